"""Pages of the site that are made from the code; a hook of MkDocs, so nothing generated is kept.

Pages of methods and audits come from docstrings, cards and fields, thresholds from the modules that hold
them, the command line from its parser, results from what the last replications wrote. In hand-written
pages a line `<!-- fill: name -->` is replaced by what `FILLINGS` makes.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, Field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import griffe
import typer
import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click
from typer.main import get_command

from palimpsest.cli.audits import audit_listing
from palimpsest.cli.main import app
from palimpsest.cli.methods import learner_listing, method_listing
from palimpsest.core.auditing import AUDITS
from palimpsest.core.needs import Need
from palimpsest.core.unlearner import UNLEARNERS
from palimpsest.retain.learner import LEARNERS, Keeps

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "replications" / "results"
PICTURE = "images/report.png"
OWN = "palimpsest."
"""Third-party methods that happen to be installed have no page here."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put one entry per method and audit into the navigation."""
    for section in config.nav or []:
        for title, registry in (("Methods", UNLEARNERS), ("Audits", AUDITS)):
            if title in section:
                folder = title.lower()
                pages = [{name: f"{folder}/{name}.md"} for name, _ in own(registry.items())]
                section[title] = [f"{folder}/index.md", *pages]
        if "Methods" in section:
            pages = [{name: f"learners/{name}.md"} for name, _ in own(LEARNERS.items())]
            section["Methods"].append({"Learners": ["learners/index.md", *pages]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for place, text in generated_pages().items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill the marks in hand-written pages."""
    return re.sub(r"<!-- fill: ([\w-]+) -->", lambda found: FILLINGS[found[1]](), markdown)


def generated_pages() -> dict[str, str]:
    """Text of every generated page, by its place in the site."""
    pages = {
        "methods/index.md": _index(
            "Methods", "can make a trained model forget.", method_listing().markdown()
        ),
        "learners/index.md": _index(
            "Learners", "learns a stream and keeps what it knows.", learner_listing().markdown()
        ),
        "audits/index.md": _index("Audits", "ask what a model still knows.", audit_listing().markdown()),
        "reference/cli.md": cli_page(),
        "results.md": results_page(sorted(RESULTS.glob("*.json"))),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
    }
    pages.update({f"methods/{name}.md": method_page(name, cls) for name, cls in own(UNLEARNERS.items())})
    pages.update({f"audits/{name}.md": audit_page(name, cls) for name, cls in own(AUDITS.items())})
    pages.update({f"learners/{name}.md": learner_page(name, cls) for name, cls in own(LEARNERS.items())})
    return pages


def own(entries: Iterable[tuple[str, type[Any]]]) -> list[tuple[str, type[Any]]]:
    """Entries that come with Palimpsest."""
    return [(name, cls) for name, cls in entries if cls.__module__.startswith(OWN)]


def method_page(name: str, cls: type[Any]) -> str:
    """A method: paper, needs, docstring, hyperparameters, how to call it."""
    card = cls.card
    summary, body, attributes = docstring_of(cls)
    paper = card.paper
    title = f"[{paper.title}]({paper.link})" if paper and paper.link else paper.title if paper else ""
    published = f"{title}, {paper.venue}" if paper else "no single paper; common practice"
    needs = ", ".join(f"{need.value}" for need in Need if need in card.needs)
    return "\n\n".join(
        [
            f"# {name}",
            f"*{summary}*",
            table(
                ("", ""),
                [
                    ("Published", published),
                    ("Domains", ", ".join(card.tasks)),
                    ("Needs", needs),
                    ("Code", f"`{cls.__module__}`"),
                ],
            ),
            body,
            "## Hyperparameters",
            settings_table(cls, attributes),
            "## Use",
            f"```bash\npalimpsest compare {example_of(card.tasks)} --methods {name} --seeds 3\n```",
            f'```python\nunlearned = pal.forget(model, parts, method="{name}", task=task, seed=0)\n```',
        ]
    )


def learner_page(name: str, cls: type[Any]) -> str:
    """A learner: paper, streams, what it keeps, docstring, hyperparameters, how to call it."""
    card = cls.card
    summary, body, attributes = docstring_of(cls)
    paper = card.paper
    title = f"[{paper.title}]({paper.link})" if paper and paper.link else paper.title if paper else ""
    about = [
        ("Published", f"{title}, {paper.venue}" if paper else "no single paper; common practice"),
        ("Streams", ", ".join(card.scenarios)),
        ("Keeps", ", ".join(kept.value for kept in Keeps if kept in card.keeps) or "nothing"),
        ("Code", f"`{cls.__module__}`"),
    ]
    first = "class:5x2" if "class" in card.scenarios else f"{card.scenarios[0]}:5x2"
    form = "domain:permuted:5" if first.startswith("domain") else first
    return "\n\n".join(
        [
            f"# {name}",
            f"*{summary}*",
            table(("", ""), about),
            body,
            "## Hyperparameters",
            settings_table(cls, attributes),
            "## Use",
            f"```bash\npalimpsest retain --data digits --stream {form} --methods {name} --seeds 3\n```",
            f'```python\noutcome = palimpsest.retain.learn("{name}", stream, network)\n```',
        ]
    )


def example_of(tasks: Sequence[str]) -> str:
    """Data and request of an example, for the domains of a method."""
    if "any" in tasks or "classification" in tasks:
        return "--data digits --forget label=3"
    return (
        "--bench people" if "language" in tasks else "--task regression --data diabetes --forget fraction=0.1"
    )


def audit_page(name: str, cls: type[Any]) -> str:
    """An audit: what it asks, what it costs, settings and thresholds."""
    card = cls.card
    summary, body, attributes = docstring_of(cls)
    module = importlib.import_module(cls.__module__)
    about = inspect.getdoc(module) or ""
    known = thresholds(cls.__module__)
    parts = [
        f"# {name}",
        f"*{summary}*",
        table(
            ("", ""),
            [
                ("Checklist", card.code),
                ("Cost", card.cost.value),
                ("Parts of the split", ", ".join(card.parts) or "any"),
                ("Domains", ", ".join(card.tasks)),
                ("Runs", "by default" if card.default else "when it is named"),
                ("Code", f"`{cls.__module__}`"),
            ],
        ),
        body,
        *(["## Settings", settings_table(cls, attributes)] if fields(cls) else []),
        "## How it is measured",
        about.partition("\n")[2].strip() or about,
        *(["## Constants", known] if known else []),
    ]
    return "\n\n".join(part for part in parts if part)


def docstring_of(thing: Any) -> tuple[str, str, dict[str, str]]:
    """First line, further text, and what it says of each attribute."""
    sections = griffe.Docstring(inspect.getdoc(thing) or "").parse("google", warnings=False)
    text = "\n\n".join(item.value for item in sections if item.kind is griffe.DocstringSectionKind.text)
    attributes = {
        item.name: " ".join(item.description.split())
        for section in sections
        if section.kind is griffe.DocstringSectionKind.attributes
        for item in section.value
    }
    summary, _, body = text.partition("\n")
    return summary, body.strip(), attributes


def settings_table(cls: type[Any], attributes: dict[str, str]) -> str:
    """The fields of a dataclass with their defaults."""
    rows = [
        (f"`{item.name}`", f"`{item.type}`", f"`{_default(item)}`", attributes.get(item.name, ""))
        for item in fields(cls)
        if item.init
    ]
    return table(("name", "type", "default", "meaning"), rows) if rows else "None."


def _default(item: Field[Any]) -> str:
    if item.default is not MISSING:
        return repr(item.default)
    return repr(item.default_factory()) if item.default_factory is not MISSING else "required"


def thresholds(module: str) -> str:
    """The public constants of a module that are plain numbers, with the sentence below each."""
    loaded = importlib.import_module(module)
    statements = ast.parse(inspect.getsource(loaded)).body
    rows: list[tuple[str, str, str]] = []
    for statement, following in pairwise(statements):
        match statement, following:
            case (
                ast.Assign(targets=[ast.Name(id=name)]),
                ast.Expr(value=ast.Constant(value=str(meaning))),
            ) if name.isupper() and isinstance(getattr(loaded, name), int | float):
                rows.append((f"`{name}`", f"{getattr(loaded, name):g}", " ".join(meaning.split())))
            case _:
                pass
    return table(("name", "value", "meaning"), rows) if rows else ""


def cli_page() -> str:
    """The command line, from its parser; examples as code, summaries of verbs in full."""
    command: Any = get_command(app)
    text = get_docs_for_click(
        obj=command, ctx=typer.Context(command, info_name="palimpsest"), name="palimpsest"
    )
    text = re.sub(r"^# .*", "# Command line", text, count=1)
    text = re.sub(r"^(Examples?:) ?", r"**\1**\n\n", text, flags=re.MULTILINE)
    text = re.sub(r"^(palimpsest .*)", r"```bash\n\1\n```", text, flags=re.MULTILINE)
    for name, verb in command.commands.items():
        summary = verb.help.partition("\n")[0]
        text = re.sub(
            rf"^\* `{name}`: .*", f"* [`{name}`](#palimpsest-{name}): {summary}", text, flags=re.MULTILINE
        )
    return text


def results_page(files: Sequence[Path]) -> str:
    """What the last run of every replication gave, with the notes that its recipe has now."""
    parts = [
        "# Results",
        "Claims of published papers, run again on a small scale with `palimpsest replicate NAME`. A claim that does "
        "not hold is shown as not holding, with what was tried.",
    ]
    for file in files:
        recipe = file.parent.parent / f"{file.stem}.yaml"
        claims = yaml.safe_load(recipe.read_text(encoding="utf-8"))["claims"] if recipe.is_file() else []
        notes = {claim["name"]: claim.get("note") for claim in claims}
        parts += _replication(json.loads(file.read_text(encoding="utf-8")), notes)
    known = {path.stem for path in RESULTS.parent.glob("*.yaml")} - {file.stem for file in files}
    if known:
        parts.append(f"Not run yet: {', '.join(f'`{slug}`' for slug in sorted(known))}.")
    return "\n\n".join(parts)


def _replication(result: dict[str, Any], latest: dict[str, str | None]) -> list[str]:
    paper = result["paper"]
    title = (
        f"[{paper['title']}](https://arxiv.org/abs/{paper['arxiv']})"
        if paper.get("arxiv")
        else paper["title"]
    )
    versions = ", ".join(f"{name} {version}" for name, version in result.get("versions", {}).items())
    rows = [
        (
            claim["statement"],
            claim["paper"],
            claim["ours"],
            f"{claim['held']} of {claim['units']}",
            "holds" if claim["passed"] else "**does not hold**",
        )
        for claim in result["claims"]
    ]
    notes = [
        f"- *{claim['name']}*: {' '.join(note.split())}"
        for claim in result["claims"]
        if (note := latest.get(claim["name"]) or claim.get("note"))
    ]
    return [
        f"## {result['slug']}",
        f"{title}, {paper.get('venue', '')}. {' '.join(result['setting'].split())}",
        f"{result['seeds']} seeds, {result['seconds']:g} seconds ({versions}).",
        table(("claim", "paper", "ours", "held", ""), rows),
        *(["Notes:\n\n" + "\n".join(notes)] if notes else []),
    ]


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(_cell(str(cell)) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    """A cell on one line; bars would end it, except within code."""
    spans = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(span if span.startswith("`") else span.replace("|", "\\|") for span in spans)


def _index(title: str, what: str, listing: str) -> str:
    linked = re.sub(r"^\| `([\w+-]+)` \|", r"| [`\1`](\1.md) |", listing, flags=re.MULTILINE)
    names = {name for registry in (UNLEARNERS, AUDITS, LEARNERS) for name, _ in own(registry.items())}
    rows = [line for line in linked.splitlines() if _is_listed(line, names)]
    return f"# {title}\n\nWhat {what}\n\n" + "\n".join(rows)


def _is_listed(line: str, names: set[str]) -> bool:
    found = re.match(r"\| \[`([\w+-]+)`\]", line)
    return found is None or found[1] in names


def _verdict_rules() -> str:
    about = inspect.getdoc(importlib.import_module("palimpsest.audit.verdict")) or ""
    rules = about[about.index("The rules in order") :]
    return re.sub(r"\nThe thresholds are below.*", "", rules, flags=re.DOTALL)


def _scale() -> str:
    about = inspect.getdoc(importlib.import_module("palimpsest.core.scale")) or ""
    return about.partition("\n")[2].strip()


def _needs() -> str:
    return table(("need", "if it is missing"), [(f"`{need.value}`", need.remedy) for need in Need])


def _verdicts() -> str:
    from palimpsest.audit.verdict import Verdict

    return ", ".join(verdict.value for verdict in Verdict)


def _demo() -> str:
    recipe = (ROOT / "src" / "palimpsest" / "cli" / "demo.yaml").read_text(encoding="utf-8")
    yaml.safe_load(recipe)
    return f"```yaml\n{recipe}```"


def _recipe_keys() -> str:
    from palimpsest.study.recipe import Recipe

    least = Recipe.model_validate({"forget": "label=3", "methods": "ssd"}).plain()
    meanings = docstring_of(Recipe)[2]
    rows = [
        (
            f"`{name}`",
            "required" if field.is_required() else f"`{json.dumps(least[name])}`",
            meanings.get(name, ""),
        )
        for name, field in Recipe.model_fields.items()
    ]
    return table(("key", "default", "meaning"), rows)


def _picture() -> str:
    there = (ROOT / "docs" / PICTURE).is_file()
    return f"![The report of the demo: trade-off, verdicts, curves]({PICTURE})" if there else ""


def _contributing() -> str:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return text.partition("## Add a method in one file")[2].partition("\n## ")[0].strip()


FILLINGS: dict[str, Callable[[], str]] = {
    "verdict-rules": _verdict_rules,
    "verdict-thresholds": lambda: thresholds("palimpsest.audit.verdict"),
    "scale": _scale,
    "scale-thresholds": lambda: thresholds("palimpsest.core.scale"),
    "verdicts": _verdicts,
    "needs": _needs,
    "demo": _demo,
    "recipe-keys": _recipe_keys,
    "report-picture": _picture,
    "add-a-method": _contributing,
    "methods": lambda: method_listing().markdown(),
    "learners": lambda: learner_listing().markdown(),
}
