"""Unwrapping: what do the weights know without filters, guards, hooks and adapters (checklist B5)?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from palimpsest.audit.attacks.bare import BareNetwork, bare_network, distance
from palimpsest.audit.attacks.knowledge import Watched, gain, known, measured, not_run
from palimpsest.core.auditing import Cost, audit
from palimpsest.core.evidence import UNLEARNED, Evidence
from palimpsest.core.finding import Finding, Outcome
from palimpsest.core.scale import judged


@audit("unwrapping", code="B5", cost=Cost.ATTACK, tasks=("classification", "regression", "language"))
@dataclass(frozen=True)
class Unwrapping:
    """Take the network out of its wrapper and ask it directly.

    The adapter removal of the checklist made general: weights under the original's names are looked for
    in the model, in its submodules and under adapters' names, loaded into a plain copy of the original's
    architecture, and asked for the forget records. Whatever stood around them (a filter of the outputs, a
    guard of the inputs, hooks, an unmerged adapter) is gone then. Around an untouched network K is 1. For a
    model of the original's own architecture this evaluates its weights in the original's forward code;
    only if that answers differently from the model itself does the finding bear on the verdict.
    """

    def run(self, evidence: Evidence) -> Outcome:
        """Forget accuracy of the bare network, its gain, and the share of weights that were kept."""
        original = evidence.original
        if original is None:
            return not_run("unwrapping", "inner_forget_accuracy", "the original model is not at hand")
        if not any(True for _ in evidence.unlearned.parameters()):
            return not_run("unwrapping", "inner_forget_accuracy", "the unlearned model exposes no parameters")
        bare: dict[str, BareNetwork] = {}
        for role in evidence.roles:
            found = bare_network(evidence.model(role), original)
            if found is None:
                why = f"the {role} model does not hold weights of the original's names and shapes"
                return not_run("unwrapping", "inner_forget_accuracy", why)
            bare[role] = found
        watched = Watched.part(evidence, "forget")
        right: dict[str, NDArray[np.bool_]] = {}
        for role, found in bare.items():
            right[role] = watched.right(evidence.runtime.place(found.network))
        where = f"weights {bare[UNLEARNED].where}, run in the original's architecture"
        inner = known(evidence, "unwrapping", "inner_forget_accuracy", right, where)
        if not self._same(evidence, bare[UNLEARNED].network, watched):
            inner = replace(inner, bears="inside")
        return Outcome((inner, *gain(evidence, inner), *_kept(evidence, bare, original)))

    def _same(self, evidence: Evidence, network: nn.Module, watched: Watched) -> bool:
        """Whether the bare network answers as the model does: then nothing was wrapped."""
        outputs = watched.logits(evidence.model(UNLEARNED))
        return torch.allclose(watched.logits(network), outputs, rtol=1e-3, atol=1e-3)


def _kept(evidence: Evidence, bare: Mapping[str, BareNetwork], original: nn.Module) -> list[Finding]:
    reference = dict(original.named_parameters())
    shares = {role: kept(dict(found.network.named_parameters()), reference) for role, found in bare.items()}
    whole = {role: _whole(dict(found.network.named_parameters()), reference) for role, found in bare.items()}
    far = {role: distance(found.network.state_dict(), original.state_dict()) for role, found in bare.items()}
    note = f"share of single weights that are the original's; relative distance {far[UNLEARNED]:.3g}"
    tensors = "share of parameter tensors that are the original's"
    return [
        judged(measured(evidence, "unwrapping", "weights_kept", shares, note)),
        judged(measured(evidence, "unwrapping", "tensors_kept", whole, tensors)),
    ]


def kept(weights: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """Share of single weights that are bit for bit the reference's."""
    same = sum(int(torch.eq(weights[name].cpu(), tensor.cpu()).sum()) for name, tensor in reference.items())
    return same / sum(tensor.numel() for tensor in reference.values())


def _whole(weights: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """Share of tensors that are bit for bit the reference's."""
    same = [torch.equal(weights[name].cpu(), tensor.cpu()) for name, tensor in reference.items()]
    return sum(same) / len(same)
