"""`import neural_plasticity` changes nothing, and loads little of its own; each room's import changes nothing either."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = sorted(path.stem for path in (ROOT / "neural_plasticity").glob("*.py") if not path.stem.startswith("_"))

WATCHED = """
import os, random, sys
import matplotlib, numpy, torch, transformers

def state():
    numpy_state = numpy.random.get_state()
    return {
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "torch seed": torch.get_rng_state().tolist(),
        "numpy seed": (numpy_state[1].tolist(), *numpy_state[2:]),
        "python seed": random.getstate(),
        "environment": dict(os.environ),
        "backend": dict.__getitem__(matplotlib.rcParams, "backend"),  # a plain look-up would choose one
        "rcParams": {key: str(value) for key, value in dict.items(matplotlib.rcParams)},
        "path": list(sys.path),
        "defaults": (torch.get_default_dtype(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()),
        "attention functions": sorted(transformers.AttentionInterface().keys()),
    }

state()  # looking may load parts of torch and transformers, which change the environment themselves
before, modules = state(), set(sys.modules)
"""


def run(code):
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_the_package_changes_nothing():
    run(WATCHED + "import neural_plasticity\nafter = state()\nassert after == before, [k for k in after if after[k] != before[k]]")


@pytest.mark.parametrize("beforehand", ["", "import torch, transformers"])
def test_importing_the_package_loads_little(beforehand):
    loaded = run(f"import sys\n{beforehand}\nbefore = set(sys.modules)\nimport neural_plasticity\nprint(*sorted(set(sys.modules) - before))").split()
    own = [name for name in loaded if name.split(".")[0] == "neural_plasticity"]
    assert len(own) <= 3, own  # the package itself; rooms are loaded when a name of theirs is asked for
    heavy = {"matplotlib", "ipywidgets", "plotly", "datasets", "accelerate", "pandas", "IPython", "nbdev", "fastcore", "papermill"}
    assert not heavy & {name.split(".")[0] for name in loaded}


def test_importing_every_room_changes_nothing():
    optional = {"cli", "widgets"}  # widgets needs the extra "demo"
    rooms = "\n".join(f"import neural_plasticity.{room}" for room in ROOMS if room not in optional)
    code = f"""
{rooms}
after = state()
after["attention functions"] = [name for name in after["attention functions"] if name in before["attention functions"]]
assert after == before, [k for k in after if after[k] != before[k]]
loaded = set(sys.modules) - modules
assert not loaded & {{"matplotlib.pyplot", "ipywidgets", "plotly", "nbdev", "fastcore"}}, loaded
"""
    run("from transformers import Trainer\n" + WATCHED + code)  # so that what its import changes is not put down to us
