"""ULD: a small assistant that knows only what is to be forgotten, subtracted from the model at every token."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords, MissingNeed, NonFiniteLoss
from palimpsest.core.needs import Need
from palimpsest.core.records import Batch, Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Span
from palimpsest.core.split import ForgetSplit
from palimpsest.core.unlearner import Paper, check_range, unlearner
from palimpsest.forget.gradient import HISTORY_ATTRIBUTE
from palimpsest.forget.language.combine import Combined, Difference, vocabulary_of
from palimpsest.forget.language.uld_data import assistant_loss, forget_side, interleave, retain_side
from palimpsest.parts.decoder import truncated
from palimpsest.parts.lora import add_lora, merged
from palimpsest.parts.parameters import trainable
from palimpsest.tasks.language import Language


@unlearner(
    "uld",
    intention="suppression",
    needs={Need.MODEL, Need.FORGET_DATA, Need.RETAIN_DATA},
    tasks=("language",),
    paper=Paper(
        "Reversing the Forget-Retain Objectives: An Efficient LLM Unlearning Framework from Logit Difference",
        "NeurIPS 2024",
        "2406.08607",
    ),
    search={
        "alpha": Span(0.3, 1.5),
        "lr": Span(5e-4, 5e-3, log=True),
        "epochs": Span(10, 40, integer=True),
        "retain_weight": Span(1.0, 10.0, log=True),
    },
)
@dataclass(frozen=True, kw_only=True)
class ULD:
    """Train an assistant with the opposite aim, and subtract its logits: target - alpha * assistant.

    The assistant is cut out of the target (embedding, first blocks, final norm, head) and learns the forget
    records, while it stays uniform on retained records and on wrong answers to the forgotten questions, so
    that it knows the facts and not their topic. The target is not changed by a bit; the pair scores and
    generates as one model (`combine.Combined`). Training costs as much as the assistant is small; every
    later token costs the assistant's pass too.

    Nothing is removed: whoever holds the pair can leave the assistant away, and audits do. Use it where the
    weights stay with the one who serves them, or to have an answer today and a retrained model later.

    Tokens that the target finds unlikely (`relative_top`) are not raised by the difference. When text is
    scored they keep the target's logit; when it is generated they are excluded. Raw logits are combined in
    both cases. In scores the level of the kept tokens against the others therefore depends on the level of
    the assistant's logits, to which its own softmax is blind; among kept tokens it does not.

    Deviations from the released code, which are its slips: excluded tokens are -inf (it multiplies
    by a 0/1 mask, and an excluded token wins where all kept ones are negative); at least one token is kept
    where relative_top * vocabulary is below 1 (there the filter switches itself off); sampling and beams run; the assistant
    has its own keys and values in scoring too; generation ends at the end token; wrong answers come from
    the forget records themselves; paraphrases keep their order; interleaving leaves nothing out. Retained
    records are drawn at random, because in most data the last ones (`retain_sample="last"`, as released) are
    no sample of the whole. A deviation of ours: `tuning="full"` trains all of a small assistant.

    Attributes:
        layers: Blocks of the assistant, from the first; by default half of the target's, 8 at most.
        alpha: Share of the assistant's logits that is subtracted; 0 gives the target exactly.
        relative_top: See above; None combines all tokens.
        retain_weight: Of the uniform part of the loss.
        answers_only: Ask for uniformity only where answer tokens are predicted, not at all positions.
        retain_records: At most so many retained records, and no more than there are to forget; 0 takes none.
        retain_sample: "random" or "last".
        paraphrases: So many paraphrased pairs of each forget record are learnt with it, if it has them.
        perturbed: So many wrong answers of each stand on the retain side, if it has them.
        tuning: "lora" (adapters on every linear layer but the head; merged at the end) or "full".
        r: Rank of the adapters.
        lora_alpha: Their scale.
        dropout: On their inputs.
        lr: Peak learning rate; linear schedule.
        epochs: Passes over both sides.
        batch_size: Records of one pass through the assistant.
        accumulate: Passes per optimizer step.
        weight_decay: Of AdamW.
        warmup: Share of the steps in which the learning rate rises.
        clip: Largest gradient norm; None does not clip.
    """

    layers: int | None = None
    alpha: float = 0.8
    relative_top: float | None = 0.01
    retain_weight: float = 5.0
    answers_only: bool = False
    retain_records: int = 400
    retain_sample: Literal["random", "last"] = "random"
    paraphrases: int = 2
    perturbed: int = 2
    tuning: Literal["lora", "full"] = "lora"
    r: int = 16
    lora_alpha: float = 32.0
    dropout: float = 0.05
    lr: float = 1e-3
    epochs: int = 10
    batch_size: int = 8
    accumulate: int = 4
    weight_decay: float = 0.01
    warmup: float = 0.1
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        _ = self.combination
        least = {"epochs": 1, "batch_size": 1, "accumulate": 1, "r": 1, "retain_records": 0}
        least |= {"paraphrases": 0, "perturbed": 0, "retain_weight": 0, "weight_decay": 0}
        for name, low in least.items():
            check_range(name, getattr(self, name), low, math.inf)
        for name in ("lr", "lora_alpha", "layers", "clip"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 0, math.inf, open_low=True)
        check_range("warmup", self.warmup, 0, 1)
        check_range("dropout", self.dropout, 0, 1)
        if self.tuning not in ("lora", "full") or self.retain_sample not in ("random", "last"):
            raise InvalidHyperparameter(
                f"tuning is 'lora' or 'full', retain_sample 'random' or 'last', not {self.tuning!r} and "
                f"{self.retain_sample!r}."
            )

    @property
    def combination(self) -> Difference:
        """How the pair answers."""
        return Difference(self.alpha, self.relative_top)

    @property
    def supplies(self) -> frozenset[Need]:
        """Without a uniform part, or with wrong answers alone on that side, retained records are not needed."""
        alone = self.retain_weight == 0 or self.retain_records == 0
        return frozenset({Need.RETAIN_DATA}) if alone else frozenset()

    def unlearn(self, model: nn.Module, split: ForgetSplit, task: Language, runtime: Runtime) -> nn.Module:
        """The pair of models; `inner` is the target, `HISTORY_ATTRIBUTE` tells of the assistant's training.

        Raises:
            InvalidHyperparameter: If the target has fewer blocks than `layers`.
            MissingNeed: If there are retained records nowhere and the loss has a uniform part.
            InvalidRecords: If a paraphrase or a wrong answer is too long, or tokenizes to nothing.
            NonFiniteLoss: If the loss becomes NaN or Inf.
        """
        vocabulary = vocabulary_of(model)
        if self.relative_top is not None and self.relative_top * vocabulary < 1:
            warnings.warn(
                f"relative_top = {self.relative_top} of {vocabulary} tokens is less than one: one is kept.",
                stacklevel=2,
            )
        sides = self.sides(split, runtime)
        _check_rows([*sides[0], *sides[1]], model, task)
        assistant, history = self.teach(self.assistant_of(model, runtime), sides, task, runtime)
        target = runtime.place(copy.deepcopy(model)).eval()
        pair = Combined(target, [assistant], self.combination)
        setattr(pair, HISTORY_ATTRIBUTE, history)
        return pair.eval()

    def assistant_of(self, model: nn.Module, runtime: Runtime) -> nn.Module:
        """The first blocks of a copy of the target, with its embedding, final norm and head."""
        whole = merged(copy.deepcopy(model)) if hasattr(model, "merge_and_unload") else model
        return runtime.place(truncated(whole, self.layers or blocks_by_default(whole)))

    def sides(self, split: ForgetSplit, runtime: Runtime) -> tuple[list[Batch], list[Batch]]:
        """Items to remember, and items to be uniform on.

        Raises:
            MissingNeed: If nothing is on the second side though the loss has a uniform part.
        """
        kept = self._sample(split, runtime)
        sides = forget_side(split.forget, self.paraphrases), retain_side(split.forget, kept, self.perturbed)
        if not sides[1] and self.retain_weight:
            raise MissingNeed(
                "ULD's assistant must be uniform on something: pass retained records as ForgetSplit.retain, or forget records "
                "with perturbed_answer, or set retain_weight=0 (then it unlearns far too much)."
            )
        if not self.retain_weight:
            warnings.warn(
                "With retain_weight=0 the assistant may know anything beside the request.", stacklevel=3
            )
        return sides

    def _sample(self, split: ForgetSplit, runtime: Runtime) -> Records | None:
        count = min(self.retain_records, len(split.forget), 0 if split.retain is None else len(split.retain))
        if split.retain is None or not count or not self.retain_weight:
            return None
        if self.retain_sample == "last":
            return split.retain.select(range(len(split.retain) - count, len(split.retain)))
        return split.retain.select(
            runtime.numpy("uld retain").choice(len(split.retain), count, replace=False)
        )

    def teach(
        self, assistant: nn.Module, sides: tuple[list[Batch], list[Batch]], task: Language, runtime: Runtime
    ) -> tuple[nn.Module, list[dict[str, float]]]:
        """Train the assistant; gives it in evaluation mode, and the losses of every step.

        Raises:
            NonFiniteLoss: If the loss becomes NaN or Inf.
        """
        rows = sum(map(len, sides))
        steps = self.epochs * -(-rows // (self.batch_size * self.accumulate))
        warmup = min(math.ceil(self.warmup * steps), steps - 1)
        history: list[dict[str, float]] = []
        with runtime.seeded("uld assistant"):
            student = self._opened(assistant, runtime)
            optimizer = torch.optim.AdamW(
                list(trainable(student).values()), self.lr, weight_decay=self.weight_decay
            )
            shared, optimizer = runtime.shared(student, optimizer)
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer,
                lambda done: (
                    (done + 1) / (warmup + 1) if done < warmup else (steps - done) / (steps - warmup)
                ),
            )
            shared.train()
            for window in runtime.track(self._windows(sides, runtime), "teaching the assistant", steps):
                seen = {"loss": 0.0, "remember": 0.0, "uniform": 0.0}
                for items in window:
                    batch = runtime.to_device(task.collate(items))
                    retained = torch.tensor([item["retained"] for item in items]).to(batch["labels"].device)
                    logits = task.logits(shared, batch)
                    loss = assistant_loss(
                        logits, batch["labels"], retained, self.retain_weight, self.answers_only
                    )
                    if not torch.isfinite(loss.total):
                        raise NonFiniteLoss(
                            f"The assistant's loss became {loss.total.item()} on {batch['id'][:3]}."
                        )
                    (loss.total / len(window)).backward()
                    parts = {"loss": loss.total, "remember": loss.remember, "uniform": loss.uniform}
                    for name, value in parts.items():
                        seen[name] += float(value.detach()) / len(window)
                if self.clip is not None:
                    nn.utils.clip_grad_norm_(list(trainable(student).values()), self.clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
                history.append(seen)
        return merged(student).eval(), history

    def _opened(self, assistant: nn.Module, runtime: Runtime) -> nn.Module:
        if self.tuning == "full":
            return assistant.requires_grad_(True)
        return runtime.place(add_lora(assistant.requires_grad_(False), self.r, self.lora_alpha, self.dropout))

    def _windows(
        self, sides: tuple[list[Batch], list[Batch]], runtime: Runtime
    ) -> Iterator[list[list[Batch]]]:
        """The microbatches of every optimizer step: both sides shuffled anew in every epoch, then interleaved."""
        generator = runtime.generator("uld order")
        for _ in range(self.epochs):
            first, second = (
                [side[at] for at in torch.randperm(len(side), generator=generator).tolist()] for side in sides
            )
            rows = interleave(first, second)
            for start in range(0, len(rows), self.batch_size * self.accumulate):
                window = rows[start : start + self.batch_size * self.accumulate]
                pieces = [window[at : at + self.batch_size] for at in range(0, len(window), self.batch_size)]
                own = [piece[runtime.rank :: runtime.processes] for piece in pieces]
                yield [piece for piece in own if piece]


def blocks_by_default(model: nn.Module) -> int:
    """Half of the blocks of a decoder, at least 1 and at most 8."""
    from palimpsest.parts.decoder import decoder_of

    return max(1, min(8, len(decoder_of(model).blocks) // 2))


def _check_rows(rows: Sequence[Batch], model: nn.Module, task: Language) -> None:
    """Check that every item has an answer and fits into the context, before anything is trained.

    Raises:
        InvalidRecords: Naming the first that does not.
    """
    limits = (task.max_length, getattr(getattr(model, "config", None), "max_position_embeddings", None))
    longest = min((limit for limit in limits if limit), default=1 << 30)
    for item in rows:
        question: Any = item.get("question")
        ids, start = task.encode(question, item["text"] if question is None else item["answer"])
        if len(ids) <= max(start, 1) or len(ids) > longest:
            raise InvalidRecords(
                f"{item['id']!r} has {len(ids)} tokens, {start} of them the prompt, and {longest} fit: it needs an answer, "
                "and must be shorter."
            )
