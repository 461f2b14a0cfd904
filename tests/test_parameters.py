"""A parameter that the demo does not have is refused by name with the nearest right one, by papermill and in the notebook."""
import json
import os
import re
import subprocess
import sys

import pytest
from house import NBS

from neural_plasticity.errors import InvalidArgument
from neural_plasticity.parameters import refuse_unknown_parameters

KNOWN = ["prune_level", "strategy", "seed"]


@pytest.fixture
def beginning(tmp_path):
    "The demo up to its configuration: everything before a model is loaded."
    notebook = json.loads((NBS / "demo.ipynb").read_text(encoding="utf-8"))
    sources = ["".join(cell["source"]) for cell in notebook["cells"]]
    [last] = [number for number, source in enumerate(sources) if "config = ExperimentConfig(" in source]
    notebook["cells"] = notebook["cells"][: last + 1]
    notebook["cells"][last]["source"] = sources[last].partition("prepared = ")[0] + "print('configured with', config.prune_level, config.strategy)"
    path = tmp_path / "beginning.ipynb"
    path.write_text(json.dumps(notebook), encoding="utf-8")
    return path


def papermill(path, *options):
    environ = os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    done = subprocess.run([sys.executable, "-m", "papermill", str(path), "out.ipynb", *options], cwd=path.parent, env=environ, capture_output=True, text=True, timeout=300)
    outputs = [output for cell in json.loads((path.parent / "out.ipynb").read_text(encoding="utf-8"))["cells"] for output in cell.get("outputs", [])]
    return done.returncode, re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr), outputs


def test_the_demo_refuses_a_misspelt_parameter(beginning):
    pytest.importorskip("papermill")
    code, terminal, outputs = papermill(beginning, "-p", "seed", "3", "-p", "prune_lvel", "0.6")
    [error] = [output for output in outputs if output["output_type"] == "error"]
    assert code == 1 and error["ename"] == "InvalidArgument"
    assert error["evalue"].startswith("the notebook has no parameter 'prune_lvel'; do you mean 'prune_level'? There are model_name, ")
    assert "do you mean 'prune_level'" in terminal


def test_the_demo_takes_the_parameters_that_it_has(beginning):
    pytest.importorskip("papermill")
    code, terminal, outputs = papermill(beginning, "-p", "prune_level", "0.6", "-p", "strategy", "taylor")
    assert code == 0, terminal
    assert any("configured with 0.6 taylor" in output.get("text", "") or "configured with 0.6 taylor\n" in output.get("text", []) for output in outputs)


@pytest.mark.parametrize("cell", ["prune_lvel = 0.6", "prune_lvel: float = 0.6", "seed = 1\nprune_lvel = 0.6"])
def test_names_are_read_from_papermills_cell(cell):
    with pytest.raises(InvalidArgument, match="no parameter 'prune_lvel'; do you mean 'prune_level'"):
        refuse_unknown_parameters(KNOWN, ["import sys", "prune_level = 0.4", f"# Parameters\n{cell}\n", "more = 1"])


def test_a_users_own_cells_are_nobodys_parameters():
    "In plain Jupyter and on Colab, where cells run in any order and more than once."
    refuse_unknown_parameters(KNOWN, ["prune_level = 0.4", "mine = 1", "prune_level = 0.4", "%pip install something", "# parameters of mine\nother = 2", ""])
    refuse_unknown_parameters(KNOWN)  # outside of any notebook
