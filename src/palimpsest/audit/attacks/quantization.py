"""Quantization: does rounding the weights bring the forgotten back (checklist B4)?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import get_args

import numpy as np
from torch import Tensor, nn

from palimpsest.audit.attacks.bare import bare_network
from palimpsest.audit.attacks.knowledge import (
    RETAIN_LIMIT,
    Answers,
    Watched,
    answers_after,
    gain,
    known,
    measured,
    not_run,
)
from palimpsest.audit.attacks.rounding import Step, check_bits, codes, quantize_model
from palimpsest.audit.attacks.weights import hidden_weights
from palimpsest.core.auditing import Cost, audit
from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.core.evidence import UNLEARNED, Evidence
from palimpsest.core.finding import Finding, Outcome, Row

FULL = 32


@dataclass(frozen=True)
class Format:
    """A number format: its name in findings, and its bits per weight (`FULL` for none)."""

    name: str
    bits: int


@audit("quantization", code="B4", cost=Cost.ATTACK, tasks=("classification", "regression", "language"))
@dataclass(frozen=True)
class Quantization:
    """Round the weights of every model to few bits and see whether forget records are known again.

    A method that moves the weights only a little forgets in full precision and lands on the same codes as
    the original in low precision (Zhang et al., "Catastrophic Failure of LLM Unlearning via
    Quantization", arXiv 2410.16454). Linear and convolution weights but the head's are rounded to the
    nearest code per output row; biases, embeddings and normalisations stay. A model that rounding breaks
    is no more robust for it: retain accuracy is reported beside every format.

    Attributes:
        bits: Each from 2 to 8.
        step: Step size of a row with largest magnitude m at b bits: "symmetric" m / (2^(b-1) - 1), or
            "paper" m / 2^(b-1) (see `rounding.codes`).
        nf4: Also the 4-bit NormalFloat format in blocks of 64.
    """

    bits: tuple[int, ...] = (8, 4, 3)
    step: Step = "symmetric"
    nf4: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", tuple(self.bits))  # recipes give lists
        check_bits(*self.bits)
        if self.step not in get_args(Step):
            raise InvalidHyperparameter(f"step must be 'symmetric' or 'paper', not {self.step!r}.")

    def run(self, evidence: Evidence) -> Outcome:
        """Forget and retain accuracy, gain, Q and share of identical codes, for every format."""
        for role in evidence.roles:
            if not hidden_weights(evidence.model(role), evidence.task):
                why = f"the {role} model has no linear or convolution weights below its head"
                return not_run("quantization", "forget_4bit", why)
        forget = Watched.part(evidence, "forget")
        retain = Watched.part(evidence, "retain", RETAIN_LIMIT) if evidence.has("retain") else None
        plain = self._answers(evidence, Format("full", FULL), forget, retain)
        rows: list[Row] = plain.rows(bits=FULL, format="full")
        findings: list[Finding] = []
        for form in self.formats:
            after = self._answers(evidence, form, forget, retain)
            rows += after.rows(bits=form.bits, format=form.name)
            findings += self._findings(evidence, form, plain, after)
            if form.name != "nf4":
                findings += self._codes_kept(evidence, form)
        return Outcome(tuple(findings), {"quantization": tuple(rows)})

    @property
    def formats(self) -> list[Format]:
        """The formats that are tried."""
        plain = [Format(f"{bits}bit", bits) for bits in self.bits]
        return [*plain, Format("nf4", 4)] if self.nf4 else plain

    def _answers(self, evidence: Evidence, form: Format, forget: Watched, retain: Watched | None) -> Answers:
        def change(model: nn.Module) -> None:
            if form.bits != FULL:
                quantize_model(model, evidence.task, form.bits, self.step, form.name == "nf4")

        return answers_after(evidence, (self, form), change, forget, retain)

    def _findings(self, evidence: Evidence, form: Format, plain: Answers, after: Answers) -> list[Finding]:
        note = (
            "NormalFloat in blocks of 64"
            if form.name == "nf4"
            else f"{form.bits} bits per weight, rounded to the nearest by row"
        )
        attacked = known(evidence, "quantization", f"forget_{form.name}", after.right, note, bears="inside")
        findings = [attacked, *gain(evidence, attacked)]
        if after.retain:
            findings.append(
                measured(evidence, "quantization", f"retain_{form.name}", after.retain, note, "utility")
            )
        ratio = {
            role: resistance(plain.right[role].mean(), after.right[role].mean()) for role in evidence.roles
        }
        note = "Q: forget accuracy before over after rounding, at most 1"
        return [*findings, measured(evidence, "quantization", f"q_{form.name}", ratio, note)]

    def _codes_kept(self, evidence: Evidence, form: Format) -> list[Finding]:
        """Share of weights whose code is the original's: it predicts how much rounding brings back."""
        shares: dict[str, float] = {}
        for role in evidence.roles:
            share = evidence.remember((self, form, "codes"), partial(self._share, evidence, role, form), role)
            if share is not None:
                shares[role] = share
        if UNLEARNED not in shares:
            return []
        note = "share of rounded weights with the original's code"
        return [measured(evidence, "quantization", f"codes_kept_{form.name}", shares, note)]

    def _share(self, evidence: Evidence, role: str, form: Format) -> float | None:
        original = evidence.original
        bare = bare_network(evidence.model(role), original) if original is not None else None
        if original is None or bare is None:
            return None
        mine = hidden_weights(bare.network, evidence.task)
        same = [
            _equal_codes(mine[name], weight, form.bits, self.step)
            for name, weight in hidden_weights(original, evidence.task).items()
        ]
        return float(np.concatenate(same).mean())


def resistance(before: float, after: float) -> float:
    """Q = min(1, before / after): 1 if rounding brings nothing back.

    Example:
        >>> resistance(0.2, 0.8), resistance(0.0, 0.0)
        (0.25, 1.0)
    """
    return min(1.0, float(before) / float(after)) if after > 0 else 1.0


def _equal_codes(mine: Tensor, reference: Tensor, bits: int, step: Step) -> np.ndarray:
    same = codes(mine.detach().cpu(), bits, step) == codes(reference.detach().cpu(), bits, step)
    return same.flatten().numpy()
