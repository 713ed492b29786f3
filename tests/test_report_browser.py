"""The report page in a real browser: it opens quietly, sorts, filters, leads to runs and back.

Needs playwright's Python package and a Chromium of the system (Debian's will do); without one the
tests are skipped and say so.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from report_fixtures import HOSTILE, chromium, data_folder, known_store

from qbench.report.report import Choices, report

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

pytestmark = pytest.mark.skipif(chromium() is None, reason="no Chromium is installed")
PATIENCE_MS = 60_000
"""A machine may be busy; nothing here is timed."""


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as driver:
        arguments = ["--no-sandbox", "--disable-gpu"]  # the page is ours, containers lack the rest
        found = driver.chromium.launch(executable_path=chromium(), args=arguments)
        yield found
        found.close()


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("report")
    choices = Choices(data=data_folder(root / "data"), against="bitnet-table3")
    return report(known_store(root / "results"), root / "report.html", choices)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("hostile")
    choices = Choices(data=data_folder(root / "data", hostile=True))
    return report(known_store(root / "results", hostile=True), root / "report.html", choices)


class Opened:
    """A page with everything the browser complained of or asked for."""

    def __init__(self, browser: sync_api.Browser, path: Path, **context: object) -> None:
        options = {"viewport": {"width": 1280, "height": 800}} | context
        self.context = browser.new_context(**options)  # type: ignore[arg-type]
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.complaints: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.on("request", self._requested)
        self.page.goto(path.as_uri())

    def _requested(self, request: sync_api.Request) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            self.complaints.append(f"asked for {request.url}")

    def plot(self) -> None:
        """Wait until the plot is drawn."""
        self.page.locator("#plot").scroll_into_view_if_needed()
        self.page.wait_for_selector("#plot .main-svg path.point")

    def rows(self) -> list[list[str]]:
        """The texts of the table's visible rows."""
        return self.page.eval_on_selector_all(
            "#table-rows tbody tr:not([hidden])",
            "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))",
        )

    def column(self, heading: str) -> list[str]:
        headings = self.page.locator("#table-rows thead th").all_text_contents()
        (place,) = [i for i, text in enumerate(headings) if text.startswith(heading)]
        return [row[place] for row in self.rows()]

    def sort(self, heading: str) -> None:
        self.page.locator("#table-rows thead button", has_text=heading).click()

    def until(self, condition: str) -> None:
        """Wait until the JavaScript ``condition`` holds.

        Asked from outside: ``wait_for_function`` evaluates a text in the page once it has to wait,
        which the page's policy forbids.
        """
        deadline = time.monotonic() + PATIENCE_MS / 1000
        while not self.page.evaluate(condition):
            assert time.monotonic() < deadline, f"never came true: {condition}"
            self.page.wait_for_timeout(20)

    def overflow(self) -> int:
        """By how many pixels the page is wider than the window."""
        return self.page.evaluate("document.documentElement.scrollWidth - innerWidth")


@pytest.fixture
def opened(browser, html) -> Iterator[Opened]:
    found = Opened(browser, html)
    yield found
    found.context.close()


def test_it_opens_and_draws_without_a_complaint_or_a_request(opened):
    opened.plot()
    assert opened.page.locator("#plot .points path").count() == 5  # rows with an accuracy
    opened.page.select_option("#plot-axis", "effective bits per weight")
    opened.page.wait_for_selector("#plot .xtitle:has-text('effective')")
    opened.page.select_option("#plot-label", index=1)
    opened.page.wait_for_selector("#plot .ytitle:has-text('perplexity')")
    assert opened.complaints == []


def test_a_click_on_a_heading_sorts_by_value_and_the_third_restores_the_order(opened):
    before = opened.rows()
    opened.sort("PPL")
    numbers = ["inf (diverged)", "12.00", "10.50", "10.00"]
    assert [re.sub(r" ?▼|\d$", "", text) for text in opened.column("PPL")[:4]][0] == numbers[0]
    assert [text[:5] for text in opened.column("PPL")[1:4]] == numbers[1:]
    heading = opened.page.locator("#table-rows th[aria-sort]")
    assert heading.get_attribute("aria-sort") == "descending"
    opened.sort("PPL")
    assert [text[:5] for text in opened.column("PPL")[:3]] == numbers[:0:-1]
    assert heading.get_attribute("aria-sort") == "ascending"
    opened.sort("PPL")
    assert opened.rows() == before
    assert heading.count() == 0


def test_rows_without_a_number_stay_last_whichever_way(opened):
    for _ in range(2):
        opened.sort("piqa")
        assert opened.column("piqa")[-1] in ("n/a", "failed")


def test_a_heading_is_sorted_from_the_keyboard(opened):
    opened.page.locator("#table-rows thead button", has_text="W/A").focus()
    opened.page.keyboard.press("Enter")
    assert opened.column("W/A") == sorted(opened.column("W/A"), key=lambda t: float(t[1:].split("A")[0]))  # fmt: skip  # noqa: E501


def test_filters_and_search_narrow_the_table_and_say_how_far(opened):
    opened.page.select_option("select[name=method]", "gptq")
    assert {row[2].rstrip("†") for row in opened.rows()} == {"gptq"}
    assert opened.page.text_content("#count") == "2 of 7 rows"
    opened.page.select_option("select[name=width]", "W2A16")
    assert len(opened.rows()) == 1
    opened.page.click("button[type=reset]")
    opened.until("document.getElementById('count').textContent === '7 rows'")
    opened.page.fill("input[type=search]", "TENSOR w4a16")
    assert [row[2] for row in opened.rows()] == ["absmax"]
    opened.page.fill("input[type=search]", "nothing is called so")
    assert opened.rows() == []


def test_a_run_opens_from_the_table_and_back_leads_to_the_same_place(opened):
    opened.page.fill("input[type=search]", "gptq")
    opened.page.evaluate("scrollTo(0, document.getElementById('table').offsetTop - 100)")
    opened.until("kept > 0")
    place = opened.page.evaluate("scrollY")
    opened.page.click("#table-rows tbody tr:not([hidden]) th a")
    opened.page.wait_for_selector("#run h1:has-text('gptq W4A16')")
    assert opened.page.locator("#all").is_hidden()
    assert opened.page.title().startswith("gptq W4A16")
    assert opened.page.evaluate("scrollY") == 0
    opened.page.go_back()
    opened.page.wait_for_selector("#all:not([hidden])")
    assert opened.page.locator("#run").is_hidden()
    assert opened.page.evaluate("scrollY") == place
    assert len(opened.rows()) == 2  # still filtered
    opened.page.go_forward()
    opened.page.wait_for_selector("#run h1:has-text('gptq W4A16')")
    opened.page.click("#run .back a")
    opened.page.wait_for_selector("#all:not([hidden])")
    assert opened.complaints == []


def test_the_address_of_a_run_opens_it(browser, html, opened):
    link = opened.page.get_attribute("#table-rows tbody tr:nth-child(2) th a", "href")
    other = Opened(browser, html)
    other.page.goto(html.as_uri() + str(link))
    other.page.reload()
    other.page.wait_for_selector("#run h1")
    assert other.page.locator("#all").is_hidden()
    other.context.close()


def open_run(opened: Opened, title: str) -> None:
    opened.page.evaluate(
        """async title => {
          for (const anchor of Object.keys(data.runs)) {
            if (JSON.parse(await unpack(anchor)).title === title) location.hash = anchor;
          }
        }""",
        title,
    )
    opened.page.wait_for_selector(f"#run h1:has-text('{title}')")


def test_a_run_shows_its_settings_matrices_and_answers(opened):
    open_run(opened, "gptq W4A16")
    text = opened.page.inner_text("#run")
    assert "percdamp" in text and "0.01" in text and "torch" in text
    assert "1 of 6 matrices were rounded to nearest" in text
    assert "not positive definite" in text
    opened.page.wait_for_selector("#run .plot .main-svg path.point")
    assert opened.page.locator("#run .plot .points path").count() == 6
    opened.page.click("details.task summary")
    card = opened.page.locator("article.item", has_text="question 48")
    assert "How is thing 48 done?" in card.inner_text()
    rows = card.locator("tbody tr").all_inner_texts()
    assert "right" in rows[0] and "−11.48" in rows[0] and "➤ −10.00" in rows[0]
    assert opened.page.locator("article.item").count() == 2
    assert opened.complaints == []


def test_numbers_of_a_run_are_sorted_by_value_with_their_errors_and_signs(opened):
    texts = ["34.0 ± 6.8", "100.0 ± 0.0", "−14.0", "–", "+2.0", "1,293", "inf (diverged)"]
    expected = ["inf (diverged)", "1,293", "100.0 ± 0.0", "34.0 ± 6.8", "+2.0", "−14.0", "–"]
    shown = opened.page.evaluate(
        """texts => {
          const box = tableOf("numbers", ["name", "value"], texts.map(t => ["a", t]), [1]);
          box.querySelectorAll("button")[1].click();
          return [...box.querySelectorAll("tbody td")].map(cell => cell.textContent);
        }""",
        texts,
    )
    assert shown == expected


def test_an_address_cut_off_within_a_letter_shows_everything(browser, html):
    other = Opened(browser, html)
    other.page.goto(html.as_uri() + "#%E0%A4%A")
    other.page.reload()
    assert other.page.locator("#all").is_visible()
    assert other.complaints == []
    other.context.close()


def test_capped_answers_say_how_many_more_there_are(opened):
    open_run(opened, "gptq W2A16")
    opened.page.click("details.task summary")
    opened.page.wait_for_selector("article.item")
    assert opened.page.locator("article.item").count() == 12
    assert "and 12 more" in opened.page.inner_text("#run")


def test_planted_markup_is_inert(browser, hostile):
    opened = Opened(browser, hostile)
    opened.plot()
    open_run(opened, f"gptq{HOSTILE} W4A16".replace("'", "\\'"))
    opened.page.click("details.task summary")
    opened.page.wait_for_selector("article.item")
    assert HOSTILE in opened.page.inner_text("article.item >> nth=0")
    assert HOSTILE in opened.page.inner_text("#run .lead")
    assert opened.page.locator("img").count() == 0
    assert opened.page.evaluate("window.pwned") is None
    assert opened.complaints == []
    opened.context.close()


def test_the_policy_stops_scripts_and_requests_that_got_in(opened):
    """Even markup put in by hand runs nothing and reaches nobody."""
    opened.page.evaluate(
        """() => {
          const place = document.createElement('div');
          place.innerHTML = '<img src="https://example.invalid/x.png" onerror="window.pwned=1">';
          document.body.append(place);
          const script = document.createElement('script');
          script.textContent = 'window.pwned = 2';
          document.body.append(script);
        }"""
    )
    opened.until("document.querySelector('img').complete")
    assert opened.page.evaluate("window.pwned") is None
    refused = opened.page.evaluate(
        "fetch('https://example.invalid').then(() => 'sent', () => 'refused')"
    )
    assert refused == "refused"
    assert any("Content Security Policy" in text for text in opened.complaints)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_wider_than_the_screen(browser, html, scheme):
    phone = {"width": 390, "height": 844}
    opened = Opened(browser, html, viewport=phone, color_scheme=scheme)
    opened.plot()
    assert opened.overflow() <= 0
    scroller = opened.page.locator("#table .scroll")
    assert scroller.evaluate("box => box.scrollWidth > box.clientWidth")  # it scrolls by itself
    open_run(opened, "gptq W4A16")
    opened.page.click("details.task summary")
    opened.page.wait_for_selector("article.item")
    assert opened.overflow() <= 0
    colour = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    lightness = sum(map(int, re.findall(r"\d+", colour)[:3])) / 3
    assert lightness > 200 if scheme == "light" else lightness < 60
    opened.context.close()


def test_it_prints_with_every_column_on_the_page(browser, html):
    """A4 landscape within 12 mm margins is 1032 CSS pixels wide."""
    opened = Opened(browser, html, viewport={"width": 1032, "height": 700})
    opened.plot()
    opened.page.emulate_media(media="print")
    for box in opened.page.locator(".scroll").all():
        assert box.evaluate("box => box.firstElementChild.offsetWidth") <= 1032
    assert opened.overflow() <= 0
    assert opened.page.locator("#filters").is_hidden()
    opened.page.emulate_media(media=None)  # type: ignore[arg-type]
    printed = opened.page.pdf(prefer_css_page_size=True)
    assert printed.startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b", printed)) >= 2
    opened.context.close()


def test_without_javascript_the_table_and_the_findings_can_be_read(browser, html):
    opened = Opened(browser, html, java_script_enabled=False)
    assert opened.page.locator("#table-rows tbody tr").count() == 7
    assert opened.page.locator("#table-rows").is_visible()
    assert "Full precision answers 80.0\N{NO-BREAK SPACE}%" in opened.page.inner_text(".findings")
    assert "need JavaScript" in opened.page.inner_text("#table")
    assert opened.page.locator("#filters").is_hidden()
    opened.context.close()
