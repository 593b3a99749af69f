"""Does a prompt ask for what is to be forgotten? A small network on pooled hidden states of the frozen model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords, ModelMismatch
from palimpsest.core.modes import evaluating
from palimpsest.core.runtime import Runtime
from palimpsest.core.unlearner import check_range
from palimpsest.tasks.language import Language

PENULTIMATE = -2
"""Of the hidden states of transformers, which begin with the embeddings and end with the last layer's output."""


@dataclass(frozen=True)
class ClassifierSettings:
    """How the classifier of prompts is trained.

    Attributes:
        layer: Hidden state that is pooled; -2 is the penultimate. In a model of two blocks what lies below it (-3)
            tells wordings that were not trained on apart more surely.
        hidden: Units of the hidden layer.
        epochs: Steps of Adam on all training prompts.
        lr: Step size.
        weight_decay: Of AdamW.
        threshold: Probability above which a prompt is a forget prompt; None chooses it.
        false_positives: Share of the validation's retain prompts that a chosen threshold may take for forget prompts.
        validation: Share of the retain prompts that is not trained on and gives the threshold.
        batch_size: Prompts at once through the language model.

    Raises:
        InvalidHyperparameter: If a value is out of range.
    """

    layer: int = PENULTIMATE
    hidden: int = 64
    epochs: int = 200
    lr: float = 5e-3
    weight_decay: float = 1.0
    threshold: float | None = None
    false_positives: float = 0.01
    validation: float = 0.2
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_range("hidden", self.hidden, 1, 1 << 20)
        check_range("epochs", self.epochs, 1, 1 << 20)
        check_range("lr", self.lr, 0, 10, open_low=True)
        check_range("weight_decay", self.weight_decay, 0, 100)
        check_range("batch_size", self.batch_size, 1, 1 << 20)
        for name, value in (
            ("threshold", self.threshold),
            ("false_positives", self.false_positives),
            ("validation", self.validation),
        ):
            if value is not None and not 0 < value < 1:
                raise InvalidHyperparameter(f"{name} must lie strictly between 0 and 1, not {value!r}.")


class PromptClassifier(nn.Module):
    """Two layers on standardised pooled states, and the probability from which a prompt counts.

    Args:
        width: Of the states.
        hidden: Units of the hidden layer.
    """

    mean: Tensor
    scale: Tensor
    threshold: Tensor

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.register_buffer("threshold", torch.tensor(0.5))
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 2))

    def forward(self, pooled: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch 2"]:
        """Logits of "others" and "forget"."""
        return self.layers((pooled.float() - self.mean) / self.scale)

    def probability(self, pooled: Float[Tensor, "batch dim"]) -> Float[Tensor, " batch"]:
        """That a prompt asks for what is to be forgotten."""
        return self(pooled).softmax(1)[:, 1]

    def decides(self, pooled: Float[Tensor, "batch dim"]) -> Bool[Tensor, " batch"]:
        """Whether a prompt counts as a forget prompt."""
        return self.probability(pooled) > self.threshold


def pool(
    hidden: Float[Tensor, "batch tokens dim"], mask: Int[Tensor, "batch tokens"]
) -> Float[Tensor, "batch dim"]:
    """Mean of the states of every row's tokens (card, step 1)."""
    weights = mask.to(hidden)[:, :, None]
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


def states_of(output: object, layer: int) -> Float[Tensor, "batch tokens dim"]:
    """One hidden state of a model's output.

    Raises:
        ModelMismatch: If the output has no hidden states, or not so many.
    """
    hidden = getattr(output, "hidden_states", None)
    if not hidden:
        raise ModelMismatch(
            "The language model gives no hidden states (`output_hidden_states=True`), which tell prompts apart."
        )
    if not -len(hidden) <= layer < len(hidden):
        raise ModelMismatch(
            f"The model has hidden states 0 to {len(hidden) - 1} (or -1 to {-len(hidden)}), not {layer}."
        )
    return hidden[layer]


@torch.no_grad()
def pooled_states(
    model: nn.Module, task: Language, prompts: Sequence[Sequence[int]], layer: int, batch_size: int
) -> Float[Tensor, "prompts dim"]:
    """Pooled states of prompts under the frozen model, each distinct prompt passed once.

    Raises:
        ModelMismatch: If the model gives no hidden states.
    """
    place = next(model.parameters()).device
    distinct = sorted({tuple(prompt) for prompt in prompts}, key=lambda prompt: (len(prompt), prompt))
    parts: list[Tensor] = []
    with evaluating(model):
        for start in range(0, len(distinct), batch_size):
            rows = distinct[start : start + batch_size]
            padded = task.padded(rows, [0] * len(rows))
            ids, mask = padded["input_ids"].to(place), padded["attention_mask"].to(place)
            output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
            parts.append(pool(states_of(output, layer).float(), mask))
    where = {prompt: at for at, prompt in enumerate(distinct)}
    return torch.cat(parts)[[where[tuple(prompt)] for prompt in prompts]]


def train_classifier(
    forget: Float[Tensor, "forget dim"],
    retain: Float[Tensor, "retain dim"],
    settings: ClassifierSettings,
    runtime: Runtime,
) -> PromptClassifier:
    """A classifier of pooled states: cross entropy with classes weighed alike.

    Some of the retain prompts are kept from training. The threshold is the smallest from 0.5 on under which at
    most `false_positives` of them count as forget prompts. Prompts are kept back one by one, so other wordings of
    them may be trained on: with whole records kept back the threshold would have to reach over questions that
    name a value nobody has heard of ("Who has the phone number ...?"), and most forget prompts fell below it.

    Args:
        forget: Of prompts about what is to be forgotten.
        retain: Of others.
        settings: How to train.
        runtime: Random numbers.

    Raises:
        InvalidRecords: If there are no prompts of one of the classes, or too few others to validate.
    """
    if not len(forget) or not len(retain):
        raise InvalidRecords(
            f"A classifier needs prompts of both classes, not {len(forget)} to forget and {len(retain)} to retain."
        )
    validated = _kept_back(len(retain), settings.validation, runtime).to(retain.device)
    fitted = retain[~validated]
    if not len(fitted) or not bool(validated.any()):
        raise InvalidRecords(
            f"{len(retain)} retained prompts are too few to train the classifier and choose its threshold: "
            "give more of them."
        )
    states = torch.cat([forget, fitted])
    labels = torch.cat([torch.ones(len(forget)), torch.zeros(len(fitted))]).long().to(states.device)
    weights = len(labels) / (2 * torch.bincount(labels, minlength=2).float())
    with runtime.seeded("guard", "classifier"):
        classifier = PromptClassifier(states.shape[1], settings.hidden).to(states.device)
    classifier.mean.copy_(states.mean(0))
    classifier.scale.copy_(states.std(0, unbiased=False).clamp(min=1e-6))
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    with torch.enable_grad():
        for _ in range(settings.epochs):
            optimizer.zero_grad()
            F.cross_entropy(classifier(states), labels, weights).backward()
            optimizer.step()
    classifier.requires_grad_(False).eval()
    chosen = settings.threshold
    if chosen is None:
        chosen = threshold_for(classifier.probability(retain[validated]), settings.false_positives)
    classifier.threshold.fill_(chosen)
    return classifier


def threshold_for(probabilities: Float[Tensor, " retain"], false_positives: float) -> float:
    """The smallest threshold from 0.5 on that at most a share of the probabilities exceeds.

    Example:
        >>> threshold_for(torch.tensor([0.1, 0.2, 0.9, 0.3]), 0.25), threshold_for(torch.tensor([0.1, 0.75]), 0.1)
        (0.5, 0.75)
    """
    allowed = int(false_positives * len(probabilities))
    ordered = probabilities.sort(descending=True).values
    return max(0.5, float(ordered[allowed])) if allowed < len(ordered) else 0.5


def _kept_back(size: int, share: float, runtime: Runtime) -> Bool[Tensor, " prompts"]:
    """A random share of the prompts, at least one of them where there are two."""
    kept = torch.zeros(size, dtype=torch.bool)
    order = torch.randperm(size, generator=runtime.generator("guard", "validation"))
    kept[order[: min(max(round(share * size), 1), size - 1)]] = True
    return kept
