"""The page in a real browser, by its keys and by the mouse."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from hanse.finetuning.labelling.labels import Labels
from hanse.finetuning.labelling.queue import Pool, Queue
from hanse.finetuning.labelling.server import serving

playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no `chromium` on the PATH: install Debian's package of that name")
expect = playwright.expect


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def queue(pool: Pool, labels: Labels) -> Queue:
    return Queue(pool, labels)


@pytest.fixture
def url(queue: Queue) -> Iterator[str]:
    with serving(queue, title="day-1") as url:
        yield url


@pytest.fixture
def page(browser: playwright.Browser, url: str) -> Iterator[playwright.Page]:
    """The page, opened; at the end, all that it asked for was asked of its own server, and no error was logged."""
    context = browser.new_context()
    asked: list[str] = []
    errors: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    context.on("weberror", lambda error: errors.append(str(error.error)))
    context.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page = context.new_page()
    page.goto(url)
    ready(page)
    yield page
    context.close()
    assert {urlsplit(each)[:2] for each in asked} == {urlsplit(url)[:2]}
    assert len(asked) > 4
    assert errors == []


def ready(page: playwright.Page) -> None:
    """The server has answered and the picture is there."""
    expect(page.locator("#said")).to_contain_text("Now ")
    expect(page.locator("body[aria-busy]")).to_have_count(0)


def file_in(page: playwright.Page) -> str:
    name = page.locator("#picture").get_attribute("alt")
    assert name is not None
    return str(name.split(",")[0])


def press(page: playwright.Page, key: str) -> str:
    """Press a key that labels; the file that it labelled."""
    file = file_in(page)
    page.keyboard.press(key)
    expect(page.locator("#picture")).not_to_have_attribute("alt", re.compile(re.escape(file)))
    ready(page)
    return file


def label_truly(page: playwright.Page, truth: dict[str, int], count: int) -> None:
    for _ in range(count):
        press(page, str(truth[file_in(page)]))


def test_keys_label_and_the_counter_counts(page: playwright.Page, queue: Queue) -> None:
    keys = {"1": 1, "0": 0, "s": -1, "ArrowRight": 1, "ArrowLeft": 0, "ArrowDown": -1}
    given = {press(page, key): label for key, label in keys.items()}
    assert {file: each.label for file, each in queue.labels.given.items()} == given
    expect(page.locator("#found")).to_have_text("2")
    expect(page.locator("#looked")).to_have_text("6")
    expect(page.locator("#rate")).to_have_text("33 %")
    expect(page.locator("#progress-text")).to_contain_text("6 of ")
    expect(page.locator("#recent li")).to_have_count(6)


def test_nothing_is_labelled_before_it_is_seen(page: playwright.Page, queue: Queue) -> None:
    held: list[playwright.Route] = []
    page.route("**/picture/*", lambda route: held.append(route))
    with page.expect_request("**/picture/*"):
        page.keyboard.press("1")
    page.keyboard.press("1")  # the next picture is still on its way
    expect(page.locator("body[aria-busy]")).to_have_count(1)
    for route in held:
        route.continue_()
    page.unroute("**/picture/*")
    ready(page)
    assert len(queue.labels.given) == 1
    press(page, "1")
    assert len(queue.labels.given) == 2


def test_undo_shows_the_image_again(page: playwright.Page, queue: Queue) -> None:
    expect(page.get_by_role("button", name="Undo")).to_be_disabled()
    first, second = press(page, "1"), press(page, "1")
    page.keyboard.press("u")
    expect(page.locator("#picture")).to_have_attribute("alt", re.compile(re.escape(second)))
    ready(page)
    expect(page.locator("#looked")).to_have_text("1")
    press(page, "0")
    page.get_by_role("button", name=f"Take back {first}: anomaly").click()
    expect(page.locator("#picture")).to_have_attribute("alt", re.compile(re.escape(first)))
    ready(page)
    assert {file: each.label for file, each in queue.labels.given.items()} == {second: 0}


def test_find_similar_brings_what_the_band_cannot(page: playwright.Page, queue: Queue, truth: dict[str, int]) -> None:
    label_truly(page, truth, 5)
    page.keyboard.press("f")
    expect(page.locator("#facts")).to_contain_text("as similar")
    ready(page)
    label_truly(page, truth, 21)
    found = {file for file, each in queue.labels.given.items() if each.label == 1}
    missed = {name for name, score in zip(queue.pool.names, queue.pool.scores, strict=True) if truth[name] and score < 0.01}
    assert missed
    assert missed <= found
    page.keyboard.press("f")
    expect(page.locator("#facts")).to_contain_text("in the band")


def test_find_similar_says_that_it_needs_an_anomaly(page: playwright.Page) -> None:
    page.keyboard.press("f")
    expect(page.get_by_text("Label an anomaly first")).to_be_visible()
    expect(page.get_by_role("button", name="Anomaly")).to_be_disabled()
    page.keyboard.press("1")
    page.keyboard.press("f")
    ready(page)


def test_the_handles_move_the_band(page: playwright.Page, queue: Queue) -> None:
    low, high = page.get_by_label("Lowest score of the band"), page.get_by_label("Highest score of the band")
    low.focus()
    page.keyboard.press("End")  # as far as the other handle lets it
    expect(page.locator("#band-text")).to_have_text("0.30 to 0.30")
    high.focus()
    page.keyboard.press("End")
    expect(page.locator("#band-text")).to_have_text("0.30 to 1.00")
    expect(page.get_by_text("Every image in this band is labelled")).to_be_visible()
    low.focus()
    page.keyboard.press("Home")
    expect(page.locator("#band-text")).to_have_text("0.000 to 1.00")
    expect(page.locator("#progress-text")).to_contain_text("0 of 240")
    ready(page)
    press(page, "0")  # a digit labels although a handle has the focus
    assert len(queue.labels.given) == 1
    assert low.get_attribute("aria-valuetext") == "0.000"


def test_a_spot_check_is_counted_apart(page: playwright.Page, queue: Queue) -> None:
    page.locator("#modes").get_by_text("Spot check").click()
    expect(page.locator("#facts")).to_contain_text("spot check")
    ready(page)
    press(page, "ArrowLeft")  # the arrows label although a choice was clicked
    expect(page.locator("#progress-text")).to_contain_text("1 of 50")
    expect(page.locator("#looked")).to_have_text("0")
    expect(page.locator("#chance")).to_contain_text("1 drawn by lot")
    assert [each.how for each in queue.labels.given.values()] == ["spot"]


def test_the_picture_is_enlarged_without_smoothing(page: playwright.Page) -> None:
    picture = page.locator("#picture")
    expect(picture).to_have_css("image-rendering", "pixelated")
    before = picture.bounding_box()
    page.keyboard.press("z")
    expect(page.locator("#zoomed")).to_have_text("2×")
    after = picture.bounding_box()
    assert after["width"] > 1.9 * before["width"]
    assert after["x"] + after["width"] / 2 == pytest.approx(before["x"] + before["width"] / 2, abs=20)  # its middle stays in view


def test_two_windows_lose_nothing(page: playwright.Page, queue: Queue, url: str) -> None:
    other = page.context.new_page()
    other.goto(url.split("?")[0])  # the cookie is enough
    ready(other)
    assert file_in(page) != file_in(other)
    given = [press(each, "1") for _ in range(3) for each in (page, other)]
    assert list(queue.labels.given) == given
    page.keyboard.press("u")
    expect(page.locator("#picture")).to_have_attribute("alt", re.compile(re.escape(given[4])))
    other.reload()
    ready(other)
    other.keyboard.press("u")
    expect(other.locator("#picture")).to_have_attribute("alt", re.compile(re.escape(given[5])))
    ready(other)
    assert list(queue.labels.given) == given[:4]


def test_the_page_keeps_no_token_in_its_address_and_can_be_loaded_again(page: playwright.Page, url: str) -> None:
    assert page.url == url.split("?")[0]
    file = file_in(page)
    page.reload()
    ready(page)
    assert file_in(page) == file


def test_everything_can_be_reached_and_is_named(page: playwright.Page) -> None:
    press(page, "1")
    reached = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.add(page.locator("body").evaluate("() => document.activeElement.id"))
    assert {"stage", "anomaly", "normal", "unsure", "undo", "zoom", "low", "high"} <= reached
    for name in ("1 Anomaly", "0 Normal", "S Unsure", "U Undo", "Z Zoom"):
        expect(page.get_by_role("button", name=name)).to_be_visible()
    expect(page.get_by_role("radio", name="Band of scores")).to_be_checked()
    expect(page.get_by_role("progressbar")).to_have_accessible_name(re.compile("in this band labelled"))
    expect(page.get_by_role("status")).to_contain_text("anomaly. F finds similar ones. Now ")
    expect(page.get_by_role("table")).to_have_count(1)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(browser: playwright.Browser, url: str, scheme: str) -> None:
    """WCAG 2.2, 1.4.3: a contrast of at least 4.5 for the page's ink, soft text and buttons."""
    context = browser.new_context(color_scheme=scheme)
    page = context.new_page()
    page.goto(url)
    ready(page)
    pairs = page.locator("h1, header p, #chance, #anomaly, #normal, #unsure, #modes input:checked + span, #said").evaluate_all(
        """all => all.map(one => {
          let behind = one;
          while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
          return [getComputedStyle(one).color, getComputedStyle(behind).backgroundColor];
        })"""
    )
    assert len(pairs) == 8
    assert min(contrast(*pair) for pair in pairs) >= 4.5
    context.close()


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio of two colours, written as rgb(r, g, b)."""
    lights = []
    for colour in (one, other):
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)
