"""Membership signals of every text of a part, all from the one shared pass over its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor, nn

from palimpsest.audit.membership import language_signals as signals
from palimpsest.audit.membership.language_signals import SMALLEST_VARIANCE
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.evidence import Evidence
from palimpsest.core.records import Batch
from palimpsest.core.task import Task
from palimpsest.parts.sample_gradients import sample_gradient_norms

Signals = Float[np.ndarray, " texts"]
TOGETHER = 32
"""Records of one backward pass of GradNorm."""
Tokens = Float[Tensor, "texts tokens"]


def token_scores(
    evidence: Evidence, role: str, part: str
) -> tuple[Tokens, Tokens, Bool[Tensor, "texts tokens"]]:
    """Log-probabilities of the scored tokens, the same standardised (Min-K%++), and which entries are tokens."""
    seen = evidence.observe(role, part).tokens
    mask = seen["mask"].bool()
    log_p = seen["log_probability"].double()
    deviation = seen["deviation"].double().clamp(min=SMALLEST_VARIANCE**0.5)
    standardised = (log_p - seen["mean"].double()) / deviation
    return log_p, standardised.masked_fill(~mask, 0.0), mask


def texts_of_part(evidence: Evidence, part: str) -> list[str]:
    """The scored text of every record: the answer, or the running text."""
    return [
        str(item["answer"] if item.get("question") is not None else item["text"])
        for item in evidence.records(part)
    ]


def signals_of(evidence: Evidence, role: str, part: str, k: float) -> Mapping[str, Signals]:
    """LOSS, zlib, Min-K% and Min-K%++ of every record of a part, [records]; high means member."""

    def compute() -> dict[str, Signals]:
        log_p, standardised, mask = token_scores(evidence, role, part)
        found = {
            "loss": signals.mean_log_probabilities(log_p, mask),
            "zlib": signals.zlib_scores(log_p, mask, texts_of_part(evidence, part)),
            "min_k": signals.min_k_scores(log_p, mask, k),
            "min_k_plus": signals.min_k_scores(standardised, mask, k),
        }
        return {name: values.numpy() for name, values in found.items()}

    return evidence.remember(("token signals", part, k), compute, role)


def reference_signal(evidence: Evidence, role: str, reference: str, part: str) -> Signals:
    """LOSS above that of another model on the same tokens, [records]."""
    own, _, mask = token_scores(evidence, role, part)
    other, _, _ = token_scores(evidence, reference, part)
    return signals.reference_scores(own, other, mask).numpy()


def lowercase_signal(evidence: Evidence, role: str, part: str) -> Signals:
    """Minus loss over that of the lower-cased text, which costs a pass of its own, [records]."""

    def compute() -> Signals:
        own, _, mask = token_scores(evidence, role, part)
        plain = -signals.mean_log_probabilities(own, mask)
        model = evidence.runtime.place(evidence.model(role))
        lower: list[Tensor] = []
        with torch.no_grad():
            for batch in _lowered(evidence, part):
                lower.append(evidence.task.loss_per_example(model, batch).double().cpu())
        evidence.runtime.count_pass(f"{role}/{part} lower-cased")
        # a model may be certain of a text: the ratio then counts the smallest loss that double precision tells apart
        return signals.lowercase_scores(plain, torch.cat(lower).clamp(min=1e-12)).numpy()

    return evidence.remember(("lowercase signal", part), compute, role)


def gradient_signal(evidence: Evidence, role: str, part: str) -> Signals:
    """GradNorm: minus the mean norm of the gradients of every parameter tensor, [records].

    One backward pass for a batch where the model can be taken apart (`sample_gradient_norms`), else one per record.
    """

    def compute() -> Signals:
        import copy

        model = evidence.runtime.place(copy.deepcopy(evidence.model(role))).eval()
        parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
        for parameter in parameters:
            parameter.requires_grad_(True)
        records, task = evidence.records(part), evidence.task
        evidence.runtime.count_pass(f"{role}/{part} backward")
        found: list[Tensor] = []
        for batch in evidence.runtime.batches(records, task, TOGETHER):
            scores = gradient_scores(task, model, batch, parameters)
            if scores is None:
                break
            found.append(scores)
        else:
            return torch.cat(found).cpu().numpy()
        losses = (
            task.loss_per_example(model, one).mean() for one in evidence.runtime.batches(records, task, 1)
        )
        return np.array([signals.gradient_norm(loss, parameters) for loss in losses])

    return evidence.remember(("gradient signal", part), compute, role)


def gradient_scores(
    task: Task, model: nn.Module, batch: Batch, parameters: Sequence[nn.Parameter]
) -> Float[Tensor, " batch"] | None:
    """GradNorm of every row of a batch from one backward pass; None where rows must be taken one by one.

    Raises:
        InvalidAudit: If there is no parameter to differentiate by.
    """
    if not parameters:
        raise InvalidAudit("The gradient norm needs at least one trainable parameter.")
    norms = sample_gradient_norms(
        model, lambda: task.loss_of_logits(task.logits(model, batch), batch), parameters
    )
    return None if norms is None else -norms.mean(1)


def _lowered(evidence: Evidence, part: str):
    """Batches of a part with lower-cased questions, answers and texts."""
    from palimpsest.core.records import Records

    records = evidence.records(part)
    items = [
        {
            key: value.lower()
            for key, value in item.items()
            if key in ("question", "answer", "text") and isinstance(value, str)
        }
        for item in records
    ]
    return evidence.runtime.batches(Records(items, ids=records.ids), evidence.task)


def detector_features(evidence: Evidence, role: str, part: str) -> NDArray[np.float64]:
    """What a detector sees of a text: mean, lowest and deviation of its log-probabilities, and of the standardised."""
    log_p, standardised, mask = token_scores(evidence, role, part)
    count = mask.sum(1)
    mean = log_p.sum(1) / count
    spread = (((log_p - mean[:, None]) ** 2).masked_fill(~mask, 0).sum(1) / count).sqrt()
    lowest = log_p.masked_fill(~mask, torch.inf).amin(1)
    return torch.stack([mean, lowest, spread, standardised.sum(1) / count], 1).numpy()
