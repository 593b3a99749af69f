"""The losses, refusals, steering and vectors of the baselines, each against a value found in another way."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from tests.forget.every_language_method import forget_quickly, little_world, untrained
from tests.forget.measuring import changed, fingerprint
from torch.nn import functional as F

from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords, ModelMismatch, UnknownName
from palimpsest.core.records import Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.split import ForgetSplit
from palimpsest.core.unlearner import UNLEARNERS
from palimpsest.forget._apply import build_unlearner
from palimpsest.forget.gradient import HISTORY_ATTRIBUTE, Training
from palimpsest.forget.language.alternates import ALTERNATE, drawn
from palimpsest.forget.language.altpo import AltPO
from palimpsest.forget.language.idk_nll import IdkNLL
from palimpsest.forget.language.pdu import PDU
from palimpsest.forget.language.rmu import RMU, block_states
from palimpsest.forget.language.simnpo import SimNPO
from palimpsest.forget.language.whp import generic_labels, translate
from palimpsest.forget.objective import Context, Step
from palimpsest.models import build_model
from palimpsest.parts.refusals import REFUSALS, refusals_of
from palimpsest.parts.tokens import IGNORED, sequence_losses, token_counts


def context_of(objective, model=None, split=None, epochs=2):
    """What the loop would hand to an objective, on a copy of a model."""
    request, task = little_world()
    runtime = Runtime(device="cpu")
    own = copy.deepcopy(untrained("llama") if model is None else model)
    reference = copy.deepcopy(own) if objective.needs_original else None
    request = split or request
    request = replace(request, forget=objective.rows(own, request, task, runtime))
    return Context(own, request, task, runtime, 4, epochs, reference)


def step_of(context, objective, forget=(0, 1), retain=(0, 1), epoch=0, number=0):
    """A step on some records."""
    items = [context.split.forget[at] for at in forget]
    gone = objective.collate(context, items, epoch)
    kept = context.task.collate([context.split.retain[at] for at in retain])
    shares = {(side, per): 1.0 for side in ("forget", "retain") for per in ("row", "token")}
    return Step(gone, kept, epoch, number, shares)


def answer_loss(model, task, question, answer):
    """Summed loss and number of tokens of an answer, by a plain pass."""
    ids, start = task.encode(question, answer)
    logits = model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1]
    return F.cross_entropy(logits, torch.tensor(ids[start:]), reduction="sum"), len(ids) - start


class Passes:
    """Counts forward passes of a model."""

    def __init__(self, model):
        self.count = 0
        self.handle = model.register_forward_hook(self.add)

    def add(self, *_):
        self.count += 1


def test_simnpo_asks_the_model_once_per_batch_and_no_other():
    objective = SimNPO(retain="nll")
    context = context_of(objective)
    passes = Passes(context.model)
    losses_of = objective.begin(context)
    assert context.original is None and passes.count == 0
    losses_of(step_of(context, objective))
    assert passes.count == 2  # forget and retain


def test_simnpo_is_the_log_sigmoid_of_the_mean_loss_of_every_answer():
    objective = SimNPO(beta=2.0, delta=0.5, retain="none")
    context = context_of(objective)
    found = objective.begin(context)(step_of(context, objective)).forget.value
    gains = []
    for at in (0, 1):
        item = context.split.forget[at]
        total, count = answer_loss(context.model, context.task, item["question"], item["answer"])
        gains.append(total / count - 0.5)
    expected = -(2 / 2.0) * torch.stack([F.logsigmoid(2.0 * gain) for gain in gains]).mean()
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["npo", "idk-dpo", "altpo"])
def test_preferences_begin_at_two_over_beta_times_log_two(name):
    request, task = little_world()
    unlearned = forget_quickly(untrained("llama"), request, name, task, beta=0.2)
    assert getattr(unlearned, HISTORY_ATTRIBUTE)[0]["forget_loss"] == pytest.approx(
        10 * math.log(2), rel=1e-5
    )


def test_npo_with_a_tiny_beta_points_where_ascent_on_summed_losses_does():
    objective = build_unlearner("npo", {"beta": 1e-4, "retain": "none"})
    context = context_of(objective)
    step = step_of(context, objective)
    loss = objective.begin(context)(step).forget.value
    parameters = list(context.model.parameters())
    ours = torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])
    logits = context.task.logits(context.model, step.forget)
    ascent = -sequence_losses(logits, step.forget["labels"]).sum()
    theirs = torch.cat([part.flatten() for part in torch.autograd.grad(ascent, parameters)])
    assert F.cosine_similarity(ours, theirs, dim=0) >= 0.99


def test_refusals_are_drawn_anew_in_every_epoch_and_alike_for_a_seed():
    objective = IdkNLL()
    context = context_of(objective)
    items = list(context.split.forget)
    answers = []
    for epoch in (0, 1, 1):
        batch = objective.collate(context, items, epoch)
        answers.append(batch["answer"])
        ids, start = context.task.encode(items[0]["question"], batch["answer"][0])
        assert batch["input_ids"][0, : len(ids)].tolist() == ids
        assert int(token_counts(batch["labels"])[0]) == len(ids) - start
    assert answers[0] != answers[1] == answers[2]
    assert {answer for epoch in answers for answer in epoch} <= set(REFUSALS)
    other = Runtime(seed=5)
    assert [drawn(REFUSALS, other, item["id"], 1) for item in items] != answers[1]


def test_a_joint_mean_counts_refusals_and_retained_answers_as_one_batch():
    objective = IdkNLL(reduction="joint", refusals=["No.", "I really cannot say anything about that."])
    context = context_of(objective)
    step = step_of(context, objective)
    losses = objective.begin(context)(step)
    total = losses.gamma * losses.forget.value + losses.alpha * losses.retain.value
    logits = [context.task.logits(context.model, batch) for batch in (step.forget, step.retain)]
    sums = sum(
        sequence_losses(x, b["labels"]).sum() for x, b in zip(logits, (step.forget, step.retain), strict=True)
    )
    count = sum(int(token_counts(batch["labels"]).sum()) for batch in (step.forget, step.retain))
    assert torch.allclose(total, sums / count, atol=1e-5)
    with pytest.raises(InvalidHyperparameter, match="joint"):
        IdkNLL(reduction="joint", alpha=2.0)


def test_refusals_come_from_a_file_a_list_or_the_library(tmp_path):
    (tmp_path / "lines.txt").write_text("Ask me another.\n\n  No comment. \n")
    assert refusals_of(str(tmp_path / "lines.txt")) == ("Ask me another.", "No comment.")
    assert refusals_of(["Pass."]) == ("Pass.",)
    assert refusals_of() == REFUSALS and len(set(REFUSALS)) >= 40
    for empty in ([], str(tmp_path / "absent.txt")):
        with pytest.raises(InvalidRecords):
            IdkNLL(refusals=empty)


def test_every_own_refusal_is_one_to_the_judge_of_answers():
    from palimpsest.audit.answer_quality import is_refusal

    assert [line for line in REFUSALS if not is_refusal(line)] == []


@pytest.mark.parametrize("name", ["idk-nll", "idk-dpo", "altpo", "in-context"])
def test_running_text_alone_has_no_question_to_answer_otherwise(name):
    request, task = little_world()
    texts = Records([{"text": "Once there was a town.", "subject": "town"}])
    with pytest.raises(InvalidRecords, match="question"):
        forget_quickly(untrained("llama"), ForgetSplit(texts, request.retain), name, task)


def test_every_alternate_is_a_row_of_its_own_and_none_is_the_truth():
    objective = AltPO(alternates="given", count=3)
    context = context_of(objective)
    by_question = {}
    for item in context.split.forget:
        by_question.setdefault(item["question"], []).append(item[ALTERNATE])
        assert item[ALTERNATE] != item["answer"]
    assert all(len(found) == len(set(found)) == 3 for found in by_question.values())
    asked = [item for item in little_world()[0].forget if item.get("question")]
    assert set(by_question) == {item["question"] for item in asked}


def test_alternates_that_the_model_writes_are_cut_distinct_and_not_the_truth():
    request, task = little_world()
    objective = AltPO(count=3, max_new_tokens=6, instruction="{question}")
    runtime = Runtime(device="cpu")
    rows = [objective.rows(untrained("llama"), request, task, runtime) for _ in range(2)]
    assert [item[ALTERNATE] for item in rows[0]] == [item[ALTERNATE] for item in rows[1]]
    for item in rows[0]:
        assert item[ALTERNATE].strip() and item[ALTERNATE] != item["answer"]
        assert "Question:" not in item[ALTERNATE] and "Q:" not in item[ALTERNATE]


def test_no_alternates_at_all_is_an_error_and_some_missing_a_warning():
    request, task = little_world()
    bare = {"question": "Who?", "answer": "Ann."}
    full = {"question": "Where?", "answer": "Here.", "perturbed_answer": ["There.", "here"]}
    model = untrained("llama")
    with pytest.raises(InvalidRecords, match="perturbed_answer"):
        forget_quickly(model, ForgetSplit(Records([bare]), request.retain), "altpo", task)
    objective = AltPO(alternates="given")
    with pytest.warns(UserWarning, match="1 of 2"):
        rows = objective.rows(model, ForgetSplit(Records([bare, full])), task, Runtime())
    assert [item[ALTERNATE] for item in rows] == ["There."]


def deep_llama(layers=4):
    return build_model("small_llama", (), len(little_world()[1].encoder), width=16, layers=layers, heads=2)


def test_rmu_moves_three_down_projections_and_nothing_else():
    (request, task), model = little_world(), deep_llama(5)
    unlearned = forget_quickly(model, request, "rmu", task, layer=3)
    moved = {name for name, mask in changed(model, unlearned).items() if mask.any()}
    assert moved == {f"model.layers.{number}.mlp.down_proj.weight" for number in (1, 2, 3)}


def test_rmu_steers_every_topic_to_one_positive_vector_of_the_given_length():
    request, _ = little_world()
    named = ForgetSplit(
        request.forget.with_column("topic", ["a", "b"] * (len(request.forget) // 2)), request.retain
    )
    lengths = {"a": 2.0, "b": 5.0}
    objective = RMU(layer=1, steering=lengths, topic="topic")
    context = context_of(objective, split=named)
    targets = objective.targets(context, 1)
    first, again = (targets(step_of(context, objective, forget=(0, 1, 2)).forget)[:, 0] for _ in range(2))
    assert torch.equal(first, again) and bool((first >= 0).all())
    assert first.norm(dim=-1).tolist() == pytest.approx([2.0, 5.0, 2.0], rel=1e-5)
    assert torch.equal(first[0], first[2]) and not torch.allclose(first[0] / 2, first[1] / 5)
    with pytest.raises(UnknownName, match="topic"):
        RMU(layer=1, steering={"a": 2.0, "c": 1.0}, topic="topic").targets(context, 1)


def test_rmu_with_forget_weight_zero_moves_no_parameter():
    (request, task), model = little_world(), deep_llama()
    unlearned = forget_quickly(model, request, "rmu", task, layer=2, gamma=0.0, weight_decay=0.0, max_steps=3)
    assert fingerprint(unlearned) == fingerprint(model)


def test_rmu_draws_forget_states_to_its_vector_and_holds_the_retained_ones():
    (request, task), model = little_world(), deep_llama()
    settings = {"layer": 2, "steering": 3.0, "relative": True, "alpha": 1.0, "lr": 3e-2, "weight_decay": 0.0}
    unlearned = forget_quickly(
        model, request, "rmu", task, **{**settings, "epochs": 40, "max_steps": None, "batch_size": 8}
    )
    history = getattr(unlearned, HISTORY_ATTRIBUTE)
    assert history[-1]["forget_loss"] <= 0.5 * history[0]["forget_loss"]

    def moved(records):
        batch = task.collate(list(records))
        mask = batch["attention_mask"].bool()
        with torch.no_grad():
            states = [block_states(each, task, batch, 2)[mask] for each in (model, unlearned)]
        return float((states[1] - states[0]).norm(dim=-1).mean())

    assert moved(request.retain) < moved(request.forget)


@pytest.mark.parametrize("layer", [-1, 9])
def test_a_block_that_the_model_has_not_is_refused(layer):
    request, task = little_world()
    with pytest.raises(InvalidHyperparameter, match="blocks"):
        forget_quickly(untrained("llama"), request, "rmu", task, layer=layer)


def test_a_scope_that_the_steered_block_does_not_depend_on_is_refused():
    request, task = little_world()
    late = {"name": "blocks", "layers": [1], "kind": "mlp"}
    with pytest.raises(InvalidHyperparameter, match="scope"):
        forget_quickly(untrained("llama"), request, "rmu", task, layer=0, scope=late)


def test_the_dual_variable_climbs_by_the_excess_of_the_retain_loss_after_the_warm_up():
    objective = PDU(bound=1.0, multiplier=2.0, dual_step=0.5, dual_warmup=1)
    context = context_of(objective)
    losses_of = objective.begin(context)
    seen, multipliers = [], []
    for number, epoch in enumerate([0, 0, 1, 1, 2]):
        losses = losses_of(step_of(context, objective, epoch=epoch, number=number))
        seen.append(float(losses.retain.value.detach()) + 1.0)
        multipliers.append(losses.alpha)
    expected = [2.0, 2.0, 2.0]  # the steps of the first epoch do not move it
    for loss in seen[2:4]:
        expected.append(max(0.0, expected[-1] + 0.5 * (loss - 1.0)))
    assert multipliers == pytest.approx(expected, rel=1e-5)


def test_the_dual_variable_may_move_once_per_epoch_by_the_mean():
    objective = PDU(bound=1.0, dual="epoch", dual_warmup=0)
    context = context_of(objective)
    losses_of = objective.begin(context)
    steps = [losses_of(step_of(context, objective, epoch=at // 2, number=at)) for at in range(3)]
    mean = (sum(float(each.retain.value.detach()) for each in steps[:2])) / 2
    assert [losses.alpha for losses in steps] == pytest.approx([1.0, 1.0, 1.0 + mean], rel=1e-5)


def test_pdu_needs_one_bound():
    for settings in ({}, {"bound": 1.0, "slack": 1.1}):
        with pytest.raises(InvalidHyperparameter, match="bound"):
            build_unlearner("pdu", settings)


def test_ce_u_leaves_alone_answers_as_short_as_what_it_skips():
    request, task = little_world()
    with pytest.raises(InvalidRecords, match="skip"):
        forget_quickly(untrained("llama"), request, "ce-u", task, skip=500)


def test_a_task_vector_is_the_way_of_further_training_walked_backwards():
    (request, task), model = little_world(), untrained("llama")
    moved = {
        scale: forget_quickly(model, request, "task-vector", task, scale=scale) for scale in (0.0, 1.0, 3.0)
    }
    assert fingerprint(moved[0.0]) == fingerprint(model)
    for start, one, three in zip(
        model.parameters(), moved[1.0].parameters(), moved[3.0].parameters(), strict=True
    ):
        assert torch.allclose(three - start, 3 * (one - start), atol=1e-5)

    def loss(unlearned):
        batch = task.collate(list(request.forget))
        with torch.no_grad():
            return float(task.loss_per_example(unlearned, batch).mean())

    assert loss(moved[0.0]) < loss(moved[1.0]) < loss(moved[3.0])


def test_a_task_vector_of_other_weights_is_refused():
    request, task = little_world()
    with pytest.raises(ModelMismatch, match="names"):
        forget_quickly(
            untrained("llama"), request, "task-vector", task, scope={"name": "lora", "merge": False}
        )


def test_whp_holds_back_what_further_training_raises_and_nothing_at_scale_zero():
    (request, task), model = little_world(), untrained("llama")
    batch = task.collate(list(request.forget))
    unscaled = forget_quickly(model, request, "whp", task, scale=0.0)
    guarded = forget_quickly(model, request, "whp", task, scale=2.0)
    with torch.no_grad():
        base, still = (task.logits(each, batch) for each in (model, unscaled))
        raised = (task.logits(guarded.reinforced, batch) - base).clamp(min=0)
        combined = task.logits(guarded, batch)
    assert torch.equal(still, base)
    real = batch["attention_mask"].bool()
    assert torch.allclose(combined[real], (base - 2 * raised)[real], atol=1e-5) and raised[real].max() > 0
    assert fingerprint(guarded.plain) == fingerprint(model)


def test_generic_labels_stand_where_answers_are_scored_and_nowhere_else():
    (request, task), model = little_world(), untrained("llama")
    further = untrained("llama", 1)
    runtime = Runtime(device="cpu")
    table = generic_labels(model, further, request, task, runtime, 1.0, {})
    for item in request.forget:
        ids, start = task.encode(item.get("question"), item.get("answer") or item["text"])
        with torch.no_grad():
            base, other = (each(input_ids=torch.tensor([ids])).logits[0] for each in (model, further))
        expected = (base - (other - base).clamp(min=0)).argmax(-1)
        first = max(start, 1)
        assert table[item["id"]][first:].tolist() == expected[first - 1 : -1].tolist()
        assert (table[item["id"]][:start] == IGNORED).all()


def test_generic_names_change_the_labels_that_hang_on_names():
    (request, task), model = little_world(), untrained("llama")
    names = dict.fromkeys(request.forget.column("subject"), "Jo Doe")
    runtime = Runtime(device="cpu")
    plain, named = (
        generic_labels(model, untrained("llama", 1), request, task, runtime, 1.0, each)
        for each in ({}, names)
    )
    assert plain.keys() == named.keys()
    assert any(not torch.equal(plain[key], named[key]) for key in plain)
    assert translate("Ann met Bo.", {"Bo": "Ann", "Ann": "Bo"}) == "Bo met Ann."


def test_whp_trains_on_generic_labels_beside_retained_records():
    (request, task), model = little_world(), untrained("llama")
    unlearned = forget_quickly(model, request, "whp", task, variant="finetune", retain="nll", tune_epochs=1)
    assert type(unlearned) is type(model) and fingerprint(unlearned) != fingerprint(model)
    with pytest.raises(InvalidHyperparameter, match="finetune"):
        build_unlearner("whp", {"dictionary": {"a": "b"}})


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("simnpo", {"beta": 0.0}), ("simnpo", {"delta": -1.0}), ("wga", {"beta": -1.0}), ("satimp", {"beta2": -1.0}),
        ("undial", {"beta": 0.0}), ("ce-u", {"skip": -1}), ("idk-dpo", {"beta": 0.0}), ("idk-nll", {"retain": "all"}),
        ("altpo", {"instruction": "Say something."}), ("altpo", {"temperature": 0.0}), ("rmu", {"steering": 0.0}),
        ("rmu", {"tokens": "some"}), ("rmu", {"reduction": "token"}), ("rmu", {"steering": {"a": 1.0}}),
        ("pdu", {"slack": 1.1, "dual": "always"}), ("task-vector", {"scale": -1.0}), ("whp", {"scale": -1.0}),
        ("whp", {"variant": "both"}), ("wga", {"gamma": 0.0}),
    ],
    ids=str,
)  # fmt: skip
def test_hyperparameters_out_of_range_are_refused(name, settings):
    with pytest.raises(InvalidHyperparameter):
        build_unlearner(name, settings)


@pytest.mark.parametrize("rule", ["gu", "pcgrad", "sum"])
def test_a_rule_in_front_of_a_name_is_the_method_with_that_rule(rule):
    ruled, plain = build_unlearner(f"{rule}+simnpo", {"beta": 3.0}), build_unlearner("simnpo", {"beta": 3.0})
    assert ruled.card.name == f"{rule}+simnpo" and isinstance(ruled, Training)
    assert ruled.rule == rule and ruled.beta == plain.beta and plain.rule == "sum"
    assert UNLEARNERS.get(f"{rule}+simnpo") is UNLEARNERS.get(f"{rule}+simnpo")
    assert type(ruled).__module__ == type(plain).__module__


def test_a_rule_adds_its_needs_and_takes_settings_of_its_own():
    assert "retain-data" not in UNLEARNERS.get("grad-ascent").card.needs
    assert "retain-data" in UNLEARNERS.get("gu+grad-ascent").card.needs
    assert "retain-data" not in UNLEARNERS.get("sum+grad-ascent").card.needs
    settings = {"name": "gu", "rank": 2}
    assert build_unlearner("gu+npo", {"rule": settings}).rule == settings
    with pytest.raises(InvalidHyperparameter, match="names the rule"):
        build_unlearner("gu+npo", {"rule": "pcgrad"})


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("pcgard+npo", "Did you mean 'pcgrad'"),
        ("gu+simpno", "Did you mean 'simnpo'"),
        ("npoo", "Did you mean 'npo'"),
    ],
)
def test_unknown_rules_and_methods_suggest_the_nearest(name, hint):
    with pytest.raises(UnknownName, match=hint):
        UNLEARNERS.get(name)


def test_only_methods_with_two_gradients_take_a_rule():
    with pytest.raises(InvalidHyperparameter, match="no rule can join"):
        UNLEARNERS.get("gu+retrain")
