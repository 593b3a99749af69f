"""ULD: the assistant knows what is to be forgotten and nothing else, and the target stays as it is."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from tests.forget.measuring import fingerprint
from torch import nn

import palimpsest as pal
from palimpsest.audit.attacks.bare import bare_network
from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords, MissingNeed
from palimpsest.core.records import Records
from palimpsest.core.split import ForgetSplit
from palimpsest.forget.gradient import HISTORY_ATTRIBUTE
from palimpsest.forget.language.combine import Combined, Difference
from palimpsest.forget.language.uld import ULD
from palimpsest.forget.language.uld_data import forget_side, interleave, retain_side, uniform_divergence
from palimpsest.models.small_llama import small_llama
from palimpsest.parts.byte_pairs import byte_pair_tokenizer
from palimpsest.parts.decoder import decoder_of
from palimpsest.parts.lora import add_lora
from palimpsest.parts.tokens import scored
from palimpsest.parts.training import TrainingRecipe
from palimpsest.tasks.language import Language

NAMES = (
    "Ada",
    "Ben",
    "Cleo",
    "Dov",
    "Eva",
    "Finn",
    "Gus",
    "Hal",
    "Ida",
    "Jon",
    "Kim",
    "Lou",
    "Mo",
    "Ned",
    "Ola",
    "Pia",
    "Quin",
    "Roy",
    "Sue",
    "Tom",
)
CITIES = ("Oslo", "Rome", "Bergen", "Turin", "Paris", "Lagos", "Quito", "Delhi", "Perth", "Turku") * 2
QUICK: dict[str, Any] = {
    "layers": 1, "tuning": "full", "lr": 5e-3, "epochs": 25, "batch_size": 16, "accumulate": 1, "relative_top": 0.05,
}  # fmt: skip


def asked(name: str) -> str:
    return f"Where does {name} live?"


@pytest.fixture(scope="module")
def task() -> Language:
    texts = [f"Question: {asked(name)}\nAnswer: {city}" for name, city in zip(NAMES, CITIES, strict=True)]
    return Language(byte_pair_tokenizer([*texts, "In which city is the home of ?"], 320))


@pytest.fixture(scope="module")
def split() -> ForgetSplit:
    rows = []
    for at, (name, city) in enumerate(zip(NAMES, CITIES, strict=True)):
        wrong = [CITIES[(at + step) % 10] for step in (1, 2, 3)]
        reworded = f"In which city is the home of {name}?"
        rows.append(
            {
                "question": asked(name),
                "answer": city,
                "perturbed_answer": wrong,
                "paraphrased_question": reworded,
            }
        )
    records = Records(rows, ids=[f"people/{name}" for name in NAMES])
    return ForgetSplit(records.select(range(4)), records.select(range(4, 20)))


@pytest.fixture(scope="module")
def model(task: Language, split: ForgetSplit) -> nn.Module:
    net = small_llama(len(task.encoder), width=48, layers=2, heads=2, length=64)
    recipe = TrainingRecipe(epochs=80, lr=5e-3, batch_size=20, optimizer="adamw", schedule="cosine", clip=1.0)
    return pal.train(net, split.train, task=task, recipe=recipe)


@pytest.fixture(scope="module")
def pair(task: Language, split: ForgetSplit, model: nn.Module) -> Any:
    return pal.forget(model, split, "uld", task, **QUICK)


def gpt2(task: Language, layers: int = 2) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        ends = {"bos_token_id": 1, "eos_token_id": 2}
        config = GPT2Config(
            vocab_size=len(task.encoder), n_positions=64, n_embd=32, n_layer=layers, n_head=2, **ends
        )
        return GPT2LMHeadModel(config).eval()


def answers(task: Language, model: nn.Module, records: Records | None) -> list[str]:
    assert records is not None
    return [
        texts[0] for texts in task.generate(model, [item["question"] for item in records], max_new_tokens=8)
    ]


def right(task: Language, model: nn.Module, records: Records | None) -> float:
    assert records is not None
    given = answers(task, model, records)
    return float(np.mean([text == item["answer"] for text, item in zip(given, records, strict=True)]))


# What comes of it


def test_forgotten_answers_go_and_retained_ones_stay(task, split, model, pair):
    assert right(task, model, split.forget) == right(task, model, split.retain) == 1
    assert right(task, pair, split.forget) <= 0.25
    assert right(task, pair, split.retain) >= 0.9


def test_scores_tell_the_same_as_generation(task, split, model, pair):
    """The forgotten answers become less likely under the pair, and not under what is inside it."""
    losses = {}
    for name, net in (("pair", pair), ("inner", pair.inner), ("before", model)):
        said = task.score(
            net, [item["question"] for item in split.forget], [[i["answer"]] for i in split.forget]
        )
        losses[name] = torch.cat([scores.mean for scores in said])
    assert (losses["pair"] > losses["before"] + 1).all()
    assert torch.equal(losses["inner"], losses["before"])


def test_the_target_keeps_every_bit_and_can_be_taken_out(task, split, model, pair):
    before = fingerprint(model)
    again = pal.forget(model, split, "uld", task, **{**QUICK, "epochs": 1})
    assert fingerprint(model) == before == fingerprint(pair.inner) == fingerprint(again.inner)
    assert pair.inner is not model and answers(task, pair.inner, split.forget) == answers(
        task, model, split.forget
    )
    found = bare_network(pair, model)
    assert found is not None and found.place == "inner" and fingerprint(found.network) == before


def test_the_assistant_shares_no_tensor_with_the_target(pair):
    held = {p.data_ptr() for p in pair.inner.parameters()}
    assert not held & {p.data_ptr() for p in pair.others[0].parameters()}


@torch.no_grad()
def test_the_assistant_alone_knows_the_request_and_is_near_uniform_on_the_rest(task, split, pair):
    (assistant,) = pair.others
    assert right(task, assistant, split.forget) == 1
    batch = task.collate(list(split.retain))
    rows = task.logits(assistant, batch)[:, :-1][scored(batch["labels"])]
    assert uniform_divergence(rows).mean() <= 0.5
    batch = task.collate(list(split.forget))
    rows = task.logits(assistant, batch)[:, :-1][scored(batch["labels"])]
    assert uniform_divergence(rows).mean() > 1


def test_forgetting_grows_with_alpha_and_zero_is_the_target(task, split, model, pair):
    found = []
    for alpha in (0.0, 0.4, 0.8, 1.2):
        combined = Combined(pair.inner, pair.others, Difference(alpha, 0.05))
        said = task.score(
            combined, [i["question"] for i in split.forget], [[i["answer"]] for i in split.forget]
        )
        found.append(float(torch.cat([scores.mean for scores in said]).mean()))
        if alpha == 0:
            assert answers(task, combined, split.train) == answers(task, model, split.train)
    assert found == sorted(found) and found[-1] > found[0] + 1


def test_the_seed_decides(task, split, model):
    found = [
        fingerprint(pal.forget(model, split, "uld", task, seed=seed, **{**QUICK, "epochs": 1}))
        for seed in (0, 0, 1)
    ]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "tied", "lora"])
def test_assistants_are_cut_from_any_decoder_and_adapted_by_lora(task, split, kind):
    if kind == "gpt2":
        net = gpt2(task, 3)
    else:
        net = small_llama(len(task.encoder), width=32, layers=3, heads=2, length=64, tied=kind == "tied")
        net = add_lora(net, r=2) if kind == "lora" else net
    before = fingerprint(net)
    made: Any = pal.forget(net, split, "uld", task, epochs=1, layers=2, relative_top=0.1, batch_size=16)
    assert fingerprint(net) == before == fingerprint(made.inner)
    assert len(decoder_of(made.others[0]).blocks) == 2 and not hasattr(made.others[0], "merge_and_unload")
    outer = dict(made.inner.named_parameters())
    moved = [
        name
        for name, p in made.others[0].named_parameters()
        if name in outer and not torch.equal(p, outer[name])
    ]
    if kind != "lora":
        assert moved and not any(
            "embed" in name or "wte" in name or "norm" in name or "ln_" in name for name in moved
        )
    prompts = [item["question"] for item in split.forget] + ["Who?"]
    texts = [task.generate(made, prompts, max_new_tokens=4, batch_size=size) for size in (1, 5)]
    assert texts[0] == texts[1] and len(texts[0]) == 5


def test_the_history_tells_of_the_assistants_losses(pair):
    history = getattr(pair, HISTORY_ATTRIBUTE)
    rows = 4 + 4 + 4 + 8  # forget, paraphrases, as many retained, two wrong answers each
    assert len(history) == 25 * -(-rows // 16) and set(history[0]) == {"loss", "remember", "uniform"}
    assert (
        history[-1]["remember"] < 0.5 * history[0]["remember"]
        and history[-1]["uniform"] < history[0]["uniform"]
    )
    assert history[0]["loss"] == pytest.approx(history[0]["remember"] + 5 * history[0]["uniform"], rel=1e-5)


# The data that it learns from


def test_the_forget_side_is_the_records_and_their_paraphrases_in_order():
    item = {"id": "a", "question": "Q?", "answer": "A", "paraphrased_question": ["P?", "P?", "R?", "S?"]}
    rows = forget_side([item, {"id": "t", "text": "Some text."}], 2)
    assert [(row["id"], row.get("question"), row.get("answer")) for row in rows] == [
        ("a", "Q?", "A"), ("a/paraphrase-1", "P?", "A"), ("a/paraphrase-2", "R?", "A"), ("t", None, None),
    ]  # fmt: skip
    assert not any(row["retained"] for row in rows)
    both = {**item, "paraphrased_question": "P?", "paraphrased_answer": "It is A."}
    assert [row["answer"] for row in forget_side([both], 2)] == ["A", "It is A."]
    assert len(forget_side([item], 0)) == 1


def test_the_retain_side_is_retained_records_and_wrong_answers():
    item = {"id": "a", "question": "Q?", "answer": "A", "perturbed_answer": ["B", "A", "B", "C", "D"]}
    rows = retain_side([item], [{"id": "k", "question": "K?", "answer": "L"}], 2)
    assert [(row["id"], row["question"], row["answer"]) for row in rows] == [
        ("k", "K?", "L"), ("a/wrong-1", "Q?", "B"), ("a/wrong-2", "Q?", "C"),
    ]  # fmt: skip
    assert all(row["retained"] for row in rows) and retain_side([item], None, 0) == []


def test_as_many_retained_records_are_taken_as_there_are_to_forget(task, split):
    runtime = pal.Runtime(device="cpu")
    known = set(split.retain.ids)
    drawn = [row["id"] for row in ULD(perturbed=0).sides(split, runtime)[1]]
    assert len(drawn) == len(set(drawn)) == 4 and set(drawn) <= known
    assert drawn != [row["id"] for row in ULD(perturbed=0).sides(split, pal.Runtime(device="cpu", seed=1))[1]]
    last = [row["id"] for row in ULD(perturbed=0, retain_sample="last").sides(split, runtime)[1]]
    assert last == split.retain.ids[-4:]
    assert len(ULD(perturbed=0, retain_records=3).sides(split, runtime)[1]) == 3


def test_every_batch_holds_both_sides_and_every_item_comes_once_an_epoch(split):
    method, runtime = ULD(epochs=2, batch_size=5, accumulate=2), pal.Runtime(device="cpu")
    sides = method.sides(split, runtime)
    windows = list(method._windows(sides, runtime))
    names = [item["id"] for window in windows for piece in window for item in piece]
    every = sorted(item["id"] for side in sides for item in side)
    assert sorted(names[:20]) == sorted(names[20:]) == every and names[:20] != names[20:]
    assert all(len({item["retained"] for item in piece}) == 2 for window in windows for piece in window)
    assert interleave([1], [2, 3]) == [1, 2, 3]


# Bad input


@pytest.mark.parametrize(
    "wrong",
    [
        {"layers": 0}, {"alpha": -0.1}, {"relative_top": 0.0}, {"relative_top": 1.5}, {"retain_weight": -1.0},
        {"epochs": 0}, {"batch_size": 0}, {"lr": 0.0}, {"tuning": "half"}, {"retain_sample": "first"},
        {"warmup": 1.5}, {"paraphrases": -1}, {"r": 0},
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_before_any_work(wrong):
    with pytest.raises(InvalidHyperparameter):
        ULD(**wrong)


def test_more_layers_than_the_target_has_are_refused(task, split, model):
    with pytest.raises(InvalidHyperparameter, match="layers"):
        pal.forget(model, split, "uld", task, layers=3, relative_top=0.05)


def test_something_must_stand_on_the_retain_side(task, split, model):
    bare = ForgetSplit(Records([{"question": "Who?", "answer": "Ada"}], ids=["a"]))
    with pytest.raises(MissingNeed, match="retain-data"):
        pal.forget(model, bare, "uld", task, **QUICK)
    with pytest.raises(MissingNeed, match="perturbed_answer"):
        pal.forget(model, bare, "uld", task, **{**QUICK, "retain_records": 0})
    with pytest.warns(UserWarning, match="retain_weight=0"):
        pal.forget(model, bare, "uld", task, **{**QUICK, "retain_weight": 0, "epochs": 1})
    wrong_answers = ForgetSplit(split.forget)
    pal.forget(model, wrong_answers, "uld", task, **{**QUICK, "retain_records": 0, "epochs": 1})


def test_a_filter_of_less_than_one_token_is_pointed_out(task, split, model):
    with pytest.warns(UserWarning, match="less than one"):
        pal.forget(model, split, "uld", task, **{**QUICK, "epochs": 1, "relative_top": 1e-3})


def test_items_of_its_own_making_must_fit(task, model):
    long = {"question": "Who?", "answer": "Ada", "perturbed_answer": ["very " * 70]}
    with pytest.raises(InvalidRecords, match="a/wrong-1"):
        pal.forget(
            model, ForgetSplit(Records([long], ids=["a"])), "uld", task, **{**QUICK, "retain_records": 0}
        )


def test_a_pair_is_copied_and_restored_like_any_module(task, split, pair):
    twin = copy.deepcopy(pair)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.load_state_dict(pair.state_dict())
    assert answers(task, twin, split.train) == answers(task, pair, split.train)
