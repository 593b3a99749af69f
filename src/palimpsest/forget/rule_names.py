"""Methods with a rule in front of their name: "gu+npo" is NPO under the rule "gu"."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.core.needs import Need
from palimpsest.core.unlearner import UNLEARNERS, Unlearner
from palimpsest.forget.gradient import Training
from palimpsest.forget.rules import RULES, RuleLike

JOINT = "+"


@UNLEARNERS.made_by
def ruled(name: str) -> type[Unlearner] | None:
    """The method of a name "rule+method"; None for a name of another form.

    It is the method itself with `rule` set, and needs retained records if the rule does. Settings of the
    rule are given as `rule={"name": ..., settings}`.

    Raises:
        UnknownName: For a rule or method that does not exist; suggests the nearest.
        InvalidHyperparameter: If the method is not trained by the loop that has rules.
    """
    if JOINT not in name:
        return None
    rule, _, base = name.partition(JOINT)
    return _ruled(name, rule.strip(), base.strip())


@cache
def _ruled(name: str, rule: str, base: str) -> type[Unlearner]:
    kind, method = RULES.get(rule), UNLEARNERS.get(base)
    if not issubclass(method, Training):
        fitting = [other for other, cls in UNLEARNERS.items() if issubclass(cls, Training)]
        raise InvalidHyperparameter(
            f"'{name}': {base} does not train by forget and retain gradients, so no rule can join them. Methods with "
            f"rules: {', '.join(fitting)}."
        )

    kind_name = rule

    @dataclass(frozen=True, kw_only=True)
    class Ruled(method):
        rule: RuleLike = kind_name

        def __post_init__(self) -> None:
            super().__post_init__()
            said = self.rule["name"] if isinstance(self.rule, Mapping) else self.rule
            if not isinstance(said, kind) and said != kind_name:
                raise InvalidHyperparameter(
                    f"'{name}' names the rule {kind_name!r}, its settings another: {self.rule!r}."
                )

    Ruled.__name__, Ruled.__qualname__ = method.__name__, method.__qualname__
    Ruled.__module__, Ruled.__doc__ = method.__module__, method.__doc__
    needs = method.card.needs | ({Need.RETAIN_DATA} if kind.needs_retain else frozenset[Need]())
    summary = f"{method.card.summary} Under the rule '{rule}'."
    Ruled.card = dataclasses.replace(method.card, name=name, summary=summary, needs=frozenset(needs))
    return Ruled
