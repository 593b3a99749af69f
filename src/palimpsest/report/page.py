"""The page: one HTML file that holds everything it shows and asks nothing of the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palimpsest.audit.report import AuditReport
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.rendering import renderer
from palimpsest.core.writing import write_text
from palimpsest.report.attacks import (
    interpolation_chart,
    pruning_chart,
    quantization_chart,
    relearning_chart,
)
from palimpsest.report.cost import cost_chart
from palimpsest.report.features import features_chart, sets_chart
from palimpsest.report.frame import framed
from palimpsest.report.gathering import labels_of, requests_of
from palimpsest.report.inside import answers_chart, cka_chart, separation_chart
from palimpsest.report.membership import confidence_chart, roc_chart
from palimpsest.report.muse import muse_chart
from palimpsest.report.per_class import class_chart
from palimpsest.report.style import colours
from palimpsest.report.tables import exposed_tables, finding_rows, headings, judgements
from palimpsest.report.trade_off import forgetting_chart, privacy_chart
from palimpsest.report.turns import turns_chart


@dataclass(frozen=True)
class Panel:
    """A chart of the page.

    Attributes:
        key: Of the element.
        title: Above it.
        reading: How to read it, in a sentence.
        make: From reports to a Vega-Lite specification, or None where there is nothing to draw.
        wide: Whether it takes the whole width.
    """

    key: str
    title: str
    reading: str
    make: Callable[[Sequence[AuditReport]], dict[str, Any] | None]
    wide: bool = False


PANELS = (
    Panel("trade-off", "Forgetting and utility", "Good is close to the star, the model retrained without the "
          "records. Bars are 95 % intervals over seeds.", forgetting_chart),
    Panel("privacy", "Privacy and utility", "How well an attacker tells the forget records from records that no model "
          "has seen. Good is close to the star.", privacy_chart),
    Panel("turns", "Request after request", "Every request is put to the model that the answer to the one before left. "
          "K: 0 as never trained on, 1 untouched.", turns_chart, wide=True),
    Panel("muse", "MUSE over the requests", "Scores of MUSE after every request, x 100: growing forget sets show "
          "scalability, requests in turn sustainability. Utility should stay where retraining leaves it.", muse_chart,
          wide=True),
    Panel("classes", "Accuracy by class", "Change against the original in points. A method should change what "
          "retraining changes, and nothing else.", class_chart, wide=True),
    Panel("roc", "Membership attack", "Both axes logarithmic: the left end shows what an attacker learns who must not "
          "be wrong. The dashed line is guessing.", roc_chart),
    Panel("relearning", "Does it come back?", "Every model is trained alike. What returns faster than in the retrained "
          "model was still there.", relearning_chart),
    Panel("confidence", "How sure the models are", "Forget records against records never seen: after forgetting the "
          "two look alike.", confidence_chart, wide=True),
    Panel("cka", "Similarity by layer", "Linear CKA of the layers' activations. Only retraining says how similar a "
          "model without the records would be.", cka_chart),
    Panel("separation", "Is the class still a class inside?", "How far the forgotten class stands apart from the "
          "nearest retained class, in units of its own spread.", separation_chart),
    Panel("answers", "Are the answers still readable inside?", "Probes trained on retained subjects, and the head itself, "
          "on the hidden states of every block. What hides an answer leaves it readable further down.", answers_chart),
    Panel("features", "Feature space", "The plane in which each model's features spread most, turned alike. Retraining "
          "shows where records of a class lie that a model never saw; hiding leaves them where they were.",
          features_chart, wide=True),
    Panel("sets", "Representations by set", "Colour is the gap to the retrained model on the same set: red below, blue "
          "above. What is right is what retraining gives.", sets_chart),
    Panel("quantization", "Fewer bits", "Rounding the weights can undo small changes: the forgotten returns.",
          quantization_chart),
    Panel("pruning", "Fewer weights", "The same with the smallest weights removed.", pruning_chart),
    Panel("interpolation", "Towards the original", "On the straight line of weights from each model to the original.",
          interpolation_chart),
    Panel("cost", "Cost", "Time of the method as a share of retraining from scratch; beside it seconds.", cost_chart),
)  # fmt: skip


def write_report(
    reports: Sequence[AuditReport], path: str | Path, title: str = "", failures: Sequence[str] = ()
) -> Path:
    """Write the page, whole or not at all.

    Args:
        reports: Of one audit or of all cells of a study.
        path: Of the HTML file.
        title: Of the page; what was judged by default.
        failures: Cells that have no report, in words.

    Raises:
        InvalidAudit: If there is no report.
        CannotWrite: If the place cannot be written.
    """
    return write_text(path, html_report(reports, title, failures))


@renderer("html")
def html_report(reports: Sequence[AuditReport], title: str = "", failures: Sequence[str] = ()) -> str:
    """The text of the page.

    Raises:
        InvalidAudit: If there is no report.
    """
    if not reports:
        raise InvalidAudit("There is no audit report to show.")
    drawn = [(panel, chart) for panel in PANELS if (chart := panel.make(reports)) is not None]
    labels = labels_of(reports)
    data = {
        "requests": requests_of(reports),
        "colours": colours(labels),
        "charts": {panel.key: chart for panel, chart in drawn},
        "findings": finding_rows(reports),
    }
    return framed(
        "page.html", data, title=title or _title(reports), facts=_facts(reports), requests=data["requests"],
        labels=labels, colours=data["colours"], headings=headings(reports), judged=judgements(reports),
        failures=failures, exposed=exposed_tables(reports), panels=[panel for panel, _ in drawn],
        not_run=_not_run(reports),
    )  # fmt: skip


def _title(reports: Sequence[AuditReport]) -> str:
    facts = reports[0].facts
    return str(facts.get("study") or facts.get("label") or facts.get("method") or "Audit")


def _facts(reports: Sequence[AuditReport]) -> list[tuple[str, str]]:
    """What was judged, as pairs of words."""
    first = reports[0].facts
    seeds = sorted({report.facts["seed"] for report in reports if "seed" in report.facts})
    known = {
        "data": first.get("data"),
        "model": first.get("model"),
        "seeds": ", ".join(map(str, seeds)),
        "controls": max(
            (len(finding.controls) for report in reports for finding in report.findings), default=0
        ),
        "findings": sum(len(report.findings) for report in reports),
    }
    return [(name, str(value)) for name, value in known.items() if value]


def _not_run(reports: Sequence[AuditReport]) -> list[tuple[str, str]]:
    """Audits that were not run, with the reason; never to be taken for passed."""
    found = {
        finding.key: finding.note
        for report in reports
        for finding in report.findings
        if finding.judgement.value == "not run"
    }
    return sorted(found.items())
