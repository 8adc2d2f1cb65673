"""The page in a real browser, by keyboard alone; skipped, with a word, where there is none.

With CATMAPS_SCREENSHOTS=FOLDER it leaves pictures there, and CATMAPS_PAGE_RUN=RUN serves another run than the tests'.
"""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from live_server import Live, live

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"NO BROWSER ({', '.join(NAMES)}): the page was not tested")
PICTURES = os.environ.get("CATMAPS_SCREENSHOTS")


@pytest.fixture(scope="module")
def server(map_run: Path) -> Iterator[Live]:
    with live(Path(os.environ.get("CATMAPS_PAGE_RUN", map_run))) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    api = pytest.importorskip("playwright.sync_api", reason="NO PLAYWRIGHT: the page was not tested")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture
def page(browser: "Browser", server: Live) -> "Iterator[Page]":
    opened = browser.new_page(viewport={"width": 1280, "height": 860}, reduced_motion="reduce")
    faults: list[str] = []
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
    elsewhere: list[str] = []
    opened.on("request", lambda sent: elsewhere.append(sent.url) if not sent.url.startswith(server.url) else None)
    opened.goto(server.url)
    yield opened
    opened.close()
    assert [fault for fault in faults if "status of 400" not in fault] == []
    assert [url for url in elsewhere if not url.startswith("data:")] == []


def focused(page: "Page") -> str:
    return page.evaluate("document.activeElement.id || document.activeElement.className")


def tab_to(page: "Page", what: str) -> None:
    for _ in range(30):
        if focused(page) == what:
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"no way to {what} by Tab; at {focused(page)}")


def until(page: "Page", condition: str) -> None:
    """Asks again and again: the page's policy lets nothing wait inside it."""
    end = time.monotonic() + 60
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(30)


def picture(page: "Page", name: str) -> None:
    if PICTURES is not None:
        page.screenshot(path=str(Path(PICTURES) / f"{name}.png"))


def written(page: "Page") -> list[str]:
    return page.evaluate("panels.map(p => p.tokens.map(t => t.textContent).join(''))")


def fill(page: "Page", field: str, text: str) -> None:
    tab_to(page, field)
    page.keyboard.press("Control+A")
    page.keyboard.press("Delete")  # a page of a larger run begins with an example
    page.keyboard.type(text)


def write(page: "Page", text: str, seed: str = "3") -> None:
    fill(page, "text", text)
    fill(page, "seed", seed)
    tab_to(page, "write")
    page.keyboard.press("Enter")
    until(page, "document.getElementById('status').textContent.startsWith('Done')")


def test_everything_is_done_by_keyboard(page: "Page", server: Live) -> None:
    write(page, "the [[6]] of")
    final = written(page)
    assert len(final) == 3
    assert all(text.startswith("the ") and text.endswith(" of") for text in final)
    assert final[1] == server.texts(infill="the [[6]] of", seed=3, num_steps=4)[0]
    picture(page, "end")
    tab_to(page, "time")
    page.keyboard.press("Home")
    assert written(page) == ["the ······ of"] * 3
    assert "Calls\n0 of 64" in page.inner_text(".card:nth-child(3)").replace("\t", "\n")
    picture(page, "noise")
    page.keyboard.press("ArrowRight")
    assert written(page)[0] == final[0]  # one step: the first is the last
    picture(page, "first")
    page.keyboard.press("End")
    assert written(page) == final
    tab_to(page, "token given marked")
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    assert page.inner_text("#detail-head") == "Token 6 of 13 in 1 step, after step 1"
    assert page.locator("#detail-list li").count() == 5
    picture(page, "detail")
    page.keyboard.press("Home")
    assert page.inner_text("#detail-head").endswith("given")
    page.keyboard.press("Escape")
    assert not page.is_visible("#detail")
    page.keyboard.press("Tab")
    page.keyboard.press("End")
    assert page.inner_text("#detail-head").startswith("Token 13 of 13 in 4 steps")


def test_hover_shows_alternatives_and_play_moves_the_time(page: "Page") -> None:
    write(page, "")
    page.hover(".card:nth-child(2) .token:nth-child(3)")
    assert page.inner_text("#detail-head").startswith("Token 3 of")
    assert page.inner_text("#detail-head").endswith("in 4 steps, after step 4")
    page.mouse.move(3, 3)
    assert not page.is_visible("#detail")
    tab_to(page, "play")
    page.keyboard.press("Enter")
    assert page.inner_text("#play") == "Pause"
    until(page, "Number(document.getElementById('time').value) > 3")
    page.keyboard.press("Enter")
    assert page.inner_text("#play") == "Play"
    assert 0 < page.evaluate("Number(document.getElementById('time').value)") < 64


def test_refusals_are_said(page: "Page") -> None:
    fill(page, "text", "[[999]]")
    tab_to(page, "write")
    page.keyboard.press("Enter")
    page.wait_for_selector("#problem:not([hidden])")
    assert "window holds" in page.inner_text("#problem")
    assert page.locator(".card").count() == 0
    assert page.is_enabled("#write")


CONTRAST = """() => {
  const light = c => { const v = c.match(/[0-9.]+/g).slice(0, 3).map(x => x / 255)
    .map(x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126*v[0] + 0.7152*v[1] + 0.0722*v[2]; };
  const behind = e => { while (e) { const c = getComputedStyle(e).backgroundColor;
    if (c !== 'rgba(0, 0, 0, 0)') return c; e = e.parentElement; } return 'rgb(255, 255, 255)'; };
  return [...document.querySelectorAll('h1, p, label, dt, dd, .token, button, h2, #scale span')]
    .filter(e => e.offsetParent && e.textContent.trim()).map(e => {
      const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
      return [(a + 0.05) / (b + 0.05), e.className || e.id || e.tagName]; }).sort((x, y) => x[0] - y[0])[0]; }"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_labels_and_narrow_windows(page: "Page", scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    write(page, "the ")
    assert page.evaluate("panels.length") == 3
    ratio, where = page.evaluate(CONTRAST)
    assert ratio >= 4.5, where
    unnamed = "[...document.querySelectorAll('input, select, textarea')].filter(e => !e.labels.length).map(e => e.id)"
    assert page.evaluate(unnamed) == []
    picture(page, f"{scheme}-wide")
    page.set_viewport_size({"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    picture(page, f"{scheme}-narrow")
