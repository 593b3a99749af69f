"""What all pages share: one self-contained HTML file with its styles, scripts and data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

import palimpsest


def framed(template: str, data: Mapping[str, Any], **shown: Any) -> str:
    """The text of a page.

    Args:
        template: File beside this one that extends `frame.html`.
        data: For the page's script, as JSON.
        **shown: What the template names: title, facts, requests, labels, colours, failures and its own.
    """
    from jinja2 import Environment, FunctionLoader, select_autoescape

    pages = Environment(
        loader=FunctionLoader(asset),
        autoescape=select_autoescape(default_for_string=True),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return pages.get_template(template).render(
        **shown, version=palimpsest.__version__, made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        style=asset("page.css"), script=asset("page.js"), bundle=vega(),
        data=in_script(json.dumps(data, separators=(",", ":"), default=str)),
    )  # fmt: skip


def vega() -> str:
    """The JavaScript of Vega, Vega-Lite and vega-embed, fit to stand in a script element."""
    from vl_convert import javascript_bundle

    bundle = javascript_bundle()  # pyright: ignore[reportCallIssue]  # the stub asks for an optional argument
    return bundle.replace("</script", "<\\/script")


def asset(name: str) -> str:
    """The text of a file beside this one."""
    return files("palimpsest.report").joinpath(name).read_text(encoding="utf-8")


def in_script(text: str) -> str:
    """JSON that cannot end the script element that it stands in."""
    return text.replace("</", "<\\/")
