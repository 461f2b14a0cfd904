"""The docs site in a real browser: every page renders, is found by the search, and can be read in light, in the dark, on a phone and without a network.

Needs playwright and a Chromium. The site is the one in `PLASTICITY_SITE`, or in `_proc/_docs`; where neither is there, `.ci/site` builds it.
"""
import functools
import http.server
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from house import ROOT

pytestmark = pytest.mark.browser
playwright = pytest.importorskip("playwright.sync_api")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1400, "height": 1000}
# What a page may ask of other hosts, and is read without: the themes' letters, the typesetting of formulas, the badge beside the title
OUTSIDE = ("https://fonts.googleapis.com/css2?", "https://cdn.jsdelivr.net/npm/katex@", "https://colab.research.google.com/assets/colab-badge.svg")

# What there is to see on a page: its headings, pictures, formulas that were not typeset, and words that are left of markup
CONTENTS = """() => {
    const main = document.querySelector('main'), text = main.cloneNode(true);
    text.querySelectorAll('pre, code, script, style, .math').forEach(element => element.remove());
    return {
        titles: [...document.querySelectorAll('h1')].map(h => h.innerText.trim()),
        letters: main.innerText.length,
        silent: [...main.querySelectorAll('img')].filter(img => !img.alt.trim()).length,
        missing: [...main.querySelectorAll('img')].filter(img => img.src.startsWith(location.origin + '/') || img.src.startsWith('data:')).filter(img => !(img.complete && img.naturalWidth)).length,
        formulas: [...document.querySelectorAll('.math')].filter(math => !math.innerText.trim()).length,
        markup: (text.textContent.match(/\\*\\*[^*\\n]+\\*\\*|\\]\\((?:https?:|\\w+\\.)[^)]*\\)|^#+ .*$|^:::.*$|&lt;|\\$\\$/gm) || []).slice(0, 3),
    };
}"""
# Pairs of text and ground whose contrast is too low (WCAG AA: 4.5, or 3 for large letters), each with the first words that have it
FAINT = """() => {
    const channels = color => color.match(/[\\d.]+/g).map(Number), found = new Map();
    const over = (top, below) => [0, 1, 2].map(i => top[i] * (top[3] ?? 1) + below[i] * (1 - (top[3] ?? 1)));
    const light = color => color.slice(0, 3).map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4).reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const known = new Map();
    const around = element => {  // the colour behind an element, and how opaque it is drawn
        if (!element) return [[255, 255, 255], 1];
        if (!known.has(element)) {
            const style = getComputedStyle(element), [below, opacity] = around(element.parentElement);
            known.set(element, [over(channels(style.backgroundColor), below), opacity * Number(style.opacity)]);
        }
        return known.get(element);
    };
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let node; node = walker.nextNode();) {
        const element = node.parentElement;
        if (!node.data.trim() || element.closest('script, style, svg, .anchorjs-link, mark, .visually-hidden') || !element.getClientRects().length) continue;
        const style = getComputedStyle(element), [below, opacity] = around(element), color = channels(style.color), seen = opacity * (color[3] ?? 1);
        if (seen === 0) continue;  // shown when pointed at
        const [a, b] = [light(over([...color.slice(0, 3), seen], below)), light(below)].sort((x, y) => y - x), ratio = (a + 0.05) / (b + 0.05);
        const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
        if (ratio < (large ? 3 : 4.5)) found.set(`${element.tagName.toLowerCase()}.${element.className} ${style.color} on ${below.map(Math.round)}: ${ratio.toFixed(1)}`, node.data.trim().slice(0, 40));
    }
    return [...found].map(([what, words]) => `${what} (${words})`);
}"""
# What sticks out of the window and lies in nothing that scrolls: a page would scroll sideways for it, or cut it off
WIDE = """() => {
    const main = document.querySelector('main'), scrolls = element => element !== main && (/auto|scroll/.test(getComputedStyle(element).overflowX) || scrolls(element.parentElement));
    const out = [...main.querySelectorAll('*')].filter(element => element.getBoundingClientRect().right > innerWidth + 1 && !scrolls(element.parentElement));
    const page = document.scrollingElement.scrollWidth > innerWidth ? [`the page is ${document.scrollingElement.scrollWidth} wide`] : [];
    return page.concat(out.slice(0, 3).map(element => `${element.tagName.toLowerCase()}.${element.className}: ${(element.innerText || '').slice(0, 40)}`));
}"""


@pytest.fixture(scope="module")
def folder():
    "The built site."
    site = Path(os.environ.get("PLASTICITY_SITE", ROOT / "_proc" / "_docs"))
    if not (site / "index.html").is_file():
        subprocess.run(["bash", ROOT / ".ci" / "site"], check=True)
    return site


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def address(folder):
    "Where the built site is served."
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def page(address):
    "A browser that reaches this site and nothing else. `page.outside` holds what was asked of others, `page.problems` what went wrong."
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport=DESK, reduced_motion="reduce")  # colours change at once
        page.outside, page.problems = [], []

        def to_others(route):
            page.outside.append(route.request.url)
            route.abort()

        page.route(re.compile(f"^(?!{re.escape(address)}/|data:)"), to_others)
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("console", lambda message: message.type == "error" and not message.location["url"].startswith(OUTSIDE) and page.problems.append(f"{message.text} {message.location['url']}"))  # a page or picture that is missing, too
        yield page
        browser.close()


@pytest.fixture(scope="module")
def visits(page, address, folder):
    "What was found on every page: {page: {what: value}}."
    found = {}
    for path in sorted(folder.rglob("*.html")):
        name = path.relative_to(folder).as_posix()
        page.outside, page.problems = [], []
        page.emulate_media(color_scheme="light")
        page.set_viewport_size(DESK)
        page.goto(f"{address}/{name}", wait_until="load")
        seen = page.evaluate(CONTENTS)
        seen["light"] = page.evaluate(FAINT)
        page.emulate_media(color_scheme="dark")
        page.wait_for_function("document.documentElement.classList.contains('quarto-dark')")
        seen["dark"] = page.evaluate(FAINT)
        page.set_viewport_size(PHONE)
        seen["wide"] = page.evaluate(WIDE)
        found[name] = seen | {"outside": page.outside, "problems": page.problems}
    return found


def offenders(visits, what):
    return {name: seen[what] for name, seen in visits.items() if seen[what]}


def test_every_page_of_the_sidebar_has_one_title_and_something_to_read(visits):
    assert len(visits) > 100
    assert {name: seen["titles"] for name, seen in visits.items() if len(seen["titles"]) != 1 or not seen["titles"][0]} == {}
    assert {name: seen["letters"] for name, seen in visits.items() if seen["letters"] < 300} == {}


def test_nothing_goes_wrong_on_any_page(visits):
    assert offenders(visits, "problems") == {}


def test_what_is_asked_of_other_hosts_is_known(visits):
    assert {url for seen in visits.values() for url in seen["outside"] if not url.startswith(OUTSIDE)} == set()


def test_formulas_can_be_read_without_the_network(visits):
    assert any(seen["outside"] for seen in visits.values()) and offenders(visits, "formulas") == {}


def test_pictures_load_and_say_what_they_show(visits):
    assert offenders(visits, "missing") == {}
    assert offenders(visits, "silent") == {}


def test_no_markup_is_left_in_the_text(visits):
    assert offenders(visits, "markup") == {}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_code_and_tables_stand_out_from_their_ground(visits, scheme):
    assert offenders(visits, scheme) == {}


def test_a_phone_scrolls_no_page_sideways(visits):
    assert offenders(visits, "wide") == {}


def test_the_search_finds_a_function_and_leads_to_it(page, address):
    page.set_viewport_size(DESK)
    page.goto(f"{address}/index.html")
    page.get_by_role("searchbox").first.fill("generate_pruning_mask")
    hit = page.locator("a.search-result").first
    hit.wait_for()
    assert "generate_pruning_mask" in hit.inner_text()
    hit.click()
    page.wait_for_url(lambda url: "/index.html" not in url)
    assert page.locator("main h2, main h3").filter(has_text="generate_pruning_mask").count() >= 1


def test_the_reader_can_choose_the_dark(page, address):
    page.emulate_media(color_scheme="light")
    page.set_viewport_size(DESK)
    page.goto(f"{address}/index.html")
    page.locator(".quarto-color-scheme-toggle").first.click()
    page.wait_for_function("document.documentElement.classList.contains('quarto-dark')")
    page.goto(f"{address}/demo.html")  # remembered
    assert page.evaluate("document.documentElement.classList.contains('quarto-dark')")
    page.locator(".quarto-color-scheme-toggle").first.click()
    page.wait_for_function("!document.documentElement.classList.contains('quarto-dark')")


def test_a_phone_reaches_every_page_through_the_menu(page, address, visits):
    page.set_viewport_size(PHONE)
    page.goto(f"{address}/index.html")
    page.get_by_role("button", name="Toggle sidebar").first.click()
    page.locator("#quarto-sidebar").get_by_text("how to", exact=True).click()
    page.locator("#quarto-sidebar").get_by_text("Prune your own model").click()
    page.wait_for_url("**/howto/prune_your_own_model.html")
    linked = page.locator("#quarto-sidebar a[href$='.html']").evaluate_all("links => links.map(link => new URL(link.href).pathname.slice(1))")
    assert set(visits) == set(linked)
