"""Activation patching: does the original lose its answers with another model's hidden states in it (checklist C3)?"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor, nn

from palimpsest.audit.attacks.knowledge import measured, not_run
from palimpsest.audit.language.asked import Question, language_of, questions, subjects
from palimpsest.audit.language.hidden_probe import ridge
from palimpsest.audit.language.inside import (
    blocks_of,
    network_of,
    opening,
    put_first,
    spread_out,
    watching,
)
from palimpsest.core.auditing import audit
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.evidence import ORIGINAL, UNLEARNED, Evidence
from palimpsest.core.finding import Finding, Outcome, Row
from palimpsest.core.modes import evaluating
from palimpsest.core.records import Batch
from palimpsest.core.scale import judged
from palimpsest.core.unlearner import check_range
from palimpsest.parts.decoder import stack_of

COUNTS = 0.05
"""Drop in nats from which a block counts (card `sok`)."""
PENALTY = 0.001
"""Of the linear translation between two models' states, per token that it is fitted on."""
FOREIGN = 0.5
"""Drop on retained questions, as a share of that on forgotten ones, above which a control's basis is foreign."""
SAVES = 1e-4
"""Nats that a translation must save; the own states of a model, say, cannot be bettered but by rounding."""
DRAWS = 500

Drops = Float[NDArray[np.float64], "blocks questions"]


@dataclass(frozen=True)
class Text:
    """A question with its answer, ready for a pass.

    Attributes:
        batch: One row per question.
        entity: Which tokens say the fact: the answer from where it differs from wrong ones, without the
            ending, [rows, tokens - 1], aligned with the logits that predict them.
    """

    batch: Batch
    entity: Bool[Tensor, "rows tokens"]


@audit("patching", code="C3", parts=("forget", "retain"), tasks=("language",))
@dataclass(frozen=True)
class Patching:
    """Put a model's hidden states into the original, block by block, and see how much of the answer is lost.

    The unlearning depth score (arXiv 2605.24614): D1 of a block is the drop of the answer's log-probability per
    token when the states of a control that never knew stand there, D2 when those of the unlearned model do; UDS
    is the mean of D2 / D1, cut to [0, 1], weighted by D1, over blocks with D1 above 0.05. 1: erased at every
    depth; 0: the original can go on from the unlearned model's states as from its own.

    Models trained from different starting weights speak different bases, and any states of another would be
    noise to the original. Every source is therefore read either as it is or through a linear translation that
    was fitted on retained questions, whichever costs other retained questions less (a translation by 1e-4 nats at
    least). The original's own states need none, nor do models that were tuned from one pretrained base, for which
    the score was published. Where the controls cost retained questions more than half of what they cost forgotten
    ones even so (it happens in worlds that are learnt from scratch), D1 is partly noise and 1 - UDS too high: it is
    then reported and does not bear on the verdict.

    Attributes:
        most: At most so many blocks, evenly spaced, the last among them.
        translated_on: At most so many retained questions: the translation is fitted on four fifths of them, and
            chosen by the others.
    """

    most: int = 8
    translated_on: int = 200

    def __post_init__(self) -> None:
        check_range("most", self.most, 1, float("inf"))
        check_range("translated_on", self.translated_on, 10, float("inf"))

    def run(self, evidence: Evidence) -> Outcome:
        """The unlearning depth score, what is kept (1 - UDS) on the scale K, and the drops by block."""
        language_of(evidence)
        if evidence.original is None or not evidence.controls:
            return not_run("patching", "kept", "it needs the original and a retrained model")
        asked = questions(evidence, "forget")
        try:
            chosen = spread_out(blocks_of(evidence), self.most)
            found = {
                role: evidence.remember(
                    (self, "drops"), partial(self._drops, evidence, role, chosen, asked), role
                )
                for role in evidence.roles
            }
        except InvalidAudit as problem:
            return not_run("patching", "kept", str(problem))
        drops = {role: forget for role, (forget, _) in found.items()}
        lost = np.mean([found[role][1] for role in evidence.control_roles], 0)
        control = np.mean([drops[role] for role in evidence.control_roles], 0)
        rows: list[Row] = [
            {
                "model": role,
                "block": block,
                "forget_drop": float(forget[at].mean()),
                "retained_drop": float(retain[at]),
            }
            for role, (forget, retain) in found.items()
            for at, block in enumerate(chosen)
        ]
        if not (control.mean(1) > COUNTS).any():
            outcome = not_run("patching", "kept", f"no block of the controls costs {COUNTS} nats or more")
            return replace(outcome, series={"patching": tuple(rows)})
        findings = self._findings(evidence, drops, control, lost, subjects(asked))
        return Outcome(tuple(findings), {"patching": tuple(rows)})

    def _drops(
        self, evidence: Evidence, role: str, chosen: list[int], asked: Sequence[Question]
    ) -> tuple[Drops, NDArray[np.float64]]:
        """Drops on forget questions, and their means on retained ones that nothing was fitted on, by block."""
        known = questions(evidence, "retain", self.translated_on)
        order = evidence.runtime.numpy("patching").permutation(len(known))
        most = len(known) * 4 // 5
        fit, check = ([known[at] for at in part] for part in (order[:most], order[most:]))
        if not most:
            raise InvalidAudit(f"{len(known)} retained questions are too few for a translation.")
        source = evidence.runtime.place(network_of(evidence, role))
        target = evidence.runtime.place(network_of(evidence, ORIGINAL))
        texts = {
            name: text_of(evidence, part)
            for name, part in (("fit", fit), ("check", check), ("forget", asked))
        }
        inner = {name: _inner(evidence, source, text) for name, text in texts.items()}
        outer = _inner(evidence, target, texts["fit"])
        clean = {name: entity(evidence, target, texts[name]) for name in ("check", "forget")}
        drops, costs = [], []
        for block in chosen:
            move = _Translation(inner["fit"][block], outer[block], texts["fit"])
            tried = []
            for change in (None, move):
                here = {
                    name: inner[name][block] if change is None else change(inner[name][block])
                    for name in clean
                }
                lost = {}
                for name, given in here.items():
                    with patched(target, block, given):
                        lost[name] = clean[name] - entity(evidence, target, texts[name])
                tried.append((float(lost["check"].mean()), lost["forget"]))
            plain, translated = tried
            cost, lost_here = translated if translated[0] < plain[0] - SAVES else plain
            drops.append(lost_here)
            costs.append(cost)
        return np.stack(drops), np.array(costs)

    def _findings(
        self,
        evidence: Evidence,
        drops: Mapping[str, Drops],
        control: Drops,
        lost: NDArray[np.float64],
        subject: NDArray[np.int64],
    ) -> list[Finding]:
        score = {role: depth_score(control.mean(1), values.mean(1)) for role, values in drops.items()}
        random, sampled = evidence.runtime.numpy("patching", "bootstrap"), []
        for _ in range(DRAWS):
            at = random.integers(0, control.shape[1], control.shape[1])
            again = control[:, at].mean(1)
            sampled.append(
                depth_score(again, drops[UNLEARNED][:, at].mean(1)) if (again > COUNTS).any() else np.nan
            )
        low, high = (float(value) for value in np.nanquantile(sampled, [0.025, 0.975]))
        layers = int((control.mean(1) > COUNTS).sum())
        note = f"unlearning depth score, {layers} of {len(control)} blocks count; 1 is erased"
        kept = measured(
            evidence, "patching", "kept", {role: 1 - value for role, value in score.items()},
            "1 - unlearning depth score: share of the answer that the original finds in the states", "knowledge",
        )  # fmt: skip
        n, facts = control.shape[1], len(np.unique(subject))
        uds = measured(evidence, "patching", "uds", score, note)
        foreign = lost.mean() > FOREIGN * control.mean()
        basis = "; the controls speak another basis: an upper bound" if foreign else ""
        kept = replace(
            kept, low=1 - high, high=1 - low, n=n, bears="" if foreign else "inside",
            note=f"{kept.note}; {facts} subjects{basis}",
        )  # fmt: skip
        return [replace(uds, low=low, high=high, n=n), judged(kept, float(np.nanstd(sampled)), 1 / n)]


def depth_score(
    control: Float[NDArray[np.float64], " blocks"], unlearned: Float[NDArray[np.float64], " blocks"]
) -> float:
    """UDS = sum D1 clip(D2 / D1, 0, 1) / sum D1 over the blocks with D1 above 0.05.

    Raises:
        InvalidAudit: If no block counts.

    Example:
        >>> depth_score(np.array([1.0, 3.0, 0.01]), np.array([2.0, 0.6, 9.0]))
        0.4
    """
    counts = control > COUNTS
    if not counts.any():
        raise InvalidAudit(f"No block costs the original more than {COUNTS} nats.")
    one, two = control[counts], unlearned[counts]
    return float((one * np.clip(two / one, 0, 1)).sum() / one.sum())


def text_of(evidence: Evidence, asked: Sequence[Question]) -> Text:
    """Questions with their answers as one batch."""
    task = language_of(evidence)
    pairs = [task.encode(item.question, item.answer) for item in asked]
    batch = evidence.runtime.to_device(
        dict(task.padded([ids for ids, _ in pairs], [start for _, start in pairs]))
    )
    begins = torch.tensor([len(opening(task, item).ids) for item in asked])
    ends = torch.tensor(
        [max(len(ids) - 1, int(begin) + 1) for (ids, _), begin in zip(pairs, begins, strict=True)]
    )
    at = torch.arange(1, batch["input_ids"].shape[1])
    return Text(batch, (at >= begins[:, None]) & (at < ends[:, None]))


@torch.no_grad()
def entity(evidence: Evidence, model: nn.Module, text: Text) -> Float[NDArray[np.float64], " questions"]:
    """Mean log-probability of the tokens that say the fact, teacher-forced."""
    with evaluating(model):
        logits = language_of(evidence).logits(model, text.batch)[:, :-1].float()
    log_p = logits.log_softmax(-1).gather(2, text.batch["input_ids"][:, 1:, None])[:, :, 0].cpu()
    return ((log_p * text.entity).sum(1) / text.entity.sum(1)).double().numpy()


@contextmanager
def patched(model: nn.Module, block: int, states: Float[Tensor, "rows tokens dim"]) -> Generator[nn.Module]:
    """The model with the output of one block replaced by given states; as before at exit."""
    handle = (
        stack_of(model)
        .blocks[block]
        .register_forward_hook(lambda _module, _inputs, output: put_first(output, states))
    )
    try:
        yield model
    finally:
        handle.remove()


@torch.no_grad()
def _inner(evidence: Evidence, model: nn.Module, text: Text) -> list[Float[Tensor, "rows tokens dim"]]:
    with evaluating(model), watching(model) as seen:
        language_of(evidence).logits(model, text.batch)
    return list(seen)


class _Translation:
    """A linear map between the states of two models, fitted where both read the same tokens."""

    def __init__(self, source: Tensor, target: Tensor, text: Text):
        read = text.batch["attention_mask"].bool()
        self.x, self.y = (part[read].double().cpu().numpy() for part in (source, target))
        self.penalty = PENALTY * len(self.x)

    def __call__(self, states: Float[Tensor, "rows tokens dim"]) -> Float[Tensor, "rows tokens dim"]:
        flat = states.flatten(0, 1).double().cpu().numpy()
        moved = ridge(self.x, self.y, self.penalty, flat)
        return torch.from_numpy(moved).to(states).view(*states.shape[:2], -1)
