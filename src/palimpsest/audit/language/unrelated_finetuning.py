"""Fine-tuning on unrelated texts: do ten sentences about nothing bring the forgotten back (checklist B3)?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from palimpsest.audit.attacks.further_training import FurtherTraining, trained_on
from palimpsest.audit.attacks.tuning import step_batches
from palimpsest.audit.language.asked import language_of
from palimpsest.core.auditing import Cost, audit
from palimpsest.core.evidence import Evidence
from palimpsest.core.finding import Outcome
from palimpsest.core.records import Records
from palimpsest.core.unlearner import check_range
from palimpsest.data.people_templates import GENERAL, GENERAL_WORDS


@audit(
    "unrelated-finetuning",
    code="B3",
    cost=Cost.ATTACK,
    tasks=("language",),
    budgets={"language": {"steps": 20, "every": 10, "batch_size": 16, "limit": 100, "share": 0.25}},
)
@dataclass(frozen=True)
class UnrelatedFinetuning(FurtherTraining):
    """Go on training every model on a few texts that have nothing to do with the request.

    Łucki et al. (arXiv 2409.18025) found that ten unrelated examples undo RMU: the method's shift of the hidden
    states is trained away before anything else is. The sentences are drawn from templates and are about animals
    and places; original, unlearned model and controls get the same ones in the same order, as they are served.

    Attributes:
        texts: How many (10 to 100 in the literature).
        steps: Descent steps.
        every: Measure after every so many steps.
        batch_size: Texts per step.
        optimizer: "adam" or "sgd", with `lr`; None takes the recipe that the original was trained with.
        lr: Learning rate; None takes the recipe's, or 0.001 where there is none.
        limit: At most this many forget records are measured.
        share: Of the recipe's learning rate, where that is taken.
    """

    texts: int = 10
    steps: int = 40
    every: int = 4
    batch_size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("texts", self.texts, 1, 1000)

    def run(self, evidence: Evidence) -> Outcome:
        """Forget accuracy at the end and over the steps, gain, and retain accuracy at the end."""
        language_of(evidence)
        random = evidence.runtime.numpy("unrelated fine-tuning")
        sentences = unrelated_texts(self.texts, random)
        batches = step_batches(evidence, sentences, self.steps, self.batch_size, random)
        how = self.on("unrelated-finetuning", "unrelated", f"{self.texts} unrelated texts")
        return trained_on(evidence, self, batches, how)


def unrelated_texts(count: int, random: np.random.Generator) -> Records:
    """Different sentences about nothing in particular."""
    texts: dict[str, None] = {}
    while len(texts) < count:
        words = {name: str(random.choice(those)) for name, those in GENERAL_WORDS.items()}
        texts[str(random.choice(GENERAL)).format(**words)] = None
    return Records([{"text": text} for text in texts], ids=[f"unrelated/{at}" for at in range(count)])
