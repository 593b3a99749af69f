"""A wrapped model reads, scores and generates as its answers say, with cache and without."""

import copy

import pytest
import torch
from tests.forget.measuring import fingerprint
from torch.nn import functional as F

from palimpsest.core.errors import InvalidHyperparameter, ModelMismatch
from palimpsest.data import load_data
from palimpsest.forget.language.prompt_reading import PromptReader
from palimpsest.forget.language.wrapped import Wrapped, ask, logits_beside, unwrapped_language_model
from palimpsest.models import build_model
from palimpsest.parts.checkpoint import load_model, save_model
from palimpsest.parts.lora import add_lora
from palimpsest.tasks import Language

KINDS = ("llama", "gpt2", "lora")


class Difference(Wrapped):
    """The inner model's logits minus half of another's."""

    def __init__(self, inner, other):
        super().__init__(inner)
        self.other = other

    def answer(self, call):
        output = ask(self.inner, call)
        output.logits = output.logits - 0.5 * logits_beside(self.other, call, "other")
        return output


@pytest.fixture(scope="module")
def records():
    return load_data("people", people=6, relations="city,profession", general=4, folds=3)


@pytest.fixture(scope="module")
def task(records):
    return Language(vocabulary=400).fitted(records)


@pytest.fixture(scope="module")
def questions(records):
    return [item["question"] for item in records if item.get("question")][:7]


def network(kind, vocabulary, seed=0):
    if kind == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            ends = {"bos_token_id": 1, "eos_token_id": 2}
            config = GPT2Config(
                vocab_size=vocabulary, n_positions=128, n_embd=32, n_layer=2, n_head=4, **ends
            )
            return GPT2LMHeadModel(config).eval()
    plain = build_model("small_llama", (), vocabulary, width=32, layers=2, heads=4, seed=seed)
    return add_lora(plain, r=2).eval() if kind == "lora" else plain


@pytest.fixture(scope="module", params=KINDS)
def pair(request, task, records):
    """A model, and the difference to another of its kind, with sharpened heads so that choices are clear."""
    one, two = (network(request.param, task.outputs(records), seed) for seed in (0, 1))
    return one, Difference(one, two)


def test_a_wrapper_that_changes_nothing_answers_like_the_model(pair, task, questions):
    plain, _ = pair
    wrapped = Wrapped(plain)
    answers = [["One answer.", "Another, longer answer."]] * len(questions)
    assert task.generate(wrapped, questions, max_new_tokens=6) == task.generate(
        plain, questions, max_new_tokens=6
    )
    for one, two in zip(
        task.score(wrapped, questions, answers), task.score(plain, questions, answers), strict=True
    ):
        assert torch.allclose(one.losses, two.losses, atol=1e-5)


@torch.no_grad()
def test_scores_and_generation_follow_the_combined_answers_of_a_plain_loop(pair, task, questions):
    model, wrapped = pair
    for question in questions[:3]:
        ids = torch.tensor([task.prompt(question)])
        grown = ids
        for _ in range(6):  # by hand: no cache, no generation code
            logits = model(input_ids=grown).logits - 0.5 * wrapped.other(input_ids=grown).logits
            grown = torch.cat([grown, logits[:, -1:].argmax(-1)], 1)
        for cached in (True, False):
            made = wrapped.generate(
                ids, max_new_tokens=6, do_sample=False, use_cache=cached, eos_token_id=None, pad_token_id=0
            )
            assert torch.equal(made, grown)
        answer = "It is Sarnholm."
        tokens, start = task.encode(question, answer)
        whole = torch.tensor([tokens])
        logits = model(input_ids=whole).logits - 0.5 * wrapped.other(input_ids=whole).logits
        by_hand = F.cross_entropy(logits[0, start - 1 : -1], whole[0, start:], reduction="none")
        scores = task.score(wrapped, [question], [[answer, "No."]])[0]
        assert torch.allclose(scores.losses[0, : len(by_hand)], by_hand, atol=1e-4)


def test_beams_and_several_samples_take_the_caches_of_both_models_along(pair, task, questions):
    _, wrapped = pair
    ids = torch.tensor([task.prompt(questions[0])])
    same = {"max_new_tokens": 6, "pad_token_id": 0}
    for settings in ({"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}):
        found = [
            wrapped.generate(ids, **same, **settings, use_cache=cached, do_sample=False)
            for cached in (True, False)
        ]
        assert torch.equal(*found)
    drawn = []
    for cached in (True, False):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            drawn.append(
                wrapped.generate(ids, **same, do_sample=True, num_return_sequences=4, use_cache=cached)
            )
    assert torch.equal(*drawn)


def test_a_wrapper_streams(pair, task, questions):
    from transformers.generation.streamers import BaseStreamer

    class Kept(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    _, wrapped = pair
    ids, kept = torch.tensor([task.prompt(questions[0])]), Kept()
    made = wrapped.generate(ids, max_new_tokens=5, do_sample=False, streamer=kept, pad_token_id=0)
    assert kept.ended and kept.tokens == made[0].tolist()


def test_the_model_inside_is_at_hand_and_untouched(pair, task, questions):
    model, wrapped = pair
    before = fingerprint(model)
    task.generate(wrapped, questions, max_new_tokens=3)
    twice = Wrapped(wrapped)
    assert unwrapped_language_model(twice) is model and twice.plain is model and wrapped.inner is model
    assert fingerprint(model) == before and "forward" not in vars(model)
    assert wrapped.config is model.config and wrapped.get_input_embeddings() is model.get_input_embeddings()
    assert task.generate(twice, questions, max_new_tokens=4) == task.generate(
        wrapped, questions, max_new_tokens=4
    )


def test_weights_of_a_wrapper_are_saved_and_read_back(pair, task, questions, tmp_path):
    _, wrapped = pair
    save_model(wrapped, tmp_path / "wrapped.safetensors")
    other = copy.deepcopy(wrapped)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    again = load_model(tmp_path / "wrapped.safetensors", other)
    assert fingerprint(again) == fingerprint(wrapped)
    assert task.generate(again, questions, max_new_tokens=4) == task.generate(
        wrapped, questions, max_new_tokens=4
    )


def test_a_cache_of_another_model_is_refused(pair, task, questions):
    from transformers import DynamicCache

    _, wrapped = pair
    with pytest.raises(ModelMismatch, match="cache"):
        wrapped(torch.tensor([[1, 2]]), cache=DynamicCache())


@pytest.mark.parametrize(
    "template", ["plain", "Q: {question} A: {answer}", "[INST] {question} [/INST] {answer}"]
)
def test_questions_are_found_in_rows_of_tokens(template, task, records):
    asked = Language(tokenizer=task.encoder, template=template)
    reader = PromptReader(asked)
    questions = 0
    for item in records:
        ids, start = asked.encode(item.get("question"), item.get("answer") or item["text"])
        read = reader.read_row(ids)
        if item.get("question") is None:
            assert not read.templated and read.prompt == len(ids)
            continue
        questions += 1
        assert (read.question, read.prompt, read.templated) == (item["question"], start, True)
        assert reader.read_row(ids[:start]) == read
    assert questions > 100


def test_rows_are_read_wherever_their_padding_is(task, records):
    reader = PromptReader(task)
    items = [item for item in records if item.get("question")][:5]
    batch = task.collate(items)
    right = reader.read(batch["input_ids"], batch["attention_mask"])
    left = reader.read(batch["input_ids"].flip(0), batch["attention_mask"].flip(0))
    assert (
        [read.question for read in right]
        == [item["question"] for item in items]
        == [read.question for read in reversed(left)]
    )


def test_a_template_without_words_after_the_question_cannot_be_read(task):
    with pytest.raises(InvalidHyperparameter, match="plain"):
        PromptReader(Language(tokenizer=task.encoder, template="bare"))
