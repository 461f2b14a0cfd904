"""The benchmark of removal runs, covers what it promises, and counts right. Its times are never judged."""
import json
import math
import os
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from house import ROOT, imported_script
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SCRIPT = ROOT / "benchmarks" / "removal_latency.py"


@pytest.fixture(scope="module")
def benchmark():
    "The script as a module."
    with imported_script("removal_latency") as module:
        yield module


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    "What `--quick` writes, run as a user runs it."
    out = tmp_path_factory.mktemp("benchmark") / "results" / "quick.json"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, str(SCRIPT), "--quick", "--threads", "1", "--out", str(out)], cwd=out.parents[1], env=os.environ | {"PYTHONPATH": path},
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text(encoding="utf-8"))


def groups(rows):
    "Rows that differ only in what was removed."
    found = {}
    for row in rows:
        found.setdefault((row["model"], row["phase"], row["batch"], row["length"], row["mode"]), []).append(row)
    return list(found.values())


def test_every_case_has_a_row_for_every_share_of_heads(result, benchmark):
    sizes, cases = benchmark.PLANS["quick"]
    expected = {(size.name, case.phase, case.batch, case.length, "eager", removed) for size in sizes for case in cases for removed in (0, 0.25, 0.5, 0.75)}
    found = [(row["model"], row["phase"], row["batch"], row["length"], row["mode"], row["removed"]) for row in result["rows"]]
    assert len(found) == len(expected) and set(found) == expected
    assert {case.phase for case in cases} == {"prompt", "decode"} and result["quick"] and not result["notes"]


def test_the_cost_falls_with_the_heads(result):
    for rows in groups(result["rows"]):
        for kind in ("parameters", "flops", "cache_bytes_per_token") + (("bytes",) if rows[0]["phase"] == "decode" else ()):
            costs = [row[kind] for row in rows]
            assert costs == sorted(set(costs), reverse=True), (kind, costs)
        for kind in ("flops", "bytes") if rows[0]["phase"] == "decode" else ("flops",):
            for row in rows:  # Amdahl: what does not belong to heads stays; 1e-4 is what five digits leave
                assert row[f"{kind}_ratio"] == pytest.approx(1 - row["removed"] * row[f"heads_{kind}_share"], abs=1e-4)


def test_ratios_are_numbers_and_compare_with_the_unpruned_model(result):
    for row in result["rows"]:
        lower, upper = row["ratio_quartiles"]
        assert all(math.isfinite(number) and number > 0 for number in (row["seconds"], row["ratio"], lower, upper))
        assert lower <= row["ratio"] <= upper
        assert row["removed"] or row["ratio"] == lower == upper == 1


def test_counts_are_those_of_the_architecture(result):
    sizes = {size["name"]: size for size in result["models"]}
    for row in result["rows"]:
        size, batch, length = sizes[row["model"]], row["batch"], row["length"]
        d, layers, vocabulary, head = size["d_model"], size["layers"], size["vocabulary"], size["d_model"] // size["heads"]
        heads, kv = (round(size[name] * (1 - row["removed"])) for name in ("heads", "key_value_heads"))
        matrices = layers * (2 * d * heads * head + 2 * d * kv * head + 3 * d * size["mlp"])
        assert row["parameters"] == matrices + 2 * vocabulary * d + (2 * layers + 1) * d  # embeddings, their way back, norms
        assert row["cache_bytes_per_token"] == 2 * layers * kv * head * 4
        if row["phase"] == "prompt":  # scores and mixing of every token with those up to itself; the last token's logits
            attention, logits, tokens = 4 * heads * head * layers * length * (length + 1) // 2, 2 * d * vocabulary, length
        else:
            attention, logits, tokens = 4 * heads * head * layers * length, 2 * d * vocabulary, 1
            assert row["bytes"] == 4 * (row["parameters"] - vocabulary * d) + batch * length * row["cache_bytes_per_token"]
        counted = batch * (2 * matrices * tokens + attention + logits)
        assert row["flops"] == pytest.approx(counted, rel=1e-3)  # some versions also count the rotary angles


def test_the_result_names_what_it_ran_on_and_no_place(result):
    assert result["environment"]["torch"] == torch.__version__ and result["environment"]["threads"] == 1
    assert result["command"] == "python benchmarks/removal_latency.py --device cpu --dtype float32 --threads 1 --quick"


def test_a_step_on_the_full_cache_is_a_step_of_generation(benchmark):
    "The cache of the benchmark gives the logits that transformers' own gives."
    size = benchmark.PLANS["quick"][0][0]
    model = benchmark.build(size, 0.5, torch.device("cpu"), torch.float32)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        expected = model(ids).logits[:, -1]
        filled = model(ids[:, :-1], use_cache=True).past_key_values
        room = torch.zeros(2, size.key_value_heads // 2, 1, model.config.head_dim)
        layers = [benchmark.FullLayer(torch.cat([layer.keys, room], 2), torch.cat([layer.values, room], 2)) for layer in filled.layers]
        cache = benchmark.Cache(layers=layers)
        for _ in range(2):  # the same place again, as the benchmark does it
            torch.testing.assert_close(model(ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1], expected, atol=1e-5, rtol=1e-5)


def test_heads_that_are_no_whole_groups_are_refused(benchmark):
    size = benchmark.Size("odd", d_model=32, layers=1, heads=4, key_value_heads=1, mlp=32, vocabulary=32)
    with pytest.raises(SystemExit, match="no whole groups of 4"):
        benchmark.build(size, 0.5, torch.device("cpu"), torch.float32)


@pytest.fixture
def fake_cuda(benchmark, monkeypatch):
    "Stand-ins for CUDA graphs that say whether one is being recorded and how often each was replayed; what is called runs on the processor."
    state = SimpleNamespace(recording=False, graphs=[])

    class Graph:
        def __init__(self):
            self.replays = 0
            state.graphs.append(self)

        def replay(self):
            self.replays += 1

    @contextmanager
    def record(graph):
        state.recording = True
        try:
            yield
        finally:
            state.recording = False

    fakes = {"Stream": lambda: SimpleNamespace(wait_stream=lambda other: None), "current_stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
             "stream": lambda stream: nullcontext(), "CUDAGraph": Graph, "graph": record, "synchronize": lambda *device: None,
             "is_current_stream_capturing": lambda: state.recording}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return state


def test_a_call_is_warmed_up_recorded_once_and_then_only_replayed(benchmark, fake_cuda):
    recording = []

    def call():
        recording.append(fake_cuda.recording)
        return SimpleNamespace(logits=torch.ones(1, 1, 4))

    replay = benchmark.Replayed(call)
    assert recording == [False, False, False, True]
    replay(), replay()
    assert recording == [False, False, False, True] and fake_cuda.graphs[0].replays == 3  # one of them compares with the eager call


def test_what_cannot_be_recorded_is_noted_and_the_others_are_timed(benchmark, fake_cuda):
    def call(behaviour):
        if fake_cuda.recording and behaviour == "fails":
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return SimpleNamespace(logits=torch.ones(1, 1, 4) * (2 if fake_cuda.recording and behaviour == "differs" else 1))

    calls_of = {0.0: partial(call, "works"), 0.25: partial(call, "fails"), 0.5: partial(call, "differs"), 0.75: partial(call, "works")}
    samples, _, failures = benchmark.time_case(calls_of, "graph", torch.device("cpu"), rounds=3, warmup=1)
    assert list(samples) == [0.0, 0.75] and all(len(found) == 3 for found in samples.values())
    assert failures[0.25] == {"error": "RuntimeError", "message": "operation not permitted when stream is capturing"}
    assert failures[0.5]["error"] == "ReplayDiffers" and "off by 1" in failures[0.5]["message"]
    samples, _, failures = benchmark.time_case({0.0: calls_of[0.25], 0.5: calls_of[0.0]}, "graph", torch.device("cpu"), rounds=3, warmup=1)
    assert not samples and list(failures) == [0.0]  # nothing to compare with


def test_graph_rows_are_made_of_the_same_calls_as_eager_ones(benchmark, fake_cuda):
    size, cases = benchmark.PLANS["quick"][0][0], benchmark.PLANS["quick"][1]
    rows, notes = {}, []
    for mode in benchmark.MODES["cuda"]:
        rows[mode], found = benchmark.benchmark(size, cases, mode, torch.device("cpu"), torch.float32, rounds=3, warmup=1)
        notes += found
    assert not notes and len(rows["graph"]) == len(rows["eager"]) == 4 * len(cases)
    for eager, graph in zip(rows["eager"], rows["graph"]):
        assert (eager["mode"], graph["mode"]) == ("eager", "graph")
        counted = set(eager) - {"mode", "calls", "seconds", "ratio", "ratio_quartiles", "launching"}
        assert {key: graph[key] for key in counted} == {key: eager[key] for key in counted}


@pytest.mark.parametrize("capturing", [False, True])
def test_no_mask_is_made_whether_recording_or_not(benchmark, fake_cuda, monkeypatch, capturing):
    "A mask would send attention to other kernels than the eager call's; some versions of transformers make one while a graph is recorded."
    size, cases = benchmark.PLANS["quick"][0][0], benchmark.PLANS["quick"][1]
    model = benchmark.build(size, 0.5, torch.device("cpu"), torch.float32)
    inputs = [benchmark.inputs_for(model, case, size.key_value_heads // 2) for case in cases]
    with torch.inference_mode():
        expected = [model(**given).logits for given in inputs]
        benchmark.without_masks(model)
        attend, seen = torch.nn.functional.scaled_dot_product_attention, []
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention",
                            lambda *args, **kwargs: (seen.append((kwargs["attn_mask"], kwargs["is_causal"])), attend(*args, **kwargs))[1])
        monkeypatch.setattr(fake_cuda, "recording", capturing)
        for given, case, logits in zip(inputs, cases, expected):
            seen.clear()
            assert torch.equal(model(**given).logits, logits)
            assert seen == [(None, case.phase == "prompt")] * size.layers


def test_a_call_asks_the_processor_for_nothing(benchmark):
    "On the meta device no value can be read; a tensor from the processor, or a read, would break the recording of a graph."
    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            result = operation(*args, **(kwargs or {}))
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor) and leaf.numel()]
            assert all(tensor.is_meta for tensor in tensors), operation
            return result

    size, cases = benchmark.PLANS["quick"][0][0], benchmark.PLANS["quick"][1]
    model = benchmark.build(size, 0.0, torch.device("meta"), torch.bfloat16)
    benchmark.without_masks(model)
    for case in cases:
        given = benchmark.inputs_for(model, case, size.key_value_heads)
        with torch.inference_mode(), Spy():
            assert model(**given).logits.shape == (case.batch, 1, size.vocabulary)
