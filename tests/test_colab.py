"""The demo's first cells in a real kernel that looks like Colab's, and the versions that Colab brings. `.ci/matrix colab` runs all of the demo with those versions."""
import json
import sys

import pytest
from house import NBS, ROOT, settings

for package in ("nbclient", "ipykernel", "ipywidgets"):
    pytest.importorskip(package)

import ipywidgets  # noqa: E402
from demo_in_kernel import execute, outputs, shown, text, write_kernelspec  # noqa: E402
from packaging.requirements import Requirement  # noqa: E402
from packaging.version import Version  # noqa: E402

DEMO = NBS / "demo.ipynb"
WHERE = "import neural_plasticity; print(environment['is_colab'], environment['place'], neural_plasticity.IS_COLAB, type(get_ipython()).__module__)"
PIP = """
import json, pathlib, sys
calls = pathlib.Path({calls!r})
calls.write_text((calls.read_text() if calls.exists() else "") + json.dumps(sys.argv[1:]) + "\\n")
"""
HIDDEN = """
import importlib.util, pathlib
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: find_spec(name, package) if name != "neural_plasticity" or pathlib.Path({calls!r}).exists() else None
"""


def in_colab(folder, monkeypatch, cells, hidden=False):
    "The demo's first code cells, run in the Colab-like kernel with a pip that only writes down what it is asked for, and those requests."
    calls, tools = folder / "calls", folder / "tools"
    (tools / "pip").mkdir(parents=True)
    (tools / "pip" / "__init__.py").touch()
    (tools / "pip" / "__main__.py").write_text(PIP.format(calls=str(calls)), encoding="utf-8")
    if hidden:  # until pip was asked for it
        (tools / "sitecustomize.py").write_text(HIDDEN.format(calls=str(calls)), encoding="utf-8")
    write_kernelspec(folder / "jupyter", sys.executable, colab=True, path=[tools, ROOT], HF_HUB_OFFLINE=1, OMP_NUM_THREADS=1)
    monkeypatch.setenv("JUPYTER_PATH", str(folder / "jupyter"))
    page = execute(DEMO, folder, cells, {"minimal": True}, then=[WHERE])
    return page, [json.loads(line) for line in calls.read_text(encoding="utf-8").splitlines()] if calls.exists() else []


def test_to_the_explorer_where_it_is_installed(tmp_path, monkeypatch):
    page, calls = in_colab(tmp_path, monkeypatch, cells=7)
    found = shown(page)
    assert not found["errors"] and not found["cells not run"]
    assert "place       Google Colab" in found["setup"]
    assert text(outputs(page, WHERE)[0]["text"]).split() == ["True", "colab", "True", "google.colab._shell"]
    assert found["explorer"] and found["sliders"] == [{"7": "1.5.0", "8": "2.0.0"}[ipywidgets.__version__[0]]]
    assert calls == []  # so nothing was replaced either


def test_it_is_installed_where_it_is_not(tmp_path, monkeypatch):
    page, calls = in_colab(tmp_path, monkeypatch, cells=2, hidden=True)
    assert not shown(page)["errors"] and "place       Google Colab" in shown(page)["setup"]
    assert calls == [["install", "-q", f"git+{settings()['git_url']}"]]  # this library, and no other word


def pins(name, python):
    "The versions that a list of pins gives for a version of Python."
    lines = (ROOT / ".ci" / name).read_text(encoding="utf-8").splitlines()
    wanted = [Requirement(line) for line in lines if line and not line.startswith("#")]
    wanted = [pin for pin in wanted if pin.marker is None or pin.marker.evaluate({"python_version": python})]
    found = {pin.name: str(pin.specifier).removeprefix("==") for pin in wanted}
    assert len(found) == len(wanted)
    return found


def needed(*keys):
    "Requirements of settings.ini."
    filled = " ".join(settings()[key] for key in keys)
    for name, value in settings().items():
        filled = filled.replace(f"%({name})s", value)
    return [Requirement(word) for word in filled.split()]


@pytest.mark.parametrize("python", ["3.12", "3.13"])
def test_nothing_that_colab_brings_is_too_old(python):
    brought = pins("colab.txt", python)
    for requirement in needed("requirements"):
        assert requirement.specifier.contains(brought[requirement.name]), requirement
    assert "papermill" not in brought and "nbdev" not in brought
    for requirement in needed("demo_requirements"):
        assert requirement.name == "papermill" or requirement.specifier.contains(brought[requirement.name]), requirement


def test_the_lower_bounds_are_those_that_are_tried():
    tried = {name: Version(version) for name, version in pins("lower-bounds.txt", "3.10").items()}
    assert {requirement.name: Version(str(requirement.specifier).removeprefix(">=")) for requirement in needed("requirements", "demo_requirements")} == tried
