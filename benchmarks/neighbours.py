"""What do others do about attention heads, what does it cost, and where does it still run? This library and its neighbours in one run.

Three parts
    entropy     attention entropy of every head of a model, one sequence of T tokens: what people write today beside `measure_entropy`.
                Time, peak memory beyond the model, and the error against float64.
    importance  what each head is worth by Michel et al. (2019), the mean over samples of |dloss/dgate|: the loop over samples, one backward
                over the batch, TextPruner, and `measure_heads`. Time, and how far the scores are from the loop's.
    pruning     the same heads removed by every neighbour, from GPT-2, BERT, LLaMA, and LLaMA with grouped heads. Are the logits those of
                the model whose heads are gated to zero, and does it come back from a folder?

How
    Models have random weights and are built from configs, and the two embedded ones are real; nothing is downloaded. All variants of a case stay
    in one process and take turns, in an order that rotates; a ratio compares two times of the same round; reported are medians and quartiles.
    On a GPU the peak is CUDA's own count; on a processor it is the resident high-water mark of a fresh process a variant.
    The reference of an entropy is computed in float64 from the queries and keys of the same forward pass in the same attention implementation,
    so that the error is the measurement's alone, not that of the model's dtype.

The neighbours are no dependencies. Each is imported where it is used, and "not installed" goes into the results where it is missing:
    pip install torch-pruning transformer-lens bertviz circuitsvis
    pip install --no-deps textpruner==1.1.post2     (its requirement numpy<1.22 cannot be met by today's Pythons)

Run (a few minutes each; on a machine with nothing else to do)
    python benchmarks/neighbours.py --threads 2
    python benchmarks/neighbours.py --device cuda --dtype bfloat16 --threads 1
    python benchmarks/neighbours.py --quick         does it run? Tiny models; its times mean nothing and are kept only with --out
"""
import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass

import torch
import transformers
from common import command, environment, free, out_file, parsed, parser_for, write
from neighbours_entropy import Size, entropy_rows, known_version, memory_job, variants
from neighbours_pruning import KINDS, MASKS, WAYS, drawing_rows, importance_rows, pruning_job



@dataclass(frozen=True)
class Known:
    "A neighbour as its package index had it when this was written."
    package: str
    module: str
    version: str
    released: str
    licence: str


NEIGHBOURS = (
    Known("torch-pruning", "torch_pruning", "1.6.1", "2025-09", "MIT"),
    Known("textpruner", "textpruner", "1.1.post2", "2023-03", "Apache-2.0"),
    Known("transformer-lens", "transformer_lens", "4.3.0", "2026-10", "MIT"),
    Known("bertviz", "bertviz", "1.4.1", "2025-06", "Apache-2.0"),
    Known("circuitsvis", "circuitsvis", "1.43.3", "2024-12", "MIT"),
)


EMBEDDED = ("embedded gpt2", "embedded llama")
SMALL = Size("small", d_model=512, layers=4, heads=8, key_value_heads=4, mlp=1408)
BILLION = Size("1B-class", d_model=2048, layers=16, heads=32, key_value_heads=8, mlp=8192)  # the blocks of a LLaMA 3.2 with 1 billion weights
TINY = Size("tiny", d_model=64, layers=2, heads=4, key_value_heads=2, mlp=176, vocabulary=256)
PLANS = {  # entropy: (model, tokens); importance: (kind, width, layers, samples, tokens)
    "cpu": {"entropy": ((SMALL, (256, 512, 1024, 2048)), *((name, (256,)) for name in EMBEDDED)),
            "importance": (("llama", 256, 4, 8, 128), ("bert", 256, 4, 8, 128))},
    "cuda": {"entropy": ((BILLION, (1024, 2048, 4096, 8192, 16384)), *((name, (512,)) for name in EMBEDDED)),
             "importance": (("llama", 1024, 12, 8, 1024), ("bert", 1024, 12, 8, 512))},
    "quick": {"entropy": ((TINY, (16, 32)), (EMBEDDED[1], (24,))), "importance": (("llama", 64, 2, 3, 16), ("bert", 64, 2, 3, 16))},
}


def job(threads, words, timeout):
    "This script in a fresh process: its standard output, and why it ended, if it did not end well."
    done = subprocess.Popen([sys.executable, __file__, "--threads", str(threads), "--job", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        out, err = done.communicate(timeout=timeout)
        return out, None if done.returncode == 0 else (err.strip().split("\n") or [""])[-1][:300]
    except subprocess.TimeoutExpired:
        done.kill()
        return done.communicate()[0], f"no answer in {timeout} s"


def add_memory(rows, plan, dtype):
    "Peak bytes on a processor: one process a variant of the first model."
    what, _ = PLANS[plan]["entropy"][0]
    for variant in variants():
        out, trouble = job(torch.get_num_threads(), ["memory", plan, 0, variant, dtype], timeout=300)
        if trouble:
            raise SystemExit(f"measuring the memory of {variant!r} failed: {trouble}")
        found = {int(tokens): peak for tokens, peak in json.loads(out.strip().split("\n")[-1]).items()}
        for row in rows:
            if (row["variant"], row["model"]) == (variant, what.name):
                row["peak_bytes"] = found[row["tokens"]]


def pruning_rows():
    "All ways of all neighbours; what a process did not come back with is said so."
    rows = []
    for neighbour, ways in WAYS.items():
        expected = [{"part": "pruning", "neighbour": neighbour, "way": way, "model": kind, "mask": mask} for way in ways for kind in KINDS for mask in MASKS]
        if neighbour != "neural_plasticity" and not known_version(neighbour):
            rows += [row | {"outcome": "not installed"} for row in expected]
            continue
        out, trouble = job(1, ["pruning", neighbour], timeout=180)  # these models are tiny
        found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        rows += found + [row | {"outcome": "error", "message": trouble} for row in expected[len(found):]]
    return rows


def line_of(row):
    "A row for people."
    words = [f"{row['part']:10}", *(str(row[key]) for key in ("neighbour", "way", "model", "tokens", "mask", "variant", "what") if key in row), row["outcome"]]
    words += [f"{key} {row[key]}" for key in ("seconds", "ratio", "peak_bytes", "error", "rank", "message", "saved") if row.get(key) is not None]
    return "  ".join(words)


def run_job(name, *rest):
    if name == "memory":
        plan, place, variant, dtype = rest
        print("\n" + json.dumps(memory_job(*PLANS[plan]["entropy"][int(place)], variant, dtype)))
    else:
        pruning_job(*rest)


def arguments():
    parser = parser_for(__doc__, "what entropy and importance are measured in", rounds=5, name="neighbours")
    parser.add_argument("--job", nargs="+", help=argparse.SUPPRESS)  # a fresh process for one variant
    return parsed(parser)


def main():
    options = arguments()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded, by nobody
    transformers.logging.set_verbosity_error()
    if options.job:
        return run_job(*options.job)
    device, dtype, rounds = torch.device(options.device), getattr(torch, options.dtype), options.rounds or (3 if options.quick else 5)
    plan = "quick" if options.quick else options.device
    out = out_file("neighbours", options)
    result = {
        "schema": 1, "quick": options.quick, "command": command("neighbours", options), "environment": environment(options),
        "rounds": rounds, "models": [asdict(what) for what, _ in PLANS[plan]["entropy"] if not isinstance(what, str)],
        "neighbours": [asdict(known) | {"installed": known_version(known.package)} for known in NEIGHBOURS], "rows": [],
    }

    def keep(rows):
        for row in rows:
            print(line_of(row), flush=True)
        result["rows"] += rows
        if out:
            write(out, result)  # after every part, so that what was measured is never lost

    keep(pruning_rows())
    keep(drawing_rows())
    for case in PLANS[plan]["importance"]:
        keep(importance_rows(*case, device, dtype, rounds))
        free(device)
    for what, lengths in PLANS[plan]["entropy"]:
        rows = entropy_rows(what, lengths, device, dtype, rounds)
        if device.type == "cpu" and not isinstance(what, str):
            add_memory(rows, plan, options.dtype)
        keep(rows)
        free(device)
    print(f"{len(result['rows'])} rows")


if __name__ == "__main__":
    main()
