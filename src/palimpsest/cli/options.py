"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON on standard output, and nothing else there.")
]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="NAME[:PLACE]",
        help="Data set: digits, fashion-mnist, image-folder:FOLDER, arrays:FILE.npz (`palimpsest data` lists them).",
    ),
]
RULE = (
    "What to forget: label=3, label=3,5, fraction=0.1, fraction=0.1@7 (seed 7), COLUMN=VALUE, ids=a,b or a .json "
    "file of ids; joined by & and |, negated by 'not '."
)
Rule = Annotated[str, typer.Option("--forget", metavar="RULE", help=RULE)]
Arch = Annotated[
    str,
    typer.Option(
        "--arch",
        metavar="NAME",
        help="Architecture: small_cnn, torchvision:resnet18, timm:NAME or package.module:factory.",
    ),
]
ArchSet = Annotated[
    list[str],
    typer.Option(
        "--arch-set", metavar="KEY=VALUE", help="Setting of the architecture, such as width=32; repeatable."
    ),
]
Classes = Annotated[
    int | None, typer.Option("--classes", min=2, help="Number of logits; by default the largest label + 1.")
]
Domain = Annotated[
    str,
    typer.Option("--task", metavar="NAME", help="What the model does: classification or regression."),
]
DomainSet = Annotated[
    list[str],
    typer.Option(
        "--task-set",
        metavar="KEY=VALUE",
        help="Setting of the task, such as loss=mae or standardise=true; repeatable.",
    ),
]
SHARE = "a share of all records, a rule that picks them (part=test), or 0 for none"
Test = Annotated[
    str, typer.Option("--test", metavar="SHARE|RULE", help=f"Records that test the model: {SHARE}.")
]
Holdout = Annotated[
    str,
    typer.Option(
        "--holdout", metavar="SHARE|RULE", help=f"Records never trained on, for membership attacks: {SHARE}."
    ),
]
SplitSeed = Annotated[int, typer.Option("--split-seed", help="Seed of the draw of test and holdout.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, mps, ...")]
Imports = Annotated[
    list[str],
    typer.Option(
        "--import",
        metavar="MODULE",
        help="Python module to import first, for the methods it registers; found in this folder too. Repeatable.",
    ),
]
AuditSet = Annotated[
    list[str],
    typer.Option(
        "--audit-set",
        metavar="AUDIT.KEY=VALUE",
        help="Setting of an audit that --audits names, such as shadow-membership.runs=64; repeatable.",
    ),
]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")]
Seeds = Annotated[
    str | None, typer.Option("--seeds", metavar="N|A,B,...", help="Number of seeds, or the seeds themselves.")
]
Workers = Annotated[
    int | None, typer.Option("--workers", min=0, help="Processes of this machine; 0 works in this one.")
]
StoreUrl = Annotated[
    str | None,
    typer.Option(
        "--store", metavar="URL", help="SQLAlchemy URL; a SQLite file in the run folder by default."
    ),
]
RunFolder = Annotated[
    Path | None, typer.Option("--out", metavar="FOLDER", help="Folder of the run; runs/NAME by default.")
]
Change = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change any key of the recipe; repeatable."),
]
Retry = Annotated[bool, typer.Option("--retry", help="Run cells that failed once more.")]
Wait = Annotated[
    bool, typer.Option("--wait/--no-wait", help="Wait while another process works on the folder.")
]
WritePage = Annotated[bool, typer.Option("--report/--no-report", help="Write report.html into the folder.")]
