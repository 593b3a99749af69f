"""The verdict: one word from all findings, with its reasons.

The rules in order; the first that applies decides. "Outputs", "inside" and so on are what a finding bears
on (`Finding.bears`); K is the scale of `core.scale`, 0 as a retrained model, 1 as the original. A finding
counts only if its probe is valid, that is, if original and retrained models differ clearly in it.

1. **intact** by identity: the outputs are the original's on every record, and so is every finding on the
   outputs (a filter of generated replies leaves likelihoods as they are).
2. **inconclusive**: no retrained control, or fewer than `FEWEST_RECORDS` records to forget.
3. **damaged**: on retained or test records (without the forgotten classes) the model is worse than both the
   original and the controls by more than `DAMAGE`, beyond sampling error and the spread of the controls; or
   it lost a retained class by more than `CLASS_DAMAGE`. Not if the network inside a wrapper still knows: what
   stands around it can be taken off, knowledge and utility are back, and rule 4 applies with the damage named.
4. **suppressed**: at least one finding on the outputs says forgotten (K at most `FORGOTTEN`), and a finding
   on the inside says known (K at least `KNOWN` with its interval above 0, or at least `UNTOUCHED`).
5. **intact**: every finding on the outputs has K of at least `UNTOUCHED`.
6. **over-forgotten**: the forget records are answered worse than the controls answer them, by more than
   `DAMAGE`, beyond sampling error and the spread of the controls.
7. **incomplete**: a finding on the outputs has K above `FORGOTTEN` and above 0 beyond its interval.
8. Where the outputs show no difference between original and retrained at all (most random requests), the
   lineage decides: **intact** if the model is as close to the original as K of `UNTOUCHED` in every such
   finding, **incomplete** if closer than retrained models are in every such finding.
9. **removed**, if valid findings looked at the outputs (or lineage) and inside; else **inconclusive**.

Where models answer in numbers, skill stands for accuracy (`audit.regression`): a share of the error of a
constant answer that is saved. Of language models it stands for the share of questions whose greedy reply names
the answer (`audit.language.recall`); over-forgotten are answers whose tokens are less likely than to controls.
Inside a language model look the probe and the lens (`audit.language.hidden_probe`, `logit_lens`), the ablation of
directions, patching (only where the controls share the original's basis: else its zero is noise), and whatever
trains or rounds copies. What stands around a network is left out before it is read, so that a guard, a refusal
or an offset of logits over an untouched network is **suppressed**, whatever its outputs say.

The thresholds are below, in one place. `tests/audit/test_verdict.py` shows how often they are right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from palimpsest.core.finding import Finding, Judgement
from palimpsest.core.scale import SEED_SPREAD, lowest_expected

FEWEST_RECORDS = 10
"""With fewer records to forget no rate is known well enough."""
DAMAGE = 0.05
"""Loss of accuracy, as a share of all answers (of a regression, loss of skill), that counts as damage."""
CLASS_DAMAGE = 0.3
"""Loss of accuracy within one retained class that counts as damage."""
FORGOTTEN = 0.2
"""K up to which an output counts as forgotten (card `sok`)."""
KNOWN = 0.5
"""K from which an inside finding counts as known (card `sok`)."""
UNTOUCHED = 0.8
"""K from which a finding counts as untouched."""
SKILL_SPREAD = 0.15
"""Prior deviation of the skill on forget records between retrainings: beyond the retained targets they
extrapolate, each in its own way (digits as numbers, small CNN: 0.14; tables less)."""
BARE = "unwrapping.inner_forget_accuracy"
"""What the network inside a wrapper knows; bears on the inside only where it differs from the whole."""
CHANGES = ("distance.max_change", "regression.max_change", "recall.max_change")
"""Findings that say how far outputs are from the original's."""
TOKEN_SPREAD = 0.5
"""Prior deviation of the mean log-probability per token of answers never trained on, in nats."""
FORGET_ANSWERS = {
    "utility.forget_accuracy": SEED_SPREAD,
    "regression.forget_skill": SKILL_SPREAD,
    "recall.forget_log_probability": TOKEN_SPREAD,
}
"""Findings that say how well forget records are answered, and their prior deviation between retrainings."""


class Verdict(StrEnum):
    """What the findings together say. Never "certified": only that the listed audits found no trace."""

    REMOVED = "removed"
    SUPPRESSED = "suppressed"
    INCOMPLETE = "incomplete"
    INTACT = "intact"
    OVER_FORGOTTEN = "over-forgotten"
    DAMAGED = "damaged"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True)
class Judgment:
    """A verdict and the findings it rests on, in words."""

    verdict: Verdict
    reasons: tuple[str, ...]


def judge(findings: Sequence[Finding], records: int) -> Judgment:
    """The verdict of a list of findings.

    Args:
        findings: Of one audited model.
        records: Number of forget records.
    """
    by_key = {finding.key: finding for finding in findings}
    change = next((by_key[key] for key in CHANGES if key in by_key), None)
    if change is not None and change.value == 0 and not _replies_differ(findings):
        return _say(Verdict.INTACT, "The outputs are the original's on every record: nothing was forgotten.")
    known = [finding for finding in findings if finding.valid and finding.k is not None]
    outputs = [finding for finding in known if finding.bears == "outputs"]
    inside = [finding for finding in known if finding.bears == "inside"]
    lineage = [finding for finding in known if finding.bears == "lineage"]
    reason = _cannot_say(findings, records)
    if reason:
        return _say(Verdict.INCONCLUSIVE, reason)
    damage = [text for finding in findings for text in _damage(finding)]
    forgotten = [finding for finding in outputs if _k(finding) <= FORGOTTEN]
    present = [finding for finding in inside if _still_known(finding)]
    wrapped = forgotten and any(finding.key == BARE and _k(finding) >= UNTOUCHED for finding in present)
    if damage and not wrapped:
        return _say(Verdict.DAMAGED, *damage)
    if forgotten and present:
        gone = [_quote(finding, "gone from the outputs") for finding in forgotten[:1]]
        there = [_quote(finding, "still there") for finding in present]
        return _say(Verdict.SUPPRESSED, *gone, *there, *(f"As it is served: {text}" for text in damage))
    if outputs and all(_k(finding) >= UNTOUCHED for finding in outputs):
        return _say(Verdict.INTACT, *(_quote(finding, "as the original") for finding in outputs))
    worse = [text for finding in findings for text in _over_forgotten(finding)]
    if worse:
        return _say(Verdict.OVER_FORGOTTEN, *worse)
    partial = [finding for finding in outputs if _k(finding) > FORGOTTEN and (finding.k_low or 0) > 0]
    if partial:
        return _say(Verdict.INCOMPLETE, *(_quote(finding, "not as retrained") for finding in partial))
    if not outputs and lineage:
        verdict = _by_lineage(lineage)
        if verdict:
            return verdict
    if not outputs and not lineage:
        return _say(
            Verdict.INCONCLUSIVE, "No valid finding tells what the outputs show of the forget records."
        )
    looked = inside or lineage
    if not looked:
        return _say(
            Verdict.INCONCLUSIVE,
            "The outputs are as a retrained model's, but no valid audit looked inside the model.",
        )
    return _say(
        Verdict.REMOVED,
        *(_quote(finding, "as retrained") for finding in [*outputs, *looked]),
        "This is the absence of a trace under the audits listed, not a proof.",
    )


def _replies_differ(findings: Sequence[Finding]) -> bool:
    """Whether some finding on the outputs is another than the original's."""
    return any(
        finding.bears == "outputs"
        and finding.value is not None
        and finding.original is not None
        and not math.isclose(finding.value, finding.original, abs_tol=1e-6)
        for finding in findings
    )


def _cannot_say(findings: Sequence[Finding], records: int) -> str:
    if not any(finding.controls for finding in findings):
        return "There is no retrained model to compare with: only absolute values can be given."
    if not any(finding.original is not None for finding in findings):
        return "The original model is not at hand: the scale from retrained to untouched is unknown."
    if records < FEWEST_RECORDS:
        return f"Only {records} records are to be forgotten; at least {FEWEST_RECORDS} are needed to judge."
    return ""


def _by_lineage(lineage: Sequence[Finding]) -> Judgment | None:
    silent = "The outputs on the forget records do not tell the original from a retrained model."
    if all(_k(finding) >= UNTOUCHED for finding in lineage):
        return _say(Verdict.INTACT, silent, *(_quote(finding, "as the original") for finding in lineage))
    if all(_k(finding) >= KNOWN and (finding.k_low or 0) > 0 for finding in lineage):
        close = "closer to the original than retrained models are"
        return _say(Verdict.INCOMPLETE, silent, *(_quote(finding, close) for finding in lineage))
    return None


def _damage(finding: Finding) -> list[str]:
    """Utility below both the original and the controls."""
    if finding.bears != "utility" or finding.value is None or not finding.controls:
        return []
    allowed = CLASS_DAMAGE if finding.key == "utility.worst_class_change" else DAMAGE
    reference = lowest_expected(finding.controls, SEED_SPREAD)
    if finding.original is not None:
        reference = min(reference, finding.original)
    upper = finding.value if finding.high is None else finding.high
    if finding.value < reference - allowed and upper < reference:
        return [
            f"{finding.key} is {finding.value:.3f}, at least {reference:.3f} was expected of a retrained model."
        ]
    return []


def _over_forgotten(finding: Finding) -> list[str]:
    """Forget records answered worse than the controls answer them."""
    if finding.key not in FORGET_ANSWERS or finding.value is None or not finding.controls:
        return []
    reference = lowest_expected(finding.controls, FORGET_ANSWERS[finding.key])
    upper = finding.value if finding.high is None else finding.high
    if finding.value < reference - DAMAGE and upper < reference:
        return [
            f"{finding.key} is {finding.value:.3f}, a retrained model reaches {np.mean(finding.controls):.3f}: "
            "the forget records stand out as forgotten."
        ]
    return []


def _still_known(finding: Finding) -> bool:
    return _k(finding) >= UNTOUCHED or (_k(finding) >= KNOWN and (finding.k_low or 0) > 0)


def _k(finding: Finding) -> float:
    return math.nan if finding.k is None else finding.k


def _quote(finding: Finding, meaning: str) -> str:
    interval = f" [{finding.k_low:.2f}, {finding.k_high:.2f}]" if finding.k_low is not None else ""
    note = f" ({finding.note})" if finding.note and finding.judgement != Judgement.INVALID else ""
    return f"{finding.key}: K = {_k(finding):.2f}{interval}, {meaning}{note}."


def _say(verdict: Verdict, *reasons: str) -> Judgment:
    return Judgment(verdict, reasons)
