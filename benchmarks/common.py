"""What the benchmarks share: the words of their commands, the clock, the machine's name, and rows as JSON."""
import argparse
import gc
import json
import platform
import time
from contextlib import contextmanager
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"


def parser_for(doc, dtype="of the weights", rounds=15, name=None):
    "A parser of the words that every comparison knows; `name` is that of the results."
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help=dtype)
    parser.add_argument("--threads", type=int, help="processor threads that torch may use; default: as many as it would use anyway")
    parser.add_argument("--rounds", type=int, help=f"counted rounds of the comparison; default: {rounds}, with --quick 3")
    parser.add_argument("--out", type=Path, help=f"default: benchmarks/results/{name}_<device>.json; with --quick nothing is kept")
    parser.add_argument("--quick", action="store_true", help="tiny models and three rounds, to see that it runs")
    return parser


def parsed(parser):
    "What was typed, refused where it cannot be; torch has as many threads as asked for."
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; leave --device out to measure on the processor")
    if options.rounds is not None and options.rounds < 3 or options.threads is not None and options.threads < 1:
        parser.error("at least three rounds, for quartiles, and one thread")
    if options.threads:
        torch.set_num_threads(options.threads)
    return options


def command(name, options, *more):
    "What to type for the same again, wherever the results are to go."
    words = ["python", f"benchmarks/{name}.py", "--device", options.device, "--dtype", options.dtype, "--threads", torch.get_num_threads()]
    words += ["--rounds", options.rounds] * bool(options.rounds) + [*more] + ["--quick"] * options.quick
    return " ".join(map(str, words))


def out_file(name, options):
    "Where the results go; None: nowhere."
    return options.out or (None if options.quick else RESULTS / f"{name}_{options.device}.json")


def environment(options):
    "The machine and the versions, as every result names them."
    import transformers

    return {"device": options.device, "device_name": device_name(torch.device(options.device)), "dtype": options.dtype, "threads": torch.get_num_threads(),
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def device_name(device):
    "The model of the processor or GPU."
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def wait_for(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device):
    "Give the memory of dead models back."
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def seconds_of(call, device, calls=1):
    "Seconds of one call, the mean of some in a row."
    wait_for(device)
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    wait_for(device)
    return (time.perf_counter() - begin) / calls


def launching_of(call, device):
    "Share of a call that passes before all its kernels are launched. Of a call that ends by fetching numbers it is 1; None on a processor."
    if device.type != "cuda":
        return None
    wait_for(device)
    begin = time.perf_counter()
    call()
    launched = time.perf_counter() - begin
    wait_for(device)
    return launched / (time.perf_counter() - begin)


@contextmanager
def clocked(places, spent):
    "While open, the seconds of every call of these functions, [(holder, name)], are added to the list `spent`."

    def watched(function):
        def call(*args, **kwargs):
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent.append(time.perf_counter() - begin)
        return call

    kept = [(holder, name, getattr(holder, name)) for holder, name in places]
    try:
        for holder, name, function in kept:
            setattr(holder, name, watched(function))
        yield spent
    finally:
        for holder, name, function in kept:
            setattr(holder, name, function)


def short(number):
    "Five digits are more than a clock is good for."
    return None if number is None else float(f"{number:.5g}")


def write(out, result, lists=("rows",)):
    "The result as JSON, the `lists` of it last, a row a line."
    out.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({name: value for name, value in result.items() if name not in lists}, indent=1).removesuffix("\n}")
    parts = [f' "{name}": [' + ",".join("\n  " + json.dumps(row) for row in result[name]) + ("\n ]" if result[name] else "]") for name in lists]
    out.write_text(",\n".join([head, *parts]) + "\n}\n", encoding="utf-8")
