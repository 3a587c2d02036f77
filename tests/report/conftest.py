"""Run folders to report on, and the machine's browser to look at the page."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import result, write_run


@pytest.fixture
def run_folder(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a run folder: `run_folder("name", seed=1, kept=False)`."""

    def make(name: str = "fbnet-5ms", made: dict[str, Any] | None = None, **options: Any) -> Path:
        return write_run(tmp_path / name, made or result(**options), options.get("seed", 0))

    return make


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium, the machine's own; the tests that look at the page are skipped without it."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no chromium or google-chrome on this machine")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    with playwright.sync_playwright() as engine:
        opened = engine.chromium.launch(
            executable_path=path, args=[*quiet, "--disable-component-update", "--disable-sync"]
        )
        yield opened
        opened.close()
