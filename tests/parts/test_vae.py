from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords, NonFinite, NonFiniteLoss
from palimpsest.parts.vae import VAE, fit_vae, vae_loss


def fitted(vectors, seed=0, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return fit_vae(vectors, torch.Generator().manual_seed(seed), **settings)


def error(vae, x):
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(7)
        return float((vae(x)[0] - x).square().sum(1).mean())


@pytest.fixture(scope="module")
def plane():
    """Points near a plane in sixteen dimensions, and as many near another one."""
    generator = torch.Generator().manual_seed(0)
    coordinates, noise = (
        torch.randn(2, 256, 2, generator=generator),
        torch.randn(2, 256, 16, generator=generator),
    )
    frames = torch.randn(2, 2, 16, generator=generator)
    return coordinates @ frames + 0.05 * noise


def test_the_loss_is_the_squared_error_and_the_exact_divergence_from_a_standard_normal():
    generator = torch.Generator().manual_seed(0)
    x, rebuilt = torch.randn(2, 5, 4, generator=generator)
    mean, sigma = torch.randn(5, 3, generator=generator), torch.rand(5, 3, generator=generator) + 0.1
    divergence = kl_divergence(Normal(mean, sigma), Normal(0.0, 1.0)).sum(1)
    expected = (((rebuilt - x) ** 2).sum(1) + 0.3 * divergence).mean()
    torch.testing.assert_close(vae_loss(rebuilt, x, mean, sigma, 0.3), expected)


def test_it_learns_the_vectors_it_is_given_and_not_others(plane):
    own, other = plane
    vae = fitted(own, latent=2, output="linear", epochs=60)
    spread = float((own - own.mean(0)).square().sum(1).mean())
    assert error(vae, own) < 0.5 * spread
    assert error(vae, other) > 2 * error(vae, own)


def test_it_comes_back_frozen_in_evaluation_mode_and_still_samples(plane):
    vae = fitted(plane[0], epochs=1)
    assert not vae.training and not any(p.requires_grad for p in vae.parameters())
    first, second = (vae(plane[0])[0] for _ in range(2))
    assert not torch.equal(first, second)
    x = plane[0].clone().requires_grad_()
    vae(x)[0].sum().backward()
    assert x.grad is not None and x.grad.any()


def test_the_layers_are_those_of_the_paper():
    shapes = [tuple(p.shape) for p in VAE(256, 8).parameters() if p.dim() == 2]
    assert shapes == [(128, 256), (32, 128), (8, 32), (8, 32), (32, 8), (128, 32), (256, 128)]


def test_a_sigmoid_keeps_reconstructions_between_0_and_1_and_a_linear_output_does_not(plane):
    squashed, free = (
        fitted(plane[0], output=output, epochs=20)(plane[0])[0] for output in ("sigmoid", "linear")
    )
    assert squashed.min() >= 0 and squashed.max() <= 1
    assert free.min() < 0 and free.max() > 1


def test_the_same_seeds_give_the_same_bytes(plane):
    one, two, other = (fitted(plane[0], seed, epochs=1).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["mean.weight"], other["mean.weight"])


def test_what_cannot_be_modelled_is_refused(plane):
    own = plane[0]
    with pytest.raises(InvalidRecords, match="dim"):
        fitted(own[0])
    with pytest.raises(InvalidRecords, match="dim"):
        fitted(own[:0])
    with pytest.raises(NonFinite):
        fitted(torch.full((4, 3), torch.nan))
    with pytest.raises(NonFiniteLoss):
        fitted(torch.full((4, 3), 1e30), output="linear")
    with pytest.raises(InvalidRecords, match=r"\[batch, 16\], not \(256, 3\)"):
        fitted(own, epochs=1)(own[:, :3])
    with pytest.raises(InvalidHyperparameter, match="relu"):
        VAE(4, output="relu")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidHyperparameter, match="at least 1"):
        VAE(4, latent=0)
