"""The report: one HTML file that needs no network, stays small for large models, trusts no text, and reads runs that are still being written."""
import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from neural_plasticity.errors import StorageError
from neural_plasticity.experiment import ExperimentConfig, run_experiment
from neural_plasticity.report import report

VOID = {"meta", "br", "hr", "img", "path", "rect", "polyline"}
NASTY = "<script>alert('x')</script> & \"quoted\""


def large_record(layers=30, heads=9, arms=("chosen", "random", "control")):
    "The record of a run of a model with 270 heads, in which 108 fall asleep and every fourth of those comes back."
    gone = [[layer, head] for layer in range(layers) for head in range(heads) if (layer + head) % 5 < 2]
    row = {"heads": layers * heads, "perplexity": 30.0, "bits_per_byte": 1.0, "parameters": 135_000_000, "seconds": 0.5, "after pruning": None, "compensated": None}
    lines = [{"phase": "baseline", "arm": "before", **row}]
    for arm in arms:
        if arm != "control":
            lines += [{"phase": "measure", "arm": arm, "cycle": 1, "gradient": [[layer + head / 10 for head in range(heads)] for layer in range(layers)], "entropy": [[0.5] * heads] * layers},
                      {"phase": "choose", "arm": arm, "cycle": 1, "heads": gone}, {"phase": "prune", "arm": arm, "cycle": 1, "pruned_heads": gone}]
        for step in range(0, 500, 10):
            if arm == "chosen" and step == 50:
                lines.append({"phase": "regrow", "arm": arm, "cycle": 1, "step": step, "revived_heads": gone[::4]})
            lines.append({"phase": "train", "arm": arm, "cycle": 1, "step": step, "train_loss": float("nan") if step == 0 else 3.0, "perplexity": 40 - step / 100})
        lines.append({"phase": "summary", "arm": arm, **row, "perplexity": {"chosen": 33.0, "random": 36.0, "control": 30.0}[arm]})
    return lines + [{"phase": "end", "samples": {"before": NASTY}, "removal": f"removed some {NASTY}"}]


def write(folder, lines, tail=""):
    folder.mkdir(exist_ok=True)
    (folder / "record.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"strategy": NASTY}), encoding="utf-8")
    return folder


class Page(HTMLParser):
    "The tags of a page in order of opening; raises if they are not closed as they were opened."

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.addresses, self.scripts = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return report(write(tmp_path_factory.mktemp("runs") / "001", large_record())).read_text(encoding="utf-8")


def test_nothing_is_fetched(page):
    found = Page(page)
    assert not found.addresses and not any(tag in ("link", "iframe", "img", "object", "embed", "base") for tag, _ in found.tags)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|fetch\(|XMLHttpRequest|import\(", page)


def test_a_model_of_270_heads_stays_small_and_every_head_has_its_words(page):
    assert len(page.encode()) < 3_000_000
    assert len(re.findall(r"<title>head \(\d+, \d+\): gradient", page)) == 270 == len(re.findall(r"<title>head \(\d+, \d+\): entropy", page))
    assert page.count(", pruned</title>") == 2 * 108  # crossed out in both maps
    assert "step 50: head (0, 0) comes back" in page and "step 490: head (0, 1) dormant" in page


def test_text_is_never_markup(page):
    found = Page(page)
    assert len(found.scripts) == 1 and "alert" not in found.scripts[0]
    assert page.count("&lt;script&gt;alert") == 4 and "<script>alert" not in page  # headline, sample, removal, configuration


def test_it_compares_with_control_and_chance(page):
    assert "10.0 % above the control" in page and "20.0 % above" in page and "the choice beat chance" in page


def test_for_phones_the_dark_and_paper(page):
    assert 'name="viewport"' in page and "prefers-color-scheme: dark" in page and "@media print" in page
    tags = Page(page).tags
    assert [tag for tag, _ in tags].count("svg") == 4 and all(attributes.get("aria-label") for tag, attributes in tags if tag == "svg")
    assert all(attributes.get("tabindex") == "0" for tag, attributes in tags if tag == "figure")


@pytest.mark.parametrize("count", [0, 1, 2, 4, 60, 100])
def test_a_run_that_is_still_being_written(count, tmp_path):
    lines = large_record()
    text = report(write(tmp_path / "002", lines[:count], tail='{"phase": "trai')).read_text(encoding="utf-8")
    Page(text)
    assert "This run has not ended." in text and "Nothing can be said yet" in text


def test_a_run_without_an_arm_to_compare_with(tmp_path):
    text = report(write(tmp_path / "003", large_record(arms=("chosen",)))).read_text(encoding="utf-8")
    assert "no result of the control arm" in text


def test_heads_that_do_not_exist_are_not_drawn(tmp_path):
    lines = [{"phase": "measure", "arm": "chosen", "gradient": [[0.1, None], [0.2, float("nan")], [0.3, 0.4]], "entropy": [[], [], []]}]
    text = report(write(tmp_path / "004", lines)).read_text(encoding="utf-8")
    assert len(re.findall(r"<title>head ", text)) == 4


def test_it_goes_where_it_is_told_and_a_folder_without_a_run_is_refused(tmp_path):
    target = report(write(tmp_path / "005", large_record()), tmp_path / "mine.html")
    assert target == tmp_path / "mine.html" and target.is_file() and not (tmp_path / "005" / "report.html").exists()
    with pytest.raises(StorageError, match="record.jsonl"):
        report(tmp_path)


# What follows opens reports in a real browser: pytest -m browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SIDEWAYS = "document.scrollingElement.scrollWidth - innerWidth"
# The least contrast of letters with the page (WCAG AA asks for 4.5)
CONTRAST = """() => {
    const rgb = color => color.match(/[\\d.]+/g).slice(0, 3).map(Number);
    const light = color => rgb(color).map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4).reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const paper = light(getComputedStyle(document.body).backgroundColor);
    const letters = [...document.querySelectorAll('h1, h2, p, td, th, figcaption, output, summary, svg text')].map(element => light(getComputedStyle(element)[element.closest('svg') ? 'fill' : 'color']));
    return Math.min(...letters.map(ink => (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05)));
}"""


@pytest.fixture(scope="module", params=["a small run", "270 heads"])
def written(request, tmp_path_factory):
    "A report of a run of the embedded model, and one of a large model's record."
    folder = tmp_path_factory.mktemp("seen")
    if request.param == "270 heads":
        return report(write(folder / "001", large_record()))
    return report(run_experiment(ExperimentConfig(minimal=True, prune_level=0.4, output_dir=str(folder))).folder)


@pytest.fixture(scope="module")
def opened(written):
    "The report opened from its file by a browser without a network; what it asked for and complained of."
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=next(filter(None, map(shutil.which, BROWSERS)), None), args=["--no-sandbox", "--disable-dev-shm-usage"])
        view = browser.new_context(offline=True, viewport={"width": 1100, "height": 900}).new_page()
        view.asked, view.problems = [], []
        view.on("request", lambda request: view.asked.append(request.url))
        view.on("pageerror", lambda error: view.problems.append(str(error)))
        view.on("console", lambda message: view.problems.append(message.text))
        view.goto(written.as_uri())
        yield view
        browser.close()


@pytest.mark.browser
def test_it_opens_from_a_file_without_a_network(opened, written):
    assert opened.asked == [written.as_uri()] and not opened.problems
    assert opened.locator("h1").count() == 1 and opened.locator("svg[role='img'][aria-label]").count() == 4
    assert written.stat().st_size < 3_000_000


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1100, 390])
def test_it_can_be_read_on_a_desk_and_on_a_phone_by_day_and_by_night(opened, scheme, width):
    opened.emulate_media(color_scheme=scheme)
    opened.set_viewport_size({"width": width, "height": 844})
    opened.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert opened.evaluate(SIDEWAYS) <= 0
    assert opened.evaluate(CONTRAST) >= 4.5


@pytest.mark.browser
def test_pointing_and_arrow_keys_tell_what_a_cell_is(opened):
    maps = opened.locator("figure", has=opened.locator("svg[aria-label^='gradient']"))
    maps.locator(".c").first.hover()
    said = maps.locator("output")
    assert said.inner_text().startswith("head (0, 0): gradient")
    opened.mouse.move(0, 0)  # else the page scrolls under it, and it points at another cell
    maps.focus()
    opened.keyboard.press("ArrowRight")
    opened.keyboard.press("ArrowDown")
    assert said.inner_text().startswith("head (1, 1): gradient")


@pytest.mark.browser
def test_every_head_is_large_enough_to_be_pointed_at(opened):
    opened.set_viewport_size({"width": 390, "height": 844})
    sides = opened.locator("svg[aria-label^='gradient'] .c").evaluate_all("cells => cells.map(cell => cell.getBoundingClientRect()).map(box => Math.min(box.width, box.height))")
    assert min(sides) >= 12


@pytest.mark.browser
def test_it_prints_on_a_few_pages_with_everything_open(opened):
    opened.emulate_media(color_scheme="dark", media="print")
    assert opened.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"  # no black paper
    pages = opened.pdf(format="A4").count(b"/Type /Page\n")
    assert 2 <= pages <= 12
    assert opened.evaluate("[...document.querySelectorAll('details')].every(part => part.open)")
