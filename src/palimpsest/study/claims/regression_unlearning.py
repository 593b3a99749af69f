"""Measurements for the claims of deep regression unlearning."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from palimpsest.audit.regression import wasserstein
from palimpsest.core.errors import ModelMismatch
from palimpsest.core.modes import evaluating
from palimpsest.core.records import Records
from palimpsest.forget import forget
from palimpsest.forget.regression.blindspot import Blindspot, attention_difference, watching
from palimpsest.forget.regression.gaussian_amnesiac import gaussian_targets
from palimpsest.parts.activations import head_name, weight_layers
from palimpsest.parts.reinitialise import reinitialised
from palimpsest.parts.training import fit
from palimpsest.study.claims.measuring import Setting, measurement
from palimpsest.tasks.regression import Regression

EPOCHS, BATCH, BLINDSPOT_EPOCHS = 3, 32, 3
"""Of blindspot unlearning and fine-tuning, and of the blindspot model."""
GAUSSIAN_EPOCHS = 5
GOLD = 9_000
"""Seed of the retrained model that predictions are compared with."""


@measurement("regression-unlearning.w1-share-of-fine-tuning")
def w1_share_of_fine_tuning(setting: Setting) -> float:
    """Wasserstein-1 distance to a retrained model on the forget records: Blindspot's over fine-tuning's."""
    settings: dict[str, Any] = {
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "lr": 1e-3,
        "optimizer": "adam",
        "weight_decay": 0.0,
    }
    return _share(setting, forget(setting.original, setting.split, "finetune", setting.task,
                                  runtime=setting.runtime, **settings))  # fmt: skip


@measurement("regression-unlearning.w1-share-of-gaussian")
def w1_share_of_gaussian(setting: Setting) -> float:
    """The same over Gaussian amnesiac's."""
    return _share(setting, forget(setting.original, setting.split, "gaussian-amnesiac", setting.task,
                                  runtime=setting.runtime, epochs=GAUSSIAN_EPOCHS, batch_size=BATCH))  # fmt: skip


@measurement("regression-unlearning.attention-share")
def attention_share(setting: Setting) -> float:
    """Mean attention difference to B on the forget records, with at_beta 50 over that with 0."""
    task = _task(setting)
    method = Blindspot(epochs=EPOCHS, batch_size=BATCH, blindspot_epochs=BLINDSPOT_EPOCHS)
    runtime, retain = setting.runtime, setting.split.retain
    if retain is None:
        raise ModelMismatch("Without retained records there is no blindspot model.")
    blindspot = fit(reinitialised(setting.original, runtime), retain, task, runtime, method.blindspot_recipe)

    def difference(at_beta: float) -> float:
        after = replace(method, at_beta=at_beta).unlearn(setting.original, setting.split, task, runtime)
        mine, theirs = (_activations(model, setting) for model in (after, blindspot))
        pairs = zip(mine, theirs, strict=True)
        return float(np.mean([float(attention_difference(a, b)) for a, b in pairs]))

    return difference(50.0) / difference(0.0)


@measurement("regression-unlearning.drawn-mean-error")
def drawn_mean_error(setting: Setting) -> float:
    """|mean of the drawn targets - that of the training targets|, in standard errors."""
    drawn, mean, deviation = _drawn(setting)
    return abs(float(drawn.mean()) - mean) / (deviation / np.sqrt(len(drawn)))


@measurement("regression-unlearning.drawn-deviation-error")
def drawn_deviation_error(setting: Setting) -> float:
    """The same of the standard deviation."""
    drawn, _, deviation = _drawn(setting)
    return abs(float(drawn.std(ddof=1)) - deviation) / (deviation / np.sqrt(2 * len(drawn)))


def _task(setting: Setting) -> Regression:
    if not isinstance(setting.task, Regression):
        raise ModelMismatch(f"The claims are about regressions, not about {setting.task.name}.")
    return setting.task


def _predictions(model: nn.Module, setting: Setting) -> np.ndarray:
    """On the forget records, [records, targets]."""
    task = _task(setting)
    with torch.no_grad(), evaluating(model):
        batches = setting.runtime.batches(setting.split.forget, task)
        found = [task.predictions(task.logits(model, batch)).cpu() for batch in batches]
    return torch.cat(found).double().numpy()


def _share(setting: Setting, other: nn.Module) -> float:
    """Distance of Blindspot to the retrained model over that of another model."""
    runtime = setting.runtime
    gold = forget(setting.original, setting.split, "retrain", setting.task, runtime=runtime.with_seed(GOLD))
    method = Blindspot(epochs=EPOCHS, batch_size=BATCH, blindspot_epochs=BLINDSPOT_EPOCHS)
    mine = method.unlearn(setting.original, setting.split, _task(setting), runtime)
    wanted = _predictions(gold, setting)
    return wasserstein(_predictions(mine, setting), wanted) / wasserstein(
        _predictions(other, setting), wanted
    )


def _activations(model: nn.Module, setting: Setting) -> list[Tensor]:
    """Of every layer but the head on the forget records; flat ones with an axis to average over."""
    head, records = head_name(model), setting.split.forget
    layers = [name for name in weight_layers(model) if name != head]
    with torch.no_grad(), evaluating(model), watching(model, layers) as seen:
        setting.task.logits(model, _whole(records, setting))
        return [a.unsqueeze(1) if a.dim() == 2 else a for a in seen.values()]


def _whole(records: Records, setting: Setting) -> dict[str, object]:
    return setting.runtime.to_device(records.batch(range(len(records)), setting.task.collate))


def _drawn(setting: Setting) -> tuple[np.ndarray, float, float]:
    """Targets drawn for the forget records, and mean and deviation of all training targets."""
    targets = _task(setting).all_targets(setting.split.train)
    generator = setting.runtime.generator("targets")
    drawn = gaussian_targets(torch.from_numpy(targets), len(setting.split.forget), generator).numpy()
    return drawn[:, 0], float(targets[:, 0].mean()), float(targets[:, 0].std(ddof=1))
