"""The page in a browser: drawn, quiet, and as wide as a hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import front, result
from test_report_page import EVIL

from netsmith.report.page import write_report


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Open the report of the runs; at the end nothing was complained of and nothing was asked of the network."""
    complaints: list[str] = []
    requests: list[str] = []
    pages = []

    def look(*runs: Path, width: int = 1280, scheme: str = "light", touch: bool = False) -> Any:
        out = write_report(list(runs), tmp_path / "report.html")
        view = {"width": width, "height": 844}
        page = browser.new_page(viewport=view, color_scheme=scheme, has_touch=touch)
        pages.append(page)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(out.as_uri())
        page.wait_for_selector("html[data-drawn]", timeout=20_000)
        return page

    yield look
    for page in pages:
        page.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []


INK = ".subplot path, .subplot image"
DRAWN = f'[...document.querySelectorAll(".chart")].filter(chart => chart.querySelector("{INK}")).length'


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_every_chart_is_drawn_and_nothing_runs_over(
    opened: Callable[..., Any], run_folder: Callable[..., Path], width: int, scheme: str
) -> None:
    runs = run_folder("a"), run_folder("f", made=front(1)), run_folder("l", made=result(method="lana"))
    page = opened(*runs, width=width, scheme=scheme)
    charts = page.evaluate('document.querySelectorAll(".chart").length')
    assert page.evaluate(DRAWN) == charts > 20
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    wide = (
        '[...document.querySelectorAll("main *")].filter(e => e.getBoundingClientRect().right > innerWidth + 1).length'
    )
    assert page.evaluate(wide) == 0


def test_theme_slider_and_copy_button_work(opened: Callable[..., Any], run_folder: Callable[..., Path]) -> None:
    """Three things on one page: it is the opening that costs seconds."""
    page = opened(run_folder(), scheme="light")
    colour = 'document.querySelector(".chart").layout.font.color'
    assert page.evaluate(colour) == "#1c2126"
    page.emulate_media(color_scheme="dark")
    for _ in range(100):  # not wait_for_function: the page's policy forbids the eval it needs
        if page.evaluate(colour) == "#e5e8ea":
            break
        page.wait_for_timeout(50)
    assert page.evaluate(colour) == "#e5e8ea"
    page.wait_for_selector("html[data-drawn]")
    slider = page.locator("input[type=range]").first
    cell = 'document.getElementById("figure-2").data[0].z[3][5]'
    before = page.evaluate(cell)
    slider.focus()
    page.keyboard.press("Home")
    assert page.locator("output").first.inner_text() == "epoch 0"
    assert slider.get_attribute("aria-valuetext") == "epoch 0"
    assert page.evaluate(cell) != before
    button = page.locator("#run-1 .copy button").last
    button.click()
    page.wait_for_selector('.copy button:has-text("Copied")')


def test_a_name_runs_no_script(opened: Callable[..., Any], run_folder: Callable[..., Path]) -> None:
    made = result() | {"verdict": EVIL}
    made["baselines"][0]["name"] = EVIL
    made["layers"][0] |= {"name": EVIL, "text": EVIL}
    page = opened(run_folder(made=made))
    assert page.evaluate("window.evil === undefined")


def test_a_bare_run_opens(opened: Callable[..., Any], run_folder: Callable[..., Path]) -> None:
    folder = run_folder(made={"method": "random"})
    (folder / "events.jsonl").unlink()
    page = opened(folder, width=390)
    assert page.evaluate('document.querySelectorAll(".chart").length') == 0
    assert "No layers were recorded." in page.inner_text("main")
