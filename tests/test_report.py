"""The report: one HTML file that needs no network, stays small for large models, trusts no text, and reads runs that are still being written."""
import json
import re
from html.parser import HTMLParser

import pytest

from neural_plasticity.errors import StorageError
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
