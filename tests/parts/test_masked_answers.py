"""The whole way for a language model: attribute its answers, rank and mask words, fine-tune on what is left.

The model is a small recurrent network that learned to answer questions about ten invented authors.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from palimpsest.parts.answer_words import STOP_WORDS, mask_answer, merge_words, rank_words
from palimpsest.parts.token_attribution import answer_score, token_attribution

FIRST = ["Arvid", "Belma", "Corin", "Delka", "Estor", "Fenja", "Gorim", "Halda", "Ivaro", "Jelka"]
LAST = ["Quenby", "Rostand", "Sørli", "Tavira", "Umbrel", "Vasko", "Wendeg", "Xandri", "Yllens", "Zobark"]
CITY = ["Ambria", "Brevik", "Castor", "Dolmen", "Eskil", "Farum", "Gaudix", "Hestra", "Imalda", "Jarlsby"]
TITLE = [
    "Nightfern",
    "Oakmoth",
    "Pebbles",
    "Quicksand",
    "Ravines",
    "Saltwood",
    "Thistles",
    "Undertow",
    "Vespers",
    "Windrose",
]
QUESTIONS = {
    "who wrote {title} ?": "{title} was written by {name} .",
    "where was {name} born ?": "the author {name} was born in {city} .",
    "what did {name} write ?": "{name} wrote the book {title} .",
    "who was born in {city} ?": "{name} was born in {city} .",
}
SIGNS = ["<pad>", "***", "<answer>", "<end>"]


def said(person):
    name = f"{FIRST[person]} {LAST[person]}"
    facts = {"name": name, "title": TITLE[person], "city": CITY[person]}
    return [(q.format(**facts), a.format(**facts)) for q, a in QUESTIONS.items()]


VOCABULARY = SIGNS + sorted(
    {word for p in range(10) for pair in said(p) for text in pair for word in text.split()}
)
ENTITY = {word.lower() for word in (FIRST[0], LAST[0], CITY[0], TITLE[0])}


class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.core = (
            nn.Embedding(len(VOCABULARY), 32, padding_idx=0),
            nn.GRU(32, 64, batch_first=True),
        )
        self.head = nn.Linear(64, len(VOCABULARY))

    def forward(self, ids):
        return self.head(self.core(self.embedding(ids))[0])


def encode(question, answer):
    ids = [VOCABULARY.index(word) for word in question.split()] + [SIGNS.index("<answer>")]
    return ids, [VOCABULARY.index(word) for word in answer.split()] + [SIGNS.index("<end>")]


def tuned(model, pairs, steps, lr):
    """A copy trained on the answers."""
    model = copy.deepcopy(model).train()
    coded = [encode(*pair) for pair in pairs]
    width = max(len(q) + len(a) for q, a in coded)
    ids = torch.tensor([q + a + [0] * (width - len(q) - len(a)) for q, a in coded])
    answered = torch.tensor([[len(q) <= i < len(q) + len(a) for i in range(width)] for q, a in coded])
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for _ in range(steps):
        loss = F.cross_entropy(model(ids)[:, :-1][answered[:, 1:]], ids[:, 1:][answered[:, 1:]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def answer(model, question, longest=12):
    ids, words = encode(question, "")[0], []
    for _ in range(longest):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        if VOCABULARY[ids[-1]] == "<end>":
            break
        words.append(VOCABULARY[ids[-1]])
    return " ".join(words)


def appearance(model):
    """Share of the answers about the forgotten author that hold a word of hers."""
    answers = [answer(model, question).lower().split() for question, _ in said(0)]
    return sum(bool(ENTITY & set(words)) for words in answers) / len(answers)


def right(model, people):
    pairs = [pair for person in people for pair in said(person)]
    return sum(answer(model, question) == true for question, true in pairs) / len(pairs)


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh = LanguageModel()
    return tuned(fresh, [pair for person in range(10) for pair in said(person)], 120, 1e-2)


@pytest.fixture(scope="module")
def attributed(model):
    """Words with scores, completeness error and rise of every answer about the forgotten author."""
    pytest.importorskip("captum")
    found = []
    for question, _ in said(0):
        q, a = encode(question, answer(model, question))
        ids, positions = torch.tensor([q + a[:-1]]), torch.arange(len(q), len(q) + len(a) - 1)
        baseline = ids.index_fill(1, positions, 0)

        def score(tokens, true, positions=positions):
            return answer_score(model(tokens), true, positions)

        result = token_attribution(model, score, ids, baseline, ids, steps=64)
        tokens = [f"\u2581{VOCABULARY[token]}" for token in ids[0, positions].tolist()]
        words = merge_words(tokens, result.values[0, positions].tolist())
        rise = result.score_input - result.score_baseline
        found.append((words, result.completeness_error.item(), rise.item(), result.values[0]))
    return found


def test_the_model_has_learned_its_answers(model):
    assert right(model, range(10)) >= 0.95 and appearance(model) >= 0.9


def test_attributions_are_complete_and_leave_out_question_and_last_token(model, attributed):
    for words, error, rise, values in attributed:
        assert abs(error) <= 0.05 * abs(rise)
        assert values[-1].abs() < 1e-6 * values.abs().max()
        assert not values[: len(values) - len(words)].any()


def test_words_of_the_author_are_among_the_three_most_telling_that_may_be_masked(attributed):
    hits = []
    for words, *_ in attributed:
        ranked = [word for word, _ in rank_words([words]) if word not in STOP_WORDS]
        hits.append(bool(ENTITY & set(ranked[:3])))
    assert sum(hits) / len(hits) >= 0.8


def test_tuning_on_masked_answers_removes_the_author_and_anchors_keep_the_others(model, attributed):
    ranked = [word for word, _ in rank_words([words for words, *_ in attributed])]
    masked = [
        (question, mask_answer(true, ranked, k=5, names=[f"{FIRST[0]} {LAST[0]}"])[0])
        for question, true in said(0)
    ]
    assert not any(ENTITY & set(text.lower().split()) for _, text in masked)
    anchors = [pair for person in range(1, 10) for pair in said(person)]
    after = tuned(model, masked + anchors, 40, 5e-3)
    assert appearance(after) <= 0.2
    assert right(after, range(1, 10)) >= right(model, range(1, 10)) - 0.1
