"""A small variational autoencoder of vectors: what representations of some records look like."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords, NonFinite, NonFiniteLoss

EPSILON = 1e-8
"""Added to the variance inside the logarithm."""
Output = Literal["sigmoid", "linear"]


class VAE(nn.Module):
    """Encoder dim -> 128 -> 32 -> (mu, log sigma^2), decoder latent -> 32 -> 128 -> dim, ReLU between.

    Args:
        dim: Width of the vectors.
        latent: Width of z = mu + sigma * noise.
        output: "sigmoid" squashes reconstructions into (0, 1); "linear" lets them be any number.
        widths: Of the two hidden layers of the encoder; the decoder has them in reverse.
    """

    def __init__(
        self, dim: int, latent: int = 8, output: Output = "sigmoid", widths: tuple[int, int] = (128, 32)
    ):
        super().__init__()
        if dim < 1 or latent < 1:
            raise InvalidHyperparameter(f"dim and latent must be at least 1, not {dim} and {latent}.")
        if output not in ("sigmoid", "linear"):
            raise InvalidHyperparameter(f"output must be 'sigmoid' or 'linear', not {output!r}.")
        outer, inner = widths
        self.dim = dim
        self.encoder = nn.Sequential(nn.Linear(dim, outer), nn.ReLU(), nn.Linear(outer, inner), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(inner, latent), nn.Linear(inner, latent)
        layers = [
            nn.Linear(latent, inner),
            nn.ReLU(),
            nn.Linear(inner, outer),
            nn.ReLU(),
            nn.Linear(outer, dim),
        ]
        self.decoder = nn.Sequential(*layers, nn.Sigmoid() if output == "sigmoid" else nn.Identity())

    def forward(
        self, x: Float[Tensor, "batch dim"]
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch latent"], Float[Tensor, "batch latent"]]:
        """Reconstruction, mu and sigma; the noise comes from torch's global random state, in every mode.

        Raises:
            InvalidRecords: If x is not [batch, dim].
        """
        if x.dim() != 2 or x.shape[1] != self.dim:
            raise InvalidRecords(f"The autoencoder takes [batch, {self.dim}], not {tuple(x.shape)}.")
        hidden = self.encoder(x)
        mean, sigma = self.mean(hidden), (0.5 * self.log_variance(hidden)).exp()
        return self.decoder(mean + sigma * torch.randn_like(sigma)), mean, sigma


def vae_loss(
    reconstruction: Float[Tensor, "batch dim"],
    x: Float[Tensor, "batch dim"],
    mean: Float[Tensor, "batch latent"],
    sigma: Float[Tensor, "batch latent"],
    kl_weight: float = 0.025,
) -> Float[Tensor, ""]:
    """Squared reconstruction error plus weighted KL divergence from N(0, 1), both summed and divided by batch.

    The divergence is -1/2 sum(log(sigma^2 + 1e-8) + 1 - mu^2 - sigma^2).

    Example:
        >>> one = torch.ones(2, 3)
        >>> vae_loss(one, 0 * one, 0 * one, one).item()  # N(0, 1) has no divergence from itself
        3.0
    """
    error = (reconstruction - x).square().sum()
    variance = sigma.square()
    divergence = -0.5 * ((variance + EPSILON).log() + 1 - mean.square() - variance).sum()
    return (error + kl_weight * divergence) / len(x)


def fit_vae(
    vectors: Float[Tensor, "records dim"],
    order: torch.Generator,
    latent: int = 8,
    output: Output = "sigmoid",
    epochs: int = 10,
    lr: float = 1e-3,
    batch_size: int = 32,
    kl_weight: float = 0.025,
) -> VAE:
    """A VAE of these vectors, trained by Adam, frozen and in evaluation mode.

    Args:
        vectors: To be modelled, on the device to train on.
        order: Draws the order of the batches. Initial weights and noise come from torch's global state.
        latent: Width of the latent vector.
        output: Of the decoder.
        epochs: Passes.
        lr: Learning rate.
        batch_size: Vectors per step.
        kl_weight: Of the divergence in `vae_loss`.

    Raises:
        InvalidRecords: If there are no vectors, or not one per record.
        NonFinite: If they hold NaN or Inf.
        NonFiniteLoss: If training diverges.
    """
    if vectors.dim() != 2 or vectors.numel() == 0:
        raise InvalidRecords(f"An autoencoder needs vectors [records, dim], not {tuple(vectors.shape)}.")
    if not torch.isfinite(vectors).all():
        raise NonFinite("The vectors to model hold NaN or Inf.")
    vae = VAE(vectors.shape[1], latent, output).to(vectors)
    optimizer = torch.optim.Adam(vae.parameters(), lr)
    for _ in range(epochs):
        for rows in torch.randperm(len(vectors), generator=order).split(batch_size):
            x = vectors[rows.to(vectors.device)]
            loss = vae_loss(*_against(vae, x), kl_weight)
            if not torch.isfinite(loss):
                raise NonFiniteLoss(f"The loss of the autoencoder became {loss.item()}.")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return vae.eval().requires_grad_(False)


def _against(vae: VAE, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    reconstruction, mean, sigma = vae(x)
    return reconstruction, x, mean, sigma
