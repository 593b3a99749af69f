"""Post-hoc concept bottleneck: a sparse linear classifier on concept margins that explains a trained model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from palimpsest.core.errors import InvalidLabels
from palimpsest.parts.concept_bank import ConceptBank

Rule = Literal["confusion", "shared"]


@dataclass(frozen=True)
class ConceptBottleneck:
    """Class scores as a weighted sum of concept margins, and of the embedding itself in the hybrid.

    Attributes:
        bank: The concepts.
        weight: How much a concept speaks for a class, [classes, concepts].
        bias: [classes]; minus infinity for classes that no record had.
        residual: Weights on the embedding, [classes, dim]; None without the hybrid part.
    """

    bank: ConceptBank
    weight: Float[Tensor, "classes concepts"]
    bias: Float[Tensor, " classes"]
    residual: Float[Tensor, "classes dim"] | None = None

    def logits(self, embeddings: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch classes"]:
        """Class scores of embeddings."""
        scores = self.bank.margins(embeddings) @ self.weight.T + self.bias
        return scores if self.residual is None else scores + embeddings @ self.residual.T

    def ranking(self, label: int) -> tuple[str, ...]:
        """Concepts of a class, the one that speaks most for it first."""
        return tuple(self.bank.names[index] for index in concept_order(self.weight, label))


def fit_concept_bottleneck(
    bank: ConceptBank,
    embeddings: Float[Tensor, "records dim"],
    labels: Int[Tensor, " records"],
    classes: int,
    strength: float = 1e-2,
    l1_ratio: float = 0.99,
    hybrid: bool = False,
    seed: int = 42,
) -> ConceptBottleneck:
    """Fit the sparse classifier by stochastic gradient descent (elastic net, one class against the rest).

    Args:
        bank: Concepts, in the space of the embeddings.
        embeddings: Of training records.
        labels: Of the same.
        classes: Number of classes.
        strength: Of the elastic net, as scikit-learn's `alpha`. Published is 1e-5, on 50,000 records; on a
            thousand that leaves weights that descent has not settled, in an order that means little.
        l1_ratio: Share of its absolute part, which makes weights zero.
        hybrid: Add linear weights on the embedding itself, fitted to what the concepts leave unexplained.
        seed: Of the order of records.

    Raises:
        ModelMismatch: If the embeddings' width is not the bank's.
        InvalidLabels: If fewer than two classes occur.
    """
    from sklearn.linear_model import SGDClassifier

    embeddings, bank = embeddings.double().cpu(), bank.to(torch.zeros((), dtype=torch.float64))
    margins, target = bank.margins(embeddings).numpy(), labels.cpu().numpy()
    present = np.unique(target)
    if len(present) < 2:
        raise InvalidLabels(f"A concept bottleneck tells classes apart; the records have only {present}.")
    fitted = SGDClassifier(
        loss="log_loss", penalty="elasticnet", alpha=strength, l1_ratio=l1_ratio, random_state=seed
    ).fit(margins, target)
    weight = torch.zeros(classes, len(bank.names), dtype=torch.float64)
    bias = torch.full((classes,), -torch.inf, dtype=torch.float64)
    rows, offsets = np.asarray(fitted.coef_), np.asarray(fitted.intercept_)
    if len(present) == 2:  # scikit-learn keeps the second class's row only
        rows, offsets = np.vstack([-rows, rows]), np.hstack([-offsets, offsets])
    weight[present], bias[present] = torch.from_numpy(rows), torch.from_numpy(offsets)
    plain = ConceptBottleneck(bank, weight, bias)
    if not hybrid:
        return plain
    residual = _residual(plain.logits(embeddings), embeddings, labels.cpu().long())
    return ConceptBottleneck(bank, weight, bias, residual)


def _residual(
    scores: Float[Tensor, "records classes"],
    embeddings: Float[Tensor, "records dim"],
    labels: Int[Tensor, " records"],
    decay: float = 1e-3,
) -> Float[Tensor, "classes dim"]:
    """Linear weights on the embedding that lower the cross-entropy of the fixed scores."""
    weight = torch.zeros(scores.shape[1], embeddings.shape[1], dtype=scores.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(scores + embeddings @ weight.T, labels) + decay * weight.square().sum()
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    return weight.detach()


@dataclass(frozen=True)
class Donor:
    """Where the patch of a target class comes from.

    Attributes:
        target_concept: The target's own first concept: where the patch goes.
        donor_class: The class it is cut from, and the false label; None if the rule finds none.
        donor_concept: What it is cut around.
        donor_rank: Place of that concept, from 0: among the target's ("confusion") or the donor's ("shared").
    """

    target_concept: int
    donor_class: int | None = None
    donor_concept: int | None = None
    donor_rank: int | None = None


def concept_order(weight: Float[Tensor, "classes concepts"], label: int) -> list[int]:
    """Concepts of a class by falling weight."""
    return torch.argsort(weight[label], descending=True, stable=True).tolist()


def choose_donor(
    weight: Float[Tensor, "classes concepts"],
    target: int,
    rule: Rule = "confusion",
    topk: int = 5,
    barred: frozenset[int] = frozenset(),
) -> Donor:
    """The class whose concept can be taken for one of the target's.

    "confusion" walks the target's `topk` first concepts, looks for each at the other class with the
    largest weight on it, and takes the first concept that is that class's own first. "shared" takes the
    target's first concept and the other class with the largest weight on it, whatever else that class has.

    Args:
        weight: Of a concept bottleneck.
        target: The class to forget.
        rule: See above.
        topk: How far "confusion" walks.
        barred: Classes that cannot be donors (because they are to be forgotten too).
    """
    order = concept_order(weight, target)
    others = [label for label in range(len(weight)) if label != target and label not in barred]
    if not others:
        return Donor(order[0])
    for rank, concept in enumerate(order[: topk if rule == "confusion" else 1]):
        donor = others[int(weight[others, concept].argmax())]
        theirs = concept_order(weight, donor)
        if rule == "shared":
            return Donor(order[0], donor, concept, theirs.index(concept))
        if theirs[0] == concept:
            return Donor(order[0], donor, concept, rank)
    return Donor(order[0])
