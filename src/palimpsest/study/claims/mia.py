"""Measurements for the claims of membership inference as an audit."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.audit.membership import language_signals as language
from palimpsest.audit.membership.findings import tpr_finding
from palimpsest.audit.membership.rates import auc, tpr_at
from palimpsest.audit.membership.shadow_audit import ShadowMembership
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.evidence import UNLEARNED, Evidence
from palimpsest.core.finding import Judgement, Outcome
from palimpsest.core.intervals import auc_interval, clopper_pearson
from palimpsest.core.runtime import Runtime
from palimpsest.study.claims.measuring import Setting, measurement

RUNS = 16
PERMUTATIONS = 400
ALPHA = 0.01
TEXTS, WORDS, LENGTH = 30, 50, 16
"""Texts a side, size of the vocabulary, tokens of a text."""
STEPS = 150


@measurement("mia.tpr-ratio")
def tpr_ratio(setting: Setting) -> float:
    """True positive rate of online LiRA at 1 % over that of the confidence alone (of one member if that has none)."""
    found = {finding.name: finding for finding in _attack(setting).findings}
    ours, plain = (found[f"{name}_tpr_at_{ALPHA:g}"] for name in ("online", "confidence"))
    assert ours.value is not None and plain.value is not None
    hits = [round(finding.value * finding.n) for finding in (ours, plain) if finding.value is not None]
    return hits[0] / max(hits[1], 1)  # whole records: a quotient of rates misses 5 by a rounding error


@measurement("mia.permuted-auc")
def permuted_auc(setting: Setting) -> float:
    """Share of permutations of the membership labels under which LiRA's AUC is within 3 errors of 0.5."""

    def kept(members: np.ndarray, others: np.ndarray) -> bool:
        error, _, _ = auc_interval(members, others)
        return abs(auc(members, others) - 0.5) <= 3 * error

    return _permuted(setting, kept)


@measurement("mia.permuted-tpr")
def permuted_tpr(setting: Setting) -> float:
    """Share of permutations under which the interval of the rate at 1 % holds 1 %."""

    def kept(members: np.ndarray, others: np.ndarray) -> bool:
        low, high = clopper_pearson(int(tpr_at(members, others, ALPHA).hit.sum()), len(members))
        return low <= ALPHA <= high

    return _permuted(setting, kept)


@measurement("mia.permuted-rates")
def permuted_rates(setting: Setting) -> float:
    """Share of permutations under which the intervals of true and false positive rate at 1 % overlap."""

    def kept(members: np.ndarray, others: np.ndarray) -> bool:
        found = tpr_at(members, others, ALPHA)
        low, _ = clopper_pearson(int(found.hit.sum()), len(members))
        return low <= clopper_pearson(found.false, len(others))[1]

    return _permuted(setting, kept)


@measurement("mia.refusals")
def refusals(setting: Setting) -> float:
    """Of two ways to ask for a rate of 0.1 % with 50 non-members, how many are refused."""
    random = setting.runtime.numpy("refusals")
    members, others = random.random(500), random.random(50)
    finding = tpr_finding("membership", "rate", {UNLEARNED: (members, others)}, 0.001)
    refused = int(finding.value is None and finding.judgement == Judgement.INVALID)
    try:
        tpr_at(members, others, 0.001)
    except InvalidAudit:
        refused += 1
    return float(refused)


@measurement("mia.language-loss-auc")
def language_loss_auc(setting: Setting) -> float:
    """AUC of the mean log-probability on texts that a small language model was overfitted on."""
    return Language(setting.runtime).attack(lambda lp, _: language.mean_log_probability(lp))


@measurement("mia.language-min-k-gap")
def language_min_k_gap(setting: Setting) -> float:
    """Distance of the AUC of Min-K 40 % from that of the mean log-probability."""
    model = Language(setting.runtime)
    plain = model.attack(lambda lp, _: language.mean_log_probability(lp))
    return abs(model.attack(lambda lp, _: language.min_k(lp, 0.4)) - plain)


@measurement("mia.language-reference-gain")
def language_reference_gain(setting: Setting) -> float:
    """AUC with a reference model that saw neither side, minus that of the mean log-probability."""
    model = Language(setting.runtime)
    plain = model.attack(lambda lp, _: language.mean_log_probability(lp))
    return model.attack(language.reference_score) - plain


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Where the shadow models of all measurements of this process are kept."""
    return tempfile.TemporaryDirectory(prefix="palimpsest-mia-")


def _attack(setting: Setting) -> Outcome:
    """LiRA on the original model, with shadow models that all measurements share."""
    audit = ShadowMembership(attacks=("lira",), runs=RUNS, retained=0, folder=_folder().name)
    return audit.run(
        Evidence(setting.original, setting.split, setting.task, setting.runtime, setting.original)
    )


def _permuted(setting: Setting, kept: Callable[[np.ndarray, np.ndarray], bool]) -> float:
    rows = [row for row in _attack(setting).series["membership_scores"] if row["attack"] == "online"]
    scores = np.array([row["score"] for row in rows], float)
    count = sum(row["part"] == "forget" for row in rows)
    random = setting.runtime.numpy("permutations")
    drawn = [random.permutation(scores) for _ in range(PERMUTATIONS)]
    return float(np.mean([kept(values[:count], values[count:]) for values in drawn]))


class Language:
    """A small recurrent language model overfitted on 30 texts, a reference model, and 30 unseen texts.

    Texts are chains of words in which every word has a few likely followers, alike for all texts, so that
    both sides come from one distribution.

    Args:
        runtime: Decides texts and models.
    """

    def __init__(self, runtime: Runtime):
        random = runtime.numpy("texts")
        followers = np.stack([random.dirichlet(np.full(WORDS, 0.1)) for _ in range(WORDS)])
        self.texts = torch.from_numpy(_chains(followers, 4 * TEXTS, random))
        with runtime.seeded("language models"):
            self.model = _fitted(self.texts[:TEXTS])
            self.reference = _fitted(self.texts[2 * TEXTS :])

    def attack(self, score: Callable[[Tensor, Tensor], float]) -> float:
        """AUC of a score of (log-probabilities, those under the reference model) of a text."""
        lp, lp_reference = (
            [language.token_log_probabilities(model(text[None, :-1])[0], text[1:]) for text in self.texts]
            for model in (self.model, self.reference)
        )
        found = np.array([score(a, b) for a, b in zip(lp, lp_reference, strict=True)])
        return auc(found[:TEXTS], found[TEXTS : 2 * TEXTS])


class _Recurrent(nn.Module):
    def __init__(self, width: int = 64):
        super().__init__()
        self.words, self.memory = nn.Embedding(WORDS, width), nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.memory(self.words(ids))[0])


def _chains(followers: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    ids = np.empty((count, LENGTH), np.int64)
    ids[:, 0] = random.integers(0, WORDS, count)
    for place in range(1, LENGTH):
        ids[:, place] = [random.choice(WORDS, p=followers[before]) for before in ids[:, place - 1]]
    return ids


def _fitted(texts: Tensor) -> nn.Module:
    model = _Recurrent()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(STEPS):
        loss = F.cross_entropy(model(texts[:, :-1]).flatten(0, 1), texts[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)
