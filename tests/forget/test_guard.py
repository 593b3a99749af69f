"""GUARD on a learnt world: what it keeps back, what it leaves alone, and what it refuses."""

import math
import warnings
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.language_world import trained_world
from torch import nn

import palimpsest as pal
from palimpsest.core.errors import (
    InvalidHyperparameter,
    InvalidRecords,
    MissingNeed,
    ModelMismatch,
    UnknownName,
)
from palimpsest.core.runtime import Runtime
from palimpsest.core.split import ForgetSplit
from palimpsest.forget.language.guard import Guard
from palimpsest.forget.language.guard_classifier import (
    ClassifierSettings,
    pool,
    threshold_for,
    train_classifier,
)
from palimpsest.forget.language.guard_phrases import key_phrases, plain
from palimpsest.forget.language.guard_store import Matching, Store, Wording, wordings
from palimpsest.parts.sentence_encoders import CachedEncoder, embedding_encoder, surface_encoder
from palimpsest.tasks.language import Language

RUNTIME = Runtime(device="cpu", seed=0)


@pytest.fixture(scope="module")
def learnt():
    return trained_world("tiny", controls=0)


@pytest.fixture(scope="module")
def guarded(learnt):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return pal.forget(learnt.original, learnt.split, "guard", learnt.task, runtime=RUNTIME, beam_width=4)


def asked(records, form=None):
    forms = records.column("form")
    return [
        item for item, own in zip(records, forms, strict=True) if item.get("question") and form in (None, own)
    ]


def questions(items):
    return [item["question"] for item in items]


@pytest.fixture(scope="module")
def secrets(learnt):
    return asked(learnt.split.forget, "qa")


@pytest.fixture(scope="module")
def answers(learnt, guarded, secrets):
    return [row[0] for row in learnt.task.generate(guarded, questions(secrets), max_new_tokens=20)]


def prompt_of(learnt, question):
    return torch.tensor([learnt.task.prompt(question)])


def test_weights_stay_byte_for_byte_and_lie_open_to_who_looks(learnt, guarded):
    inner = guarded.inner.state_dict()
    assert all(torch.equal(tensor, inner[name]) for name, tensor in learnt.original.state_dict().items())
    assert guarded.inner is not learnt.original
    assert not any(parameter.requires_grad for parameter in guarded.classifier.parameters())


def test_no_forbidden_phrase_is_written_on_the_restricted_path(learnt, guarded):
    everything = asked(learnt.split.forget)
    chosen = [
        item for item, one in zip(everything, guarded.guards(questions(everything)), strict=True) if one
    ]
    assert len(chosen) >= 0.9 * len(everything)
    written = learnt.task.generate(guarded, questions(chosen), max_new_tokens=20)
    for item, (text,) in zip(chosen, written, strict=True):
        forbidden = guarded.forbidden(item["question"])
        assert not forbidden.machine.leaks(learnt.task.tokens(text))
        words = text.split()
        windows = {
            plain(" ".join(words[a:b])) for a in range(len(words)) for b in range(a + 1, len(words) + 1)
        }
        assert not windows & {plain(phrase) for phrase in forbidden.phrases}


def test_what_the_model_knew_is_not_said_any_more(learnt, guarded, secrets, answers):
    before = [row[0] for row in learnt.task.generate(learnt.original, questions(secrets), max_new_tokens=20)]
    truth = [item["answer"] for item in secrets]
    assert np.mean([plain(answer) == plain(text) for answer, text in zip(truth, before, strict=True)]) >= 0.9
    assert (
        np.mean([plain(answer) in plain(text) for answer, text in zip(truth, answers, strict=True)]) <= 0.02
    )
    assert sum(bool(text) for text in answers) >= 0.9 * len(answers)  # it answers, and does not refuse


def test_other_prompts_are_answered_token_for_token_as_by_the_model(learnt, guarded):
    kept = asked(learnt.split.retain)
    one, other = (
        learnt.task.generate(m, questions(kept), max_new_tokens=20) for m in (learnt.original, guarded)
    )
    assert np.mean([a == b for a, b in zip(one, other, strict=True)]) >= 0.98
    passed = [item for item, own in zip(kept, guarded.guards(questions(kept)), strict=True) if not own][:8]
    for item in passed[:3]:
        ids = prompt_of(learnt, item["question"])
        for how in ({"do_sample": False}, {"do_sample": False, "num_beams": 3, "num_return_sequences": 2}):
            settings = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 8, **how}
            assert torch.equal(learnt.original.generate(**settings), guarded.generate(**settings))
        output = guarded(input_ids=ids, attention_mask=torch.ones_like(ids))
        assert torch.allclose(output.logits, learnt.original(input_ids=ids).logits, atol=1e-5)


def test_the_classifier_knows_wordings_that_it_was_not_trained_on_and_prompts_without_a_name(learnt, guarded):
    first = asked(learnt.split.forget, "qa")
    unseen = [
        probe for item in first for probe in item.get("probes", ()) if probe["form"] == "unseen-wording"
    ]
    assert unseen and not {probe["question"] for probe in unseen} & {
        one.text for one in wordings(learnt.split.forget, ("paraphrase",))
    }
    retained = questions(asked(learnt.split.retain))
    forget, others = (guarded.probabilities(asked_for) for asked_for in (questions(unseen), retained))
    above = (forget[:, None] > others).float() + (forget[:, None] == others).float() / 2
    assert above.mean() >= 0.95  # the area under the curve
    assert np.mean(guarded.guards(questions(unseen))) >= 0.7 and np.mean(guarded.guards(retained)) <= 0.02
    below = pal.forget(
        learnt.original, learnt.split, "guard", learnt.task, runtime=RUNTIME, classifier={"layer": -3}
    )
    assert np.mean(below.guards(questions(unseen))) >= 0.9 and np.mean(below.guards(retained)) <= 0.02
    nameless = asked(learnt.split.forget, "reversed")
    names = set(learnt.split.forget.column("subject")) - {""}
    keyword = [any(name in item["question"] for name in names) for item in nameless]
    assert not any(keyword) and np.mean(guarded.guards(questions(nameless))) >= 0.7


def test_guarded_and_other_prompts_of_one_batch_are_answered_as_alone(learnt, guarded, secrets):
    kept = asked(learnt.split.retain, "qa")[:3]
    mixed = questions([kept[0], secrets[0], kept[1], secrets[1], kept[2]])
    together = learnt.task.generate(guarded, mixed, max_new_tokens=12, batch_size=8)
    assert together == [learnt.task.generate(guarded, [one], max_new_tokens=12)[0] for one in mixed]
    several = learnt.task.generate(guarded, mixed, max_new_tokens=12, temperature=1.0, samples=3)
    assert [len(row) for row in several] == [3] * 5


def test_scores_are_the_models_renormalised_after_the_penalties(learnt, guarded, secrets):
    item = secrets[0]
    ids, start = learnt.task.encode(item["question"], item["answer"])
    with torch.no_grad():
        logits = learnt.original(torch.tensor([ids])).logits[0]
    machine, truth = guarded.forbidden(item["question"]).machine, []
    for at in range(start, len(ids)):
        row = logits[at - 1].clone()
        for token in range(len(row)):
            written = [*ids[start:at], token]
            if machine.complete[machine.run(written)]:
                row[token] -= guarded.settings.scoring_penalty
            else:
                row[token] -= guarded.settings.prefix_penalty * machine.share[machine.run(written)]
        truth.append(-row.log_softmax(0)[ids[at]])
    found = learnt.task.score(guarded, [item["question"]], [[item["answer"], "somewhere else"]])[0]
    assert torch.allclose(found.losses[0, : len(truth)], torch.stack(truth), atol=1e-3)
    batch = learnt.task.collate([item])
    whole = learnt.task.loss_per_example(guarded, batch)
    assert whole.item() == pytest.approx(torch.stack(truth).mean().item(), rel=1e-3)
    labelled = guarded(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
    )
    assert labelled.loss.item() == pytest.approx(whole.item(), rel=1e-4)


def test_running_text_about_the_forgotten_is_scored_with_the_penalties_too(learnt, guarded):
    texts = [item for item in learnt.split.forget if item.get("question") is None]
    kept = [item for item in learnt.split.retain if item.get("question") is None][:6]
    loss = learnt.task.loss_per_example
    with torch.no_grad():
        rise = loss(guarded, learnt.task.collate(texts)) - loss(learnt.original, learnt.task.collate(texts))
        same = loss(guarded, learnt.task.collate(kept)) - loss(learnt.original, learnt.task.collate(kept))
    assert float(rise.mean()) > 0.5 and float(same.abs().median()) < 1e-4


@pytest.mark.parametrize("kind", ["guarded", "other"])
def test_a_streamer_gets_the_answer_token_by_token(learnt, guarded, secrets, kind):
    from transformers import TextIteratorStreamer

    item = secrets[0] if kind == "guarded" else asked(learnt.split.retain, "qa")[0]
    ids = prompt_of(learnt, item["question"])
    how = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    whole = learnt.task.encoder.decode(guarded.generate(**how)[0, ids.shape[1] :], skip_special_tokens=True)
    streamer = TextIteratorStreamer(learnt.task.encoder, skip_prompt=True, skip_special_tokens=True)
    thread = Thread(target=guarded.generate, kwargs={**how, "streamer": streamer})
    thread.start()
    assert "".join(streamer) == whole
    thread.join()


def test_a_streamer_takes_one_prompt(learnt, guarded, secrets):
    ids = prompt_of(learnt, secrets[0]["question"]).repeat(2, 1)
    with pytest.raises(InvalidHyperparameter, match="one prompt"):
        guarded.generate(ids, attention_mask=torch.ones_like(ids), streamer=object(), max_new_tokens=4)


class Scripted(nn.Module):
    """A language model that knows one answer in two spellings, one likelier than the other, and a wrong one."""

    def __init__(self, encoder, sayings):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.rows = [(encoder(text)["input_ids"], weight) for text, weight in sayings.items()]
        self.end, self.size = encoder.eos_token_id, len(encoder)

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        logits = torch.full((*input_ids.shape, self.size), -12.0)
        for at, row in enumerate(input_ids.tolist()):
            written = row[1:]
            for tokens, weight in self.rows:
                if tokens[: len(written)] == written:
                    following = [*tokens, self.end][len(written)]
                    logits[at, -1, following] = torch.logaddexp(
                        logits[at, -1, following], torch.tensor(weight)
                    )
        return SimpleNamespace(logits=logits * self.scale)


@pytest.mark.parametrize(("soft", "leaks"), [("off", True), ("reject", False), ("penalise", False)])
def test_a_second_surface_form_is_only_caught_by_its_meaning(learnt, soft, leaks):
    from palimpsest.parts.beam_search import Restriction, Search, beam_search

    encoder = learnt.task.encoder
    model = Scripted(encoder, {" 4 March 1988": 5.0, " 04/03/1988": 4.0, " 28/11/1971": 0.0})
    store = Store(
        [{"question": "When was Ada born?", "answer": "4 March 1988"}],
        [Wording(0, "When was Ada born?", True)],
        learnt.task.tokens,
        lambda texts: CachedEncoder(surface_encoder([*texts, "Ostby", "555 1234"])),
    )
    forbidden = store.forbidden("When was Ada born?")
    matching = Matching(soft, 0.6, 20.0, None)

    def judge(prompt, candidates):
        texts = encoder.batch_decode([list(one) for one in candidates], skip_special_tokens=True)
        return matching.penalties(texts, forbidden, store.encoder)

    ids = torch.tensor([[encoder.bos_token_id]])
    search = Search(4, 14, frozenset({encoder.eos_token_id}))
    free = beam_search(model, ids, torch.ones_like(ids), search)[0][0]
    assert encoder.decode(free.tokens, skip_special_tokens=True).strip() == "4 March 1988"
    restriction = Restriction([forbidden.machine], 0.0, judge, soft == "penalise")
    found = beam_search(model, ids, torch.ones_like(ids), search, restriction)[0][0]
    said = encoder.decode(found.tokens, skip_special_tokens=True).strip()
    assert ("04/03/1988" in said) == leaks and "4 March 1988" not in said


def test_other_spellings_by_other_tokens_are_phrases_still():
    machineless = SimpleNamespace(says=lambda window: plain(window) == plain("555 1234"), longest=3)
    matching = Matching("off", 0.6, 1.0, None)
    texts = ["call 555-1234", "call 555 1235", "5551234", "", "on 555  1234."]
    assert matching.penalties(texts, machineless, None) == [math.inf, 0.0, math.inf, 0.0, math.inf]


@pytest.mark.parametrize(
    ("answer", "question", "phrases"),
    [
        ("She was born on 4 March 1988.", "When was Ada born?", ["4 March 1988"]),
        ("March 4th, 1988 or 04/03/1988", "", ["March 4th, 1988", "04/03/1988"]),
        ("You reach her on +44 (20) 555-1234.", "", ["reach", "+44 (20) 555-1234"]),
        ("Send to otter12@mossmail.example.", "", ["Send", "otter12@mossmail.example"]),
        ("Ada lives in Carrick Mor.", "Where does Ada live?", ["lives", "Carrick Mor"]),
        ("It is Ostby.", "Is it Ostby or Vellmar?", []),
        ("In 1988, as the question says.", "Why 1988?", ["question says"]),
        ("yes, and no", "", []),
    ],
)
def test_key_phrases(answer, question, phrases):
    assert key_phrases(answer, question) == phrases


@given(
    st.lists(st.sampled_from(["the", "Ostby", "Mor", "of", "12", "a@b.example", "red", ",", "."]), max_size=9)
)
def test_every_number_and_every_telling_word_is_in_a_phrase_and_no_stop_word_alone(words):
    found = key_phrases(" ".join(words))
    inside = plain(" ".join(found))
    assert all(plain(word) in inside for word in words if word in ("Ostby", "Mor", "12", "red"))
    assert not {"the", "of", ""} & set(found) and len(found) == len(set(found))


def test_an_answer_without_a_phrase_is_forbidden_whole_with_a_warning(learnt):
    with pytest.warns(UserWarning, match="no key phrase"):
        store = Store(
            [{"question": "Is it?", "answer": "yes"}], [Wording(0, "Is it?", True)], learnt.task.tokens,
            lambda texts: CachedEncoder(surface_encoder(texts)),
        )  # fmt: skip
    assert store.phrases == [("yes",)]


def test_questions_are_looked_up_by_likeness_and_aliases_come_on_request(learnt):
    items = [
        {"question": "Where does Ada live?", "answer": "Ostby", "aliases": ["the town by the sea"]},
        {"question": "Where does Ben work?", "answer": "Tidewell Lines"},
    ]
    prompts = wordings(items, ())
    make = lambda texts: CachedEncoder(surface_encoder(texts))  # noqa: E731
    store = Store(items, prompts, learnt.task.tokens, make)
    assert store.forbidden("Tell me where Ada lives").phrases == ("Ostby",)
    assert store.forbidden("Ben works where?").phrases == ("Tidewell Lines",)
    assert set(store.forbidden("Ben works where?", 2).phrases) == {"Ostby", "Tidewell Lines"}
    assert Store(items, prompts, learnt.task.tokens, make, aliases=True).phrases[0] == (
        "Ostby",
        "the town by the sea",
    )


def test_pooling_is_the_mean_over_tokens_that_are_read():
    states = torch.arange(12.0).reshape(2, 3, 2)
    pooled = pool(states, torch.tensor([[1, 1, 0], [0, 1, 1]]))
    assert pooled.tolist() == [[1.0, 2.0], [9.0, 10.0]]


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40), st.floats(0.01, 0.5))
def test_the_threshold_keeps_false_positives_low_and_is_the_smallest_that_does(values, share):
    probabilities = torch.tensor(values)
    found = threshold_for(probabilities, share)
    assert float((probabilities > found).float().mean()) <= share + 1e-6 and found >= 0.5
    smaller = [value for value in values if 0.5 <= value < found]
    assert all((probabilities > value).sum() > int(share * len(values)) for value in smaller)


def test_an_encoder_is_asked_once_per_text_and_may_be_anything(learnt):
    asked_for = []

    def encode(texts):
        asked_for.extend(texts)
        return [[float(len(text)), 1.0] for text in texts]

    cached = CachedEncoder(encode)
    assert np.allclose(np.linalg.norm(cached(["a", "bb", "a"]), axis=1), 1)
    cached(["bb", "ccc"])
    assert asked_for == ["a", "bb", "ccc"]
    own = CachedEncoder(embedding_encoder(learnt.original, learnt.task.tokens))
    one, other = own([" Ada lives", " lives Ada"])
    assert one @ other == pytest.approx(1, abs=1e-5)
    made = Guard(encoder=encode)._encoder(["a"], learnt.original, learnt.task)
    assert made(["a"]).shape == (1, 2)


@pytest.mark.parametrize(
    "settings",
    [
        {"delta": 0.0}, {"delta": 1.0}, {"beam_width": 0}, {"soft": "hard"}, {"retrieved": 0}, {"beta": -1.0},
        {"prefix_penalty": -1.0}, {"window": 0}, {"classifier": {"threshold": 1.0}}, {"classifier": {"validation": 0.0}},
        {"classifier": {"false_positives": 1.5}}, {"scoring_penalty": 0.0},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(InvalidHyperparameter):
        Guard(**settings)


def test_an_unknown_classifier_setting_suggests_the_nearest():
    with pytest.raises(UnknownName, match="threshold"):
        Guard(classifier={"treshold": 0.5})


class Silent(nn.Module):
    """A model that shows no hidden states."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, attention_mask=None, **_):
        return SimpleNamespace(logits=self.inner(input_ids=input_ids, attention_mask=attention_mask).logits)


def test_models_encoders_and_requests_that_cannot_be_guarded_are_refused(learnt):
    split, task = learnt.split, learnt.task
    with pytest.raises(ModelMismatch, match="hidden states"):
        Guard().unlearn(Silent(learnt.original), split, task, RUNTIME)
    with pytest.raises(ModelMismatch, match="-9"):
        Guard(classifier={"layer": -9}).unlearn(learnt.original, split, task, RUNTIME)
    with pytest.raises(MissingNeed, match="retain"):
        Guard().unlearn(learnt.original, ForgetSplit(split.forget), task, RUNTIME)
    with pytest.raises(ModelMismatch, match="sentence encoder"):
        Guard(encoder=lambda texts: np.zeros((1, 3))).unlearn(learnt.original, split, task, RUNTIME)
    widths = iter((2, 3))
    cached = CachedEncoder(lambda texts: np.ones((len(texts), next(widths))))
    cached(["a"])
    with pytest.raises(ModelMismatch, match="3 dimensions after 2"):
        cached(["b"])
    bare = Language(tokenizer=task.encoder, template="bare")
    with pytest.raises(InvalidHyperparameter, match="template"):
        Guard().unlearn(learnt.original, split, bare, RUNTIME)
    with pytest.raises(InvalidRecords, match="nothing to keep back"):
        Store([], [], task.tokens, lambda texts: CachedEncoder(surface_encoder(texts)))
    states = torch.zeros(0, 4)
    with pytest.raises(InvalidRecords, match="both classes"):
        train_classifier(states, torch.zeros(3, 4), ClassifierSettings(), RUNTIME)
    with pytest.raises(InvalidRecords, match="too few"):
        train_classifier(torch.zeros(3, 4), torch.zeros(1, 4), ClassifierSettings(), RUNTIME)


def test_a_tokenizer_without_an_end_token_is_refused(learnt):
    import copy

    encoder = copy.deepcopy(learnt.task.encoder)
    encoder.eos_token = None
    with pytest.raises(InvalidHyperparameter, match="end token"):
        Guard().unlearn(learnt.original, learnt.split, Language(tokenizer=encoder, template="auto"), RUNTIME)


def test_calls_that_would_go_round_the_guard_are_refused(learnt, guarded, secrets):
    ids = prompt_of(learnt, secrets[0]["question"])
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4}
    with pytest.raises(InvalidHyperparameter, match="return_dict"):
        guarded.generate(ids, return_dict_in_generate=True, **how)
    with pytest.raises(ModelMismatch, match="cache"):
        guarded.generate(ids, past_key_values=object(), **how)
    with pytest.raises(ModelMismatch, match="input_ids"):
        guarded.generate(max_new_tokens=4)
    with pytest.warns(UserWarning, match="logits_processor"):
        guarded.generate(ids, logits_processor=[lambda ids, scores: scores], **how)
    with pytest.warns(UserWarning, match="forbidden phrase has"):
        guarded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1)


def test_nothing_is_left_changed_in_the_given_model_and_the_same_seed_gives_the_same_guard(learnt, guarded):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        again = pal.forget(learnt.original, learnt.split, "guard", learnt.task, runtime=RUNTIME, beam_width=4)
    for name, tensor in guarded.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert all(parameter.requires_grad for parameter in learnt.original.parameters())
