"""The benchmark of the demo's main job runs and accounts for all of its time. Its times are never judged."""
import json
import os
import subprocess
import sys

import pytest
from house import ROOT

pytest.importorskip("ipywidgets")


def test_it_runs_and_every_phase_is_there(tmp_path):
    out = tmp_path / "results" / "quick.json"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "main_job.py"), "--quick", "--threads", "1", "--out", str(out)], cwd=tmp_path, env=os.environ | {"PYTHONPATH": path},
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text(encoding="utf-8"))
    run, environment = result["run"], result["environment"]
    assert result["quick"] and environment["threads"] == 1 and {"processor", "cores", "torch", "transformers", "python"} <= environment.keys() and "/" not in result["command"].replace("benchmarks/", "")
    phases = [(row["phase"], row["arm"]) for row in run["phases"]]
    assert phases[0] == ("baseline", "before") and phases[-1] == ("end", None) and {("recover", arm) for arm in ("chosen", "random", "control")} <= set(phases)
    assert abs(sum(row["seconds"] for row in run["phases"]) - run["seconds"]) < 0.1 * run["seconds"] + 1  # the record leaves nothing out
    assert run["within"]["training steps"]["calls"] == 3 * 6 and run["within"]["evaluations"]["calls"] == 1 + 2 * 4 + 2 + 4  # 6 steps, evaluated every 3; 4 times bits per byte
    assert run["within"]["measuring heads"]["calls"] == 1 + 5 and run["within"]["compensation"]["calls"] == 4 + 2 and run["within"]["timings of a forward pass"]["calls"] == 4
    assert len(result["slider"]["answers"]) == 3 and result["slider"]["median"] <= result["slider"]["worst"] and "demo" not in result
