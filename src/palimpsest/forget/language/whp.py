"""WHP: lower what a model that knows the forget text too well raises ("Who's Harry Potter?")."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from palimpsest.core.errors import InvalidHyperparameter, ModelMismatch
from palimpsest.core.modes import evaluating
from palimpsest.core.needs import Need
from palimpsest.core.records import Batch
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Span
from palimpsest.core.split import ForgetSplit
from palimpsest.core.unlearner import Card, Paper, check_range, unlearner
from palimpsest.forget.gradient import GradientUnlearner, Training
from palimpsest.forget.language.reinforcing import reinforced
from palimpsest.forget.language.wrapped import Call, Wrapped, ask, logits_beside
from palimpsest.forget.objective import Context, Losses, Step, token_term
from palimpsest.forget.terms import Retain, check_retain, retain_term
from palimpsest.parts.logit_combination import whp_logits
from palimpsest.parts.tokens import IGNORED
from palimpsest.tasks.language import Language


class WHPModel(Wrapped):
    """base - scale * relu(reinforced - base), at every token that is scored or generated.

    Attributes:
        inner: The model that must forget, as it was.
        reinforced: The same after training on the forget records.
        scale: Weight of the difference; 0 gives the inner model.
    """

    def __init__(self, inner: nn.Module, reinforced: nn.Module, scale: float):
        super().__init__(inner)
        self.reinforced, self.scale = reinforced, scale

    def answer(self, call: Call) -> Any:
        """The combined logits, in the inner model's output."""
        output = ask(self.inner, call)
        output.logits = whp_logits(
            output.logits, logits_beside(self.reinforced, call, "reinforced"), self.scale
        )
        return output


@unlearner(
    "whp",
    intention="suppression",
    needs={Need.MODEL, Need.FORGET_DATA},
    tasks=("language",),
    paper=Paper("Who's Harry Potter? Approximate Unlearning in LLMs", "arXiv", "2310.02238"),
    search={
        "scale": Span(0.5, 10.0, log=True),
        "lr": Span(1e-4, 3e-3, log=True),
        "epochs": Span(1, 10, integer=True),
    },
)
@dataclass(frozen=True, kw_only=True)
class WHP(Training):
    """Compare the model with one trained further on the forget records, and hold back what that one raises.

    variant="logits" (as MUSE uses it) keeps both models and combines them at every step: nothing is removed
    from the weights. variant="finetune" is the full method: the combined logits name a generic next token
    everywhere in the forget records, and the model is trained on those in the place of the true ones.

    With `dictionary`, as in the paper, the model's own side of the comparison reads the text with the names
    of the subject replaced by generic ones; tokens of the two texts are paired where they are the same, and
    the others keep the untranslated comparison. The paper does not say how often a name was translated
    before its fine-tuning, nor which loss weights it used: both steps are here in their plain form.

    The training settings are those of the reinforced model; `tune_epochs` and `tune_lr` are of the second
    training.

    Attributes:
        variant: "logits" or "finetune".
        scale: Weight of the difference (alpha in the paper).
        dictionary: Generic names by the names that they stand for.
        tune_epochs: Passes over the forget records with generic labels.
        tune_lr: Peak learning rate of it.
        retain: Retain term of the second training: "none" as published, "nll" or "kl".
        alpha: Its weight.
    """

    card: ClassVar[Card]
    variant: Literal["logits", "finetune"] = "logits"
    scale: float = 1.0
    dictionary: Mapping[str, str] | None = None
    tune_epochs: int = 5
    tune_lr: float = 1e-5
    retain: Retain = "none"
    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in ("logits", "finetune"):
            raise InvalidHyperparameter(f"variant is 'logits' or 'finetune', not {self.variant!r}.")
        if self.dictionary and self.variant == "logits":
            raise InvalidHyperparameter("A dictionary of generic names is used by variant='finetune' only.")
        check_range("scale", self.scale, 0, math.inf)
        check_range("tune_epochs", self.tune_epochs, 1, math.inf)
        check_range("tune_lr", self.tune_lr, 0, math.inf, open_low=True)
        check_retain(self.retain, 1.0, self.alpha)

    def unlearn(self, model: nn.Module, split: ForgetSplit, task: Language, runtime: Runtime) -> nn.Module:
        """A wrapper around both models, or a model trained on generic labels.

        Raises:
            ModelMismatch: If the further training did not change the model.
        """
        further = reinforced(self, model, split, task, runtime)
        base = runtime.place(copy.deepcopy(model)).eval()
        if _same_weights(base, further):
            raise ModelMismatch("The reinforced model is the model itself: raise lr or epochs.")
        if self.variant == "logits":
            return WHPModel(base, further, self.scale).eval()
        table = generic_labels(base, further, split, task, runtime, self.scale, self.dictionary or {})
        objective = LearnGeneric(table, self.retain, self.alpha)
        settings = {name: getattr(self, name) for name in Training.__dataclass_fields__}
        settings |= {"lr": self.tune_lr, "epochs": self.tune_epochs}
        return GradientUnlearner(objective=objective, **settings).unlearn(model, split, task, runtime)


@dataclass(frozen=True)
class LearnGeneric:
    """Learn other tokens than the true ones at the same places.

    Attributes:
        table: Labels by id of the record, each [tokens].
        retain: Retain term.
        alpha: Its weight.
    """

    table: Mapping[str, Int[Tensor, " tokens"]]
    retain: Retain = "none"
    alpha: float = 1.0

    @property
    def needs_original(self) -> bool:
        """Only for the KL retain term."""
        return self.retain == "kl"

    @property
    def needs_retain(self) -> bool:
        """Only with a retain term."""
        return self.retain != "none"

    def collate(self, context: Context, items: Sequence[dict[str, Any]], epoch: int) -> Batch:
        """The records with generic labels in the place of their own."""
        rows = [self.table[item["id"]] for item in items]
        return {
            **context.task.collate(items),
            "labels": pad_sequence(rows, batch_first=True, padding_value=IGNORED),
        }

    def begin(self, context: Context) -> Callable[[Step], Losses]:
        """The terms of a step."""

        def losses(step: Step) -> Losses:
            forget = token_term(context, step.forget)
            return Losses(forget, retain_term(context, step, self.retain), 1.0, self.alpha)

        return losses


@torch.no_grad()
def generic_labels(
    base: nn.Module,
    further: nn.Module,
    split: ForgetSplit,
    task: Language,
    runtime: Runtime,
    scale: float,
    dictionary: Mapping[str, str],
) -> dict[str, Int[Tensor, " tokens"]]:
    """The likeliest token of the combined logits at every scored place of the forget records, by id."""
    table: dict[str, Tensor] = {}
    with evaluating(base), evaluating(further):
        for batch in runtime.batches(split.forget, task, 32):
            own = task.logits(base, batch)
            if dictionary:
                own = _translated(own, base, batch, task, runtime, dictionary)
            chosen = whp_logits(own, task.logits(further, batch), scale).argmax(-1)
            labels = batch["labels"]
            generic = torch.where(labels[:, 1:] == IGNORED, labels[:, 1:], chosen[:, :-1])
            whole = torch.cat([labels[:, :1], generic], 1).cpu()
            lengths = batch["attention_mask"].sum(1).tolist()
            for name, row, length in zip(batch["id"], whole, lengths, strict=True):
                table[name] = row[: int(length)].clone()
    return table


def _translated(
    own: Tensor,
    base: nn.Module,
    batch: Batch,
    task: Language,
    runtime: Runtime,
    dictionary: Mapping[str, str],
) -> Tensor:
    """The base model's logits on the translated records, wherever a token has its like there."""
    items = [
        {
            key: translate(batch[key][row], dictionary)
            for key in ("question", "answer", "text")
            if key in batch
        }
        for row in range(len(batch["id"]))
    ]
    other = runtime.to_device(task.collate(items))
    logits, found = task.logits(base, other), own.clone()
    for row, (here, there) in enumerate(
        zip(batch["input_ids"].tolist(), other["input_ids"].tolist(), strict=True)
    ):
        for block in SequenceMatcher(None, here, there, autojunk=False).get_matching_blocks():
            found[row, block.a : block.a + block.size] = logits[row, block.b : block.b + block.size]
    return found


def translate(text: str | None, dictionary: Mapping[str, str]) -> str | None:
    """A text with names replaced, longer names first.

    Example:
        >>> translate("Ann Lee met Ann.", {"Ann": "Jo", "Ann Lee": "Jo Doe"})
        'Jo Doe met Jo.'
    """
    if text is None:
        return None
    marked = text
    names = sorted(dictionary, key=len, reverse=True)
    for number, name in enumerate(names):
        marked = marked.replace(name, f"\0{number}\0")
    for number, name in enumerate(names):
        marked = marked.replace(f"\0{number}\0", dictionary[name])
    return marked


def _same_weights(one: nn.Module, two: nn.Module) -> bool:
    states = one.state_dict(), two.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(tensor, states[1][name]) for name, tensor in states[0].items()
    )
