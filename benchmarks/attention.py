"""What do exact attention statistics cost beside attention itself, and beside the maps that others make?

What is measured
    layer    one attention layer, causal, queries and keys as transformers lays them out: scaled_dot_product_attention (as torch chooses it), the
             entropy alone, all statistics, and, while it fits, what everybody writes: the map in the model's precision, then sum(-p log p).
             Time, memory beyond the inputs, largest error of the entropy against float64 on the same values.
    growth   the entropy at four lengths, four numbers of heads, four batch sizes, four head sizes, with the exponent of a fitted power
    model    a whole model with random weights (the time does not depend on them): its forward pass, and `measure_entropy` and
             `measure_attention` on the same batch; four depths; and which kernels the time goes to
    tune     (--tune, GPU) every shape of blocks for every head size; the fastest belong into neural_plasticity.attention_kernel

How
    Variants of a case take turns in one process. Each round gives one ratio a variant, its time over SDPA's (the forward pass's) of the same
    round; reported are medians. A turn is as many calls one after another as fit into 20 ms. First rounds warm up and are dropped. GPU turns
    are timed by CUDA events, after a synchronisation.

Run (a few minutes; on a machine with nothing else to do)
    python benchmarks/attention.py --threads 2
    python benchmarks/attention.py --device cuda
    python benchmarks/attention.py --quick       does it run? Tiny shapes; its times mean nothing and are kept only with --out
"""
import argparse
import itertools
import json
import math
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from common import RESULTS, device_name
from transformers import LlamaConfig, LlamaForCausalLM

from neural_plasticity import attention_entropy, attention_statistics, measure_attention, measure_entropy
from neural_plasticity.row_blocks import STATISTICS, state_problem
from neural_plasticity.streaming import statistics_path

PLANS = {  # heads, head sizes, lengths, longest map, rounds; base case of the growth curves (heads, length, head size); model
    "cpu": dict(heads=12, sizes=(64, 128), lengths=(512, 1024, 2048, 4096), maps=2048, rounds=15, base=(8, 1024, 64),
                model=dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4, vocab_size=32000), length=1024),
    "cuda": dict(heads=32, sizes=(64, 128), lengths=(8192, 16384, 32768, 65536), maps=8192, rounds=9, base=(32, 8192, 64),
                 model=dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4, vocab_size=32000), length=32768),
    "quick": dict(heads=2, sizes=(16,), lengths=(32, 64), maps=64, rounds=2, base=(2, 32, 16),
                  model=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=64), length=32),
}


def tensors(batch, heads, length, size, device, dtype):
    "Query, key, value [B,H,T,D] in the memory of [B,T,H,D]."
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(batch, length, heads, size, device=device, dtype=dtype, generator=generator).transpose(1, 2) for _ in range(3)]


def map_entropy_as_written(query, key):
    "The textbook way, in the precision that the model runs in."
    logits = (query @ key.mT / math.sqrt(query.shape[-1])).masked_fill(torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).triu(1), -torch.inf)
    map_ = logits.softmax(-1)
    return -(map_ * (map_ + 1e-12).log()).sum(-1)


def seconds_of(call, device, times=1):
    "Seconds of a call, mean of a few one after another."
    if device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - begin) / times
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(times):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / times


def in_turns(calls, device, rounds):
    "{name: (median seconds, median ratio to the first)}; a call that runs out of memory is left out."
    times, repeats = {name: [] for name in calls}, dict.fromkeys(calls, 1)
    for number in range(rounds + 2):
        for name, call in calls.items():
            if name in times:
                try:
                    times[name].append(seconds_of(call, device, repeats[name]))
                    if number == 1:  # compiled and warm by now
                        repeats[name] = max(1, min(50, round(0.02 / times[name][-1])))
                except torch.OutOfMemoryError:
                    del times[name]
                    torch.cuda.empty_cache()
    first = next(iter(calls))
    kept = {name: values[2:] for name, values in times.items()}
    return {name: (statistics.median(values), statistics.median(a / b for a, b in zip(values, kept[first]))) for name, values in kept.items()}


def extra_bytes(call, device):
    "Peak memory beyond what was there before, GPU only."
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def layer(plan, device, dtype):
    rows = []
    for size, length in itertools.product(plan["sizes"], plan["lengths"]):
        query, key, value = tensors(1, plan["heads"], length, size, device, dtype)
        calls = {"sdpa": lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True), "entropy": lambda: attention_entropy(query, key, is_causal=True),
                 "all": lambda: attention_statistics(query, key, is_causal=True)}
        if length <= plan["maps"]:
            calls["map"] = lambda: map_entropy_as_written(query, key)
        found = in_turns(calls, device, plan["rounds"])
        for name, (seconds, ratio) in found.items():
            rows.append({"head_size": size, "length": length, "heads": plan["heads"], "what": name, "seconds": seconds, "ratio": ratio, "extra_bytes": extra_bytes(calls[name], device),
                         "path": statistics_path(query, key, {"entropy": "entropy", "all": tuple(STATISTICS)}[name], is_causal=True) if name in ("entropy", "all") else None})
            print(rows[-1], flush=True)
    return rows


def errors(plan, device, dtype):
    "Largest error of the entropy, nats, on inputs of this dtype, against float64 on the same values."
    rows = []
    for size in plan["sizes"]:
        length = min(plan["maps"], 2048)
        query, key, _ = tensors(1, 4, length, size, device, dtype)
        query = query * 3  # sharper than random
        exact = attention_entropy(query.double(), key.double(), is_causal=True, path="blocks")
        for name, call in (("entropy", lambda: attention_entropy(query, key, is_causal=True)), ("map", lambda: map_entropy_as_written(query, key))):
            rows.append({"head_size": size, "length": length, "what": name, "error": (call().double() - exact).abs().max().item()})
    return rows


def exponent(sizes, values):
    "Slope of a straight line through the logarithms."
    x, y = ([math.log(v) for v in numbers] for numbers in (sizes, values))
    mean_x, mean_y = statistics.mean(x), statistics.mean(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)


def growth(plan, device, dtype):
    heads, length, size = plan["base"]
    curves = {"length": [(1, heads, length * f, size) for f in (1, 2, 4, 8)], "heads": [(1, heads * f, length, size) for f in (1, 2, 4, 8)],
              "batch": [(f, heads, length, size) for f in (1, 2, 4, 8)], "head_size": [(1, heads, length, 32 * f) for f in (1, 2, 4, 8)]}
    found = {}
    for name, shapes in curves.items():
        points = []
        for batch, count, tokens, width in shapes:
            query, key, _ = tensors(batch, count, tokens, width, device, dtype)
            points.append(in_turns({"entropy": lambda: attention_entropy(query, key, is_causal=True)}, device, plan["rounds"])["entropy"][0])
        x = [{"length": s[2], "heads": s[1], "batch": s[0], "head_size": s[3]}[name] for s in shapes]
        found[name] = {"x": x, "seconds": points, "exponent": exponent(x, points)}
        print(name, found[name], flush=True)
    return found


def build(shape, length, device, dtype, layers=None):
    torch.manual_seed(0)
    config = LlamaConfig(**shape | ({"num_hidden_layers": layers} if layers else {}), max_position_embeddings=length, attn_implementation="sdpa")
    with torch.device(device):
        model = LlamaForCausalLM(config).eval()
    return model.to(dtype).requires_grad_(False)


def whole_model(plan, device, dtype):
    "Forward pass against measuring, at four depths; and the largest kernels of a measurement."
    rows, deepest = [], plan["model"]["num_hidden_layers"]
    depths = sorted({max(1, deepest // f) for f in (1, 2, 4, 8)})
    for layers in depths:
        model = build(plan["model"], plan["length"], device, dtype, layers)
        batch = {"input_ids": torch.randint(plan["model"]["vocab_size"], (1, plan["length"]), device=device)}
        with torch.no_grad():
            calls = {"forward": lambda: model(**batch), "entropy": lambda: measure_entropy(model, [batch]), "all": lambda: measure_attention(model, [batch])}
            for name, (seconds, ratio) in in_turns(calls, device, plan["rounds"] if layers == deepest else 3).items():
                rows.append({"layers": layers, "parameters": sum(p.numel() for p in model.parameters()), "length": plan["length"], "what": name, "seconds": seconds, "ratio": ratio,
                             "extra_bytes": extra_bytes(calls[name], device)})
                print(rows[-1], flush=True)
    return {"shape": plan["model"], "rows": rows, "exponent_layers": exponent(depths, [r["seconds"] for r in rows if r["what"] == "entropy"]), "kernels": kernels(calls["entropy"], device)}


def kernels(call, device, most=8):
    "Share of the time by kernel (operator, on a CPU) of one call."
    cuda = device.type == "cuda"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    field = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = sorted(profile.key_averages(), key=lambda event: -getattr(event, field))
    total = sum(getattr(event, field) for event in events)
    return [{"name": event.key[:90], "share": getattr(event, field) / total, "calls": event.count} for event in events[:most]]


TUNED_SIZES, TUNED_DTYPES = (32, 64, 128, 256), (torch.bfloat16, torch.float32)
TUNED_SHAPES = [shape for shape in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)) if shape[0] * shape[1] >= 4096 or shape[2] == 4]


def tuned_problem(size, dtype, length):
    return state_problem(*tensors(1, 16, length, size, torch.device("cuda"), dtype)[:2], is_causal=True)


def compiled(case):
    "Compile one kernel, into Triton's cache; the name of the error if that fails, else None."
    from neural_plasticity.attention_kernel import kernel_statistics
    size, dtype, wanted, shape = case
    try:
        kernel_statistics(tuned_problem(size, dtype, 512), wanted, shape)
        torch.cuda.synchronize()
    except Exception as error:  # out of shared memory or registers, and whatever else a compiler dislikes: this shape is none
        return type(error).__name__
    return None


def tune():
    "Fastest shapes of blocks for every head size: (queries, keys, warps, stages)."
    import triton

    from neural_plasticity.attention_kernel import kernel_statistics
    cases = [(size, dtype, wanted, shape) for size in TUNED_SIZES for dtype in TUNED_DTYPES for wanted in (("entropy",), tuple(STATISTICS)) for shape in TUNED_SHAPES
             if dtype == torch.bfloat16 or (len(wanted) > 1 and shape[3] < 4)]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        fits = dict(zip(cases, pool.map(compiled, cases)))
    found = []
    for group, shapes in itertools.groupby((case for case in cases if fits[case] is None), key=lambda case: case[:3]):
        size, dtype, wanted = group
        problem = tuned_problem(size, dtype, 16384 if dtype == torch.bfloat16 else 4096)
        rows = [(triton.testing.do_bench(lambda: kernel_statistics(problem, wanted, shape), warmup=5, rep=20, return_mode="median"), shape) for *_, shape in shapes]
        found.append({"head_size": size, "dtype": str(dtype), "statistics": list(wanted), "best": [{"ms": ms, "shape": shape} for ms, shape in sorted(rows)[:4]]})
        print(found[-1], flush=True)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, help="of torch, on a CPU")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tune", action="store_true", help="only time shapes of blocks")
    parser.add_argument("--out", type=Path, help="where to write; by default benchmarks/results/attention_DEVICE.json")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device, plan = torch.device(arguments.device), PLANS["quick" if arguments.quick else arguments.device]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found = {"device": device_name(device), "threads": torch.get_num_threads(), "dtype": str(dtype).removeprefix("torch."), "torch": torch.__version__, "transformers": transformers.__version__}
    if arguments.tune:
        found["tune"] = tune()
    else:
        found |= {"layer": layer(plan, device, dtype), "errors": errors(plan, device, dtype), "growth": growth(plan, device, dtype), "model": whole_model(plan, device, dtype)}
        print(found["errors"], found["model"]["kernels"])
    out = arguments.out or (None if arguments.quick or arguments.tune else RESULTS / f"attention_{arguments.device}.json")
    if out:
        out.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
