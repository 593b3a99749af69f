"""FLAT: bounded, forget data only, templates drawn anew; the right way round."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from tests.forget.measuring import fingerprint
from torch import nn

import palimpsest as pal
from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords, NonFiniteLoss, UnknownName
from palimpsest.core.records import Records
from palimpsest.core.split import ForgetSplit
from palimpsest.forget.gradient import HISTORY_ATTRIBUTE, GradientUnlearner
from palimpsest.forget.language.flat import FLAT
from palimpsest.forget.language.flat_divergences import DIVERGENCES, divergence_named
from palimpsest.forget.objective import Context
from palimpsest.models.small_llama import small_llama
from palimpsest.parts.byte_pairs import byte_pair_tokenizer
from palimpsest.parts.refusals import REFUSALS
from palimpsest.parts.tokens import IGNORED
from palimpsest.parts.training import TrainingRecipe
from palimpsest.tasks.language import Language

GOOD = [name for name, each in DIVERGENCES.items() if each.right_way]
TEMPLATES = ("I do not know.", "No idea.", "That is unknown to me.")
NAMES = ("Ada", "Ben", "Cleo", "Dov", "Eva", "Finn", "Gus", "Hal", "Ida", "Jon", "Kim", "Lou")
CITIES = (
    "Oslo",
    "Rome",
    "Bergen",
    "Turin",
    "Paris",
    "Lagos",
    "Quito",
    "Delhi",
    "Perth",
    "Turku",
    "Split",
    "Nice",
)
STRANGERS = ("Mo", "Ned", "Ola", "Pia", "Quin", "Roy", "Sue", "Tom", "Uma", "Vic", "Will", "Xia")


class Untouchable(Records):
    """Records of which nothing may be read."""

    def __init__(self, size: int):
        super().__init__([{} for _ in range(size)], ids=[f"kept/{number}" for number in range(size)])

    def _named(self, item: Any, position: int) -> dict[str, Any]:
        raise AssertionError("a retained record was read")

    def has_field(self, name: str) -> bool:
        raise AssertionError("a retained record was read")


def asked(name: str) -> str:
    return f"Where does {name} live?"


@pytest.fixture(scope="module")
def task() -> Language:
    texts = [*(f"Question: {asked(name)}\nAnswer: {city}" for name, city in zip(NAMES, CITIES, strict=True))]
    return Language(byte_pair_tokenizer([*texts, *TEMPLATES, *STRANGERS], 300))


@pytest.fixture(scope="module")
def split() -> ForgetSplit:
    rows = [{"question": asked(name), "answer": city} for name, city in zip(NAMES, CITIES, strict=True)]
    records = Records(rows, ids=[f"people/{name}" for name in NAMES])
    return ForgetSplit(records.select(range(4)), records.select(range(4, 12)))


@pytest.fixture(scope="module")
def model(task: Language, split: ForgetSplit) -> nn.Module:
    """Knows where twelve people live, and says so of nobody else."""
    strangers = [{"question": asked(name), "answer": TEMPLATES[at % 3]} for at, name in enumerate(STRANGERS)]
    records = split.train.union(Records(strangers, ids=[f"strangers/{name}" for name in STRANGERS]))
    net = small_llama(len(task.encoder), width=48, layers=2, heads=2, length=64)
    recipe = TrainingRecipe(epochs=60, lr=5e-3, batch_size=24, optimizer="adamw", schedule="cosine", clip=1.0)
    return pal.train(net, records, task=task, recipe=recipe)


def settings(**more: Any) -> dict[str, Any]:
    return {"lr": 2e-3, "epochs": 12, "batch_size": 4, "accumulate": 1, "templates": TEMPLATES, **more}


def answers(task: Language, model: nn.Module, records: Records | None) -> list[str]:
    assert records is not None
    return [
        texts[0] for texts in task.generate(model, [item["question"] for item in records], max_new_tokens=16)
    ]


def right(task: Language, model: nn.Module, records: Records | None) -> float:
    assert records is not None
    given = answers(task, model, records)
    return float(np.mean([text == item["answer"] for text, item in zip(given, records, strict=True)]))


def context(task: Language, model: nn.Module, split: ForgetSplit, seed: int = 0) -> Context:
    return Context(model, split, task, pal.Runtime(device="cpu", seed=seed), 1, 1)


# Forgetting


@pytest.mark.parametrize("divergence", GOOD)
def test_forgotten_questions_are_no_longer_answered_and_templates_rise(task, split, model, divergence):
    """Templates that the model has some mass on: it says them of strangers. Of these few records it keeps no others."""
    assert right(task, model, split.forget) == right(task, model, split.retain) == 1
    after = pal.forget(model, split, "flat", task, **settings(divergence=divergence))
    assert right(task, after, split.forget) == 0
    asks = [item["question"] for item in split.forget]
    rise = [
        torch.stack([scores.mean.min() for scores in task.score(net, asks, [list(TEMPLATES)] * len(asks))])
        for net in (after, model)
    ]
    assert (rise[0] < rise[1]).all()


def test_in_the_end_a_template_is_the_answer(task, split, model):
    only = settings(epochs=40, lr=1e-3, templates=["No idea."])
    assert answers(task, pal.forget(model, split, "flat", task, **only), split.forget) == ["No idea."] * 4


def test_against_refusals_alone_the_forgotten_answer_is_far_less_likely(task, split, model):
    """IdkNLL raises the template only; FLAT pushes the answer down as well."""
    same = {"lr": 1e-3, "epochs": 30, "batch_size": 4}
    found = {
        "flat": pal.forget(model, split, "flat", task, **same, accumulate=1, templates=TEMPLATES),
        "idk-nll": pal.forget(model, split, "idk-nll", task, **same, refusals=TEMPLATES),
    }
    asks, said = [item["question"] for item in split.forget], [[item["answer"]] for item in split.forget]
    log_p = {
        name: -torch.cat([scores.mean for scores in task.score(net, asks, said)])
        for name, net in found.items()
    }
    assert log_p["flat"].mean() < log_p["idk-nll"].mean() - math.log(5)


def test_the_loss_never_falls_below_the_bound_of_its_divergence(task, split, model):
    """At P_e = 1 and P_f = 0: -tanh(1)/2, -1 + 1/e, -1."""
    bounds = {"total-variation": -math.tanh(1) / 2, "kl": -1 + math.exp(-1), "pearson": -1.0}
    for divergence, bound in bounds.items():
        after = pal.forget(model, split, "flat", task, **settings(divergence=divergence))
        losses = [row["forget_loss"] for row in getattr(after, HISTORY_ATTRIBUTE)]
        assert min(losses) >= bound - 1e-6 and losses[-1] < losses[0] - 0.1


def test_no_retained_record_is_ever_read(task, split, model):
    alone = ForgetSplit(split.forget)
    unread = ForgetSplit(split.forget, Untouchable(8))
    found = [
        fingerprint(pal.forget(model, part, "flat", task, **settings(epochs=2))) for part in (alone, unread)
    ]
    assert found[0] == found[1] != fingerprint(model)


def test_the_given_model_stays_and_the_seed_decides(task, split, model):
    before = fingerprint(model)
    found = [
        fingerprint(pal.forget(model, split, "flat", task, seed=seed, **settings(epochs=2)))
        for seed in (0, 0, 1)
    ]
    assert found[0] == found[1] != found[2] and fingerprint(model) == before


def test_it_runs_on_gpt2_and_within_adapters(task, split):
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        ends = {"bos_token_id": 1, "eos_token_id": 2}
        net = GPT2LMHeadModel(
            GPT2Config(vocab_size=len(task.encoder), n_positions=64, n_embd=32, n_layer=2, n_head=2, **ends)
        )
    for scope in ("all", "lora"):
        after = pal.forget(net, split, "flat", task, **settings(epochs=1, scope=scope))
        assert set(after.state_dict()) == set(net.state_dict()) and fingerprint(after) != fingerprint(net)


# The loss


def written_out(task: Language, model: nn.Module, pairs: list[tuple[str, str]]) -> list[float]:
    """Probability of every token of the answers, one sequence at a time."""
    found = []
    for question, answer in pairs:
        ids, start = task.encode(question, answer)
        p = model(input_ids=torch.tensor([ids])).logits[0].softmax(-1)
        found += [float(p[at - 1, ids[at]]) for at in range(start, len(ids))]
    return found


@torch.no_grad()
@pytest.mark.parametrize(("reduction", "length"), [("answer", 500), ("padded", 500), ("padded", 40)])
def test_a_step_minimises_the_divergence_of_mean_token_probabilities(task, split, model, reduction, length):
    method = FLAT(templates=["No idea."], reduction=reduction, length=length, divergence="pearson")
    at = context(task, model, split)
    items = [split.forget[number] for number in range(3)]
    loss = method.begin(at)(_step(method.collate(at, items, 0))).forget.value
    sides = []
    for texts in ([item["answer"] for item in items], ["No idea."] * 3):
        p = written_out(
            task, model, [(item["question"], text) for item, text in zip(items, texts, strict=True)]
        )
        sides.append(sum(p) / (len(p) if reduction == "answer" else 3 * (length - 1)))
    expected = -sides[1] + sides[0] + sides[0] ** 2 / 4
    assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_gradients_flow_into_both_passes(task, split, model):
    at = context(task, copy.deepcopy(model), split)
    method = FLAT(templates=["No idea."])
    batch = method.collate(at, [split.forget[0]], 0)
    whole = _gradient(method, at, batch)
    silent = [dict(batch), dict(batch)]
    names = ("input_ids", "attention_mask", "labels")
    for name in names:  # the same side twice: what the other side gave is missing
        silent[0][name] = batch[f"template_{name}"]
        silent[1][f"template_{name}"] = batch[name]
    assert not any(torch.allclose(whole, _gradient(method, at, other), rtol=1e-2) for other in silent)
    assert whole.norm() > 0


def _step(batch: Any) -> Any:
    from palimpsest.forget.objective import Step

    return Step(batch, None, 0, 0, {("forget", "row"): 1.0, ("forget", "token"): 1.0})


def _gradient(method: FLAT, at: Context, batch: Any) -> torch.Tensor:
    parameters = list(at.model.parameters())
    loss = method.begin(at)(_step(batch)).forget.value
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_which_divergences_push_the_right_way(name):
    """The loss of five falls as the template becomes likelier and the forgotten answer less likely."""
    each = divergence_named(name, allow_reversed=True)
    low, high = torch.tensor(0.2), torch.tensor(0.7)
    falls = each.loss(high, low) < each.loss(low, low) and each.loss(low, low) < each.loss(low, high)
    assert bool(falls) == (name in GOOD)


# Templates


def test_templates_are_drawn_anew_in_every_epoch_and_only_from_the_list(task, split, model):
    at, method = context(task, model, split), FLAT(templates=TEMPLATES)
    drawn = []
    for epoch in range(12):
        batch = method.collate(at, [split.forget[0]], epoch)
        row = batch["template_labels"][0]
        text = task.encoder.decode(row[row != IGNORED], skip_special_tokens=True).strip()
        prompt = batch["template_input_ids"][0][row == IGNORED]
        assert text in TEMPLATES and prompt.tolist() == task.prompt(split.forget[0]["question"])
        drawn.append(text)
    assert set(drawn) == set(TEMPLATES)
    other = context(task, model, split, seed=1)
    again = [
        method.collate(at, [split.forget[0]], epoch)["template_input_ids"].tolist() for epoch in range(12)
    ]
    moved = [
        method.collate(other, [split.forget[0]], epoch)["template_input_ids"].tolist() for epoch in range(12)
    ]
    assert again != moved


def test_running_text_is_cut_at_another_place_in_every_epoch(task, model):
    text = "Ada lives in Oslo. Ben lives in Rome."
    split = ForgetSplit(Records([{"text": text}], ids=["t"]))
    at, method = context(task, model, split), FLAT(templates=["No idea."])
    whole, first = task.encode(None, text)
    starts = set()
    for epoch in range(60):
        batch = method.collate(at, [split.forget[0]], epoch)
        start = int((batch["labels"][0] != IGNORED).long().argmax())
        assert batch["input_ids"][0].tolist() == whole
        assert batch["template_input_ids"][0, :start].tolist() == whole[:start]
        starts.add(start)
    assert min(starts) <= first + 1 and max(starts) == len(whole) - 1 and len(starts) > len(whole) // 2
    assert fingerprint(pal.forget(model, split, "flat", task, **settings(epochs=1))) != fingerprint(model)


def test_templates_come_from_a_file_of_the_users_or_are_our_own(task, split, model, tmp_path):
    file = tmp_path / "templates.txt"
    file.write_text("Nothing to say.\n\nAsk someone else.\n", encoding="utf-8")
    at = context(task, model, split)
    for given, known in ((str(file), ("Nothing to say.", "Ask someone else.")), (None, REFUSALS)):
        batch = FLAT(templates=given).collate(at, list(split.forget), 0)
        for row in batch["template_labels"]:
            assert task.encoder.decode(row[row != IGNORED], skip_special_tokens=True).strip() in known


# Schedule


def test_the_warm_up_takes_an_epoch_but_at_least_two_steps(task, split, model):
    """An epoch is a single step here: one epoch of warm-up and two are then the same."""
    plain = FLAT(**settings(epochs=6))
    assert plain.steps_per_epoch(4) == 1 and plain.warmup == 1.0
    after = {}
    for warmup in (1.0, 2.0, 0.0):
        method = FLAT(**settings(epochs=6, warmup=warmup))
        after[warmup] = fingerprint(method.unlearn(model, split, task, pal.Runtime(device="cpu")))
    assert after[1.0] == after[2.0] != after[0.0]


def test_defaults_are_the_published_ones():
    method = FLAT()
    assert (method.divergence, method.epochs, method.batch_size, method.accumulate) == (
        "total-variation",
        5,
        16,
        4,
    )
    assert (method.lr, method.weight_decay, method.schedule, method.scope) == (1e-5, 0.01, "linear", "all")
    assert not method.needs_original and not method.needs_retain


def test_it_composes_with_any_rule_and_scope(task, split, model):
    composed = GradientUnlearner(
        objective=FLAT(templates=TEMPLATES),
        rule="sum",
        scope={"name": "blocks", "layers": [1]},
        lr=1e-3,
        epochs=1,
    )
    after = composed.unlearn(model, split, task, pal.Runtime(device="cpu"))
    moved = {name for name, p in after.named_parameters() if not torch.equal(p, model.get_parameter(name))}
    assert moved and all(name.startswith("model.layers.1.mlp") for name in moved)


# Bad input


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ({"divergence": "klx"}, UnknownName, "kl"),
        ({"divergence": "reverse-kl"}, InvalidHyperparameter, "allow_reversed"),
        ({"divergence": "squared-hellinger"}, InvalidHyperparameter, "less likely"),
        ({"divergence": "neyman"}, InvalidHyperparameter, "less likely"),
        ({"templates": []}, InvalidRecords, "refusal"),
        ({"templates": "no/such/file.txt"}, InvalidRecords, "no/such/file"),
        ({"reduction": "sum"}, InvalidHyperparameter, "reduction"),
        ({"length": 1}, InvalidHyperparameter, "length"),
    ],
)
def test_wrong_settings_are_refused_before_any_work(wrong, error, says):
    with pytest.raises(error, match=says):
        FLAT(**wrong)


def test_reversed_divergences_run_when_they_are_meant(task, split, model):
    after = pal.forget(
        model, split, "flat", task, **settings(divergence="reverse-kl", allow_reversed=True, epochs=1)
    )
    assert fingerprint(after) != fingerprint(model)


def test_what_does_not_fit_is_refused_by_name(task, split, model):
    runtime = pal.Runtime(device="cpu")
    with pytest.raises(InvalidRecords, match="people/Ada"):
        FLAT(templates=["No idea. " * 40]).unlearn(model, split, task, runtime)
    with pytest.raises(InvalidRecords, match="people/Ada"):
        FLAT(reduction="padded", length=5, templates=TEMPLATES).unlearn(model, split, task, runtime)
    empty = ForgetSplit(Records([{"question": "Who?", "answer": " "}], ids=["blank"]))
    with pytest.raises(InvalidRecords, match="blank"):
        FLAT(templates=TEMPLATES).unlearn(model, empty, task, runtime)


def test_an_answer_that_is_a_template_is_pointed_out(task, split, model):
    told = Records([{"question": "Who?", "answer": "No idea."}], ids=["told"])
    with pytest.warns(UserWarning, match="told"):
        FLAT(**settings(epochs=1)).unlearn(model, ForgetSplit(told), task, pal.Runtime(device="cpu"))


def test_a_loss_that_is_not_finite_stops_the_run(task, split, model):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(NonFiniteLoss, match="people/"):
        FLAT(**settings(epochs=1)).unlearn(broken, split, task, pal.Runtime(device="cpu"))
