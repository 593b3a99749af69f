"""Measurements for the claims of the step-by-step attack (Sleek): refusals and gradients on some forms of a fact."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from torch import nn

from palimpsest.audit.answers import find_alias
from palimpsest.audit.hit_rates import adjusted_leak
from palimpsest.audit.language.asked import Question, greedy_hits, probes, questions, replies
from palimpsest.audit.language.sleek import Sleek
from palimpsest.core.errors import MissingNeed
from palimpsest.core.evidence import ORIGINAL, UNLEARNED, Evidence
from palimpsest.core.finding import Outcome
from palimpsest.core.split import ForgetSplit
from palimpsest.forget import forget
from palimpsest.parts.reinitialise import reinitialised
from palimpsest.parts.training import fit, recipe_of
from palimpsest.study.claims.measuring import Setting, measurement

CITY, BIRTH = "city", "birth"
DIRECT = ("qa",)
"""The form of the plain question."""
STEPS: dict[str, Any] = {"warmup": 0.0, "schedule": "constant", "batch_size": 10}
REFUSING: dict[str, Any] = {**STEPS, "lr": 1e-3, "epochs": 6}
"""Refusal tuning on the plain questions: enough to silence most of them."""
ASCENT: dict[str, Any] = {**STEPS, "lr": 1e-3, "epochs": 5, "gamma": 0.5}
"""Gradient difference."""
LONG = 2
"""Times as many epochs for gradient difference on all forms."""


@dataclass(frozen=True)
class Rates:
    """Hit rates on a part of the people, by way of asking.

    Attributes:
        plain: The city, asked plainly.
        chain: The city, in the worked chain.
        country_by_chain: The country, in the worked chain.
        country: The country, asked plainly.
    """

    plain: float
    chain: float
    country_by_chain: float
    country: float

    @property
    def all(self) -> tuple[float, float, float, float]:
        """All four."""
        return self.plain, self.chain, self.country_by_chain, self.country


@measurement("sleek.original-lowest")
def original_lowest(setting: Setting) -> float:
    """Lowest of the four hit rates of the original on the forgotten people."""
    bench = _bench(setting)
    return min(bench.rates(setting.original).all)


@measurement("sleek.control-above-chance")
def control_above_chance(setting: Setting) -> float:
    """Largest hit rate of a retrained model minus what guessing gives."""
    bench = _bench(setting)
    found = bench.rates(bench.control)
    return max(rate - chance for rate, chance in zip(found.all, bench.chances, strict=True))


@measurement("sleek.refusal-plain")
def refusal_plain(setting: Setting) -> float:
    """Plain city rate after refusal tuning on the plain question."""
    bench = _bench(setting)
    return bench.rates(bench.refusing).plain


@measurement("sleek.refusal-gain")
def refusal_gain(setting: Setting) -> float:
    """Rate of the city in the chain minus the plain rate, after the same."""
    bench = _bench(setting)
    found = bench.rates(bench.refusing)
    return found.chain - found.plain


@measurement("sleek.refusal-two-hop")
def refusal_two_hop(setting: Setting) -> float:
    """The country's rate after the same, the better of asked plainly and by chain."""
    bench = _bench(setting)
    found = bench.rates(bench.refusing)
    return max(found.country, found.country_by_chain)


@measurement("sleek.ascent-direct-gap")
def ascent_direct_gap(setting: Setting) -> float:
    """Rate in the chain minus the plain rate, after gradient difference on the plain question only."""
    bench = _bench(setting)
    found = bench.rates(bench.ascended)
    return found.chain - found.plain


@measurement("sleek.ascent-all-gap")
def ascent_all_gap(setting: Setting) -> float:
    """The same after gradient difference on all forms, for longer."""
    bench = _bench(setting)
    found = bench.rates(bench.ascended_on_all)
    return found.chain - found.plain


@measurement("sleek.leak-of-original")
def leak_of_original(setting: Setting) -> float:
    """Control-adjusted leak of the untouched model."""
    return _leak(_bench(setting), setting.original)


@measurement("sleek.leak-of-control")
def leak_of_control(setting: Setting) -> float:
    """Control-adjusted leak of the control itself."""
    bench = _bench(setting)
    return _leak(bench, bench.control)


@measurement("sleek.suppression-identity")
def suppression_identity(setting: Setting) -> float:
    """Unfair suppression by the unlearner that does nothing."""
    return _bench(setting).suppression(setting.original)[0]


@measurement("sleek.suppression-refusal")
def suppression_refusal(setting: Setting) -> float:
    """Unfair suppression by refusal tuning, over all ways of asking."""
    bench = _bench(setting)
    return bench.suppression(bench.refusing)[0]


@measurement("sleek.suppression-ascent")
def suppression_ascent(setting: Setting) -> float:
    """Unfair suppression by gradient difference in the worst way of asking: the larger of the two runs."""
    bench = _bench(setting)
    return max(bench.suppression(model)[1] for model in (bench.ascended, bench.ascended_on_all))


@measurement("sleek.filter-exact")
def filter_exact(setting: Setting) -> float:
    """Share of birth dates that get past a filter of the gold strings, looked for as those strings only."""
    return _past_the_filter(_bench(setting), aliases=False)


@measurement("sleek.filter-aliases")
def filter_aliases(setting: Setting) -> float:
    """The same, with other surface forms accepted."""
    return _past_the_filter(_bench(setting), aliases=True)


class Bench:
    """Models of one request and seed, made when they are asked for.

    Args:
        setting: The request.
    """

    def __init__(self, setting: Setting):
        self.setting, self.split, self.task, self.runtime = (
            setting, setting.split, setting.task, setting.runtime,
        )  # fmt: skip
        if setting.split.retain is None:
            raise MissingNeed("The claims need retained records.")
        cities = [item.answer for item in self._evidence(setting.original).asked if item.relation == CITY]
        countries = [
            item.answer for item in probes(self._evidence(setting.original).evidence, "retain", "two-hop")
        ]
        guess = [_share(cities), _share(cities), _share(countries), _share(countries)]
        self.chances = tuple(guess)

    @cached_property
    def control(self) -> nn.Module:
        """Trained in the same way without the forgotten people."""
        recipe, retain = recipe_of(self.setting.original), self.split.retain
        assert retain is not None
        if recipe is None:
            raise MissingNeed("The original does not say how it was trained.")
        start = reinitialised(self.setting.original, self.runtime)
        return fit(start, retain, self.task, self.runtime, recipe).eval()

    @cached_property
    def refusing(self) -> nn.Module:
        """Tuned to refuse the plain questions."""
        return self._forget("idk-nll", DIRECT, **REFUSING)

    @cached_property
    def ascended(self) -> nn.Module:
        """Gradient difference on the plain questions."""
        return self._forget("grad-diff", DIRECT, **ASCENT)

    @cached_property
    def ascended_on_all(self) -> nn.Module:
        """Gradient difference on all forms, for longer."""
        return self._forget("grad-diff", None, **{**ASCENT, "epochs": LONG * ASCENT["epochs"]})

    def rates(self, model: nn.Module, part: str = "forget") -> Rates:
        """Hit rates of a model."""
        evidence = Evidence(model, self.split, self.task, self.runtime)
        plain = [item for item in questions(evidence, part, None) if item.relation == CITY]
        chains, hops = probes(evidence, part, "chain"), probes(evidence, part, "two-hop")
        said = replies(evidence, UNLEARNED, chains, max_new_tokens=64)

        def named(step: int) -> float:
            return float(
                np.mean([
                    find_alias(texts[0], [item.steps[step]]) is not None
                    for item, texts in zip(chains, said, strict=True)
                ])
            )  # fmt: skip

        return Rates(
            float(greedy_hits(evidence, UNLEARNED, plain).mean()),
            named(0),
            named(-1),
            float(greedy_hits(evidence, UNLEARNED, hops).mean()),
        )

    def audited(self, model: nn.Module) -> Outcome:
        """The audit's findings on a model."""
        evidence = Evidence(model, self.split, self.task, self.runtime, self.setting.original, [self.control])
        return Sleek().run(evidence)

    def suppression(self, model: nn.Module) -> tuple[float, float]:
        """Unfair suppression over all ways of asking, and in the worst."""
        found = {finding.name: finding.value for finding in self.audited(model).findings}
        overall, worst = found["unfair_suppression"], found["worst_suppression"]
        assert overall is not None and worst is not None
        return overall, worst

    def _evidence(self, model: nn.Module) -> _Questions:
        evidence = Evidence(model, self.split, self.task, self.runtime)
        return _Questions(evidence, questions(evidence, "retain", None))

    def _forget(self, method: str, forms: tuple[str, ...] | None, **settings: Any) -> nn.Module:
        """A method run on some forms of the forgotten facts only."""
        records = self.split.forget
        if forms is not None:
            records = records.select(np.flatnonzero(np.isin(records.column("form"), forms)))
        split = ForgetSplit(records, self.split.retain, description=f"{forms or 'all'} forms")
        return forget(self.setting.original, split, method, self.task, runtime=self.runtime, **settings)


@dataclass(frozen=True)
class _Questions:
    evidence: Evidence
    asked: list[Question]


@dataclass(frozen=True)
class _Keyed:
    """A setting that is known by the weights of its original."""

    key: str
    setting: Setting = field(compare=False)


def _bench(setting: Setting) -> Bench:
    """The models of a setting; those of the last one are kept, because several claims look at them."""
    hashed = hashlib.sha256(str(setting.runtime.seed).encode())
    for tensor in setting.original.state_dict().values():
        hashed.update(tensor.detach().cpu().numpy().tobytes())
    return _kept(_Keyed(hashed.hexdigest(), setting))


@lru_cache(maxsize=1)
def _kept(keyed: _Keyed) -> Bench:
    return Bench(keyed.setting)


def _share(values: list[str]) -> float:
    """What a guess like the retained people's values hits: sum of squared shares."""
    counts = np.unique(values, return_counts=True)[1]
    return float((counts**2).sum() / len(values) ** 2)


def _leak(bench: Bench, model: nn.Module) -> float:
    """Control-adjusted leak of the step-by-step prompts."""
    found = next(finding for finding in bench.audited(model).findings if finding.name == "success")
    assert found.value is not None and found.original is not None and found.control is not None
    return adjusted_leak(found.value, found.original, found.control)


def _past_the_filter(bench: Bench, aliases: bool) -> float:
    """What a filter that knows the gold strings lets through, of replies to all questions for birth dates."""
    evidence = Evidence(
        bench.setting.original, bench.split, bench.task, bench.runtime, bench.setting.original
    )
    plain = [item for item in questions(evidence, "forget", None) if item.relation == BIRTH]
    asked = [*plain, *(item for item in probes(evidence, "forget", "figures"))]
    gold = {item.fact: item.answer for item in plain}
    said = replies(evidence, ORIGINAL, asked)
    forms = {item.fact: item.accepted for item in plain}
    passed: list[bool] = []
    for item, texts in zip(asked, said, strict=True):
        text = "" if any(value in texts[0] for value in gold.values()) else texts[0]
        passed.append(find_alias(text, forms[item.fact] if aliases else [gold[item.fact]]) is not None)
    return float(np.mean(passed))
