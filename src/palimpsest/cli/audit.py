"""`palimpsest audit`: judge a saved model beside its original and retrained controls."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from palimpsest.cli.loading import (
    Architecture,
    import_modules,
    read_audits,
    read_runtime,
    read_settings,
    read_split,
)
from palimpsest.cli.options import (
    Arch,
    ArchSet,
    AsJson,
    AuditSet,
    Classes,
    Data,
    Device,
    Domain,
    DomainSet,
    Holdout,
    Imports,
    Rule,
    Seed,
    SplitSeed,
    Test,
)
from palimpsest.cli.output import emit, say, show
from palimpsest.core.errors import InvalidAudit, UnknownName

if TYPE_CHECKING:
    from rich.table import Table

    from palimpsest.audit.report import AuditReport
    from palimpsest.core.finding import Finding

EXAMPLE = (
    "Example: palimpsest audit --original model.safetensors --unlearned forgot.safetensors --retrained "
    "retrained-1.safetensors --retrained retrained-2.safetensors --arch small_cnn --data digits --forget label=3 "
    "--out report.html"
)
COLOURS = {
    "removed": "green", "suppressed": "red", "incomplete": "yellow", "intact": "red", "over-forgotten": "yellow",
    "damaged": "red", "inconclusive": "cyan",
}  # fmt: skip
FORMATS = ("html", "json", "csv")


def command(
    unlearned: Annotated[Path, typer.Option(help="Weights of the model to judge, safetensors.")],
    arch: Arch,
    data: Data,
    forget: Rule,
    original: Annotated[Path | None, typer.Option(help="Weights before the request.")] = None,
    retrained: Annotated[
        list[Path],
        typer.Option(help="Weights retrained without the forgotten records; repeat it for several seeds."),
    ] = [],  # noqa: B006
    audits: Annotated[
        str | None,
        typer.Option(metavar="A,B,...", help="Audits to run; by default all without shadow models."),
    ] = None,
    audit_set: AuditSet = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="Write a report: .html, .json or .csv.")] = None,
    arch_set: ArchSet = [],  # noqa: B006
    classes: Classes = None,
    task: Domain = "classification",
    task_set: DomainSet = [],  # noqa: B006
    test: Test = "0.2",
    holdout: Holdout = "0.2",
    split_seed: SplitSeed = 0,
    seed: Seed = 0,
    device: Device = "auto",
    imports: Imports = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Say whether a model has forgotten: verdict, reasons, findings.

    Two models give a comparison, three a verdict: without a retrained model nobody can say how much of what
    is seen was learned from the forgotten records. Use the same data and split options as for `forget`.
    """
    if original is None and not retrained:
        raise InvalidAudit("Nothing to compare with: name --original, --retrained or, best, both.")
    if out is not None and out.suffix.lstrip(".").lower() not in FORMATS:
        raise UnknownName("report format", out.suffix.lstrip("."), FORMATS)
    import_modules(imports)
    chosen = read_audits(audits, audit_set)
    parts = read_split(data, forget, test, holdout, split_seed)
    network = Architecture(arch, read_settings(arch_set), classes, task, read_settings(task_set))
    before = network.load(original, parts) if original is not None else None
    judged = network.load(unlearned, parts)
    controls = [network.load(path, parts) for path in retrained]
    from palimpsest.audit import audit
    from palimpsest.core.auditing import build_audit
    from palimpsest.core.writing import check_writable

    if out is not None:
        check_writable(out.absolute().parent)
    say(parts.summary())
    report = audit(
        unlearned=judged, split=parts, task=network.domain(parts), original=before, retrained=controls,
        audits=[build_audit(item["name"], task, item["settings"]) for item in chosen] or None,
        runtime=read_runtime(seed, device, progress=True),
        facts={"label": unlearned.stem, "data": data, "model": arch, "seed": seed},
    )  # fmt: skip
    if out is not None:
        report.save(out)
        say(f"report: {out}")
    if as_json:
        emit(report.to_dict())
    else:
        _print(report)


def _print(report: AuditReport) -> None:
    from rich.text import Text

    show(Text.assemble("verdict: ", (report.verdict.value, f"bold {COLOURS.get(report.verdict.value, '')}")))
    exposed = exposed_tables(report)
    show(*(Text(f"  {reason}") for reason in report.reasons), findings_table(report), *exposed)


def exposed_tables(report: AuditReport) -> list[Table]:
    """The records that membership attacks are surest of, one table per attack."""
    from rich.table import Table
    from rich.text import Text

    rows = report.series.get("exposed", ())
    tables: list[Table] = []
    for attack in dict.fromkeys(str(row["attack"]) for row in rows):
        table = Table(title=f"most exposed records ({attack})", title_justify="left")
        for heading in ("", "record", "label", "score", "original", "retrained", "false alarms"):
            table.add_column(heading, justify="left" if heading in ("record", "label") else "right")
        for row in (row for row in rows if row["attack"] == attack):
            numbers = (_number(row[key]) for key in ("score", "original", "control", "false_alarms"))
            cells = (str(row["rank"]), str(row["id"]), str(row["label"]), *numbers)
            table.add_row(*(Text(cell) for cell in cells))
        tables.append(table)
    return tables


def _number(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else ""


def findings_table(report: AuditReport) -> Table:
    """Every finding: value, original, retrained, K, and what it says."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="K: 0 as retrained, 1 as the original; intervals of 95 %", title_justify="left")
    for heading in ("finding", "value", "original", "retrained", "K", "judgement"):
        table.add_column(heading, justify="left" if heading in ("finding", "judgement") else "right")
    for finding in report.findings:
        cells = (
            finding.key,
            _interval(finding.value, finding.low, finding.high),
            _interval(finding.original),
            _interval(finding.control),
            _interval(finding.k, finding.k_low, finding.k_high),
            _said(finding),
        )
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _interval(value: float | None, low: float | None = None, high: float | None = None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _said(finding: Finding) -> str:
    quiet = finding.judgement.value in ("invalid", "not run")
    return f"{finding.judgement.value}: {finding.note}" if quiet and finding.note else finding.judgement.value
