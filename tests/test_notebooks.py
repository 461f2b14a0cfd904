"""The notebooks are the source: modules equal them, they are clean, they name no machine, and README.md is made from one of them."""
import ast
import builtins
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from house import NBS, NOTEBOOKS, PACKAGE, ROOMS, ROOT, cells, is_export, module_of, page

TAGGED = {
    "cells": [{"cell_type": "code", "execution_count": 3, "id": "a1", "metadata": {"tags": ["parameters"], "scrolled": True}, "outputs": [], "source": ["level = 0.2"]}],
    "metadata": {"kernelspec": {"display_name": "mine", "language": "python", "name": "python3"}, "vscode": {}},
    "nbformat": 4,
    "nbformat_minor": 5,
}


@pytest.fixture(scope="module")
def made_again(tmp_path_factory):
    "A folder in which the modules were exported anew from copies of the notebooks, and the copies cleaned."
    folder = tmp_path_factory.mktemp("house")
    shutil.copy(ROOT / "settings.ini", folder)
    shutil.copytree(NBS, folder / "nbs", ignore=shutil.ignore_patterns(".*"))
    (folder / "neural_plasticity").mkdir()
    (folder / "nbs" / "tagged.ipynb").write_text(json.dumps(TAGGED), encoding="utf-8")
    code = "\n".join([
        "import sys",
        "from nbdev.clean import nbdev_clean",
        "from nbdev.config import get_config",
        "from nbdev.export import nb_export",
        "for notebook in sys.argv[1:]: nb_export(notebook, lib_path=get_config().lib_path)",
        "nbdev_clean.__wrapped__()",
    ])
    environ = os.environ | {"JUPYTER_DATA_DIR": str(folder / "jupyter")}  # cleaning signs what it cleaned; not in the user's folder
    notebooks = [f"nbs/{page(path)}" for path in ROOMS]
    done = subprocess.run([sys.executable, "-c", code, *notebooks], cwd=folder, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_module_comes_from_a_notebook(made_again):
    committed = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py", "_modidx.py"}
    assert {path.name for path in (made_again / "neural_plasticity").glob("*.py")} - {"__init__.py"} == committed


@pytest.mark.parametrize("path", ROOMS, ids=page)
def test_the_module_equals_its_notebook(made_again, path):
    name = f"{module_of(path)}.py"
    exported = (made_again / "neural_plasticity" / name).read_text(encoding="utf-8")
    assert (PACKAGE / name).read_text(encoding="utf-8") == exported, f"run nbdev_export, or nbdev_update if {name} was edited on purpose"


@pytest.mark.parametrize("path", ROOMS, ids=page)
def test_the_module_has_every_name_it_offers(path):
    if module_of(path) == "widgets":
        pytest.importorskip("ipywidgets")
    module = importlib.import_module(f"neural_plasticity.{module_of(path)}")
    assert module.__all__ and not [name for name in module.__all__ if not hasattr(module, name)]
    assert len(set(module.__all__)) == len(module.__all__)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=page)
def test_the_notebook_is_clean(made_again, path):
    assert (made_again / "nbs" / page(path)).read_text(encoding="utf-8") == path.read_text(encoding="utf-8"), "run nbdev_clean"


def test_cleaning_keeps_tags_and_drops_the_rest(made_again):
    notebook = json.loads((made_again / "nbs" / "tagged.ipynb").read_text(encoding="utf-8"))
    assert notebook["cells"][0]["metadata"] == {"tags": ["parameters"]} and notebook["cells"][0]["execution_count"] is None
    assert "vscode" not in notebook["metadata"]


def test_the_demo_has_one_parameters_cell():
    notebook = json.loads((NBS / "demo.ipynb").read_text(encoding="utf-8"))
    assert sum("parameters" in cell["metadata"].get("tags", []) for cell in notebook["cells"]) == 1


# a path to somebody's folder, or into an installation
MACHINE = re.compile(r"/(?:home|Users|root|work|private)/|/tmp/\w|[A-Z]:\\\\?Users|site-packages|dist-packages|ipykernel_\d+")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=page)
def test_outputs_are_whole_and_name_no_machine(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            assert output["output_type"] != "error", output["evalue"]
            texts = [output.get("text", ""), *(value for kind, value in output.get("data", {}).items() if not kind.startswith("image/"))]
            text = "".join("".join(part) if isinstance(part, list) else str(part) for part in texts)
            assert not (found := MACHINE.search(text)), text[max(0, found.start() - 80): found.end() + 80]
            assert not (output.get("name") == "stderr" and "Warning" in text), text


@pytest.mark.parametrize("path", ROOMS, ids=page)
def test_cells_that_import_stand_alone(path):
    "The docs builder runs export cells and cells that import, and no others: those must not need a name from a cell that is left out."
    known = {*dir(builtins), "__file__", "__name__"}
    for kind, source, directives in cells(path):
        if kind != "code":
            continue
        tree = ast.parse(source)
        nodes = list(ast.walk(tree))
        imports = any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in nodes)
        if not (imports or is_export(directives)):
            continue
        known |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        known |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef))}
        known |= {(alias.asname or alias.name).split(".")[0] for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
        known |= {node.arg for node in nodes if isinstance(node, ast.arg)} | {node.name for node in nodes if isinstance(node, ast.ExceptHandler) and node.name}
        if not is_export(directives):
            used = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
            assert used <= known, f"{used - known} are not defined when the docs are built; move the imports into a cell of their own:\n{source}"


def test_readme_is_made_from_the_index():
    spec = importlib.util.spec_from_file_location("readme", ROOT / ".ci" / "readme.py")
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    assert not list(readme.stale()), "run python .ci/readme.py"
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    linked = re.findall(r"\]\((?![a-z]+:|#)([^)]+)\)", text)
    assert linked and not [target for target in linked if not (ROOT / target.split("#")[0]).exists()]
    code = [source for kind, source, directives in cells(NBS / "index.ipynb") if kind == "code" and not directives]
    assert code and all(line in text for source in code for line in source.splitlines())
