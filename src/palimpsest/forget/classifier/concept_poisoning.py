"""Concept poisoning: fine-tune the head on copies of a class whose telling concept is covered by another's."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor, nn

from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords, MissingNeed
from palimpsest.core.modes import evaluating
from palimpsest.core.needs import Need
from palimpsest.core.records import Batch, Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Span
from palimpsest.core.split import ForgetSplit
from palimpsest.core.task import Task
from palimpsest.core.unlearner import Paper, check_range, unlearner
from palimpsest.forget.classifier._concept_patches import (
    Embed,
    Locate,
    Place,
    check_place,
    inputs_and_labels,
    labels_of,
    masked_texts,
    patched,
)  # fmt: skip
from palimpsest.parts.activations import head_name
from palimpsest.parts.attribution import Quadrature
from palimpsest.parts.concept_bank import (
    ConceptBank,
    ConceptExamples,
    examples_by_column,
    learn_concept_bank,
)
from palimpsest.parts.concept_bottleneck import (
    ConceptBottleneck,
    Donor,
    Rule,
    choose_donor,
    concept_order,
    fit_concept_bottleneck,
)
from palimpsest.parts.pairing import mixed
from palimpsest.parts.parameters import matching, only_trainable
from palimpsest.parts.training import TrainingRecipe, step

log = logging.getLogger("palimpsest")
Labels = Literal["targeted", "random", "keep"]
Integrity = Literal["full", "half"]


@unlearner(
    "concept-poisoning",
    needs={Need.MODEL, Need.FORGET_DATA, Need.FORGET_LABELS, Need.RETAIN_DATA, Need.RETAIN_LABELS},
    tasks=("classification",),
    paper=Paper(
        "Class Machine Unlearning for Complex Data via Concepts Inference and Data Poisoning",
        "arXiv 2024",
        "2405.15662",
    ),
    search={"lr": Span(1e-3, 0.1, log=True), "epochs": Span(2, 30, integer=True)},
)
@dataclass(frozen=True)
class ConceptPoisoning:
    """Find the concepts that tie a class to the model, and fine-tune its head on poisoned copies of the class.

    A post-hoc concept bottleneck says which concepts (user's examples, or directions of another embedding)
    speak for which class. A donor class is one that a concept of the target is typical of. Every record to
    be forgotten is poisoned: a patch of a random donor record, cut where the donor's concept shows most, is
    pasted where the target's concept shows most, and the label becomes the donor's. Then the head alone is
    trained on retained and poisoned records together.

    Works on images [channels, height, width] and on token ids [tokens], where a patch is a run of tokens;
    `poison="masked"` replaces the words that integrated gradients find most telling of the class instead.

    **Labels alone do it.** The authors' own ablation says that wrong labels on unchanged images forget as
    well (`poison="none"`), that patches under true labels (`labels="keep"`) never do, and that whole donor
    images (`poison="full"`) forget worse, because the false label is then simply right; the replication
    shows the same here, on images and on texts. So `poison="none"` with `donor=` is the cheap baseline that
    a patch must beat; what patches buy is an explanation of what was cut. Compare with `poison="random"`,
    which pays no attention to concepts, before crediting them. Masked words even shield a class of texts:
    the false label is learned for the mask, and the covered words go on speaking for the class. One epoch on
    true records brings the class back: what is suppressed is still in the frozen backbone.

    For whole classes. Parts of classes and random records are poisoned in the same way, class by class
    (`rule="shared"` finds every class a donor), and take records of their class that were to be kept with them.

    Deviations. The embedding of windows and records is the classifier's own features unless `embedder` is
    given (the paper has CLIP): windows are shown alone in their place, not enlarged, which those features
    see better (`view`). What trains is the last linear layer, by name; the published code takes every parameter
    with "fc" in its name. Poisoned copies are kept as tensors, not as JPEG files. Without a donor by the
    "confusion" rule nothing is done instead of falling back to another rule.

    Attributes:
        concepts: Names of truth columns of the records, or `ConceptExamples` by name, or a `ConceptBank`.
            Not needed where a donor is given and no place depends on a concept.
        poison: "localized" (a patch at the concept), "center" or "random" (a larger patch, there), "full"
            (the whole donor, shrunk, in the middle), "masked" (texts only), or "none".
        labels: "targeted" (the donor's), "random" (any class, the true one included), or "keep".
        donor: The donor class; by default `rule` finds one for each class of the forget records.
        rule: "confusion" or "shared", see `choose_donor`.
        locate: What shows a place: "concept" (likeness to the one concept), "bottleneck" (to all that the
            class lives on, weighted), or "grad-cam" (needs captum and a convolution; images only).
        patch: Side of the patch, as a share of the shorter side; published 64 of 224.
        whole: Side of the whole donor image in "full", as a share of the side; published 160 of 224. Texts
            are replaced as a whole.
        stride: Steps between windows; by default a quarter of the patch, as published.
        view: "alone" or "enlarged", see `similarity_maps`; texts are always "alone".
        top: Number of concepts of the class that are covered, one after the other; beyond 5 it fails.
        embedder: Network from inputs to embeddings; by default the model's own features.
        sparsity: Strength of the bottleneck's elastic net; published 1e-5, see `fit_concept_bottleneck`.
        hybrid: Let the bottleneck see the embedding as well (PCBM-h).
        masked_words: Most words that are masked in a text.
        mask_id: Token that masks.
        pad_id: Token of padding.
        ignored_ids: Tokens that are never masked (stop words).
        attribution_steps: Points on the path of integrated gradients.
        quadrature: See `integrated_gradients`; all but "published" need captum.
        integrity: Train on all records, or on a random "half" of every class.
        head: Parameters that train, by name or pattern; by default the head of the task.
        lr: Learning rate; published 1e-3, up to 1e-2 on small data.
        epochs: Passes; published 20 to 30.
        batch_size: Records per step.
        momentum: Of SGD.
        mode: "train", as published: batch-norm statistics move though their layers are frozen; or "eval".
    """

    concepts: Sequence[str] | Mapping[str, ConceptExamples] | ConceptBank | None = None
    poison: Place = "localized"
    labels: Labels = "targeted"
    donor: int | None = None
    rule: Rule = "confusion"
    locate: Locate = "concept"
    patch: float = 64 / 224
    whole: float = 160 / 224
    stride: int | None = None
    view: Literal["alone", "enlarged"] = "alone"
    top: int = 1
    embedder: nn.Module | None = None
    sparsity: float = 1e-2
    hybrid: bool = False
    masked_words: int = 5
    mask_id: int = 1
    pad_id: int = 0
    ignored_ids: Sequence[int] = ()
    attribution_steps: int = 32
    quadrature: Quadrature = "gausslegendre"
    integrity: Integrity = "full"
    head: str | None = None
    lr: float = 1e-2
    epochs: int = 20
    batch_size: int = 32
    momentum: float = 0.9
    mode: Literal["train", "eval"] = "train"

    def __post_init__(self) -> None:
        for name, kind in (
            ("poison", Place), ("labels", Labels), ("rule", Rule), ("locate", Locate),
            ("integrity", Integrity), ("quadrature", Quadrature),
            ("view", Literal["alone", "enlarged"]), ("mode", Literal["train", "eval"]),
        ):  # fmt: skip
            if getattr(self, name) not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise InvalidHyperparameter(f"{name} must be one of {known}, not {getattr(self, name)!r}.")
        for name in ("patch", "whole"):
            check_range(name, getattr(self, name), 0, 1, open_low=True)
        check_range("sparsity", self.sparsity, 0, float("inf"), open_low=True)
        for name, low in (("top", 1), ("masked_words", 1), ("attribution_steps", 2)):
            check_range(name, getattr(self, name), low, float("inf"))
        check_range("stride", 1 if self.stride is None else self.stride, 1, float("inf"))
        _ = self.recipe

    @property
    def recipe(self) -> TrainingRecipe:
        """The optimizer's settings."""
        return TrainingRecipe(self.epochs, self.lr, self.batch_size, "sgd", self.momentum)

    def unlearn(self, model: nn.Module, split: ForgetSplit, task: Task, runtime: Runtime) -> nn.Module:
        """A copy of the model with a head trained on the poisoned records.

        Raises:
            MissingNeed: If the retained records are not at hand.
            InvalidHyperparameter: If concepts are needed and not given, a patch does not fit, or there is no
                donor.
            InvalidRecords: If a concept has no examples.
            MissingDependency: If captum is needed and not installed.
        """
        student, _ = self.unlearn_and_report(model, split, task, runtime)
        return student

    def unlearn_and_report(
        self, model: nn.Module, split: ForgetSplit, task: Task, runtime: Runtime
    ) -> tuple[nn.Module, Poisoned]:
        """The same, with what was pasted over what."""
        student = runtime.place(copy.deepcopy(model))
        name = self.head or getattr(task, "head", None) or head_name(student)
        head = matching(student, name or "*")  # a bare linear layer is all head
        poisoned = self.poisoned(student, split, task, runtime)
        train = split.train if self.integrity == "full" else half_of_every_class(split.train, task, runtime)
        order = runtime.generator("concept-poisoning order")
        with only_trainable(student, head), runtime.seeded("concept-poisoning"):
            optimizer = self.recipe.build_optimizer(student)
            student.train(self.mode == "train")
            for _ in runtime.track(range(self.epochs), "concept-poisoning"):
                for batch, gone in mixed(train, split.forget, task, runtime, self.batch_size, order):
                    batch = poisoned.swapped_into(batch, gone, task)
                    step(student, optimizer, task.loss_per_example(student, batch).mean(), batch)
        return student.eval(), poisoned

    def poisoned(self, model: nn.Module, split: ForgetSplit, task: Task, runtime: Runtime) -> Poisoned:
        """Poisoned copies of the forget records, with their false labels; the model is only asked."""
        if split.retain is None:
            raise MissingNeed("Concept poisoning needs the retained records.")
        inputs, true = inputs_and_labels(split.forget, task, runtime)
        check_place(self, inputs)
        kept = labels_of(split.retain, task, runtime)
        words: dict[int, list[int]] = {}
        with evaluating(model):
            embed = Embed(model, task, self.embedder)
            bottleneck = self._bottleneck(embed, split, task, runtime)
            donors = self._donors(bottleneck, true, kept)
            false, result = true.clone(), inputs.clone()
            if self.labels == "random":
                draw = runtime.generator("false labels")
                false = torch.randint(embed.classes(inputs), true.shape, generator=draw)
            for label, pairs in donors.items():
                mine = (true == label).nonzero()[:, 0]
                if self.labels == "targeted":
                    false[mine] = int(pairs[0].donor_class or 0)
                if self.poison == "masked":
                    result[mine], words[label] = masked_texts(self, embed, inputs[mine], label)
                elif self.poison != "none":
                    for pair in pairs:
                        result[mine] = patched(
                            self, embed, bottleneck, result[mine], label, pair, split.retain, kept, runtime
                        )
        names = bottleneck.bank.names if bottleneck else ()
        log.info("concept-poisoning: concepts %s, donors %s", names, donors)
        rows = {name: row for row, name in enumerate(split.forget.ids)}
        return Poisoned(result, false, rows, donors, bottleneck, words)

    @property
    def _wants_donor(self) -> bool:
        return self.labels == "targeted" or self.poison not in ("none", "masked")

    def _bottleneck(
        self, embed: Embed, split: ForgetSplit, task: Task, runtime: Runtime
    ) -> ConceptBottleneck | None:
        """The concept bottleneck of the original; None if nothing depends on a concept."""
        by_concept = self.poison == "localized" and (self.locate != "grad-cam" or self.top > 1)
        if not by_concept and (self.donor is not None or not self._wants_donor):
            return None
        if self.concepts is None:
            raise InvalidHyperparameter(
                "Concepts are needed to find donors and places: give concepts= (columns, examples or a bank), or "
                "donor= with poison='random', 'center', 'full', 'masked' or 'none'."
            )
        bank = self.concepts
        if not isinstance(bank, ConceptBank):
            given = bank if isinstance(bank, Mapping) else examples_by_column(split.train, list(bank))
            bank = learn_concept_bank(given, lambda records: embed.records(records, runtime), runtime)
        first, _ = inputs_and_labels(split.train.select([0]), task, runtime)
        return fit_concept_bottleneck(
            bank,
            embed.records(split.train, runtime),
            labels_of(split.train, task, runtime),
            embed.classes(first),
            self.sparsity,
            hybrid=self.hybrid,
            seed=runtime.derive("bottleneck"),
        )

    def _donors(
        self, bottleneck: ConceptBottleneck | None, true: Tensor, kept: Tensor
    ) -> dict[int, list[Donor]]:
        """By forgotten label one pair of donor class and concepts for each concept that is covered."""
        targets, donors = true.unique().tolist(), {}
        available = set(kept.unique().tolist())
        if self.donor is not None and (self.donor in targets or self.donor not in available):
            raise InvalidHyperparameter(
                f"donor={self.donor} must be a class of the retained records that is not to be forgotten; "
                f"retained: {sorted(available)}, forgotten: {targets}."
            )
        for label in targets:
            if not self._wants_donor:
                donors[label] = []
                continue
            if bottleneck is None:
                donors[label] = [Donor(-1, self.donor)]
                continue
            weight = bottleneck.weight
            barred = frozenset(range(len(weight))) - available
            first = choose_donor(weight, label, self.rule, barred=barred)
            if self.donor is not None:
                first = Donor(first.target_concept, self.donor, concept_order(weight, self.donor)[0])
            if first.donor_class is None:
                raise InvalidHyperparameter(
                    f"No class is known for a concept of class {label} (its first: "
                    f"{', '.join(bottleneck.ranking(label)[:5])}): choose donor=, or rule='shared'."
                )
            pairs = [first]
            for concept in concept_order(weight, label)[1 : self.top]:
                others = sorted(available - {label})
                owner = others[int(weight[others, concept].argmax())]
                pairs.append(Donor(concept, owner, concept))
            donors[label] = pairs
        return donors


@dataclass(frozen=True)
class Poisoned:
    """Poisoned copies of the forget records.

    Attributes:
        inputs: One per record to be forgotten, [records, ...].
        labels: That they are trained on, [records].
        rows: Place of each record by its id.
        donors: By forgotten label what covers its concepts; empty where no donor is used.
        bottleneck: That chose them; None if no concept mattered.
        words: By forgotten label the ids of its most telling tokens, where words were masked.

    Raises:
        InvalidRecords: If there are not as many copies and labels as records.
    """

    inputs: Shaped[Tensor, "records ..."]
    labels: Int[Tensor, " records"]
    rows: Mapping[str, int]
    donors: Mapping[int, Sequence[Donor]]
    bottleneck: ConceptBottleneck | None
    words: Mapping[int, Sequence[int]]

    def __post_init__(self) -> None:
        if not len(self.inputs) == len(self.labels) == len(self.rows):
            raise InvalidRecords(
                f"{len(self.inputs)} poisoned copies with {len(self.labels)} labels were made for "
                f"{len(self.rows)} records to be forgotten."
            )

    def swapped_into(self, batch: Batch, gone: Bool[Tensor, " batch"], task: Task) -> Batch:
        """A batch with the poisoned copies in place of the records to be forgotten."""
        rows = torch.tensor([self.rows.get(name, 0) for name in batch["id"]])
        swapped = dict(batch)
        fields = (
            (getattr(task, "input", "input"), self.inputs),
            (getattr(task, "label", "label"), self.labels),
        )
        for name, new in fields:
            old = batch[name]
            mask = gone.reshape(-1, *[1] * (old.dim() - 1))
            swapped[name] = torch.where(mask, new[rows].to(old), old)
        return swapped


def half_of_every_class(records: Records, task: Task, runtime: Runtime) -> Records:
    """A random half of the records of each label."""
    labels = labels_of(records, task, runtime)
    order = runtime.numpy("half of every class").permutation(len(records))
    chosen = [
        mine[: -(-len(mine) // 2)]
        for label in labels.unique().tolist()
        for mine in [order[labels.numpy()[order] == label]]
    ]
    return records.select(np.sort(np.concatenate(chosen)))
