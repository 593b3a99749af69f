"""Label-agnostic forgetting: move representations of forget records where they are badly reconstructed."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.core.errors import InvalidRecords, MissingNeed, ModelMismatch
from palimpsest.core.needs import Need
from palimpsest.core.records import Batch, Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.split import ForgetSplit
from palimpsest.core.unlearner import Paper, check_range, unlearner
from palimpsest.parts.activations import output_with_graph
from palimpsest.parts.parameters import trainable
from palimpsest.parts.training import TrainingRecipe, step
from palimpsest.parts.vae import VAE, Output, fit_vae
from palimpsest.tasks.classification import Classification

log = logging.getLogger("palimpsest")
PAPER = Paper(
    "Label-Agnostic Forgetting: A Supervision-Free Unlearning in Deep Models", "ICLR 2024", "2404.00506"
)


@unlearner(
    "laf",
    needs={Need.MODEL, Need.FORGET_DATA, Need.RETAIN_DATA},
    tasks=("classification",),
    paper=PAPER,
)
@dataclass(frozen=True)
class LAF:
    """TODO"""

    epochs: int = 40
    lr_extraction: float = 1e-3
    lr_alignment: float = 3e-4
    temperature: float = 20.0
    least_steps: int = 160
    batch_size: int = 32
    latent: int = 8
    decoder: Output = "sigmoid"
    vae_epochs: int = 10
    vae_lr: float = 1e-3
    layer: str | None = None
    extraction: bool = True
    alignment: bool = True

    def unlearn(self, model, split, task, runtime):
        forget = split.forget.without(task.label)
        retain = split.retain.without(task.label)
        student = runtime.place(copy.deepcopy(model)).eval()
        teacher = runtime.place(copy.deepcopy(model)).eval().requires_grad_(False)
        with runtime.seeded("laf autoencoders"):
            e = representations(teacher, forget.union(retain), task, runtime, self.layer)
            all_vae = fit_vae(e, runtime.generator("a"), self.latent, self.decoder, self.vae_epochs, self.vae_lr, self.batch_size)
            e = representations(teacher, forget, task, runtime, self.layer)
            forget_vae = fit_vae(e, runtime.generator("b"), self.latent, self.decoder, self.vae_epochs, self.vae_lr, self.batch_size)
        extract = torch.optim.Adam(trainable(student).values(), self.lr_extraction)
        align = torch.optim.Adam(trainable(student).values(), self.lr_alignment)
        order = runtime.generator("laf order")
        taken, epoch = 0, 0
        with runtime.seeded("laf"):
            while epoch < self.epochs or taken < self.least_steps:
                epoch += 1
                pairs = zip(
                    runtime.batches(forget, task, self.batch_size, shuffle=order),
                    runtime.batches(retain, task, self.batch_size, shuffle=order),
                )
                for gone, kept in pairs:
                    taken += 1
                    if self.extraction:
                        e_r, e_f = (representation(student, b, task, self.layer) for b in (kept, gone))
                        loss = extraction_loss(e_r, all_vae(e_r)[0], e_f, forget_vae(e_f)[0])
                        step(student, extract, loss, kept)
                    if self.alignment:
                        with torch.no_grad():
                            t_r, t_f = (representation(teacher, b, task, self.layer) for b in (kept, gone))
                        e_r, e_f = (representation(student, b, task, self.layer) for b in (kept, gone))
                        loss = alignment_loss(e_r, t_r, e_f, t_f, self.temperature)
                        step(student, align, loss, kept)
        return student


def representation(model, batch, task, layer=None):
    if layer is None:
        return task.features(model, batch)
    return output_with_graph(model, lambda: task.logits(model, batch), layer)


@torch.no_grad()
def representations(model, records, task, runtime, layer=None):
    return torch.cat([representation(model, b, task, layer) for b in runtime.batches(records, task)])


def squashed_error(e, r):
    return (1 - 1 / (1 + (r - e).square().sum(1))).exp().sum()


def extraction_loss(a, ra, b, rb):
    return squashed_error(a, ra) - squashed_error(b, rb)


def alignment_loss(rs, rt, fs, ft, temperature):
    def distance(x, y):
        return F.cosine_embedding_loss(x, y, torch.ones(len(x), device=x.device), reduction="none")
    return (distance(rs, rt) - (distance(fs, ft) / temperature).logsumexp(0)).sum()
