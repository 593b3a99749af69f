"""Geometric disentanglement and PCGrad as rules: on bare loops over a digits MLP, and in the loop of language models."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import palimpsest as pal
from palimpsest.core.errors import InvalidHyperparameter, MissingNeed, ModelMismatch, UnknownName
from palimpsest.forget.gradient_pair import GradientPair
from palimpsest.forget.language.gu import GU
from palimpsest.forget.language.pcgrad import PCGrad
from palimpsest.forget.rules import Rule, rule_of

ADAPTIVE = {"lr": 1e-3, "weight_decay": 0.01}


@pytest.fixture(scope="module")
def data(digits):
    tensors = digits.tensors
    return tensors["input"].flatten(1), tensors["label"]


def half_trained(data: Any, seed: int) -> Any:
    """An MLP that has begun to learn the digits; a twentieth of them to forget, apart from the others."""
    x, y = data
    gone = torch.rand(len(y), generator=torch.Generator().manual_seed(seed)) < 0.05
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(x.shape[1], 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(10):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, (x[gone], y[gone]), (x[~gone], y[~gone])


@pytest.fixture(scope="module")
def trained(data):
    return half_trained(data, seed=1)


def loss_on(model: nn.Module, side: tuple[Tensor, Tensor], at: Any = slice(None)) -> Tensor:
    return F.cross_entropy(model(side[0][at]), side[1][at])


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def gradient_of(model: nn.Module, loss: Tensor) -> Tensor:
    return flat(torch.autograd.grad(loss, list(model.parameters())))


class Run:
    """Ascent on the forget records under a rule: a bare loop that keeps every gradient and every step.

    Of every optimizer step: gradients of forget and retain loss, what the optimizer was given, its second
    moment before, and how the parameters moved.
    """

    def __init__(
        self, trained: Any, rule: Rule | str, optimizer: Callable[..., Any], steps: int = 1, alpha: float = 0.0, **settings: Any
    ):  # fmt: skip
        start, gone, kept = trained
        self.model = copy.deepcopy(start)
        parameters = list(self.model.parameters())
        plain = optimizer(parameters, **settings)
        self.given: list[Tensor] = []
        self.calls = 0
        plain.register_step_pre_hook(lambda *_: self._see(parameters))
        update = rule_of(rule).begin(parameters, plain, None)
        self.rows, self.forget, self.retain, self.moved = [], [], [], []
        self.moments: list[Tensor | None] = []
        order = torch.Generator().manual_seed(0)
        for _ in range(steps):
            at = torch.randint(len(kept[0]), (64,), generator=order)
            forget, retain = -loss_on(self.model, gone), loss_on(self.model, kept, at)
            self.forget.append(gradient_of(self.model, -loss_on(self.model, gone)))
            self.retain.append(gradient_of(self.model, loss_on(self.model, kept, at)))
            states = [plain.state.get(p, {}) for p in parameters]
            known = all("exp_avg_sq" in state for state in states)
            self.moments.append(flat(state["exp_avg_sq"] for state in states) if known else None)
            before = flat(parameters).double()
            update.add(forget, retain, alpha)
            self.rows.append(update.finish(lambda at=at: float(loss_on(self.model, kept, at).detach())))
            self.moved.append(flat(parameters).double() - before)

    def _see(self, parameters: list[nn.Parameter]) -> None:
        self.calls += 1
        self.given.append(flat(parameter.grad for parameter in parameters))

    def cosine(self, step: int, of: int | None = None) -> float:
        """Of the realised step with a retain gradient; of its own step by default."""
        gradient = self.retain[step if of is None else of].double()
        return float(gradient @ self.moved[step] / (gradient.norm() * self.moved[step].norm()))


# Off, or with nothing to do


def written_out(trained: Any, optimizer: Callable[..., Any], steps: int, **settings: Any) -> nn.Module:
    """The base loss alone, as anyone would write it."""
    start, gone, _ = trained
    model = copy.deepcopy(start)
    plain = optimizer(model.parameters(), **settings)
    for _ in range(steps):
        plain.zero_grad()
        (-loss_on(model, gone)).backward()
        plain.step()
    return model


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_without_the_rule_parameters_are_those_of_the_base_loss_to_the_bit(trained, optimizer):
    base = flat(written_out(trained, optimizer, 4, lr=1e-3).parameters())
    assert torch.equal(flat(Run(trained, "sum", optimizer, 4, lr=1e-3).model.parameters()), base)
    assert not torch.equal(flat(Run(trained, "gu", optimizer, 4, lr=1e-3).model.parameters()), base)


@pytest.mark.parametrize("settings", [{}, {"block": "tensor"}, {"mode": "realised"}, {"metric": "identity"}])
def test_where_nothing_is_protected_steps_are_those_of_the_base_loss_to_the_bit(trained, settings):
    start, gone, kept = trained
    base = flat(written_out(trained, torch.optim.SGD, 3, lr=0.01).parameters())
    model = copy.deepcopy(start)
    parameters = list(model.parameters())
    update = GU(**settings).begin(parameters, torch.optim.SGD(parameters, 0.01))
    for _ in range(3):
        update.add(-loss_on(model, gone), 0.0 * loss_on(model, kept), 0.0)
        with pytest.warns(UserWarning, match="retain gradient is zero"):
            row = update.finish()
        assert row["rank"] == 0 and row["entangled"] == 0 and math.isnan(row["cosine"])
    assert torch.equal(flat(parameters), base)


class Apart(nn.Module):
    """Two weights, so that gradients can be chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
        self.b = nn.Parameter(torch.tensor([[0.3, 0.7]]))


@pytest.mark.parametrize("mode", ["gradient", "realised", "both"])
def test_an_orthogonal_forget_gradient_is_followed_and_a_parallel_one_is_not(mode):
    for parallel, expected in ((False, [1.0, -4.0, 0.5]), (True, [1.0, -2.0, 0.5])):
        model = Apart()
        parameters = list(model.parameters())
        update = GU(mode=mode, equality=True).begin(parameters, torch.optim.SGD(parameters, 1.0))
        retain = -3.0 * model.a[1] if parallel else model.b.sum()
        update.add(2.0 * model.a[1], retain, 0.0)
        update.finish()
        torch.testing.assert_close(model.a.detach(), torch.tensor(expected), atol=1e-6, rtol=0)
        torch.testing.assert_close(model.b.detach(), torch.tensor([[0.3, 0.7]]))


# What a step does


@pytest.mark.parametrize("rank", [1, 8])
def test_under_sgd_the_realised_step_is_orthogonal_to_the_protected_gradients(trained, rank):
    run = Run(trained, GU(rank=rank), torch.optim.SGD, 6, lr=0.1)
    for step in range(6):
        for of in range(max(0, step - rank + 1), step + 1):
            assert abs(run.cosine(step, of)) <= 1e-5
    assert abs(run.cosine(5, 3)) > 1e-3 or rank > 1  # with rank 1 older gradients are not protected
    raw = Run(trained, "sum", torch.optim.SGD, 6, lr=0.1)
    assert min(abs(raw.cosine(step)) for step in range(6)) > 0.05


def test_under_adam_the_gradient_is_orthogonal_in_the_metric_of_the_second_moment(trained):
    run = Run(trained, "gu", torch.optim.AdamW, 6, **ADAPTIVE)
    assert [row["adam_metric"] for row in run.rows] == [0.0, *[1.0] * 5]
    for step in range(1, 6):
        moment = run.moments[step]
        assert moment is not None
        h = (moment.double() / (1 - 0.999**step)).sqrt() + 1e-8
        given = run.given[step].double() / h.sqrt()
        for gradient in run.retain[: step + 1]:
            whitened = gradient.double() / h.sqrt()
            assert abs(whitened @ given) <= 1e-5 * whitened.norm() * given.norm()
        raw = run.given[step].double() @ run.retain[step].double()
        assert abs(raw) > 1e-4 * run.given[step].norm() * run.retain[step].norm()  # not in the identity


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_tiny_sgd_step_spares_the_retain_loss_and_still_forgets(data, seed):
    """A step of a thousandth of the parameters' length; records that conflict, or there is nothing to spare."""
    start, gone, kept = half_trained(data, seed)
    length, slope = flat(start.parameters()).norm(), gradient_of(start, loss_on(start, gone)).norm()
    at = torch.randint(len(kept[0]), (64,), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def losses(model: nn.Module) -> Tensor:
        precise = copy.deepcopy(model).double()
        return torch.stack(
            [loss_on(precise, (x.double(), y), i) for (x, y), i in ((gone, slice(None)), (kept, at))]
        )

    rises: dict[str, list[float]] = {}
    for name in ("sum", "gu"):
        run = Run((start, gone, kept), name, torch.optim.SGD, 1, lr=float(1e-3 * length / slope))
        rises[name] = (losses(run.model) - losses(start)).tolist()
    assert rises["sum"][1] > 0 and abs(rises["gu"][1]) <= 0.1 * rises["sum"][1]
    assert rises["gu"][0] >= 0.3 * rises["sum"][0] > 0


@pytest.mark.parametrize("mode", ["realised", "both"])
def test_under_adamw_corrected_steps_do_no_harm_to_any_protected_gradient(trained, mode):
    run = Run(trained, GU(rank=4, mode=mode), torch.optim.AdamW, 10, **ADAPTIVE)
    for step in range(10):
        assert max(run.cosine(step, of) for of in range(max(0, step - 3), step + 1)) <= 1e-6
    assert max(row["correction_ratio"] for row in run.rows) > 0.01
    assert all(row["corrections"] == 1 for row in run.rows)
    equal = Run(trained, GU(rank=4, mode=mode, equality=True), torch.optim.AdamW, 10, **ADAPTIVE)
    for step in range(10):
        assert max(abs(equal.cosine(step, of)) for of in range(max(0, step - 3), step + 1)) <= 1e-6


def test_under_adamw_projecting_the_gradient_alone_does_not_clear_the_step(trained):
    run = Run(trained, GU(rank=4), torch.optim.AdamW, 10, **ADAPTIVE)
    assert sum(abs(run.cosine(step)) > 1e-3 for step in range(10)) > 5


def test_the_correction_is_the_nearest_step_in_the_metric_of_adam(trained):
    """One protected gradient: the closed form d - (g.d / g M^-1 g) M^-1 g where the step does harm."""
    run = Run(trained, GU(rank=1, mode="realised"), torch.optim.AdamW, 1, lr=1e-3)
    free = Run(trained, "sum", torch.optim.AdamW, 1, lr=1e-3)
    total, g, d = run.forget[0].double(), run.retain[0].double(), free.moved[0]
    h = total.abs() + 1e-8  # after the first step the denominator is the gradient's own size
    expected = d - (g @ d) / (g @ (g / h)) * (g / h)
    assert g @ d > 0
    torch.testing.assert_close(run.moved[0], expected, atol=2e-7, rtol=1e-3)


def test_the_retain_term_of_the_objective_is_added_whole(trained):
    with_term = Run(trained, GU(rank=1), torch.optim.SGD, 1, alpha=0.7, lr=0.01)
    without = Run(trained, GU(rank=1), torch.optim.SGD, 1, alpha=0.0, lr=0.01)
    expected = without.given[0] + 0.7 * with_term.retain[0]
    torch.testing.assert_close(with_term.given[0], expected, atol=1e-6, rtol=1e-4)
    assert with_term.rows[0]["retain_loss"] == pytest.approx(0.7 * with_term.rows[0]["protected_loss"])


def test_block_by_block_every_tensor_is_orthogonal_and_more_is_removed(trained):
    run = Run(trained, GU(rank=1, block="tensor"), torch.optim.SGD, 1, lr=0.01)
    whole = Run(trained, GU(rank=1), torch.optim.SGD, 1, lr=0.01)
    sizes = [parameter.numel() for parameter in run.model.parameters()]
    products = [
        float(g @ r) for g, r in zip(run.given[0].split(sizes), run.retain[0].split(sizes), strict=True)
    ]
    scale = float(run.given[0].norm() * run.retain[0].norm())
    assert max(map(abs, products)) <= 1e-5 * scale
    global_products = [
        float(g @ r) for g, r in zip(whole.given[0].split(sizes), whole.retain[0].split(sizes), strict=True)
    ]
    assert max(map(abs, global_products)) > 1e-3 * scale
    assert run.rows[0]["entangled"] > whole.rows[0]["entangled"]
    assert run.given[0].norm() < whole.given[0].norm()


def test_the_joint_variant_keeps_what_helps_both(trained):
    """With equal gradients all of it helps both; kappa limits what is kept."""
    start, gone, kept = trained
    for kappa in (0.0, 0.5):
        model = copy.deepcopy(start)
        parameters = list(model.parameters())
        update = GU(rank=1, kappa=kappa, beta_rep=0.0).begin(parameters, torch.optim.SGD(parameters, 1.0))
        forget, retain = gradient_of(model, loss_on(model, gone)), gradient_of(model, loss_on(model, kept))
        normal = forget - (forget @ retain) / (retain @ retain) * retain
        before = flat(parameters)
        update.add(loss_on(model, gone), loss_on(model, kept), 1.0)
        update.finish()
        along = (before - flat(parameters)) - normal
        assert forget @ retain > 0
        limit = min(kappa * float(normal.norm()), float((forget - normal).norm()))
        assert float(along.norm()) == pytest.approx(limit, rel=1e-3, abs=1e-5)


# The reviewer's counts


@pytest.mark.parametrize("mode", ["gradient", "realised", "both"])
def test_every_optimizer_step_is_projected_and_reported_once(trained, mode):
    run = Run(trained, GU(rank=3, mode=mode), torch.optim.AdamW, 5, **ADAPTIVE)
    assert run.calls == len(run.rows) == 5
    assert [row["rank"] for row in run.rows] == [1, 2, 3, 3, 3]
    assert all(row["projections"] == (mode != "realised") for row in run.rows)
    assert all(row.get("corrections", 0) == (mode != "gradient") for row in run.rows)
    for step, row in enumerate(run.rows):
        true = float(run.retain[step].double() @ run.moved[step])
        scale = float(run.retain[step].norm()) * float(run.moved[step].norm())
        assert row["realised_product"] == pytest.approx(true, abs=1e-5 * scale)
        assert 0 <= row["entangled"] <= 1 and row["uncovered"] < 1e-5 and row["skipped"] == 0


def test_reported_cosine_and_entangled_share_are_those_of_the_gradients(trained):
    run = Run(trained, GU(rank=1), torch.optim.SGD, 1, lr=0.01)
    cosine = float(F.cosine_similarity(run.forget[0], run.retain[0], dim=0))
    row = run.rows[0]
    assert row["cosine"] == pytest.approx(cosine, rel=1e-4)
    assert row["entangled"] == pytest.approx(cosine**2, rel=1e-3)
    assert row["gradient_product"] == pytest.approx(float(run.forget[0] @ run.retain[0]), rel=1e-4)
    assert abs(row["projected_product"]) <= 1e-5 * float(run.forget[0].norm() * run.retain[0].norm())


@pytest.mark.parametrize("rule", [GU(), GU(mode="both"), PCGrad()])
def test_microbatches_are_projected_together_and_not_one_by_one(trained, rule):
    start, gone, kept = trained
    at = torch.arange(64)
    found: list[Tensor] = []
    for pieces in (1, 4):
        model = copy.deepcopy(start)
        parameters = list(model.parameters())
        optimizer = torch.optim.AdamW(parameters, 1e-2)
        update = rule.begin(parameters, optimizer, None)
        for _ in range(2):
            for rows in at.chunk(pieces):
                update.add(-loss_on(model, gone, rows) / pieces, loss_on(model, kept, rows) / pieces, 0.5)
            update.finish()
        found.append(flat(parameters) - flat(start.parameters()))
    torch.testing.assert_close(found[0], found[1], atol=2e-5, rtol=1e-3)


def test_clipping_keeps_the_step_orthogonal_and_short(trained):
    start, gone, kept = trained
    model = copy.deepcopy(start)
    parameters = list(model.parameters())
    update = GU().begin(parameters, torch.optim.SGD(parameters, 1.0), clip=0.01)
    retain = gradient_of(model, loss_on(model, kept))
    before = flat(parameters)
    update.add(-loss_on(model, gone), loss_on(model, kept), 0.0)
    row = update.finish()
    moved = flat(parameters) - before
    assert row["norm"] > 0.01 and float(moved.norm()) == pytest.approx(0.01, rel=1e-3)
    assert abs(retain @ moved) <= 1e-4 * retain.norm() * moved.norm()


# Steps that are too long


def test_the_filter_keeps_the_real_retain_loss_within_its_budget(trained):
    budget = 1e-3
    run = Run(trained, GU(budget=budget), torch.optim.SGD, 5, lr=3.0)
    free = Run(trained, GU(), torch.optim.SGD, 5, lr=3.0)
    start, _, kept = trained
    at = torch.randint(len(kept[0]), (64,), generator=torch.Generator().manual_seed(0))
    scales = [row["scale"] for row in run.rows]
    assert all(scale == 0 or math.log2(1 / scale) in range(7) for scale in scales) and min(scales) < 1
    one = Run(trained, GU(budget=budget), torch.optim.SGD, 1, lr=3.0).model
    unfiltered = Run(trained, GU(), torch.optim.SGD, 1, lr=3.0).model
    before = loss_on(start, kept, at)
    assert loss_on(one, kept, at) <= before + budget < loss_on(unfiltered, kept, at)
    assert "scale" not in free.rows[0]


def test_a_step_that_no_scale_makes_harmless_is_left_out(trained):
    start, gone, kept = trained
    model = copy.deepcopy(start)
    parameters = list(model.parameters())
    update = GU(budget=0.0).begin(parameters, torch.optim.SGD(parameters, 1.0))
    update.add(-loss_on(model, gone), loss_on(model, kept), 0.0)
    measured = iter(range(100))
    row = update.finish(lambda: float(next(measured)))  # a loss that rises whatever is done
    assert row["scale"] == 0 and row["realised_product"] == 0
    assert torch.equal(flat(parameters), flat(start.parameters()))


def test_a_filter_without_a_way_to_measure_is_refused(trained):
    model, gone, kept = trained
    parameters = list(model.parameters())
    update = GU(budget=1e-4).begin(parameters, torch.optim.SGD(parameters, 1.0))
    update.add(-loss_on(model, gone), loss_on(model, kept), 0.0)
    with pytest.raises(MissingNeed, match="budget"):
        update.finish()


# Gradients that are not finite


class Cliff(torch.autograd.Function):
    """A finite value with a gradient that is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.full((3,), math.inf)


@pytest.mark.parametrize("rule", [GU(rank=2), GU(rank=2, mode="both"), PCGrad()])
@pytest.mark.parametrize("side", ["forget", "retain"])
def test_a_gradient_that_is_not_finite_is_skipped_reported_and_never_remembered(rule, side):
    model = Apart()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, 1e-2)
    update = rule.begin(parameters, optimizer, 1.0)
    for bad in (False, True, False):
        before = flat(parameters)
        state = copy.deepcopy(optimizer.state_dict())
        forget, retain = (model.a**2).sum() + model.b.sum(), (model.a.sum() + model.b[0, 0]) ** 2
        broken = Cliff.apply(model.a)
        update.add(forget + (broken if bad and side == "forget" else 0), retain + (broken if bad and side == "retain" else 0), 0.0)  # fmt: skip
        if bad:
            with pytest.warns(UserWarning, match="NaN or Inf"):
                row = update.finish()
            assert row["skipped"] == 1 and row["projections"] == 0
            assert torch.equal(flat(parameters), before)
            assert all(
                torch.equal(value, state["state"][number][key])
                for number, entries in optimizer.state_dict()["state"].items()
                for key, value in entries.items()
            )
        else:
            assert update.finish()["skipped"] == 0
            assert torch.isfinite(flat(parameters)).all() and not torch.equal(flat(parameters), before)


def test_a_zero_retain_gradient_does_not_displace_an_older_one(trained):
    start, gone, kept = trained
    model = copy.deepcopy(start)
    parameters = list(model.parameters())
    update = GU(rank=2).begin(parameters, torch.optim.SGD(parameters, 0.1))
    first = gradient_of(model, loss_on(model, kept))
    for weight in (1.0, 0.0, 0.0):
        before = flat(parameters)
        update.add(-loss_on(model, gone), weight * loss_on(model, kept), 0.0)
        if weight:
            update.finish()
            continue
        with pytest.warns(UserWarning, match="retain gradient is zero"):
            assert update.finish()["rank"] == 1
        moved = (flat(parameters) - before).double()
        assert abs(first.double() @ moved) <= 1e-5 * first.norm() * moved.norm()


# PCGrad


def test_pcgrad_projects_in_conflict_only(trained):
    start, gone, kept = trained
    for sign in (1.0, -1.0):
        model = copy.deepcopy(start)
        parameters = list(model.parameters())
        forget, retain = gradient_of(model, loss_on(model, gone)), gradient_of(model, loss_on(model, kept))
        assert forget @ retain > 0
        update = PCGrad().begin(parameters, torch.optim.SGD(parameters, 0.1))
        update.add(sign * loss_on(model, gone), loss_on(model, kept), 0.0)
        row = update.finish()
        normal = forget - (forget @ retain) / (retain @ retain) * retain
        expected = forget if sign > 0 else -normal
        torch.testing.assert_close(
            flat(start.parameters()) - flat(parameters), 0.1 * expected, atol=1e-6, rtol=1e-3
        )
        assert row["projections"] == (sign < 0)


def test_per_step_gu_moves_the_retain_loss_no_more_than_pcgrad(trained):
    found = {
        name: Run(trained, rule, torch.optim.AdamW, 8, **ADAPTIVE)
        for name, rule in (("gu", GU(mode="both", equality=True)), ("pcgrad", PCGrad(metric="adam")))
    }
    for one, other in zip(found["gu"].rows, found["pcgrad"].rows, strict=True):
        assert abs(one["realised_product"]) <= abs(other["realised_product"]) + 1e-9


# Bad input


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 2.5}, "rank"),
        ({"rank": 9, "mode": "realised"}, "rank"),
        ({"mode": "stage B"}, "mode"),
        ({"metric": "fisher"}, "metric"),
        ({"block": "layer"}, "block"),
        ({"tau": -1.0}, "tau"),
        ({"kappa": math.nan}, "kappa"),
        ({"beta_rep": -1.0}, "beta_rep"),
        ({"alpha": -0.1}, "alpha"),
        ({"budget": -1e-4}, "budget"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(InvalidHyperparameter, match=words):
        rule_of({"name": "gu", **settings})


def test_rules_are_known_by_name_and_unknown_settings_are_named():
    assert rule_of("gu") == GU() and rule_of({"name": "pcgrad", "alpha": 1.0}) == PCGrad(alpha=1.0)
    assert rule_of({"name": "gu", "rank": 9}) == GU(rank=9)
    with pytest.raises(UnknownName, match="rank"):
        rule_of({"name": "gu", "rnk": 1})
    with pytest.raises(InvalidHyperparameter, match="metric"):
        rule_of({"name": "pcgrad", "metric": "none"})


@pytest.mark.parametrize("rule", [GU(), PCGrad()], ids=["gu", "pcgrad"])
def test_optimizers_that_cannot_be_projected_are_refused(rule):
    def begin(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
        rule.begin(parameters, optimizer, None)

    own = list(Apart().parameters())
    for setting in ("amsgrad", "maximize"):
        with pytest.raises(InvalidHyperparameter, match=setting):
            begin(torch.optim.AdamW(own, **{setting: True}), own)
    with pytest.raises(InvalidHyperparameter, match="1 of 2 selected parameters"):
        begin(torch.optim.SGD(own[:1], 0.1), own)
    with pytest.raises(InvalidHyperparameter, match="nothing to project"):
        begin(torch.optim.SGD(own, 0.1), [])
    half = list(Apart().half().parameters())
    with pytest.raises(InvalidHyperparameter, match="float16"):
        begin(torch.optim.SGD(half, 0.1), half)


def test_the_metric_must_be_the_optimizers():
    own = list(Apart().parameters())
    with pytest.raises(InvalidHyperparameter, match="second moment"):
        GU(metric="adam").begin(own, torch.optim.SGD(own, 0.1))
    with pytest.raises(InvalidHyperparameter, match="eps"):
        GU().begin(own, torch.optim.AdamW(own, eps=0.0))
    low = list(Apart().bfloat16().parameters())
    GU().begin(low, torch.optim.AdamW(low))
    with pytest.raises(InvalidHyperparameter, match="float32"):
        GU(mode="realised").begin(low, torch.optim.AdamW(low))


def test_a_second_moment_for_some_parameters_only_is_refused():
    model = Apart()
    own = list(model.parameters())
    optimizer = torch.optim.AdamW(own)
    model.a.sum().backward()
    optimizer.step()
    update = GU().begin(own, optimizer)
    update.add(model.a.sum(), model.b.sum(), 0.0)
    with pytest.raises(ModelMismatch, match="1 of 2 parameters"):
        update.finish()


def test_sharded_parameters_are_refused():
    """A real tensor over a mesh of one process."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        shared = [nn.Parameter(distribute_tensor(torch.ones(4), mesh))]
        with pytest.raises(ModelMismatch, match="sharded"):
            GU().begin(shared, torch.optim.SGD(shared, 0.1))
    finally:
        distributed.destroy_process_group()


def test_a_step_without_retain_loss_or_with_two_weights_is_refused():
    model = Apart()
    own = list(model.parameters())
    update = GradientPair(own, torch.optim.SGD(own, 0.1), None)
    with pytest.raises(MissingNeed, match="retain"):
        update.add(model.a.sum(), None)
    with pytest.raises(MissingNeed, match="No losses"):
        update.take()
    update.add(model.a.sum(), model.b.sum(), 1.0)
    with pytest.raises(InvalidHyperparameter, match="alpha"):
        update.add(model.a.sum(), model.b.sum(), 0.5)


# In the loop of language models


ROWS = [
    {"question": f"Where does {name} live?", "answer": f"in {place}, near the {thing}"}
    for name, place, thing in zip(
        ("Ada", "Ben", "Cleo", "Dora", "Emil", "Fay"), ("Oslo", "Bern", "Turin", "Lyon", "Graz", "Riga"),
        ("mill", "harbour", "station", "park", "bridge", "tower"), strict=True,
    )
]  # fmt: skip


@pytest.fixture(scope="module")
def speaker():
    """A tiny Llama, and a request in which one record is retained, so that every retain batch is known."""
    from palimpsest.core.records import Records
    from palimpsest.core.split import ForgetSplit
    from palimpsest.models.small_llama import small_llama
    from palimpsest.parts.byte_pairs import byte_pair_tokenizer
    from palimpsest.tasks.language import Language

    texts = [row["question"] + row["answer"] for row in ROWS]
    task = Language(byte_pair_tokenizer([*texts, "Question: Answer:"], 300))
    model = small_llama(len(task.encoder), width=16, layers=1, heads=2)
    records = Records(list(ROWS))
    return model, ForgetSplit(records.select(range(5)), records.select([5])), task


def one_step(speaker: Any, objective: str, rule: Any, lr: float = 0.3, **settings: Any) -> tuple[Any, Tensor]:
    """History of one step of SGD, and how the parameters moved."""
    from palimpsest.core.unlearner import UNLEARNERS
    from palimpsest.forget.gradient import HISTORY_ATTRIBUTE

    model, split, task = speaker
    basics = {
        "optimizer": "sgd",
        "weight_decay": 0.0,
        "warmup": 0,
        "clip": None,
        "max_steps": 1,
        "batch_size": 8,
    }
    method = UNLEARNERS.get(objective)(rule=rule, lr=lr, **{**basics, **settings})
    unlearned = method.unlearn(model, split, task, pal.Runtime(device="cpu"))
    moved = flat(unlearned.parameters()) - flat(model.parameters())
    return getattr(unlearned, HISTORY_ATTRIBUTE), moved


def protected_gradient(speaker: Any) -> Tensor:
    from palimpsest.parts.tokens import token_mean

    model, split, task = speaker
    batch = split.retain.batch([0], task.collate)
    return gradient_of(model, token_mean(task.logits(model, batch), batch["labels"]))


@pytest.mark.parametrize(("objective", "settings"), [
    ("grad-ascent", {}), ("npo", {"retain": "none"}), ("grad-diff", {"alpha": 0.0}),
])  # fmt: skip
def test_any_objective_protects_the_retain_loss_even_one_without_a_retain_term(speaker, objective, settings):
    g = protected_gradient(speaker)
    history, moved = one_step(speaker, objective, "gu", **settings)
    _, raw = one_step(speaker, objective, "sum", **settings)
    assert abs(g @ moved) <= 1e-5 * g.norm() * moved.norm() and moved.norm() > 1e-3
    assert abs(g @ raw) > 1e-2 * g.norm() * raw.norm()
    assert history[0]["retain_loss"] == 0 < history[0]["protected_loss"]


def test_a_rule_may_add_the_retain_term_that_the_objective_lacks(speaker):
    g = protected_gradient(speaker)
    _, protected = one_step(speaker, "grad-ascent", "gu")
    for name in ("gu", "pcgrad"):
        history, moved = one_step(speaker, "grad-ascent", {"name": name, "alpha": 0.5})
        assert history[0]["retain_loss"] == pytest.approx(0.5 * history[0]["protected_loss"])
        if name == "gu":
            torch.testing.assert_close(moved, protected - 0.3 * 0.5 * g, atol=1e-5, rtol=1e-3)


def test_the_objectives_own_retain_term_is_the_one_that_is_protected(speaker):
    g = protected_gradient(speaker)
    _, moved = one_step(speaker, "grad-diff", "gu", alpha=2.0)
    _, protected = one_step(speaker, "grad-diff", "gu", alpha=0.0)
    torch.testing.assert_close(moved, protected - 0.3 * 2.0 * g, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("scope", ["lora", "saliency", {"name": "blocks", "layers": [0]}], ids=str)
def test_any_scope_composes_with_it(speaker, scope):
    history, moved = one_step(speaker, "grad-ascent", "gu", scope=scope, max_steps=3, lr=1.0)
    assert moved.norm() > 1e-4 and len(history) == 3
    assert all(abs(row["realised_cosine"]) <= 1e-4 and row["projections"] == 1 for row in history)
    if scope == "saliency":
        assert (moved == 0).float().mean() >= 0.4


def test_the_filter_looks_at_the_real_loss_of_the_retained_records(speaker):
    history, _ = one_step(speaker, "grad-ascent", {"name": "gu", "budget": 1e-4}, lr=20.0)
    free, _ = one_step(speaker, "grad-ascent", "gu", lr=20.0)
    assert history[0]["scale"] < 1 and "scale" not in free[0]


def test_without_retained_records_or_a_weight_the_run_does_not_begin(speaker):
    from palimpsest.core.split import ForgetSplit

    model, split, task = speaker
    with pytest.raises(MissingNeed, match="retain"):
        one_step((model, ForgetSplit(split.forget), task), "grad-ascent", "gu")
    with pytest.raises(InvalidHyperparameter, match="gamma"):
        one_step(speaker, "npo", "gu", gamma=0.0)
