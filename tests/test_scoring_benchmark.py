"""The benchmark of scoring runs, compares what it says, and counts right. Its times are never judged."""
import json
import os
import subprocess
import sys

import pytest
import torch
from house import ROOT, imported_script

SCRIPT = ROOT / "benchmarks" / "scoring.py"


@pytest.fixture(scope="module")
def benchmark():
    "The script as a module."
    with imported_script("scoring") as module:
        yield module


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    "What `--quick` writes, run as a user runs it."
    out = tmp_path_factory.mktemp("benchmark") / "results" / "quick.json"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, str(SCRIPT), "--quick", "--without-sweeps", "--threads", "1", "--out", str(out)], cwd=out.parents[1],
                          env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text(encoding="utf-8"))


def test_every_variant_is_compared_with_a_training_step(result):
    names = ["forward", "backward", "training step", "taylor", "taylor, one batch", "four criteria", "taylor, grams", "checkpointed"]
    assert [(row["activation"], row["variant"]) for row in result["rows"]] == [(activation, name) for activation in ("gelu_new", "gelu_pytorch_tanh") for name in names]
    for row in result["rows"]:
        assert row["seconds"] > 0 and row["ratio_quartiles"][0] <= row["ratio"] <= row["ratio_quartiles"][1]
        assert row["variant"] != "training step" or row["ratio"] == 1
    assert not result["notes"] and result["command"] == "python benchmarks/scoring.py --device cpu --dtype float32 --threads 1 --without-sweeps --quick"


def test_products_are_those_of_the_architecture(result):
    "2 operations for a weight and a token; a third of a training step is for weights, which a taylor pass does not compute. The counter does not know the processor's fused attention."
    size, flops = result["model"], {row["variant"]: row["flops"] for row in result["rows"]}
    d, tokens = size["width"], size["batch"] * size["tokens"]
    linear = 2 * tokens * (12 * size["layers"] * d * d + size["vocabulary"] * d)
    assert flops["forward"] == linear and flops["training step"] == flops["backward"] == 3 * linear
    assert flops["taylor"] == 2 * linear - 2 * tokens * 3 * d * d  # before the first gate nothing goes back
    assert flops["four criteria"] - flops["taylor"] == flops["taylor, grams"] - flops["taylor"] == 2 * tokens * d * d * size["layers"]


def test_shares_of_the_profile_add_up(result):
    assert sum(result["profile_by_kind"].values()) == pytest.approx(1, abs=1e-3)
    shares = [row["share"] for row in result["profile"]]
    assert shares == sorted(shares, reverse=True) and {row["kind"] for row in result["profile"]} >= {"products"}


def test_kernels_are_told_apart(benchmark):
    names = {"nvjet_tst_128x256_64x4_2x1_v_bz_TNT": "products", "void pytorch_flash::flash_fwd_kernel<...>": "attention", "_backward_kernel": "loss",
             "void at::native::vectorized_layer_norm_kernel<...>": "norms", "void at::native::vectorized_elementwise_kernel<4, GeluCUDAKernelImpl>": "activation",
             "void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add>": "other"}
    assert {name: benchmark.kind_of(name) for name in names} == names


def test_fits_find_the_law(benchmark):
    sizes = [1, 2, 4, 8]
    line = benchmark.fit_of(sizes, [3.0 + 2 * size for size in sizes])
    assert line["line"]["r2"] == pytest.approx(1) and line["line"]["coefficients"] == pytest.approx([3, 2])
    square = benchmark.fit_of(sizes, [5.0 * size**2 for size in sizes])
    assert square["power"] == pytest.approx(2) and square["line"]["r2"] < 0.99 and square["parabola"]["coefficients"] == pytest.approx([0, 0, 5], abs=1e-6)


def test_a_sweep_has_a_row_for_every_size(benchmark):
    sizes, notes = benchmark.PLANS["quick"][1]["layers"], []
    rows, fits = benchmark.sweep("layers", sizes, torch.device("cpu"), torch.float32, 1, 0, notes)
    assert [(row["layers"], row["variant"]) for row in rows] == [(size.layers, variant) for size in sizes for variant in ("forward", "training step", "taylor")]
    assert [fit["variant"] for fit in fits] == ["forward", "training step", "taylor"] and not notes


def test_what_does_not_fit_is_noted_and_the_others_are_timed(benchmark):
    def too_much():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB\nand more")

    def broken():
        raise RuntimeError("something else")

    notes, model, device = [], torch.nn.Linear(2, 2), torch.device("cpu")
    fit = benchmark.those_that_fit(model, {"large": too_much, "small": lambda: None}, device, notes, {"layers": 3})
    assert list(fit) == ["small"] and notes == [{"kind": "does not fit", "layers": 3, "variant": "large", "message": "CUDA out of memory. Tried to allocate 80 GiB"}]
    with pytest.raises(RuntimeError, match="something else"):
        benchmark.those_that_fit(model, {"broken": broken}, device, notes, {})
    assert len(benchmark.measure(fit, device, rounds=2, warmup=0)["small"]) == 2 and benchmark.measure({}, device, 2, 1) == {}
