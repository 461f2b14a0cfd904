"""The comparison with neighbours runs, covers what it promises, and its errors are right. Its times are never judged."""
import json
import os
import subprocess
import sys

import pytest
import torch
from house import ROOT

SCRIPT = ROOT / "benchmarks" / "neighbours.py"


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    "What `--quick` writes, run as a user runs it; with whichever neighbours are installed."
    out = tmp_path_factory.mktemp("neighbours") / "results" / "quick.json"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environ = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(SCRIPT), "--quick", "--threads", "1", "--out", str(out)], cwd=out.parents[1], env=environ,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.fixture
def pruning(monkeypatch):
    "The room of the script that prunes."
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import neighbours_pruning

    return neighbours_pruning


def rows(result, part, **wanted):
    found = [row for row in result["rows"] if row["part"] == part and all(row[key] == value for key, value in wanted.items())]
    assert found, (part, wanted)
    return found


@pytest.mark.slow
def test_every_case_has_a_row(result):
    cases = [(row["model"], row["tokens"], row["variant"]) for row in rows(result, "entropy")]
    assert sorted(cases) == sorted((model, tokens, variant) for model, tokens in (("tiny", 16), ("tiny", 32), ("embedded llama", 24))
                                   for variant in ("forward", "library", "maps", "hooks", "bertviz", "transformer-lens"))
    assert len(rows(result, "importance")) == 2 * 5  # two models; the loop, the batch, the library, TextPruner in two ways
    assert len(rows(result, "pruning")) == 6 * 4 * 3  # six ways, four models, three masks
    assert {row["neighbour"] for row in rows(result, "drawing")} == {"bertviz", "circuitsvis", "transformer-lens"}
    assert {known["package"] for known in result["neighbours"]} == {"torch-pruning", "textpruner", "transformer-lens", "bertviz", "circuitsvis"}


@pytest.mark.slow
def test_entropies_are_those_of_float64(result):
    for row in rows(result, "entropy"):
        assert row["outcome"] == "ran"
        if row["variant"] in ("library", "maps", "hooks", "transformer-lens"):
            assert row["error"] < 1e-4  # nats; float32 here
            assert row["heads"] == (48 if row["model"] == "embedded llama" else 8)
        else:
            assert "error" not in row  # these measure no entropy


@pytest.mark.slow
def test_memory_is_counted_where_it_is_promised(result):
    assert all(("peak_bytes" in row) == (row["model"] == "tiny") for row in rows(result, "entropy"))


@pytest.mark.slow
def test_the_library_scores_as_the_loop_over_samples_does(result):
    for row in rows(result, "importance", variant="library"):
        assert row["outcome"] == "ran" and row["error"] < 1e-4 and row["rank"] == pytest.approx(1)
    for row in rows(result, "importance", variant="batch"):
        assert row["error"] > 1e-2  # the absolute value of a mean is another quantity than the mean of absolute values


@pytest.mark.slow
def test_the_library_removes_every_mask_exactly(result):
    for row in rows(result, "pruning", neighbour="neural_plasticity"):
        assert row["outcome"] == "exact" and row["error"] < 1e-5 and row["weights_removed"] > 0


@pytest.mark.slow
def test_what_transformers_gave_up_is_seen_as_such(result):
    assert {row["outcome"] for row in rows(result, "pruning", way="prune_heads")} == {"error"}
    assert {row["outcome"] for row in rows(result, "pruning", way="head_mask")} == {"nothing happened"}


@pytest.mark.slow
def test_missing_neighbours_are_said_to_be_missing(result):
    installed = {known["package"]: known["installed"] for known in result["neighbours"]}
    for package, version in installed.items():
        for row in [row for row in result["rows"] if row.get("neighbour") == package]:
            assert (row["outcome"] == "not installed") == (version is None)


@pytest.mark.slow
def test_the_result_names_what_it_ran_on_and_no_place(result):
    assert result["quick"] and result["environment"]["torch"] == torch.__version__ and result["environment"]["threads"] == 1
    assert result["command"] == "python benchmarks/neighbours.py --device cpu --dtype float32 --threads 1 --quick"
    assert str(ROOT) not in json.dumps(result)


def test_a_neighbour_that_prunes_other_heads_is_caught(pruning, monkeypatch):
    "The comparison itself can fail: heads that were not asked for give other logits."
    def wrong(model, mask, ids):
        pruning.remove_heads(model, mask.flip(1))

    monkeypatch.setitem(pruning.WAYS, "neighbour", {"remove": wrong, "nothing": lambda model, mask, ids: None, "raise": lambda model, mask, ids: [][0]})
    found = {way: pruning.pruning_row("neighbour", way, "gpt2", "uneven") for way in pruning.WAYS["neighbour"]}
    assert found["remove"]["outcome"] == "other logits" and found["remove"]["weights_removed"] > 0
    assert found["nothing"]["outcome"] == "nothing happened"
    assert found["raise"]["outcome"] == "error" and found["raise"]["message"] == "IndexError: list index out of range"
