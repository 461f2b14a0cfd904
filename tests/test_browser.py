"""The demo in a real browser: JupyterLab runs every cell, and the controls change what is seen. Needs jupyterlab, playwright and a Chromium."""
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from house import NBS

pytestmark = pytest.mark.browser
pytest.importorskip("jupyterlab")
playwright = pytest.importorskip("playwright.sync_api")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SHOTS = os.environ.get("PLASTICITY_SCREENSHOTS")  # a folder to keep screenshots in


def small_demo(folder: Path) -> None:
    "A copy of the demo with its outputs removed and `minimal` on."
    notebook = json.loads((NBS / "demo.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
        if "parameters" in cell["metadata"].get("tags", []):
            cell["source"] = "".join(cell["source"]).replace("minimal: bool = False", "minimal: bool = True").splitlines(keepends=True)
    (folder / "demo.ipynb").write_text(json.dumps(notebook), encoding="utf-8")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "The address of a JupyterLab that serves a folder with the demo in it."
    folder, home = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("home")
    small_demo(folder)
    settings = home / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"fetchNews": "false", "checkForUpdates": false}', encoding="utf-8")  # nothing pops up over the page
    port, token = free_port(), secrets.token_hex(16)
    environ = os.environ | {f"JUPYTER_{name}_DIR": str(home / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")} | {"JUPYTERLAB_SETTINGS_DIR": str(home / "settings")}
    options = ["--no-browser", "--ip=127.0.0.1", f"--port={port}", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}", "--LabApp.news_url=", "--allow-root", "--expose-app-in-browser"]
    with open(home / "log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], env=environ, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/api/status?token={token}", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                assert server.poll() is None, (home / "log").read_text()
                time.sleep(0.25)
        yield f"{address}/lab/tree/demo.ipynb?token={token}"
    finally:
        server.terminate()
        server.wait(30)


ALL_RUN = """() => { const cells = window.jupyterapp.shell.currentWidget.content.widgets.map(cell => cell.model).filter(cell => cell.type === 'code');
    return cells.every(cell => cell.executionCount !== null) || cells.some(cell => cell.outputs.toJSON().some(output => output.output_type === 'error')) }"""


@pytest.fixture(scope="module")
def page(lab):
    "The demo in JupyterLab, all cells run; with the errors of the page in `page.problems`."
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport={"width": 1400, "height": 1500})
        page.problems = []
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.goto(lab)
        page.locator(".jp-Notebook").wait_for(timeout=60_000)
        page.wait_for_function("window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'", timeout=60_000)
        command(page, "notebook:run-all-cells")
        page.wait_for_function(ALL_RUN, timeout=400_000)
        yield page
        browser.close()


def command(page, name: str, **options) -> None:
    "Run one of JupyterLab's commands, as its menus do."
    page.evaluate("([name, options]) => { window.jupyterapp.commands.execute(name, options) }", [name, options])  # does not wait for its end


def run_code(page, code: str) -> None:
    "Run a line in the notebook's kernel, after all cells that wait."
    page.evaluate("code => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.requestExecute({code}).done", code)


def shot(page, name: str) -> None:
    if SHOTS:
        page.locator(".widget-vbox").first.screenshot(animations="disabled", path=str(Path(SHOTS) / f"{name}.png"))


STATIC = "div[class^='plasticity-']:has(img)"
ANSWER = ".widget-html table.plasticity-answer"


def controls(page):
    slider = page.get_by_role("slider").first
    slider.wait_for(timeout=60_000)
    page.locator(ANSWER).first.wait_for()
    page.wait_for_function("document.querySelectorAll('.plasticity-heads button').length === 48", timeout=60_000)  # cells come one by one
    page.wait_for_function("document.querySelectorAll('.plasticity-heads button[title]').length === 48", timeout=60_000)
    slider.scroll_into_view_if_needed()
    return slider, page.locator(".widget-dropdown select").first


def seen(page) -> tuple[str, str, str]:
    "The map of heads as it is described cell by cell, the head that is looked at, and the table that the widget shows."
    cells = page.eval_on_selector_all(".plasticity-heads button", "cells => cells.map(cell => cell.title + cell.textContent).join('|')")
    return cells, page.locator(".widget-html .plasticity-head").first.inner_text(), page.locator(ANSWER).first.inner_text()


def wait_for_change(page, before, timeout=60.0):
    "What is seen once both map and table are others than before."
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        now = seen(page)
        if now[0] != before[0] and now[2] != before[2]:
            return now
        page.wait_for_timeout(100)
    raise AssertionError(f"nothing changed: {seen(page)[1:]}")


def test_the_slider_changes_map_and_numbers(page):
    slider, _ = controls(page)
    page.wait_for_function("(document.querySelector('.plasticity-heads').innerText.match(/×/g) || []).length === 19", timeout=60_000)
    before = seen(page)
    assert "without 19 of 48 heads" in before[2] and "taylor" in before[1] and before[0].count("×") == 19
    shot(page, "light")
    slider.focus()
    for _ in range(4):  # from 40 % to 60 %
        slider.press("ArrowRight")
    page.wait_for_function(f"document.querySelector('{ANSWER}')?.innerText.includes('without 28 of 48 heads')", timeout=60_000)
    after = seen(page)
    assert after[0].count("×") == 28 and page.locator(".widget-readout").first.inner_text() == "60%"
    assert numbers(after[2]) != numbers(before[2])
    shot(page, "light-60")


def test_a_head_is_chosen_revived_and_put_back(page):
    controls(page)
    before = seen(page)
    page.locator(".plasticity-heads button[title*='dormant']").first.click()
    revive = page.get_by_role("button", name=re.compile("revive head"))
    revive.wait_for()
    layer, head = re.search(r"revive head \((\d+), (\d+)\)", revive.inner_text()).groups()
    page.wait_for_function(f"document.querySelector('.widget-html .plasticity-head').innerText.includes('head ({layer}, {head})')", timeout=60_000)
    assert page.locator(".widget-html .plasticity-attention svg path title").count() > 50  # pointing at a cell says its tokens
    revive.press("Enter")  # by the keyboard
    after = wait_for_change(page, before)
    assert after[0].count("×") == 27 and after[0].count("○") == 1 and "without 27 of 48 heads" in after[2] and "revived by hand" in after[1]
    shot(page, "light-revived")
    page.get_by_role("button", name="undo").click()
    assert wait_for_change(page, after)[::2] == before[::2]


def test_tab_goes_past_the_map(page):
    controls(page)
    page.get_by_role("button", name="read all the text").focus()
    for _ in range(6):  # apply, folder, save, and out of the explorer
        page.keyboard.press("Tab")
        assert not page.evaluate("document.activeElement.closest('.plasticity-heads') !== null")


def test_reading_all_the_text_can_be_cancelled(page):
    controls(page)
    run_code(page, "explorer.all_batches = list(explorer.all_batches) * 1000")  # so that there is time to cancel
    before = seen(page)
    page.get_by_role("button", name="read all the text").click()
    page.get_by_role("button", name="cancel").click()
    page.get_by_text("Cancelled; nothing has changed.").wait_for(timeout=60_000)
    assert seen(page) == before


def test_a_recovery_is_cancelled_and_another_one_is_shown_and_taken_back(page):
    controls(page)
    before = seen(page)
    steps, recover, curve = page.get_by_label("training steps"), page.get_by_role("button", name="recover", exact=True), page.locator(".widget-html .plasticity-curve").first
    steps.fill("5000")  # long enough to see and to cancel, however slow the browser is
    recover.click()
    page.wait_for_function("(document.querySelector('.widget-html .plasticity-recovery')?.innerText || '').startsWith('Step ') === true", timeout=60_000)  # the curve begins
    page.get_by_text(re.compile(r"[1-9]\d* of 5\d\d\d forward passes")).first.wait_for(timeout=60_000)
    page.get_by_role("button", name="cancel").click()
    page.get_by_text("Cancelled; nothing has changed.").wait_for(timeout=60_000)
    assert seen(page) == before and not curve.is_visible()
    steps.fill("8")
    recover.click()
    page.get_by_text(re.compile("Recovered: perplexity .* in 8 steps")).wait_for(timeout=120_000)
    after = wait_for_table(page, "recovered in 8 steps")
    assert numbers(after[2])[:2] == numbers(before[2])[:2] and after[0] == before[0] and curve.is_visible()
    shot(page, "light-recovered")
    page.get_by_role("button", name="undo").click()
    page.wait_for_function(f"document.querySelector('{ANSWER}')?.innerText.includes('recovered') === false", timeout=60_000)
    assert seen(page)[::2] == before[::2]


def wait_for_table(page, words: str):
    page.wait_for_function(f"document.querySelector('{ANSWER}')?.innerText.includes({json.dumps(words)})", timeout=60_000)
    return seen(page)


def numbers(table: str) -> list[str]:
    return re.findall(r"\d+\.\d+", table)


def test_the_list_changes_map_and_numbers(page):
    _, select = controls(page)
    before = seen(page)
    select.select_option(label="entropy")
    after = wait_for_change(page, before)
    assert "entropy" in after[0] and numbers(after[2])[0] == numbers(before[2])[0]  # the whole model is the same
    shot(page, "light-entropy")


def test_the_static_output_steps_back(page):
    controls(page)
    assert page.locator(STATIC).count() == 1 and not page.locator(STATIC).is_visible()
    assert page.locator(".plasticity-heads").count() == 1


def test_all_cells_run_and_the_page_has_no_errors(page):
    outputs = page.evaluate("window.jupyterapp.shell.currentWidget.content.widgets.filter(cell => cell.model.type === 'code').map(cell => cell.model.outputs.toJSON())")
    errors = [output["evalue"] for cell in outputs for output in cell if output["output_type"] == "error"]
    assert not errors and any("lines in the record" in "".join(output.get("text", "")) for cell in outputs for output in cell)
    assert not page.problems


FOCUSED = """() => { const here = document.activeElement, whole = here.closest('.jupyter-widgets');
    return here.tagName === 'BUTTON' ? here.textContent.trim() : whole?.querySelector('label')?.textContent.trim() || '' }"""


def travel(page, name: str, key="Tab") -> None:
    "Press Tab until a control with this description has the focus."
    stops = []
    for _ in range(40):
        if stops and stops[-1].startswith(name):
            return
        page.keyboard.press(key)
        stops.append(page.evaluate(FOCUSED))
    raise AssertionError(f"{name!r} was not among {stops}")


def test_the_keyboard_alone_opens_moves_picks_gates_and_undoes(page):
    controls(page)
    page.evaluate("""() => { const book = window.jupyterapp.shell.currentWidget.content, cells = book.widgets;
        book.activeCellIndex = cells.findIndex(cell => cell.model.sharedModel.source.startsWith('explorer = explore('));
        book.mode = 'command'; book.activeCell.node.focus() }""")
    page.keyboard.press("Control+Enter")
    opened = wait_for_table(page, "without 19 of 48 heads")
    controls(page)
    travel(page, "prune level")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    moved = wait_for_table(page, "without 24 of 48 heads")
    travel(page, "strategy")
    page.keyboard.press("e")  # the first letter; JupyterLab keeps the arrows up and down for itself
    picked = wait_for_change(page, moved)
    assert "entropy" in picked[0] and "taylor" in opened[0]
    travel(page, "head")
    page.keyboard.press("ArrowUp")
    travel(page, "gate head" if "gate head" in page.locator(".widget-button", has_text=re.compile("gate head|revive head")).first.inner_text() else "revive head")
    page.keyboard.press("Enter")
    gated = wait_for_table(page, "1 by hand")
    assert gated[0].count("⊗") + gated[0].count("○") == 1
    travel(page, "undo", "Shift+Tab")
    page.keyboard.press("Enter")
    page.wait_for_function(f"document.querySelector('{ANSWER}')?.innerText.includes('by hand') === false", timeout=60_000)
    for _ in range(3):  # strategy, and the two steps of the level
        page.keyboard.press("Enter")
    back = wait_for_table(page, "without 19 of 48 heads")
    assert back[0] == opened[0] and back[0].count("×") == 19 and back[2] == opened[2] and page.locator(".widget-readout").first.inner_text() == "40%"


def test_it_is_readable_in_the_dark(page):
    page.evaluate("window.scrollTo(0, 0)")
    command(page, "apputils:change-theme", theme="JupyterLab Dark")
    page.locator("body[data-jp-theme-light='false']").wait_for(state="attached", timeout=30_000)
    controls(page)
    text, ground = page.evaluate("""() => {
        const cell = document.querySelector('.widget-html table.plasticity-answer b'), rgb = color => color.match(/[\\d.]+/g).slice(0, 3).map(Number);
        let around = cell; while (/rgba?\\(0, 0, 0, 0\\)|transparent/.test(getComputedStyle(around).backgroundColor)) around = around.parentElement;
        return [rgb(getComputedStyle(cell).color), rgb(getComputedStyle(around).backgroundColor)];
    }""")
    shot(page, "dark")
    assert sum(text) / 3 - sum(ground) / 3 > 125, (text, ground)  # light on dark; WCAG asks for this much
    assert not page.problems
