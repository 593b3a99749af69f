"""Concept bank: one direction in embedding space per named concept, learned from examples or given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from palimpsest.core.errors import InvalidRecords, ModelMismatch, UnknownName
from palimpsest.core.records import Records
from palimpsest.core.runtime import Runtime

REGULARISATIONS = (0.001, 0.01, 0.1, 1.0, 10.0)
"""Values of C that the support vector machine of a concept is tried with."""
PER_SIDE = 100
"""At most this many examples with a concept, and as many without, are used."""
LEAST = 2
"""Fewer examples on a side do not allow C to be chosen on examples that were not fitted."""

FOLDS = 3
"""Parts of the examples, each of which is left out once to choose C."""

EmbedRecords = Callable[[Records], Float[Tensor, "records dim"]]


@dataclass(frozen=True)
class ConceptExamples:
    """What a user knows of a concept: records that show it, and records that do not."""

    positive: Records
    negative: Records


@dataclass(frozen=True)
class ConceptBank:
    """Concepts as hyperplanes: how far an embedding lies on a concept's side is its margin.

    Attributes:
        names: Of the concepts.
        vectors: Normal of each concept's hyperplane, [concepts, dim].
        intercepts: Offset of each, [concepts].
        norms: What margins are divided by, [concepts].

    Raises:
        InvalidRecords: If there is no concept, a name comes twice, shapes differ, or a vector has length 0.
    """

    names: tuple[str, ...]
    vectors: Float[Tensor, "concepts dim"]
    intercepts: Float[Tensor, " concepts"]
    norms: Float[Tensor, " concepts"]

    def __post_init__(self) -> None:
        count = len(self.names)
        if count == 0:
            raise InvalidRecords("The concept bank is empty: give examples of at least one concept.")
        if len(set(self.names)) != count:
            raise InvalidRecords(f"Names of concepts must be unique: {', '.join(sorted(self.names))}.")
        if {self.vectors.shape[:1], self.intercepts.shape, self.norms.shape} != {(count,)}:
            raise InvalidRecords(f"{count} concepts need as many vectors, intercepts and norms.")
        for name, vector, norm in zip(self.names, self.vectors, self.norms, strict=True):
            if not torch.isfinite(vector).all() or not float(norm) > 0 or not float(vector.norm()) > 0:
                raise InvalidRecords(
                    f"The vector of concept '{name}' has length {float(vector.norm()):g} (norm "
                    f"{float(norm):g}): its examples do not tell it apart. Give others, or leave it out."
                )

    @property
    def directions(self) -> Float[Tensor, "concepts dim"]:
        """The vectors at length 1."""
        return self.vectors / self.vectors.norm(dim=1, keepdim=True)

    def index(self, name: str) -> int:
        """Position of a concept.

        Raises:
            UnknownName: If there is none; suggests the nearest.
        """
        if name not in self.names:
            raise UnknownName("concept", name, self.names)
        return self.names.index(name)

    def margins(self, embeddings: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch concepts"]:
        """Signed distance of each embedding to each concept's hyperplane.

        Raises:
            ModelMismatch: If embeddings are wider or narrower than the vectors.
        """
        if embeddings.shape[1] != self.vectors.shape[1]:
            raise ModelMismatch(
                f"Embeddings have {embeddings.shape[1]} numbers, the concept bank was made for "
                f"{self.vectors.shape[1]}: use the embedding that it was learned with."
            )
        return concept_margins(embeddings, self.vectors, self.intercepts, self.norms)

    def to(self, like: Tensor) -> ConceptBank:
        """The bank on the device and in the precision of a tensor."""
        moved = (tensor.to(like) for tensor in (self.vectors, self.intercepts, self.norms))
        return ConceptBank(self.names, *moved)


def concept_margins(
    embeddings: Float[Tensor, "batch dim"],
    vectors: Float[Tensor, "concepts dim"],
    intercepts: Float[Tensor, " concepts"],
    norms: Float[Tensor, " concepts"],
) -> Float[Tensor, "batch concepts"]:
    """m_k = (c_k . e + phi_k) / ||c_k||."""
    return (embeddings @ vectors.T + intercepts) / norms


def bank_of_vectors(names: Sequence[str], vectors: Float[Tensor, "concepts dim"]) -> ConceptBank:
    """A bank of given directions, such as the text embeddings of a model that embeds images alike."""
    return ConceptBank(tuple(names), vectors, vectors.new_zeros(len(vectors)), vectors.norm(dim=1))


def learn_concept_bank(
    examples: Mapping[str, ConceptExamples], embed: EmbedRecords, runtime: Runtime
) -> ConceptBank:
    """One concept activation vector per concept, from the embeddings of its examples.

    Args:
        examples: Of each concept; at most `PER_SIDE` of either kind are used, drawn at random.
        embed: From records to embeddings.
        runtime: For the draws.

    Raises:
        InvalidRecords: If there is no concept, or one has fewer than `LEAST` examples with or without it.
    """
    for name, given in examples.items():
        have = (len(given.positive), len(given.negative))
        if min(have) < LEAST:
            raise InvalidRecords(
                f"Concept '{name}' has {have[0]} examples with it and {have[1]} without: it needs at least "
                f"{LEAST} of either."
            )
    vectors, intercepts = [], []
    for name, given in examples.items():
        sides = []
        for side, records in (("with", given.positive), ("without", given.negative)):
            drawn = runtime.numpy("concept", name, side).permutation(len(records))[:PER_SIDE]
            sides.append(embed(records.select(np.sort(drawn))).double().cpu())
        vector, intercept = concept_activation_vector(sides[0], sides[1])
        vectors.append(vector)
        intercepts.append(intercept)
    if not vectors:
        raise InvalidRecords("The concept bank is empty: give examples of at least one concept.")
    stacked = torch.stack(vectors)
    return ConceptBank(tuple(examples), stacked, torch.stack(intercepts), stacked.norm(dim=1))


def concept_activation_vector(
    positive: Float[Tensor, "with dim"], negative: Float[Tensor, "without dim"]
) -> tuple[Float[Tensor, " dim"], Float[Tensor, ""]]:
    """Normal and intercept of the linear support vector machine that tells examples of a concept apart.

    Of `REGULARISATIONS` the smallest C with the best accuracy in cross-validation is taken.
    """
    from sklearn.model_selection import StratifiedKFold
    from sklearn.svm import SVC

    x = torch.cat([positive, negative]).numpy()
    y = np.repeat([1, 0], [len(positive), len(negative)])
    folds = list(StratifiedKFold(min(FOLDS, len(positive), len(negative))).split(x, y))
    right = [
        sum(int((SVC(kernel="linear", C=c).fit(x[a], y[a]).predict(x[b]) == y[b]).sum()) for a, b in folds)
        for c in REGULARISATIONS
    ]
    machine = SVC(kernel="linear", C=REGULARISATIONS[int(np.argmax(right))]).fit(x, y)
    return torch.from_numpy(machine.coef_[0].copy()), torch.tensor(float(machine.intercept_[0])).double()


def examples_by_column(records: Records, names: Sequence[str]) -> dict[str, ConceptExamples]:
    """Examples of concepts that the records name in columns of truth values.

    Raises:
        UnknownName: If there is no such column.
    """
    shown = {name: np.asarray(records.column(name)).astype(bool) for name in names}
    return {
        name: ConceptExamples(records.select(mask), records.select(~mask)) for name, mask in shown.items()
    }
