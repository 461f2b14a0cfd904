"""What does it cost to score every head by its gate gradient, beside a forward pass and a training step?

What is measured
    A GPT-2-like model with random weights, batches that are already on the device, everything through the public functions. All figures
    are for one batch.
        forward          the model on the batch, with labels, no gradients
        backward         the same and a backward pass to all weights
        training step    the same, AdamW (fused where there is one), and gradients dropped again
        taylor           measure_heads on four such batches: one forward pass and one backward pass to the gates alone for each
        four criteria    taylor, signed taylor, fisher and the gradient norm, in one pass
        taylor, grams    gate gradients and every layer's Gram matrix of the projection's inputs, in one pass
        checkpointed     taylor with checkpointing=True
        one batch        taylor on a single batch, so that it carries alone what is prepared once in a call
    once as GPT-2 comes, its GELU written as a formula of eight operations, and once with PyTorch's one operation (`gelu_pytorch_tanh`). The
    model keeps its own activation in the first three; a measurement computes a formula in one operation by itself, so only the second
    comparison is between passes that compute the same kernels. Dropout is 0 in all of them.

    Then forward, training step and taylor against layers, heads at a fixed width, heads of a fixed size, samples in a batch and tokens in
    a sample, four sizes each. `power` is the slope of log seconds over log size; `line` and `parabola` are least squares, with R².

How
    All variants take turns; the order rotates from round to round. Each round gives one ratio a variant, its time over the training
    step's of the same round; reported are medians and quartiles. The first rounds warm up and are dropped. On a GPU the clock stops only after a
    synchronisation; `launching` says which share of a call the processor needs to launch its kernels (near 1: the GPU waits for them).
    `peak` is the most memory that a call had allocated beyond what was there before it: weights, gradients of none, the optimizer's state.
    A variant that does not fit into the memory is left out, with a note. `flops` are products counted by torch's FlopCounterMode,
    which does not know a processor's fused attention.
    `profile` says where a taylor pass spends its time, kernel by kernel; `profile_seconds` is their sum, without gaps.

Run (on a machine with nothing else to do)
    python benchmarks/scoring.py --threads 2
    python benchmarks/scoring.py --device cuda --dtype bfloat16 --threads 1
    python benchmarks/scoring.py --quick       does it run? Tiny models; its times mean nothing and are kept only with --out
"""
import math
import statistics
import time
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
import transformers
from common import command, environment, free, launching_of, out_file, parsed, parser_for, seconds_of, short, wait_for, write
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from neural_plasticity import measure_heads
from neural_plasticity.importance import collect_quantities
from neural_plasticity.loss_kernels import working

BASE = "training step"  # what the others are compared with


@dataclass(frozen=True)
class Size:
    "The shape of a model and of its batch."
    layers: int
    heads: int
    head_size: int
    vocabulary: int
    batch: int
    tokens: int

    @property
    def width(self):
        return self.heads * self.head_size


MEDIUM = Size(layers=24, heads=16, head_size=64, vocabulary=50257, batch=8, tokens=1024)  # GPT-2 medium
SMALL = Size(layers=6, heads=8, head_size=32, vocabulary=8192, batch=4, tokens=256)
TINY = Size(layers=2, heads=4, head_size=8, vocabulary=97, batch=2, tokens=16)


def scales_of(size, layers, heads, batch, tokens):
    "The sweeps: name → sizes. Samples in a batch are fewer where tokens grow, so that the longest fit."
    return {
        "layers": [replace(size, layers=count) for count in layers],
        "heads at a fixed width": [replace(size, layers=layers[1], heads=count, head_size=size.width // count) for count in heads],
        "heads of a fixed size": [replace(size, layers=layers[1], heads=count) for count in heads],
        "batch": [replace(size, layers=layers[1], batch=count) for count in batch],
        "tokens": [replace(size, layers=layers[1], batch=batch[1], tokens=count) for count in tokens],
    }


PLANS = {
    "cuda": (MEDIUM, scales_of(MEDIUM, (6, 12, 18, 24), (4, 8, 16, 32), (2, 4, 8, 16), (512, 1024, 2048, 4096))),
    "cpu": (SMALL, scales_of(replace(SMALL, vocabulary=2048), (2, 4, 6, 8), (2, 4, 8, 16), (1, 2, 4, 8), (128, 256, 512, 1024))),
    "quick": (TINY, scales_of(TINY, (1, 2, 3, 4), (1, 2, 4, 8), (1, 2, 3, 4), (8, 16, 24, 32))),
}
LIMITS = {"cpu": 900, "cuda": 120}  # seconds after which no sweep begins
KNOBS = {"layers": "layers", "heads at a fixed width": "heads", "heads of a fixed size": "heads", "batch": "batch", "tokens": "tokens"}


def build(size, device, dtype, activation="gelu_new"):
    "A model of this size."
    torch.manual_seed(0)
    config = GPT2Config(n_layer=size.layers, n_head=size.heads, n_embd=size.width, vocab_size=size.vocabulary, n_positions=size.tokens, activation_function=activation,
                        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=None, eos_token_id=None, attn_implementation="sdpa")
    with torch.device(device):
        return GPT2LMHeadModel(config).to(dtype)


def batch_for(size, device):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, size.vocabulary, (size.batch, size.tokens), generator=generator).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


FOUR = ("taylor", "signed_taylor", "fisher", "gradient")


def calls_for(model, batch):
    "What is timed: name → call."
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    @torch.no_grad()
    def forward():
        model(**batch)

    def backward():
        model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)

    def step():
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    some = [batch] * BATCHES
    return {"forward": forward, "backward": backward, BASE: step, "taylor": partial(measure_heads, model, some), "taylor, one batch": partial(measure_heads, model, [batch]),
            "four criteria": partial(measure_heads, model, some, FOUR),
            "taylor, grams": partial(collect_quantities, model, some, {"gate_gradients", "input_grams"}),
            "checkpointed": partial(measure_heads, model, some, checkpointing=True)}


BATCHES = 4  # in a call of the library, which prepares once for all of them


def batches_in(name):
    "Batches that one call takes; all figures are for one."
    return BATCHES if name in ("taylor", "four criteria", "taylor, grams", "checkpointed") else 1


def peak_of(call, device):
    "Bytes that a call had allocated at most, beyond what was there; None on a processor."
    if device.type != "cuda":
        return None
    wait_for(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    wait_for(device)
    return torch.cuda.max_memory_allocated(device) - before


def out_of_memory(error):
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error)


def those_that_fit(model, calls_of, device, notes, about):
    "The calls that run, each tried once; the others are noted."
    fit = {}
    for name, call in calls_of.items():
        try:
            call()
            fit[name] = call
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            notes.append({"kind": "does not fit", **about, "variant": name, "message": str(error).split("\n")[0][:200]})
            print("does not fit:", notes[-1], flush=True)
        model.zero_grad(set_to_none=True)  # a backward pass may have come half way
        free(device)
    return fit


def measure(calls_of, device, rounds, warmup):
    "Time variants in turn: {name: [seconds] over rounds}."
    names, samples = list(calls_of), {name: [] for name in calls_of}
    calls = {name: max(1, min(64, math.ceil(0.02 / seconds_of(call, device, 1)))) for name, call in calls_of.items()}  # short calls are timed together
    for turn in range(warmup + rounds):
        start = turn % max(1, len(names))
        for name in names[start:] + names[:start]:
            seconds = seconds_of(calls_of[name], device, calls[name]) / batches_in(name if isinstance(name, str) else name[-1])
            if turn >= warmup:
                samples[name].append(seconds)
    return samples


def flops_of(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def compare(size, activation, device, dtype, rounds, warmup, notes):
    "One row a variant of the main comparison, and the profile of a taylor pass."
    model = build(size, device, dtype, activation)
    calls_of = those_that_fit(model, calls_for(model, batch_for(size, device)), device, notes, {"activation": activation})
    samples, rows = measure(calls_of, device, rounds, warmup), []
    for name, seconds in samples.items():
        row = {"activation": activation, "variant": name, "seconds": short(statistics.median(seconds))}
        if BASE in samples:
            lower, middle, upper = statistics.quantiles([mine / base for mine, base in zip(seconds, samples[BASE])], n=4, method="inclusive")
            row |= {"ratio": short(middle), "ratio_quartiles": [short(lower), short(upper)]}
        row |= {"flops": flops_of(calls_of[name]) // batches_in(name), "peak": peak_of(calls_of[name], device), "launching": short(launching_of(calls_of[name], device))}
        rows.append(row)
        print(line_of(row), flush=True)
    table = profile_of(calls_of["taylor, one batch"], device) if "taylor, one batch" in calls_of else []
    return rows, table


KINDS = (("attention", ("flash", "fmha", "attention", "sdp")), ("loss", ("_forward_kernel", "_backward_kernel", "softmax", "nll")),
         ("products", ("gemm", "cutlass", "xmma", "nvjet", "cublas", "addmm", "::mm", "::bmm", "splitk")), ("norms", ("layer_norm", "layernorm")), ("activation", ("gelu", "Gelu", "GeLU")))


def kind_of(kernel):
    "What sort of work a kernel does, by its name."
    return next((kind for kind, words in KINDS if any(word.lower() in kernel.lower() for word in words)), "other")


def profile_of(call, device):
    "Where the time goes: [{kernel, kind, calls, seconds, share}], the dearest first."
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    call()
    with profile(activities=activities) as seen:
        call()
        wait_for(device)
    kernels = {}
    for event in seen.key_averages():
        if device.type == "cuda" and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        spent = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        if spent > 0 and not event.key.startswith("["):
            known = kernels.setdefault(event.key, [0, 0.0])
            known[0], known[1] = known[0] + event.count, known[1] + spent * 1e-6
    total = sum(seconds for _, seconds in kernels.values())
    rows = [{"kernel": name[:120], "kind": kind_of(name), "calls": count, "seconds": short(seconds), "share": short(seconds / total)} for name, (count, seconds) in kernels.items()]
    return sorted(rows, key=lambda row: -row["seconds"])


def by_kind(table):
    "Shares of the kinds of work, the largest first."
    shares = {}
    for row in table:
        shares[row["kind"]] = shares.get(row["kind"], 0) + row["share"]
    return dict(sorted(((kind, short(share)) for kind, share in shares.items()), key=lambda item: -item[1]))


def fit_of(sizes, seconds):
    "How seconds grow with a size: the power of a power law, and least squares by a line and a parabola, with R²."
    x, y = torch.tensor(sizes, dtype=torch.float64), torch.tensor(seconds, dtype=torch.float64)

    def least_squares(degree):
        powers = (x / x.max())[:, None] ** torch.arange(degree + 1)
        weights = torch.linalg.lstsq(powers, y[:, None]).solution[:, 0]
        spread = (y - y.mean()).pow(2).sum()
        return {"coefficients": [short(float(weight) / float(x.max()) ** power) for power, weight in enumerate(weights)],
                "r2": short(float(1 - (powers @ weights - y).pow(2).sum() / spread)) if spread > 0 else None}

    log_x, log_y = x.log() - x.log().mean(), y.log() - y.log().mean()
    return {"power": short(float((log_x * log_y).sum() / log_x.pow(2).sum())), "line": least_squares(1), "parabola": least_squares(2)}


def sweep(name, sizes, device, dtype, rounds, warmup, notes):
    "Rows of a sweep: forward, training step and taylor for every size, and how each grows."
    calls_of = {}
    for size in sizes:
        model = build(size, device, dtype)
        calls = calls_for(model, batch_for(size, device))
        about = {"sweep": name, KNOBS[name]: getattr(size, KNOBS[name])}
        calls_of |= {(size, variant): call for variant, call in those_that_fit(model, {key: calls[key] for key in ("forward", BASE, "taylor")}, device, notes, about).items()}
    samples = measure(calls_of, device, rounds, warmup)
    rows = [{"sweep": name, **asdict(size), "variant": variant, "seconds": short(statistics.median(seconds))} for (size, variant), seconds in samples.items()]
    fits = []
    for variant in ("forward", BASE, "taylor"):
        points = [(row[KNOBS[name]], row["seconds"]) for row in rows if row["variant"] == variant]
        if len(points) >= 3:
            fits.append({"sweep": name, "variant": variant, **fit_of(*map(list, zip(*points)))})
    for row in rows:
        print(f"{name:24}{row[KNOBS[name]]:6} {row['variant']:14}{row['seconds'] * 1e3:10.2f} ms", flush=True)
    for fit in fits:
        print(f"{name:24}{fit['variant']:14} power {fit['power']:.2f}, line R² {fit['line']['r2']}", flush=True)
    return rows, fits


def line_of(row):
    "A row for people."
    text = f"{row['activation']:18}{row['variant']:18}{row['seconds'] * 1e3:9.2f} ms"
    if "ratio" in row:
        text += f"  {row['ratio']:.3f} [{row['ratio_quartiles'][0]:.3f}, {row['ratio_quartiles'][1]:.3f}] of a training step"
    text += f"  {row['flops'] / 1e9:11.2f} GFLOP"
    text += f"  at most {row['peak'] / 2**30:6.2f} GiB" if row["peak"] is not None else ""
    return text + (f"  launching {row['launching']:.0%}" if row["launching"] is not None else "")


def arguments():
    parser = parser_for(__doc__, name="scoring")
    parser.add_argument("--limit", type=float, help="seconds after which no further sweep begins; default: 900, on a GPU 120")
    parser.add_argument("--without-sweeps", action="store_true", help="the main comparison alone")
    return parsed(parser)


def main():
    options = arguments()
    transformers.logging.set_verbosity_error()
    device, dtype, begin = torch.device(options.device), getattr(torch, options.dtype), time.perf_counter()
    rounds, warmup = options.rounds or (3 if options.quick else 15), 1 if options.quick else 2
    size, scales = PLANS["quick" if options.quick else options.device]
    kernels, reason = working(torch.device("cuda", torch.cuda.current_device()), dtype) if device.type == "cuda" else (False, "on a processor")
    result = {
        "schema": 1, "quick": options.quick, "command": command("scoring", options, *["--limit", options.limit] * bool(options.limit), *["--without-sweeps"] * options.without_sweeps), "environment": environment(options),
        "loss": "two kernels" if kernels else f"some rows at a time ({reason})", "rounds": rounds, "warmup_rounds": warmup, "model": asdict(size) | {"width": size.width},
        "notes": [], "rows": [], "profile": [], "sweeps": [], "fits": [],
    }
    print(f"{result['environment']['device_name']}, {options.dtype}, {size}; loss: {result['loss']}", flush=True)
    out = out_file("scoring", options)
    for activation in ("gelu_new", "gelu_pytorch_tanh"):
        rows, table = compare(size, activation, device, dtype, rounds, warmup, result["notes"])
        result["rows"] += rows
        if activation == "gelu_new":
            result["profile"], result["profile_by_kind"] = table[:25], by_kind(table)
            result["profile_seconds"] = short(sum(row["seconds"] for row in table))
        free(device)
    for row in result["profile"][:12]:
        print(f"{row['share']:6.1%} {row['calls']:5} × {row['kind']:11}{row['kernel']}")
    shares = ", ".join(f"{kind} {share:.0%}" for kind, share in result["profile_by_kind"].items())
    print(f"of a taylor pass: {shares}; {result['profile_seconds'] * 1e3:.2f} ms in all", flush=True)
    limit = options.limit or LIMITS[options.device]
    for name, sizes in {} if options.without_sweeps else scales.items():
        if time.perf_counter() - begin > limit:
            result["notes"].append({"kind": "left out", "sweep": name, "message": f"{limit} seconds were over"})
            print("left out:", result["notes"][-1], flush=True)
            continue
        rows, fits = sweep(name, sizes, device, dtype, 3 if options.quick else max(5, rounds // 3), 1, result["notes"])
        result["sweeps"] += rows
        result["fits"] += fits
        free(device)
    result["took_seconds"] = short(time.perf_counter() - begin)
    if out:
        write(out, result, ("notes", "rows", "profile", "sweeps", "fits"))
        print(f"kept in {out}")


if __name__ == "__main__":
    main()
