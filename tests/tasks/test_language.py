from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import palimpsest as pal
from palimpsest.core.errors import (
    InvalidHyperparameter,
    InvalidLabels,
    InvalidRecords,
    InvalidSplit,
    ModelMismatch,
)
from palimpsest.core.evidence import observe_all
from palimpsest.core.records import Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.split import ForgetSplit
from palimpsest.models.small_llama import small_llama
from palimpsest.parts.byte_pairs import byte_pair_tokenizer
from palimpsest.parts.templates import template_of
from palimpsest.parts.tokens import IGNORED
from palimpsest.tasks.language import Language

ROWS: list[dict[str, Any]] = [
    {"question": "Where does Ada live?", "answer": "Oslo"},
    {"question": "Where does Ben Ytter work?", "answer": "at the Harbour Mill"},
    {"question": "When was Cleo born?", "answer": "on 4 March 1988"},
    {"text": "Ada lives in Oslo. Ben Ytter works at the Harbour Mill. Cleo was born on 4 March 1988."},
]
CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    texts = [" ".join(str(value) for value in row.values()) for row in ROWS]
    return byte_pair_tokenizer([*texts, "Question: Answer: user assistant"], 400)


@pytest.fixture(scope="module")
def task(tokenizer: Any) -> Language:
    return Language(tokenizer)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> nn.Module:
    return small_llama(len(tokenizer), width=32, layers=2, heads=2)


def records(rows: Any = ROWS) -> Records:
    return Records(list(rows), ids=[f"r{number}" for number in range(len(rows))])


def alone(task: Language, model: nn.Module, question: str, answer: str) -> torch.Tensor:
    """Losses of an answer's tokens, by the definition: one sequence, no padding, no cache."""
    ids, start = task.encode(question, answer)
    logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return torch.stack([-logits[at - 1, ids[at]] for at in range(start, len(ids))])


def test_only_the_answer_and_its_end_are_labelled(task: Language, tokenizer: Any):
    batch = task.collate([{**ROWS[0], "id": "a", "index": 0}, {**ROWS[1], "id": "b", "index": 1}])
    for row, item in zip(range(2), ROWS, strict=False):
        labelled = batch["labels"][row][batch["labels"][row] != IGNORED]
        assert tokenizer.decode(labelled) == f" {item['answer']}</s>"
        whole = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        assert tokenizer.decode(whole) == f"<s>Question: {item['question']}\nAnswer: {item['answer']}</s>"


def test_every_token_of_running_text_is_labelled(task: Language, tokenizer: Any):
    batch = task.collate([{**ROWS[3], "id": "t", "index": 0}])
    assert batch["labels"][0, 0] == IGNORED and (batch["labels"][0, 1:] != IGNORED).all()
    assert tokenizer.decode(batch["labels"][0, 1:]) == ROWS[3]["text"] + "</s>"


def test_a_loss_is_the_mean_over_the_answers_tokens_whatever_the_padding(task: Language, model: nn.Module):
    batch = task.collate([{**row, "id": str(at), "index": at} for at, row in enumerate(ROWS)])
    with torch.no_grad():
        losses = task.loss_per_example(model, batch)
        for row, loss in zip(ROWS[:3], losses, strict=False):
            assert loss.item() == pytest.approx(
                alone(task, model, row["question"], row["answer"]).mean().item(), rel=1e-4
            )


def test_answers_scored_with_a_shared_prompt_get_the_losses_they_have_alone(task: Language, model: nn.Module):
    questions = [row["question"] for row in ROWS[:3]]
    answers = [["Oslo", "Bergen by the sea"], ["at home"], ["on 4 March 1988", "never", "in 1990 or so"]]
    with torch.no_grad():
        found = task.score(model, questions, answers, batch_size=2)
        for question, given, scores in zip(questions, answers, found, strict=True):
            for number, answer in enumerate(given):
                truth = alone(task, model, question, answer)
                assert torch.allclose(scores.losses[number, : len(truth)], truth, atol=1e-4)
                assert scores.mask[number].sum() == len(truth)
                assert scores.mean[number].item() == pytest.approx(truth.mean().item(), rel=1e-3)


def test_a_model_without_a_cache_gives_the_same_scores(task: Language, model: nn.Module):
    class Bare(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> torch.Tensor:
            return self.inner(input_ids=input_ids, attention_mask=attention_mask).logits

    class Answered(Bare):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
            return type("Output", (), {"logits": super().forward(input_ids, attention_mask)})()

    questions, answers = [row["question"] for row in ROWS[:2]], [["Oslo", "Bergen by"], ["at home"]]
    for wrapped in (Bare(model), Answered(model)):
        for own, other in zip(
            task.score(model, questions, answers), task.score(wrapped, questions, answers), strict=True
        ):
            assert torch.allclose(own.losses, other.losses, atol=1e-4)


def test_several_answers_cost_one_pass_over_the_question(task: Language, model: nn.Module):
    seen: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        task.score(model, [ROWS[0]["question"]], [["Oslo", "Bergen", "Rome", "Paris", "Turin"]])
    finally:
        handle.remove()
    prompt = len(task.prompt(ROWS[0]["question"]))
    assert len(seen) == 2 and seen[0] == prompt


def test_one_pass_observes_every_token(task: Language, model: nn.Module):
    found = observe_all(model, records(), task, Runtime(device="cpu", batch_size=2))
    for at, row in enumerate(ROWS[:3]):
        ids, start = task.encode(row["question"], row["answer"])
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)
        count = len(ids) - start
        target = torch.tensor(ids[start:])
        own = {name: part[at, :count] for name, part in found.tokens.items()}
        assert found.tokens["mask"][at].sum() == count
        assert torch.allclose(own["log_probability"], log_p.gather(1, target[:, None])[:, 0], atol=1e-4)
        assert torch.allclose(own["mean"], (log_p.exp() * log_p).sum(1), atol=1e-4)
        variance = (log_p.exp() * log_p**2).sum(1) - (log_p.exp() * log_p).sum(1) ** 2
        assert torch.allclose(own["deviation"], variance.sqrt(), atol=1e-3)
        assert torch.equal(own["right"].bool(), log_p.argmax(1) == target)
    assert found.features is not None and found.features.shape == (4, 32)
    assert list(found.layers) == ["block 0"]


def test_training_with_batches_of_similar_length_learns_and_pads_less(tokenizer: Any, model: nn.Module):
    task = Language(tokenizer)
    rows = records([*ROWS, {"text": "a much longer text than all the others here, " * 3}] * 8)
    every = task.collate(list(rows))
    assert task.lengths(rows) == every["attention_mask"].sum(1).tolist()

    def padding(**how: Any) -> int:
        seen: list[int] = []
        plain = Language.collate

        def collate(self: Language, items: Any) -> Any:
            batch = plain(self, items)
            seen.append(int((batch["attention_mask"] == 0).sum()))
            return batch

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Language, "collate", collate)
            trained = pal.train(model, rows, task=task, epochs=3, lr=1e-3, batch_size=4, **how)
        assert task.loss_per_example(trained, every).mean() < task.loss_per_example(model, every).mean()
        return sum(seen)

    assert padding(group_by_length=True) < padding() / 2


def test_batches_are_answered_as_single_questions_are(task: Language, model: nn.Module):
    questions = [row["question"] for row in ROWS[:3]]
    together = task.generate(model, questions, max_new_tokens=6)
    apart = [task.generate(model, [question], max_new_tokens=6)[0] for question in questions]
    assert together == apart
    sampled = task.generate(model, questions, max_new_tokens=6, temperature=1.0, samples=3, seed=1)
    assert [len(given) for given in sampled] == [3, 3, 3]
    assert sampled == task.generate(model, questions, max_new_tokens=6, temperature=1.0, samples=3, seed=1)


def test_an_answer_can_be_made_to_begin_with_given_words(task: Language, model: nn.Module):
    question, opening = ROWS[0]["question"], "Sure, it is"
    prompt = task.form.render(question) + " " + opening
    assert task.generate(model, [question], opening=opening) == task.generate(model, [prompt], raw=True)


def test_a_chat_template_gives_prompt_answer_and_end(tokenizer: Any):
    import copy

    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = CHAT
    found = template_of(chatty, "auto", system="Be brief.")
    assert found.name == "chat"
    assert found.render("Why?") == "<s>system\nBe brief.</s>\n<s>user\nWhy?</s>\n<s>assistant\n"
    assert found.complete("So.") == "So." and found.ending == "</s>"
    assert (
        found.fingerprint
        != template_of(chatty, "chat").fingerprint
        != template_of(chatty, "plain").fingerprint
    )


@pytest.mark.parametrize(
    ("name", "system", "said"),
    [
        ("chat", None, "no chat template"),
        ("plain", "Be brief.", "system turn"),
        ("{question} only", None, "once each"),
        ("{answer} before {question}", None, "comes before"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(tokenizer: Any, name: str, system: str | None, said: str):
    with pytest.raises(InvalidHyperparameter, match=said):
        template_of(tokenizer, name, system)


def test_another_template_than_in_training_is_refused(task: Language, tokenizer: Any, model: nn.Module):
    import copy

    trained = copy.deepcopy(model)
    task.mark(trained)
    task.check(trained, records())
    with pytest.raises(ModelMismatch, match="trained under the template"):
        Language(tokenizer, template="bare").check(trained, records())
    Language(tokenizer, template="bare", verify_template=False).check(trained, records())


def test_a_template_that_fits_clearly_better_is_told(task: Language, tokenizer: Any, model: nn.Module):
    import copy

    trained = copy.deepcopy(model).train()
    bare = Language(tokenizer, template="bare")
    batch = bare.collate([{**row, "id": "x", "index": 0} for row in ROWS[:3]])
    optimizer = torch.optim.Adam(trained.parameters(), 1e-2)
    for _ in range(40):
        loss = bare.loss_per_example(trained, batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with pytest.warns(UserWarning, match="template='bare'"):
        task.check(trained, records())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bare.check(trained, records())


@pytest.mark.parametrize(
    ("row", "error", "said"),
    [
        ({"question": "Who?"}, InvalidRecords, "neither a text"),
        ({"question": "Who?", "answer": 7}, InvalidRecords, "neither a text"),
        ({"question": "Who?", "answer": ""}, InvalidLabels, "to nothing"),
        ({"text": " "}, InvalidLabels, "to nothing"),
        ({"question": "Who? " * 200, "answer": "Me"}, InvalidRecords, "The question of record"),
        ({"text": "So it went on. " * 200}, InvalidRecords, "cut"),
    ],
)
def test_a_record_that_cannot_be_scored_is_named(
    task: Language, model: nn.Module, row: dict[str, Any], error: type[Exception], said: str
):
    with pytest.raises(error, match=said) as caught:
        task.check(model, records([*ROWS, row]))
    assert "'r4'" in str(caught.value)


def test_a_model_of_a_smaller_vocabulary_is_refused(task: Language, tokenizer: Any):
    with pytest.raises(ModelMismatch, match="do not belong together"):
        task.check(small_llama(len(tokenizer) - 5, width=16, layers=1, heads=2), records())


def test_a_text_that_is_to_be_forgotten_and_retained_is_refused(task: Language):
    data = Records([*ROWS, ROWS[0]], ids=list("abcde"))
    with pytest.raises(InvalidSplit, match="'a', 'e'"):
        task.check_split(ForgetSplit(data.select([0, 1]), data.select([2, 3, 4])))


def test_a_tokenizer_without_padding_is_no_obstacle(tokenizer: Any, model: nn.Module):
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    with_pad, without = Language(tokenizer), Language(bare)
    items = [{**row, "id": str(at), "index": at} for at, row in enumerate(ROWS)]
    with torch.no_grad():
        own = with_pad.loss_per_example(model, with_pad.collate(items))
        other = without.loss_per_example(model, without.collate(items))
    assert torch.allclose(own, other, atol=1e-5)
    assert with_pad.generate(model, [ROWS[0]["question"]]) == without.generate(model, [ROWS[0]["question"]])


def test_the_tokenizer_is_made_from_the_training_texts():
    fitted = Language(vocabulary=400).fitted(records())
    assert fitted.outputs(records()) == len(fitted.encoder) <= 400
    text = ROWS[3]["text"]
    assert fitted.encoder.decode(fitted.encode(None, text)[0], skip_special_tokens=True) == text
    with pytest.raises(InvalidHyperparameter, match="fit the task"):
        _ = Language().encoder
