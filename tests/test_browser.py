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
            cell["outputs"] = []
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


@pytest.fixture(scope="module")
def page(lab):
    "The demo in JupyterLab, all cells run; with the errors of the page in `page.problems`."
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport={"width": 1400, "height": 1100})
        page.problems = []
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.goto(lab)
        page.locator(".jp-Notebook").wait_for(timeout=60_000)
        page.wait_for_function("window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'", timeout=60_000)
        command(page, "notebook:run-all-cells")
        yield page
        browser.close()


def command(page, name: str, **options) -> None:
    "Run one of JupyterLab's commands, as its menus do."
    page.evaluate("([name, options]) => { window.jupyterapp.commands.execute(name, options) }", [name, options])  # does not wait for its end


def shot(page, name: str) -> None:
    if SHOTS:
        page.locator(".widget-vbox").first.screenshot(path=str(Path(SHOTS) / f"{name}.png"))


def controls(page):
    slider = page.get_by_role("slider").first
    slider.wait_for(timeout=240_000)
    page.locator(".widget-html table").first.wait_for()
    slider.scroll_into_view_if_needed()
    return slider, page.locator(".widget-dropdown select").first


def seen(page) -> tuple[str, str, str]:
    "Picture, its description, and the table that the widget shows."
    picture = page.locator(".widget-html img").first
    return picture.get_attribute("src"), picture.get_attribute("alt"), page.locator(".widget-html table").first.inner_text()


def wait_for_change(page, before, timeout=60.0):
    "What is seen once both picture and table are others than before."
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        now = seen(page)
        if now[0] != before[0] and now[2] != before[2]:
            return now
        page.wait_for_timeout(100)
    raise AssertionError(f"nothing changed: {seen(page)[1:]}")


def test_the_slider_changes_picture_and_numbers(page):
    slider, _ = controls(page)
    before = seen(page)
    assert "without 19 of 48 heads" in before[2] and "taylor" in before[1]
    shot(page, "light")
    slider.focus()
    for _ in range(4):  # from 40 % to 60 %
        slider.press("ArrowRight")
    page.wait_for_function("document.querySelector('.widget-html table').innerText.includes('without 28 of 48 heads')", timeout=60_000)
    after = seen(page)
    assert after[0] != before[0] and after[1] != before[1] and page.locator(".widget-readout").first.inner_text() == "60%"
    assert numbers(after[2]) != numbers(before[2])
    shot(page, "light-60")


def numbers(table: str) -> list[str]:
    return re.findall(r"\d+\.\d+", table)


def test_the_list_changes_picture_and_numbers(page):
    _, select = controls(page)
    before = seen(page)
    select.select_option(label="entropy")
    after = wait_for_change(page, before)
    assert "entropy" in after[1] and numbers(after[2])[0] == numbers(before[2])[0]  # the whole model is the same
    shot(page, "light-entropy")


def test_the_static_output_steps_back(page):
    controls(page)
    assert page.locator("div[class^='plasticity-']").count() == 1
    assert not page.locator("div[class^='plasticity-']").is_visible()
    assert page.locator(".widget-html img").count() == 1


def test_all_cells_run_and_the_page_has_no_errors(page):
    page.get_by_text("lines in the record").last.wait_for(timeout=300_000, state="attached")
    assert page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']").count() == 0
    assert not page.problems


def test_it_is_readable_in_the_dark(page):
    page.evaluate("window.scrollTo(0, 0)")
    command(page, "apputils:change-theme", theme="JupyterLab Dark")
    page.locator("body[data-jp-theme-light='false']").wait_for(state="attached", timeout=30_000)
    controls(page)
    text, ground = page.evaluate("""() => {
        const cell = document.querySelector('.widget-html table b'), rgb = color => color.match(/[\\d.]+/g).slice(0, 3).map(Number);
        let around = cell; while (/rgba?\\(0, 0, 0, 0\\)|transparent/.test(getComputedStyle(around).backgroundColor)) around = around.parentElement;
        return [rgb(getComputedStyle(cell).color), rgb(getComputedStyle(around).backgroundColor)];
    }""")
    shot(page, "dark")
    assert sum(text) / 3 - sum(ground) / 3 > 125, (text, ground)  # light on dark; WCAG asks for this much
    assert not page.problems
