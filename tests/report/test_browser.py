"""The page in a real browser, offline: charts drawn, linked, legible in light and dark, no error."""

from __future__ import annotations

import shutil

import pytest

from palimpsest.report import write_report
from palimpsest.report.page import PANELS
from palimpsest.study.compare import compare
from tests.report.panels import ELSEWHERE
from tests.study.studies import tiny

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt install chromium)"),
]
playwright = pytest.importorskip("playwright.sync_api")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-background-networking", "--disable-gpu"],
        )
        yield chromium
        chromium.close()


@pytest.fixture(params=["light", "dark"])
def opened(request, browser, page):
    context = browser.new_context(
        viewport={"width": 1440, "height": 1000}, color_scheme=request.param, offline=True
    )
    tab = context.new_page()
    tab.said, tab.asked = [], []
    tab.on("console", lambda message: tab.said.append((message.type, message.text)))
    tab.on("pageerror", lambda error: tab.said.append(("error", str(error))))
    tab.on("request", lambda asked: tab.asked.append(asked.url))
    tab.goto(page.as_uri())
    tab.wait_for_selector("html[data-drawn]", state="attached", timeout=60_000)
    yield tab
    context.close()


def contrast(first: str, second: str) -> float:
    """Contrast ratio of two colours "rgb(r, g, b)" (WCAG 2)."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


def test_all_charts_are_drawn_offline_without_a_word_on_the_console(opened):
    for panel in PANELS:
        if panel.key in ELSEWHERE:
            continue
        marks = opened.locator(
            f"#chart-{panel.key} svg .mark-group path, #chart-{panel.key} svg .mark-symbol path"
        )
        assert marks.count() > 0, panel.key
    assert [text for text in opened.said if text[0] in ("error", "warning")] == []
    assert {address.partition(":")[0] for address in opened.asked} <= {"file", "data"}


def test_text_is_legible_on_its_ground(opened):
    ground = opened.evaluate("getComputedStyle(document.querySelector('.card')).backgroundColor")
    for query in ("h3", ".lead", ".reason"):
        assert (
            contrast(opened.evaluate(f"getComputedStyle(document.querySelector('{query}')).color"), ground)
            > 4.5
        )
    label = opened.evaluate(
        "getComputedStyle(document.querySelector('#chart-trade-off .role-axis-label text')).fill"
    )
    assert contrast(label, ground) > 4.5


def test_picking_a_model_fades_the_others_in_every_chart_and_table(opened):
    opened.click(".chip[data-label='ssd']")
    opened.wait_for_function(
        "document.querySelector('.verdict[data-label=original]').classList.contains('dim')"
    )
    assert opened.locator(".verdict[data-label='ssd']:visible").get_attribute("class") == "card verdict"
    lines = opened.locator("#chart-relearning svg .mark-line path")
    shown = sorted(float(lines.nth(i).get_attribute("opacity") or 1) for i in range(lines.count()))
    assert shown[0] < 0.2 and shown[-1] == 1 and shown.count(1) < len(shown)
    assert opened.locator("#findings tbody tr td:first-child").evaluate_all(
        "cells => cells.every(cell => cell.textContent === 'ssd')"
    )
    opened.click("#all")
    assert opened.locator(".dim:visible").count() == 0


def test_clicking_on_a_mark_picks_its_model(opened):
    opened.locator("#chart-cost svg .mark-rect path").first.click(position={"x": 4, "y": 3})
    opened.wait_for_selector(".chip[aria-pressed='true']")
    assert opened.locator(".chip[aria-pressed='true']").count() == 1


def test_the_feature_space_is_drawn_for_every_model_with_the_forgotten_in_colour(opened):
    chart = opened.locator("#chart-features")
    names = set(chart.locator("svg text").all_text_contents())
    assert {"original", "retrained", "ssd", "finetune (epochs=1)", "class 3", "retained"} <= names
    fills = set(
        chart.locator("svg .role-mark.marks .mark-symbol path, svg .mark-symbol.role-mark path").evaluate_all(
            "paths => paths.map(path => getComputedStyle(path).fill)"
        )
    )
    assert len(fills) >= 2, "retained and forgotten records have colours of their own"
    ground = opened.evaluate("getComputedStyle(document.querySelector('.card')).backgroundColor")
    assert all(contrast(fill, ground) > 2 for fill in fills)
    inks = chart.locator("svg text").evaluate_all("texts => texts.map(text => getComputedStyle(text).fill)")
    assert inks and all(contrast(ink, ground) > 4.5 for ink in inks)
    opened.click(".chip[data-label='ssd']")
    opened.wait_for_function(
        """() => [...document.querySelectorAll('#chart-features svg .mark-symbol.role-mark path')]
        .some(path => Number(path.getAttribute('opacity')) < 0.1)"""
    )


def test_another_request_is_one_click_away(opened):
    before = opened.locator("#chart-trade-off svg.marks").inner_html()
    opened.click(".tab >> nth=1")
    opened.wait_for_function(
        "html => document.querySelector('#chart-trade-off svg.marks').innerHTML !== html", arg=before
    )
    assert opened.locator(".cards:visible").get_attribute("data-request").startswith("a random 0.1")


def test_findings_can_be_searched_and_sorted(opened):
    opened.fill("#search", "utility forget_accuracy")
    names = opened.locator("#findings tbody tr td:nth-child(2)").all_inner_texts()
    assert names and set(names) == {"utility.forget_accuracy"}
    opened.click("[data-sort='value']")
    shown = [
        float(t.split(" ")[0]) for t in opened.locator("#findings tbody tr td:nth-child(3)").all_inner_texts()
    ]
    assert shown == sorted(shown)


def test_the_theme_can_be_switched(opened):
    before = opened.get_attribute("html", "data-theme")
    opened.click("#theme")
    assert {before, opened.get_attribute("html", "data-theme")} == {"light", "dark"}
    opened.wait_for_timeout(300)
    assert opened.locator("#chart-roc svg.marks").count() == 1


def test_requests_in_turn_are_drawn_from_the_first_to_the_last(browser, tmp_path):
    recipe = tiny(forget=["label=3", "label=5", "label=8"], in_turn=True, training={"epochs": 8, "lr": 0.003})
    reports = compare(recipe, tmp_path / "run", progress=False).reports
    tab = browser.new_page()
    tab.goto(write_report(reports, tmp_path / "report.html").as_uri())
    tab.wait_for_selector("html[data-drawn]", state="attached", timeout=60_000)
    points = tab.locator("#chart-turns svg .mark-symbol path")
    assert points.count() == 3 * 4  # three requests, four models
    tab.select_option("#chart-turns select", "K after the last request")
    assert points.count() > 0
    tab.close()
