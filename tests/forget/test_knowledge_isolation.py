"""Knowledge isolation: facts are unlearned where tracing finds them, with a retain weight that follows the damage."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from tests.forget.measuring import changed, fingerprint
from tests.language_world import TrainedWorld, trained_world
from torch import nn

import palimpsest as pal
from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords, MissingNeed, ModelMismatch
from palimpsest.core.records import Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.split import ForgetSplit
from palimpsest.forget.gradient import HISTORY_ATTRIBUTE, REPORT_ATTRIBUTE, GradientUnlearner
from palimpsest.forget.language.knowledge_isolation import FORGET, IsolationReport, KnowledgeIsolation
from palimpsest.forget.objective import Context, Step
from palimpsest.forget.traced import TRACING_ATTRIBUTE
from palimpsest.models.small_llama import small_llama
from palimpsest.parts.tokens import token_mean
from palimpsest.tasks.tracing import Tracing

RUNTIME = Runtime(device="cpu")
FIRST: dict[str, Any] = {"name": "blocks", "layers": [0], "kind": "mlp"}
LEARN: dict[str, Any] = {
    "lr": 3e-3, "epochs": 4, "batch_size": 16, "accumulate": 1, "ratio": 2.0, "schedule": "constant", "scope": FIRST,
}  # fmt: skip
STEP: dict[str, Any] = {**LEARN, "max_steps": 1, "chance": None}


@pytest.fixture(scope="module")
def world() -> TrainedWorld:
    return trained_world("tiny")


@pytest.fixture(scope="module")
def adaptive(world: TrainedWorld) -> Any:
    return unlearned(world, **LEARN)


@pytest.fixture(scope="module")
def fixed(world: TrainedWorld) -> Any:
    return unlearned(world, **LEARN, high=1.2)


def unlearned(world: TrainedWorld, **settings: Any) -> Any:
    return pal.forget(
        world.original, world.split, "knowledge-isolation", world.task, runtime=RUNTIME, **settings
    )


def report(model: nn.Module) -> IsolationReport:
    return getattr(model, REPORT_ATTRIBUTE)


def measured(world: TrainedWorld, model: nn.Module, records: Records | None) -> tuple[float, float]:
    """Share of plain questions whose every answer token is the likeliest, and mean loss of the answers."""
    assert records is not None
    plain = records.select(np.flatnonzero(records.column("form") == "qa"))
    questions, answers = [item["question"] for item in plain], [[item["answer"]] for item in plain]
    scores = world.task.score(model, questions, answers)
    whole = [bool((each.right | ~each.mask).all()) for each in scores]
    return float(np.mean(whole)), float(torch.cat([each.mean for each in scores]).mean())


# The card's claims, in short


def test_only_parameters_of_the_chosen_parts_change(world: TrainedWorld, adaptive: Any):
    moved = {name for name, mask in changed(world.original, adaptive).items() if mask.any()}
    assert moved == {f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    assert all(parameter.requires_grad for parameter in adaptive.parameters())


def test_forgotten_answers_go_and_most_retained_ones_stay(world: TrainedWorld):
    model = unlearned(world, **{**LEARN, "lr": 2e-3, "epochs": 6, "ratio": None, "cap": 2.5})
    assert measured(world, world.original, world.split.forget)[0] >= 0.9
    assert measured(world, model, world.split.forget)[0] <= 0.15
    assert measured(world, model, world.split.retain)[0] >= 0.7
    assert report(model).stopped


def test_the_weight_that_adapts_keeps_the_retain_loss_lower_than_a_fixed_one(
    world: TrainedWorld, adaptive: Any, fixed: Any
):
    ours, theirs = (measured(world, model, world.split.retain)[1] for model in (adaptive, fixed))
    assert ours <= 0.95 * theirs
    assert set(report(fixed).multipliers) == {1.2}
    found = report(adaptive).multipliers
    per_epoch = len(found) // 4
    assert set(found[:per_epoch]) == {1.2}, "during the first epoch the baseline is collected"
    assert 1.2 < max(found) <= 2.3 and len(set(found)) > 2


# Where it acts


def test_tracing_finds_the_layers_and_is_told_with_the_model(world: TrainedWorld):
    scope = {"name": "traced", "facts": 2, "samples": 2, "window": 1}
    model = unlearned(world, **{**STEP, "scope": scope})
    found = getattr(model, TRACING_ATTRIBUTE)
    assert isinstance(found, Tracing) and len(found.ids) == 2 and len(found.layers) == 1
    moved = {name for name, mask in changed(world.original, model).items() if mask.any()}
    assert moved and all(name.startswith(f"model.layers.{found.layers[0]}.mlp.") for name in moved)


@pytest.mark.parametrize(("kind", "parts"), [("self_attn", {"self_attn"}), ("all", {"mlp", "self_attn"})])
def test_attentions_or_both_move_if_asked_for_but_never_norms(
    world: TrainedWorld, kind: str, parts: set[str]
):
    scope = {"name": "traced", "facts": 1, "samples": 1, "window": 1, "count": 2, "kind": kind}
    model = unlearned(world, **{**STEP, "scope": scope})
    moved = {name.split(".")[3] for name, mask in changed(world.original, model).items() if mask.any()}
    assert moved == parts


def test_the_scope_found_by_tracing_serves_other_methods_too(world: TrainedWorld):
    scope = {"name": "traced", "facts": 1, "samples": 1, "window": 1}
    model = pal.forget(
        world.original, world.split, "npo", world.task, runtime=RUNTIME, scope=scope, max_steps=1, lr=1e-3
    )
    layer = getattr(model, TRACING_ATTRIBUTE).layers[0]
    moved = {name for name, mask in changed(world.original, model).items() if mask.any()}
    assert moved and all(name.startswith(f"model.layers.{layer}.mlp.") for name in moved)


# Mixed batches


def begun(world: TrainedWorld, **settings: Any) -> tuple[Any, Context, Records]:
    method = KnowledgeIsolation(**{**LEARN, "ratio": None, **settings})
    mixed = method.rows(world.original, world.split, world.task, RUNTIME)
    split = ForgetSplit(mixed, world.split.retain)
    context = Context(world.original, split, world.task, RUNTIME, 10, 4)
    return method.begin(context), context, mixed


def step_of(world: TrainedWorld, records: Records, epoch: int = 0) -> Step:
    return Step(records.batch(np.arange(len(records)), world.task.collate), None, epoch, 0, {})


def test_batches_are_drawn_from_forget_and_retained_records_together(world: TrainedWorld):
    _, _, mixed = begun(world)
    assert world.split.retain is not None
    gone = [item[FORGET] for item in mixed]
    assert len(mixed) == len(world.split.forget) + len(world.split.retain) and sum(gone) == len(
        world.split.forget
    )
    assert [name.removeprefix("mixed/") for name in mixed.ids] == [
        *world.split.forget.ids,
        *world.split.retain.ids,
    ]
    _, _, even = begun(world, ratio=1.0)
    assert len(even) == 2 * len(world.split.forget)


def test_a_step_is_the_joint_loss_of_the_two_sides_of_its_batch(world: TrainedWorld):
    """Against means over the two kinds of rows, each computed alone."""
    losses_of, _, mixed = begun(world)
    rows = mixed.select([0, 1, 2, len(mixed) - 2, len(mixed) - 1])
    with torch.no_grad():
        found = losses_of(step_of(world, rows))
        batches = [
            rows.select(at).batch(np.arange(len(at)), world.task.collate) for at in ([0, 1, 2], [3, 4])
        ]
        forget, retain = (
            token_mean(world.task.logits(world.original, each), each["labels"]) for each in batches
        )
    assert found.forget.value.item() == pytest.approx(-forget.item(), rel=1e-4)
    assert found.retain.value.item() == pytest.approx(retain.item(), rel=1e-4)
    assert found.alpha == 1.2 and found.gamma == 1


def test_a_side_without_rows_has_no_part_in_the_loss(world: TrainedWorld):
    losses_of, context, mixed = begun(world)
    only_forget = losses_of(step_of(world, mixed.select([0, 1])))
    assert only_forget.retain is None and context.report.multipliers == []  # type: ignore[union-attr]
    only_retain = losses_of(step_of(world, mixed.select([len(mixed) - 1])))
    assert only_retain.forget.value.requires_grad and only_retain.forget.value.item() == 0
    assert only_retain.alpha == 1.2


def test_later_epochs_weigh_what_exceeds_the_baseline(world: TrainedWorld):
    losses_of, _, mixed = begun(world)
    easy, hard = mixed.select([len(mixed) - 1]), mixed.select([len(mixed) - 1])
    first = losses_of(step_of(world, easy))
    reference = first.retain.value.item()
    batch = hard.batch(np.arange(1), world.task.collate)
    other = int(batch["labels"][batch["labels"] >= 0][0]) + 1
    batch["labels"][batch["labels"] >= 0] = other % len(world.task.encoder)
    later = losses_of(Step(batch, None, 1, 5, {}))
    excess = later.retain.value.item() - reference
    assert excess > 0.9 and later.alpha == 2.3
    assert losses_of(step_of(world, easy, 1)).alpha == 1.2


def test_a_capped_forget_term_pushes_no_further(world: TrainedWorld):
    losses_of, _, mixed = begun(world, cap=1e-9)
    found = losses_of(step_of(world, mixed.select([0, len(mixed) - 1])))
    assert found.forget.value.item() == pytest.approx(-1e-9)
    found.forget.value.backward()
    gradients = [each.grad for each in world.original.parameters() if each.grad is not None]
    assert all(not gradient.any() for gradient in gradients)
    world.original.zero_grad(set_to_none=True)


# When it ends


def test_it_stops_once_forgotten_answers_are_at_chance_and_says_so(world: TrainedWorld, caplog):
    with caplog.at_level(logging.INFO, "palimpsest"):
        model = unlearned(world, **{**LEARN, "chance": 0.99, "epochs": 3, "ratio": 0.5})
    told = report(model)
    assert told.epochs == 1 and len(told.accuracy) == 1 and told.accuracy[0] <= 0.99
    assert "After epoch 1 of 3" in told.stopped and told.stopped in caplog.text
    assert {row["epoch"] for row in getattr(model, HISTORY_ATTRIBUTE)} == {0}


def test_without_a_chance_level_it_runs_to_the_end(world: TrainedWorld):
    told = report(unlearned(world, **{**LEARN, "chance": None, "epochs": 2, "ratio": 0.5, "batch_size": 84}))
    assert told.epochs == told.kept == 2 and not told.stopped and told.accuracy == []


def test_the_best_joint_loss_is_kept_if_asked_for(world: TrainedWorld):
    """A step that is far too long makes the second epoch worse than the first."""
    common = {
        **LEARN,
        "chance": None,
        "ratio": 0.5,
        "batch_size": 84,
        "optimizer": "sgd",
        "clip": 1.0,
        "cap": 1.0,
        "lr": 2.0,
    }
    once = unlearned(world, **{**common, "epochs": 1})
    best = unlearned(world, **{**common, "epochs": 3, "keep": "best"})
    told = report(best)
    assert told.kept == 1 + int(np.argmin(told.joint)) and len(told.joint) == 3
    last = unlearned(world, **{**common, "epochs": 3})
    assert (fingerprint(best) == fingerprint(last)) == (told.kept == 3)
    if told.kept == 1:
        assert fingerprint(best) == fingerprint(once)


# As a method


def test_composed_and_named_are_the_same(world: TrainedWorld):
    named = unlearned(world, **STEP)
    settings = {key: value for key, value in STEP.items() if key not in ("ratio", "chance")}
    objective = KnowledgeIsolation(ratio=2.0, chance=None)
    composed = GradientUnlearner(objective=objective, warmup=0.0, weight_decay=0.0, **settings)
    assert fingerprint(composed.unlearn(world.original, world.split, world.task, RUNTIME)) == fingerprint(
        named
    )


# Bad input


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"scope": {"name": "blocks", "layers": [2], "kind": "mlp"}}, "not 2"),
        ({"scope": {"name": "blocks", "layers": [0], "kind": "head"}}, "head"),
        ({"scope": {"name": "blocks", "layers": []}}, "no"),
        ({"scope": {"name": "traced", "kind": "head"}}, "head"),
        ({"scope": {"name": "traced", "samples": 0}}, "samples"),
        ({"scope": {"name": "traced", "count": 3}}, "count"),
        ({"baseline": "median"}, "median"),
        ({"high": 1.0}, "high"),
        ({"keep": "first"}, "first"),
        ({"ratio": 0.0}, "ratio"),
        ({"cap": -1.0}, "cap"),
        ({"chance": 2.0}, "chance"),
    ],
)
def test_settings_out_of_range_are_refused(world: TrainedWorld, settings: Any, named: str):
    with pytest.raises(InvalidHyperparameter, match=named):
        unlearned(world, **{**STEP, **settings})


def test_retained_records_are_needed(world: TrainedWorld):
    with pytest.raises(MissingNeed, match="retain"):
        pal.forget(world.original, ForgetSplit(world.split.forget), "knowledge-isolation", world.task, **STEP)


def test_a_subject_that_its_question_does_not_name_is_an_error_with_the_prompt(world: TrainedWorld):
    rows = [{"question": "Where does Ada live?", "answer": "Ostby", "subject": "Bea"}]
    split = ForgetSplit(Records(rows, ids=["ada"]), world.split.retain)
    with pytest.raises(
        InvalidRecords, match="'Bea' of record 'ada' does not occur in its prompt 'Question: Where"
    ):
        pal.forget(world.original, split, "knowledge-isolation", world.task, max_steps=1)


def test_a_model_that_knows_none_of_the_facts_is_an_error(world: TrainedWorld):
    fresh = small_llama(len(world.task.encoder), width=16, layers=2, heads=2)
    with pytest.raises(InvalidRecords, match="begins none of"):
        pal.forget(fresh, world.split, "knowledge-isolation", world.task, max_steps=1)


def test_blocks_of_unknown_naming_are_refused(world: TrainedWorld):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(len(world.task.encoder), 4)
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
            self.head = nn.Linear(4, len(world.task.encoder))

        def forward(
            self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
        ) -> torch.Tensor:
            h = self.embed(input_ids)
            for block in self.blocks:
                h = block(h)
            return self.head(h)

    with pytest.raises(ModelMismatch, match="has no mlp"):
        pal.forget(Odd(), world.split, "knowledge-isolation", world.task, max_steps=1)
