"""The report in a real browser: what it shows, on a desk and on a phone."""

import os
import shutil

import pytest

WIDTHS = (1280, 400)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(
    CHROMIUM is None and os.environ.get("HMOE_TEST_BROWSER") != "1", reason="needs Chromium (apt-get install chromium)"
)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Chromium's sandbox needs rights that containers do not have; the page is ours.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=WIDTHS, ids=str)
def page(browser, request, report):
    """The report, loaded without network, and what the browser complained of."""
    page = browser.new_page(viewport={"width": request.param, "height": 900})
    page.complaints = []
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("requestfailed", lambda wish: page.complaints.append(wish.url))
    page.context.set_offline(True)
    page.goto(report.as_uri())
    page.wait_for_load_state("load")
    yield page
    page.close()


def test_it_loads_without_complaint_and_without_other_files(page):
    assert page.complaints == []
    addresses = page.evaluate("performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [address for address in addresses if not address.startswith("data:")] == []


def test_all_figures_are_there_and_say_what_they_show(page):
    images = page.evaluate(
        "[...document.images].map(image => ({alt: image.alt, natural: image.naturalWidth, shown: image.width}))"
    )
    assert all(image["natural"] > 0 and image["shown"] > 30 for image in images)
    assert all(len(image["alt"]) > 10 for image in images)
    for words in (
        "training and validation loss",
        "molecules per second",
        "health of the routing",
        "share of molecules of each group",
        "load of each expert",
        "Scatter plot of routing embeddings",
        "splits of experts",
        "bytes that leave ranks",
        "scaffold c1ccccc1",
    ):
        assert any(words in image["alt"] for image in images), words


def test_nothing_is_cut_off_and_letters_can_be_read(page):
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    smallest = page.evaluate(
        "Math.min(...[...document.body.querySelectorAll('*')].filter(e => e.innerText && e.offsetWidth)"
        ".map(e => parseFloat(getComputedStyle(e).fontSize)))"
    )
    assert smallest >= 11
    # In figures letters are 9 points of a drawing 4.2 inches wide.
    widths = page.evaluate("[...document.querySelectorAll('figure > img')].map(image => image.width)")
    assert min(widths) / (4.2 * 72) * 9 >= 10


def test_names_are_text_and_no_html(page):
    assert page.inner_text("h1") == "Routing report: a <b>run & more"
