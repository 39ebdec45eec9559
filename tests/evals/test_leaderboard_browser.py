"""The page in a real browser: headless Chromium, without a network."""

import os
import shutil

import pytest
from board_cells import cell, complete
from PIL import Image
from prunekit_evals.leaderboard import board, page, pictures

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.browser  # `.ci/run` installs one; without it: pytest -m "not browser"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium: install it, or name one by CHROMIUM")
    with playwright.sync_playwright() as running:
        made = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield made
        made.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("board")
    Image.new("RGB", (120, 160), "teal").save(folder / "ours.webp")
    hostile = cell("<img src=x onerror=alert(1)>", "pope", flops=0.3)
    made = board.of_cells([*complete("pope", "gqa"), hostile])
    path = folder / "board.html"
    path.write_text(page.html(made, pictures.read(folder).of), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def opened(browser, address):
    """The page, what it asked for, and what it complained of."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    tab = context.new_page()
    asked, said = [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("dialog", lambda dialog: said.append(dialog.message))
    tab.goto(address)
    tab.wait_for_selector(".plot svg")
    yield tab
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert said == []
    context.close()


def column(tab, number):
    return tab.locator("table").first.locator(f"tbody tr:visible > *:nth-child({number})").all_inner_texts()


def test_plots_are_drawn_for_both_costs_and_follow_the_task(opened):
    assert opened.locator(".plot svg").count() == 2
    points = opened.locator(".plot svg").first.locator("[aria-roledescription=point]")
    before = points.first.get_attribute("aria-label")
    opened.locator("select").select_option("gqa")
    opened.wait_for_function(
        "told => document.querySelector('[aria-roledescription=point]').getAttribute('aria-label') !== told", arg=before
    )
    assert points.count() == 6


def test_a_click_sorts_and_a_second_one_turns_round(opened):
    head = opened.locator("thead button", has_text="FLOPs").first
    place = 1 + opened.locator("thead").first.locator("button").all_inner_texts().index("FLOPs")
    head.click()
    down = [float(text.rstrip("%")) for text in column(opened, place)]
    head.click()
    up = [float(text.rstrip("%")) for text in column(opened, place)]
    assert down == sorted(down, reverse=True) and up == sorted(up) and len(set(up)) > 2


def test_filters_keep_baselines(opened):
    opened.fill("input[name=find]", "ours")
    names = column(opened, 1)
    assert any("ours" in name for name in names) and not any("theirs" in name for name in names)
    assert sum("baseline" in name for name in names) == 4
    assert "of 7 rows" in opened.locator("output").inner_text()


def test_by_keyboard_from_a_row_to_what_stands_behind_it(opened):
    link = opened.locator("tbody th a", has_text="ours").first
    link.focus()
    opened.keyboard.press("Enter")
    opened.wait_for_selector("details[open]")
    assert "prunekit eval ours.yaml" in opened.locator("details[open]").inner_text()
    assert opened.evaluate("document.activeElement.tagName") == "SUMMARY"


def test_keep_maps_are_shown(opened):
    assert opened.evaluate("document.querySelector('.maps img').decode().then(() => 'drawn')") == "drawn"


def test_nothing_is_wider_than_a_phone_and_the_dark_is_dark(browser, address):
    context = browser.new_context(viewport={"width": 375, "height": 740}, color_scheme="dark")
    tab = context.new_page()
    tab.goto(address)
    tab.wait_for_selector(".plot svg")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 375
    red, green, blue = tab.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")[:3]
    assert max(red, green, blue) < 64
    context.close()
