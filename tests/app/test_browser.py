"""The page in a real browser: what a visitor clicks, sees and hears, and that nothing leaves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from itprune.app.session import Session
from itprune.app.worker import Worker
from tests.app.asking import png
from tests.app.serving import WAIT, served
from tests.app.stubs import Slow, Visitor
from tests.app.test_serving import running

CHROMIUM = Path("/usr/bin/chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs a browser at {CHROMIUM}"),
]
sync_api = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
expect = sync_api.expect


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running() as (address, _):
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


class Visit:
    """A page, and what went wrong or out meanwhile."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.url = page, url
        self.said: list[str] = []
        self.asked: list[str] = []
        page.on("console", lambda message: self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("request", lambda request: self.asked.append(request.url))

    def begin(self) -> None:
        self.page.goto(self.url)
        expect(self.page.locator("#method option").first).to_be_attached()

    def ask(self, prompt: str = "What is red?") -> None:
        self.page.fill("#prompt", prompt)
        self.page.click("#ask")
        self.finished()

    def finished(self) -> None:
        expect(self.page.locator("#ask")).to_be_enabled(timeout=60_000)

    def check_quiet(self) -> None:
        """No message of the console, and no request to anybody else."""
        assert self.said == []
        assert self.asked
        for address in self.asked:
            assert address.startswith((self.url, f"blob:{self.url}")), address


@pytest.fixture(params=[(1200, "light"), (1200, "dark"), (390, "light"), (390, "dark")])
def visit(request: pytest.FixtureRequest, browser: Any, url: str) -> Iterator[Visit]:
    width, scheme = request.param
    size = {"width": width, "height": 844}
    context = browser.new_context(viewport=size, color_scheme=scheme)
    visit = Visit(context.new_page(), url)
    visit.begin()
    yield visit
    context.close()


def upload(page: Any, picture: bytes, name: str = "a.png") -> None:
    page.set_input_files("#picture", {"name": name, "mimeType": "image/png", "buffer": picture})


def test_a_visit_from_the_picture_to_the_figures(visit: Visit, tmp_path: Path) -> None:
    page = visit.page
    upload(page, png((160, 96)))
    expect(page.locator("#image")).to_be_visible()
    page.check("#beside")
    visit.ask()
    for column in ("pruned", "dense"):
        expect(page.locator(f"#{column} .answer")).not_to_be_empty()
    assert page.locator("#figures tbody tr").count() == 7
    assert "–" not in page.locator("#figures").inner_text()
    check_overlay(page)
    page.screenshot(path=str(tmp_path / "page.png"), full_page=True)
    # Nothing is wider than the screen.
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    visit.check_quiet()


@pytest.mark.parametrize("place", ["#drop", "#prompt", "body"])
def test_a_picture_is_dropped_anywhere(browser: Any, url: str, place: str) -> None:
    page = browser.new_page()
    visit = Visit(page, url)
    visit.begin()
    files = page.evaluate_handle(
        """bytes => {
            const files = new DataTransfer();
            files.items.add(new File([new Uint8Array(bytes)], "a.png", { type: "image/png" }));
            return files;
        }""",
        list(png()),
    )
    page.dispatch_event(place, "dragover", {"dataTransfer": files})
    expect(page.locator("#drop.over")).to_be_attached()
    page.dispatch_event(place, "drop", {"dataTransfer": files})
    expect(page.locator("#drop.over")).not_to_be_attached()
    expect(page.locator("#image")).to_be_visible()
    visit.ask()
    expect(page.locator("#pruned .answer")).not_to_be_empty()
    visit.check_quiet()
    page.close()


def test_a_picture_chosen_before_the_page_is_ready_is_taken(browser: Any, url: str) -> None:
    page = browser.new_page()
    held: list[Any] = []
    page.route("**/api/model", lambda route: held.append(route))
    with page.expect_request("**/api/model"):
        page.goto(url)
    upload(page, png())
    held[0].continue_()
    expect(page.locator("#image")).to_be_visible()
    page.close()


def check_overlay(page: Any) -> None:
    """It lies on the picture exactly, and shows the stage that is chosen."""
    places = [page.locator(name).bounding_box() for name in ("#image", "#overlay")]
    assert places[0] == pytest.approx(places[1])
    radios = page.locator("#stages input")
    shown = []
    for index in range(radios.count()):
        radios.nth(index).check()
        shown.append(page.locator("#overlay").get_attribute("aria-label"))
    assert "of 144 patches kept" in shown[0]
    assert shown[0] != shown[1]
    assert shown[-1] == "All patches kept"
    radios.first.check()


def test_slider_and_method_change_what_is_kept(browser: Any, url: str) -> None:
    visit = Visit(browser.new_page(), url)
    visit.begin()
    page = visit.page
    upload(page, png())
    kept = []
    for keep, method in (("0.2", "random"), ("0.8", "random"), ("0.8", "divprune")):
        page.locator("#keep").fill(keep)
        page.select_option("#method", method)
        visit.ask()
        kept.append(page.locator("#overlay .edge").first.get_attribute("d"))
    expect(page.locator("#kept")).to_have_text("80 %")
    expect(page.locator("#note")).to_be_empty()
    page.select_option("#method", "itprune")
    expect(page.locator("#note")).to_contain_text("not calibrated")
    page.locator("#keep").fill("1")
    expect(page.locator("#note")).to_be_empty()
    assert len(set(kept)) == 3
    expect(page.locator("#dense")).to_be_hidden()
    visit.check_quiet()


def test_it_is_used_with_the_keyboard(browser: Any, url: str) -> None:
    visit = Visit(browser.new_page(), url)
    visit.begin()
    page = visit.page
    upload(page, png())
    order = []
    for _ in range(8):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id"))
    assert order[:7] == ["picture", "prompt", "method", "keep", "beside", "longest", "ask"]
    page.focus("#prompt")
    page.keyboard.type("What is red?")
    page.keyboard.press("Enter")
    visit.finished()
    expect(page.locator("#pruned .answer")).not_to_be_empty()
    page.focus("#stages input >> nth=0")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#stages input >> nth=1")).to_be_checked()
    visit.check_quiet()


def test_markup_in_a_question_stays_text(browser: Any, url: str) -> None:
    visit = Visit(browser.new_page(), url)
    visit.begin()
    upload(visit.page, png())
    visit.ask("<img src=x onerror=alert(1)> <image>")
    assert visit.page.locator("img").count() == 1
    visit.check_quiet()


def test_what_is_wrong_is_said_beside_the_button(browser: Any, url: str) -> None:
    visit = Visit(browser.new_page(), url)
    visit.begin()
    wrong = visit.page.locator("#wrong")
    visit.ask()
    expect(wrong).to_have_text("Choose a picture first.")
    upload(visit.page, b"no picture")
    expect(wrong).to_have_text("The file is not a picture your browser can show.")
    visit.ask()
    expect(wrong).to_contain_text("not a picture that is read here")
    upload(visit.page, bytes(11_000_000))
    visit.ask()
    expect(wrong).to_contain_text("larger than 10 MB")
    upload(visit.page, png())
    visit.ask()
    expect(wrong).to_be_hidden()


def test_the_line_is_shown_and_can_be_left(browser: Any, session: Session) -> None:
    slow = Slow()
    worker = Worker(slow, waiting=4)
    first = Visitor("first")
    with served(session, worker) as url:
        worker.join(first.job)
        slow.began.get(timeout=WAIT)
        visit = Visit(browser.new_page(), url)
        visit.begin()
        page = visit.page
        upload(page, png())
        page.fill("#prompt", "second")
        page.click("#ask")
        expect(page.locator("#status")).to_have_text("1 before you …")
        expect(page.locator("#ask")).to_be_disabled()
        page.click("#stop")
        expect(page.locator("#status")).to_have_text("Stopped.")
        expect(page.locator("#ask")).to_be_enabled()
        page.fill("#prompt", "third")
        page.click("#ask")
        expect(page.locator("#status")).to_have_text("1 before you …")
        slow.go.release()
        assert slow.began.get(timeout=WAIT) == "third"
        worker.close()
        expect(page.locator("#wrong")).to_have_text("The server is stopping; ask again later")
        visit.check_quiet()


def test_what_is_drawn_is_where_the_patches_are(browser: Any, url: str) -> None:
    visit = Visit(browser.new_page(), url)
    visit.begin()
    page = visit.page
    upload(page, png())
    page.evaluate(
        """async () => {
          const { draw } = await import("/drawing.js");
          const grid = { rows: 1, columns: 2, box: [0.25, 0, 0.75, 1] };
          const stage = { layer: 0, kept: 1, of: 2, masks: ["01"] };
          draw(document.getElementById("overlay"), { grids: [grid], stages: [stage] }, 0);
        }"""
    )
    dropped = page.locator("#overlay .dropped").get_attribute("d")
    # The parts that were cut off, then the first patch.
    assert dropped == ("M0 0H250V1000H0ZM750 0H1000V1000H750Z" + "M250 0H500V1000H250Z")
    assert page.locator("#overlay .edge").get_attribute("d").startswith("M500 0H750")
    visit.check_quiet()


def test_the_policy_holds_back_what_would_leave(browser: Any, url: str) -> None:
    page = browser.new_page()
    page.goto(url)
    tried = page.evaluate(
        """async () => {
          try { await fetch("http://127.0.0.2:9/"); return "sent"; }
          catch (error) { return error.name; }
        }"""
    )
    assert tried == "TypeError"
    blocked = page.evaluate(
        """() => new Promise((tell) => {
          document.addEventListener("securitypolicyviolation", (e) => tell(e.effectiveDirective));
          document.body.append(Object.assign(new Image(), { src: "http://127.0.0.2:9/a.png" }));
        })"""
    )
    assert blocked == "img-src"
