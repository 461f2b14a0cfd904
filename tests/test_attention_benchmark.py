"""The benchmark of attention statistics runs, covers what it promises, and measures what is right. Its times are never judged."""
import json
import os
import subprocess
import sys

import pytest
from house import ROOT


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    "What `--quick` writes, run as a user runs it."
    out = tmp_path_factory.mktemp("benchmark") / "quick.json"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "attention.py"), "--quick", "--threads", "1", "--out", str(out)], env=os.environ | {"PYTHONPATH": path},
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text(encoding="utf-8"))


def test_every_length_has_every_way(result):
    found = {(row["length"], row["what"]) for row in result["layer"]}
    assert found == {(length, what) for length in (32, 64) for what in ("sdpa", "entropy", "all", "map")}
    assert {row["path"] for row in result["layer"] if row["what"] == "entropy"} == {"fused"}


def test_the_streamed_entropy_is_exact(result):
    assert all(row["error"] < 1e-4 for row in result["errors"])


def test_growth_has_four_sizes_each_and_a_slope(result):
    assert set(result["growth"]) == {"length", "heads", "batch", "head_size"}
    assert all(len(curve["x"]) == len(curve["seconds"]) == 4 and isinstance(curve["exponent"], float) for curve in result["growth"].values())


def test_a_whole_model_is_measured_at_several_depths(result):
    rows = result["model"]["rows"]
    assert {row["layers"] for row in rows} == {1, 2} and {row["what"] for row in rows} == {"forward", "entropy", "all"}
    assert sum(kernel["share"] for kernel in result["model"]["kernels"]) <= 1
