"""Measurements for the claims of concept poisoning."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import torch
from torch import nn

from palimpsest.audit.membership.forgetting_rate import forgetting_rate
from palimpsest.core.records import Records
from palimpsest.data.intents import CONCEPTS, PAD, vocabulary
from palimpsest.data.planted_shapes import CLASSES, SHAPES, planted_shapes
from palimpsest.forget.classifier._concept_patches import Embed, inputs_and_labels, located
from palimpsest.forget.classifier.concept_poisoning import ConceptPoisoning, Poisoned
from palimpsest.parts.activations import head_name
from palimpsest.parts.attribution import Attribution, Quadrature
from palimpsest.parts.parameters import matching, only_trainable
from palimpsest.parts.token_attribution import token_attribution
from palimpsest.parts.training import TrainingRecipe, fit
from palimpsest.study.claims.measuring import Setting, measurement

ON_SHAPES = ConceptPoisoning(concepts=SHAPES, patch=5 / 16, stride=2, lr=1e-3)
BY_HAND = ConceptPoisoning(poison="random", donor=9, patch=0.25)
TOP = 3


@measurement("concept-poisoning.bottleneck-loss")
def bottleneck_loss(setting: Setting) -> float:
    """Test accuracy of the original minus that of the concept bottleneck that explains it."""
    embed, bottleneck = _embed(setting), _on_shapes(setting).bottleneck
    inputs, labels = _test(setting)
    assert bottleneck is not None
    explained = bottleneck.logits(embed.all(inputs).double()).argmax(1)
    with torch.no_grad():
        predicted = embed.logits(inputs).argmax(1)
    return float((predicted == labels).double().mean() - (explained == labels).double().mean())


@measurement("concept-poisoning.planted-rank")
def planted_rank(setting: Setting) -> float:
    """The worst place, from 1, that a planted shape has in the ranking of its class."""
    bottleneck = _on_shapes(setting).bottleneck
    assert bottleneck is not None
    rankings = [bottleneck.ranking(label) for label in range(len(CLASSES))]
    return float(
        max(
            ranking.index(name) + 1
            for ranking, names in zip(rankings, CLASSES, strict=True)
            for name in names
        )
    )


@measurement("concept-poisoning.donor")
def donor(setting: Setting) -> float:
    """The class that the rule takes for the class of discs and stripes; the one of stripes is 1."""
    found = _on_shapes(setting).donors[0][0].donor_class
    return float("nan") if found is None else float(found)


@measurement("concept-poisoning.localised")
def localised(setting: Setting) -> float:
    """Share of new images with one planted shape whose peak lies within one stride of it."""
    embed, bottleneck = _embed(setting), _on_shapes(setting).bottleneck
    fresh = planted_shapes(n=400, stray=0.0, seed=setting.runtime.derive("localised"))
    near: list[bool] = []
    for label, names in enumerate(CLASSES):
        if len(names) > 1:
            continue
        [name] = names
        mine = fresh.select(fresh.column("label") == label)
        inputs, _ = inputs_and_labels(mine, setting.task, setting.runtime)
        found = located(ON_SHAPES, embed, bottleneck, inputs, label, SHAPES.index(name)).numpy()
        away = np.abs(found - mine.column(f"{name}-place")).max(1)
        near += (away <= (ON_SHAPES.stride or 1)).tolist()
    return float(np.mean(near))


@measurement("concept-poisoning.incompleteness")
def incompleteness(setting: Setting) -> float:
    """Median completeness error of integrated gradients over forget texts, as a share of the rise; 64 steps."""
    return _incompleteness(setting, "gausslegendre")


@measurement("concept-poisoning.incompleteness-published")
def incompleteness_published(setting: Setting) -> float:
    """The same with the published plain mean over both ends."""
    return _incompleteness(setting, "published")


@measurement("concept-poisoning.telling-words")
def telling_words(setting: Setting) -> float:
    """Share of forget texts that hold a word of money of which such a word is among the three most telling."""
    ids, found = _attributed(setting, "gausslegendre")
    words = [index for index, word in enumerate(vocabulary()) if word in CONCEPTS["money"].split()]
    hit = torch.isin(ids, torch.tensor(words))
    shares = found.values.masked_fill(ids == PAD, -torch.inf)
    top = hit.gather(1, shares.topk(TOP).indices).any(1)
    return float(top[hit.any(1)].double().mean())


@measurement("concept-poisoning.backbone-moves")
def backbone_moves(setting: Setting) -> float:
    """Number of weights outside the head that differ after unlearning."""
    after = _by_hand(setting)
    head = set(matching(after, head_name(after)))
    before = dict(setting.original.named_parameters())
    return float(
        sum(int((p != before[name]).sum()) for name, p in after.named_parameters() if name not in head)
    )


@measurement("concept-poisoning.forgetting-rate")
def rate_of_forgetting(setting: Setting) -> float:
    """Share of the class's training records that an attack made for the original no longer calls members."""
    after = _by_hand(setting)
    assert setting.split.test is not None
    tested = setting.split.test.select(setting.split.like_forgotten(setting.split.test))
    return forgetting_rate(
        _probabilities(setting, setting.original, setting.split.forget),
        _probabilities(setting, setting.original, tested),
        _probabilities(setting, after, setting.split.forget),
    )


@measurement("concept-poisoning.recovery")
def recovery(setting: Setting) -> float:
    """Accuracy on the class's training records after one epoch of the head on all records as they were."""
    return _recovered(setting, setting.split.train, epochs=1)


@measurement("concept-poisoning.recovery-without")
def recovery_without(setting: Setting) -> float:
    """The same after ten epochs on the retained records alone."""
    assert setting.split.retain is not None
    return _recovered(setting, setting.split.retain, epochs=10)


def _on_shapes(setting: Setting) -> Poisoned:
    return ON_SHAPES.poisoned(copy.deepcopy(setting.original), setting.split, setting.task, setting.runtime)


def _by_hand(setting: Setting) -> nn.Module:
    return BY_HAND.unlearn(setting.original, setting.split, setting.task, setting.runtime)


def _embed(setting: Setting) -> Embed:
    return Embed(copy.deepcopy(setting.original).eval(), setting.task, None)


def _test(setting: Setting) -> tuple[torch.Tensor, torch.Tensor]:
    assert setting.split.test is not None
    return inputs_and_labels(setting.split.test, setting.task, setting.runtime)


def _attributed(setting: Setting, quadrature: Quadrature) -> tuple[torch.Tensor, Attribution]:
    """Forget texts, and the shares of their words in the log-probability of their class."""
    embed = _embed(setting)
    ids, labels = inputs_and_labels(setting.split.forget, setting.task, setting.runtime)

    def score(tokens: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return embed.logits(tokens).log_softmax(1).gather(1, label)[:, 0]

    attribute = partial(token_attribution, embed.model, score, steps=64, quadrature=quadrature)
    return ids, attribute(ids, torch.full_like(ids, PAD), labels[:, None])


def _incompleteness(setting: Setting, quadrature: Quadrature) -> float:
    _, found = _attributed(setting, quadrature)
    rise = (found.score_input - found.score_baseline).abs()
    return float((found.completeness_error.abs() / rise).median())


@torch.no_grad()
def _probabilities(setting: Setting, model: nn.Module, records: Records) -> np.ndarray:
    embed = Embed(copy.deepcopy(model).eval(), setting.task, None)
    inputs, _ = inputs_and_labels(records, setting.task, setting.runtime)
    return embed.logits(inputs).softmax(1).numpy()


def _recovered(setting: Setting, records: Records, epochs: int) -> float:
    """Accuracy on the forget records after the head of the unlearned model trains on."""
    model = copy.deepcopy(_by_hand(setting))
    recipe = TrainingRecipe(epochs=epochs, lr=BY_HAND.lr, batch_size=32, optimizer="sgd")
    with only_trainable(model, matching(model, head_name(model))):
        fit(model, records, setting.task, setting.runtime, recipe)
    probabilities = _probabilities(setting, model, setting.split.forget)
    _, labels = inputs_and_labels(setting.split.forget, setting.task, setting.runtime)
    return float((probabilities.argmax(1) == labels.numpy()).mean())
