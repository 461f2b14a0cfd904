"""How much faster does a model get when attention heads are removed, beside what arithmetic says it could win?

What is measured
    LLaMA-like models with grouped key/value heads and random weights (the time does not depend on the values). From copies of each,
    `remove_heads` takes 0, 25, 50 and 75 % of the heads: whole key/value groups, as many in every layer. Each cut is proven in
    float32; then the model is cast to --dtype.
        prompt   one forward pass over a prompt that fills a new cache and gives the logits of its last token
        decode   one more token for each sequence, on a key/value cache of a fixed length that is already full
    All of it with torch's scaled_dot_product_attention, under `torch.inference_mode`, not compiled, in one or two modes:
        eager    as transformers does by default: Python launches every kernel of every call
        graph    on a GPU too: the same call, recorded once as a CUDA graph and replayed, so that all its kernels are one launch. Only
                 where a replay gives the logits of the eager call; a variant that cannot be recorded is noted under `notes`

How
    All variants of a model stay in memory, in one process, and take turns; the order rotates from round to round, so that drift strikes
    all alike. Each round gives one ratio a variant, its time over the unpruned model's of the same round; reported are the median
    ratio and its quartiles. The first rounds warm up and are dropped. On a GPU the clock stops only after a synchronisation,
    and `launching` says which share of a call the processor needs to launch its kernels: near 1, the GPU waits for them.

What it could win
    flops   counted by `model_cost`, less the upper half of the attention scores of a prompt, which causal kernels leave out
    bytes   of a decode step: every weight but the table of embeddings, and the whole cache, read once
    The ideal ratio is that count over the unpruned model's. `heads_share` is the part of the unpruned count that belongs to heads: by
    Amdahl's law the ideal after removing a fraction r of them is 1 - r * heads_share.

Run (a few minutes each; on a machine with nothing else to do)
    python benchmarks/removal_latency.py --threads 2
    python benchmarks/removal_latency.py --device cuda --dtype bfloat16 --threads 1
    python benchmarks/removal_latency.py --quick       does it run? Tiny models; its times mean nothing and are kept only with --out
"""
import math
import statistics
from dataclasses import asdict, dataclass
from functools import partial

import torch
from common import command, environment, free, launching_of, out_file, parsed, parser_for, seconds_of, short, write
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from neural_plasticity import model_cost, remove_heads

REMOVED = (0.0, 0.25, 0.5, 0.75)  # shares of the heads; 0 is what the others are compared with
MODES = {"cpu": ("eager",), "cuda": ("eager", "graph")}
UNMASKED = "sdpa_unmasked"


@dataclass(frozen=True)
class Size:
    "The shape of a model."
    name: str
    d_model: int
    layers: int
    heads: int
    key_value_heads: int
    mlp: int
    vocabulary: int = 32_000


@dataclass(frozen=True)
class Case:
    "What is timed: a prompt of `length` tokens, or a token more on a cache that holds `length` with it."
    phase: str
    batch: int
    length: int


SMALL = Size("small", d_model=512, layers=8, heads=8, key_value_heads=4, mlp=1408)
MEDIUM = Size("medium", d_model=1024, layers=12, heads=16, key_value_heads=8, mlp=2816)
LARGE = Size("large", d_model=4096, layers=16, heads=32, key_value_heads=8, mlp=14336)  # half the layers of an 8-billion LLaMA
PLANS = {
    "cpu": ((SMALL, MEDIUM), (Case("prompt", 1, 512), Case("decode", 1, 512), Case("decode", 8, 2048))),
    "cuda": ((SMALL, MEDIUM, LARGE),
             (Case("prompt", 1, 512), Case("prompt", 1, 4096), Case("decode", 1, 4096), Case("decode", 32, 4096))),
    "quick": ((Size("tiny", d_model=64, layers=2, heads=8, key_value_heads=4, mlp=176, vocabulary=256),
               Size("tiny, wider", d_model=128, layers=2, heads=8, key_value_heads=4, mlp=352, vocabulary=256)),
              (Case("prompt", 1, 32), Case("decode", 1, 32), Case("decode", 4, 32))),
}


def build(size, removed, device, dtype):
    "A model of this size without a share of its heads: whole key/value groups, as many in every layer."
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=size.d_model, num_hidden_layers=size.layers, num_attention_heads=size.heads,
                         num_key_value_heads=size.key_value_heads, intermediate_size=size.mlp, vocab_size=size.vocabulary,
                         max_position_embeddings=8192, attn_implementation="sdpa")
    with torch.device(device):
        model = LlamaForCausalLM(config).eval()
    gone = round(size.heads * removed)
    if gone % (size.heads // size.key_value_heads):
        raise SystemExit(f"{removed:.0%} of {size.heads} heads are no whole groups of {size.heads // size.key_value_heads}; choose another size")
    if gone:
        remove_heads(model, [(layer, head) for layer in range(size.layers) for head in range(gone)])
    return model.to(dtype).requires_grad_(False)


class FullLayer(DynamicLayer):
    "A layer's key/value cache of a fixed length, full: the new token takes the last place, and all places are attended to."

    def __init__(self, keys, values):  # [B,Hkv,T,D] each
        super().__init__()
        self.keys, self.values, self.dtype, self.device = keys, values, keys.dtype, keys.device
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        self.keys[:, :, -1:], self.values[:, :, -1:] = key_states, value_states
        return self.keys, self.values

    def get_seq_length(self, *args):
        return self.keys.shape[-2] - 1  # what was there before the new token


def inputs_for(model, case, key_value_heads):
    "What the model is called with, [B,T] tokens or [B,1] and a cache."
    generator = torch.Generator().manual_seed(0)
    config, prompt = model.config, case.phase == "prompt"
    ids = torch.randint(0, config.vocab_size, (case.batch, case.length if prompt else 1), generator=generator).to(model.device)
    if prompt:
        return {"input_ids": ids, "logits_to_keep": 1, "use_cache": True}
    shape = (case.batch, key_value_heads, case.length, config.head_dim)
    layers = [FullLayer(*torch.randn(2, *shape, dtype=model.dtype, device=model.device)) for _ in range(config.num_hidden_layers)]
    return {"input_ids": ids, "past_key_values": Cache(layers=layers), "use_cache": True}


def without_masks(model):
    """Let the model call the same attention, and never make a mask.

    Neither case needs one: a prompt is causal, which is a flag, and a last token sees everything. transformers leaves masks out by
    itself, but some versions not while a CUDA graph is recorded; the graph would then hold other, slower kernels than the eager call."""
    AttentionInterface.register(UNMASKED, sdpa_attention_forward)  # no mask function goes by this name, so no mask is made
    model.set_attn_implementation(UNMASKED)


class ReplayDiffers(RuntimeError):
    "A replayed graph does not give what the eager call gives."


class Replayed:
    "A call recorded as a CUDA graph; calling this replays it. Its inputs are those of the recording, in the same memory."

    def __init__(self, call, warmup=3):
        side, home = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(home)
        with torch.cuda.stream(side):  # libraries set themselves up in first calls, which must not be recorded
            for _ in range(warmup):
                expected = call().logits
        home.wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(home), torch.cuda.graph(self.graph):  # back to `home` even if the recording fails; a memory pool of its own
            self.logits = call().logits
        self.graph.replay()
        torch.cuda.synchronize()
        off, scale = (self.logits - expected).abs().max().item(), expected.abs().max().item()
        if not off <= 0.02 * scale:  # bfloat16 keeps 8 bits; also true of NaN
            raise ReplayDiffers(f"the logits of the replayed graph are off by {off:.3g}, the largest is {scale:.3g}")

    def __call__(self):
        self.graph.replay()


def recorded(calls_of):
    "Calls as CUDA graphs, {variant: Replayed}, and why others could not be recorded, {variant: {error, message}}."
    replays, failures = {}, {}
    for variant, call in calls_of.items():
        try:
            replays[variant] = Replayed(call)
        except RuntimeError as error:  # torch's own errors of CUDA and of memory are RuntimeErrors
            failures[variant] = {"error": type(error).__name__, "message": str(error).strip().split("\n")[0]}
    return replays, failures


def costs(model, inputs, case, size, removed, cache_bytes_per_token):
    "Operations of one call, and for a decode step the bytes that it cannot help reading."
    flops = model_cost(model, batch=inputs)["flops"]
    if case.phase == "prompt":
        heads = size.layers * round(size.heads * (1 - removed))
        masked = case.length * (case.length - 1) // 2  # pairs of a query and a later key, of length**2
        return {"flops": flops - 4 * case.batch * masked * heads * size.d_model // size.heads}
    embeddings = model.get_input_embeddings().weight.numel()
    weights = sum(p.numel() for p in model.parameters()) - embeddings
    return {"flops": flops, "bytes": int(weights * model.dtype.itemsize + case.batch * case.length * cache_bytes_per_token)}


@torch.inference_mode()
def measure(calls_of, device, rounds, warmup):
    "Time variants in turn: {variant: call} → {variant: [(seconds, launching)] over rounds}, and how many calls a time is the mean of."
    variants, samples = list(calls_of), {variant: [] for variant in calls_of}
    for call in calls_of.values():
        call()
    calls = max(1, min(64, math.ceil(0.04 / seconds_of(calls_of[variants[0]], device, 1))))  # short calls are timed together
    for turn in range(warmup + rounds):
        start = turn % len(variants)
        for variant in variants[start:] + variants[:start]:
            sample = seconds_of(calls_of[variant], device, calls), launching_of(calls_of[variant], device)
            if turn >= warmup:
                samples[variant].append(sample)
    return samples, calls


def rows_of(case, size, mode, costs_of, samples, calls, models):
    "One row a variant that was timed: what was measured, and what would be ideal."
    base, half, rows = costs_of[0.0], costs_of[0.5], []
    kinds = [kind for kind in ("flops", "bytes") if kind in base]
    for removed in samples:
        cost = costs_of[removed]
        seconds, launching = zip(*samples[removed])
        ratios = [mine / unpruned for mine, (unpruned, _) in zip(seconds, samples[0.0])]
        lower, middle, upper = statistics.quantiles(ratios, n=4, method="inclusive")
        row = {"model": size.name, **asdict(case), "mode": mode, "removed": removed, **models[removed], **cost, "calls": calls,
               "seconds": short(statistics.median(seconds)), "ratio": short(middle), "ratio_quartiles": [short(lower), short(upper)]}
        row |= {f"{kind}_ratio": short(cost[kind] / base[kind]) for kind in kinds}
        row |= {f"heads_{kind}_share": short((base[kind] - half[kind]) / 0.5 / base[kind]) for kind in kinds}
        rows.append(row | {"launching": None if None in launching else short(statistics.median(launching))})
    return rows


def time_case(calls_of, mode, device, rounds, warmup):
    "Time the variants of a case in one mode: samples, calls, and what could not be recorded; without the unpruned one there are no samples."
    failures = {}
    if mode == "graph":
        with torch.inference_mode():
            calls_of, failures = recorded(calls_of)
    samples, calls = measure(calls_of, device, rounds, warmup) if 0.0 in calls_of else ({}, 0)
    return samples, calls, failures


def benchmark(size, cases, mode, device, dtype, rounds, warmup):
    "All rows of one size in one mode, and notes on what could not be timed."
    variants = {removed: build(size, removed, device, dtype) for removed in REMOVED}
    per_token = {"input_ids": torch.zeros(1, 8, dtype=torch.long), "logits_to_keep": 1}
    counted = {removed: model_cost(model, batch=per_token) for removed, model in variants.items()}
    models = {removed: {"parameters": cost["parameters"], "cache_bytes_per_token": cost["cache_bytes_per_token"]} for removed, cost in counted.items()}
    if mode == "graph":
        for model in variants.values():
            without_masks(model)
    rows, notes = [], []
    for case in cases:
        inputs = {removed: inputs_for(model, case, round(size.key_value_heads * (1 - removed))) for removed, model in variants.items()}
        costs_of = {removed: costs(model, inputs[removed], case, size, removed, models[removed]["cache_bytes_per_token"])
                    for removed, model in variants.items()}
        samples, calls, failures = time_case({removed: partial(model, **inputs[removed]) for removed, model in variants.items()}, mode, device, rounds, warmup)
        new = rows_of(case, size, mode, costs_of, samples, calls, models)
        for row in new:
            print(line_of(row), flush=True)
        for removed, failure in failures.items():
            notes.append({"kind": "not recorded", "model": size.name, **asdict(case), "mode": mode, "removed": removed, **failure})
            print("not recorded:", notes[-1], flush=True)
        rows += new
        del inputs
        free(device)
    return rows, notes


def line_of(row):
    "A row for people."
    lower, upper = row["ratio_quartiles"]
    text = (f"{row['model']:12}{row['phase']:7} batch {row['batch']:2} × {row['length']:4} tokens {row['mode']:5} −{row['removed']:3.0%} heads "
            f"{row['parameters'] / 1e6:8.1f} M parameters {row['seconds'] * 1e3:9.2f} ms  ratio {row['ratio']:.3f} [{lower:.3f}, {upper:.3f}]  "
            f"FLOPs-ideal {row['flops_ratio']:.3f} (heads: {row['heads_flops_share']:.0%})")
    if "bytes_ratio" in row:
        text += f"  bytes-ideal {row['bytes_ratio']:.3f} (heads: {row['heads_bytes_share']:.0%})"
    return text + (f"  launching {row['launching']:.0%}" if row["launching"] else "")


def main():
    options = parsed(parser_for(__doc__, "what the models are timed in", name="removal_latency"))
    device = torch.device(options.device)
    rounds = options.rounds or (3 if options.quick else 15)
    warmup = 1 if options.quick else 2
    sizes, cases = PLANS["quick" if options.quick else options.device]
    result = {
        "schema": 2, "quick": options.quick,
        "command": command("removal_latency", options), "environment": environment(options),
        "rounds": rounds, "warmup_rounds": warmup, "models": [asdict(size) for size in sizes], "notes": [], "rows": [],
    }
    out = out_file("removal_latency", options)
    for mode in MODES[options.device]:  # all of one mode first: a recording that fails badly cannot spoil an eager row
        for size in sizes:
            rows, notes = benchmark(size, cases, mode, device, getattr(torch, options.dtype), rounds, warmup)
            free(device)
            result["rows"] += rows
            result["notes"] += notes
            if out:
                write(out, result)  # after every model, so that what was measured is never lost
    print(f"{len(result['rows'])} rows, {len(result['notes'])} notes")


if __name__ == "__main__":
    main()
