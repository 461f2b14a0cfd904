"""How long does the demo's main job take, where does the time go, and how soon do the sliders answer?

What is measured
    run      `run_experiment` as the demo calls it (embedded GPT-2, 40 % of the heads in rounds, 60 steps of recovery with looks at dormant heads, beside a random
             choice and an unpruned control trained as long), in this process: seconds of each phase of each arm, from the times in the run's record, and in all
    within   how much of the run was spent in steps of training, evaluations, looks at dormant heads, timings of a forward pass; the rest is choosing and compensating
    slider   the seconds between a move of the level or a change of the strategy and everything being shown: the figure, the perplexity on 1,024 tokens, the text.
             Twelve positions, none seen before
    demo     the whole page by papermill, from the start of its kernel to the last cell (not with --quick, or --no-demo)

Wall time, on a machine with nothing else to do. `processor_seconds` are those that all threads of this process have used for the run, `others_processor_seconds` those of all other
processes (on Linux): where they are many, the run has waited for them.

Run (about five minutes on two cores)
    python benchmarks/main_job.py
    python benchmarks/main_job.py --quick       does it run? Its times mean nothing and are kept only with --out
"""
import argparse
import importlib
import json
import operator
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WITHIN = {  # what is timed → where the library looks it up
    "training steps": [("neural_plasticity.trainer", "PlasticityTrainer.training_step")],
    "evaluations": [("neural_plasticity.training", "evaluate_model"), ("neural_plasticity.arms", "evaluate_model"), ("neural_plasticity.experiment", "evaluate_model"), ("neural_plasticity.experiment", "bits_per_byte")],
    "looks at dormant heads": [("neural_plasticity.callback", "plasticity_step")],
    "measuring heads": [("neural_plasticity.arms", "measure_heads"), ("neural_plasticity.choosing", "measure_heads")],
    "compensation": [("neural_plasticity.arms", "compensate_heads"), ("neural_plasticity.choosing", "compensate_heads")],
    "timings of a forward pass": [("neural_plasticity.experiment", "measure_latency")],
}
POSITIONS = [(0.35, "taylor"), (0.25, "taylor"), (0.25, "fisher"), (0.5, "fisher"), (0.1, "fisher"), (0.1, "gradient"),
             (0.6, "gradient"), (0.6, "brain_surgeon"), (0.3, "brain_surgeon"), (0.3, "entropy"), (0.45, "entropy"), (0.45, "activation_norm")]


def found(module: str, path: str) -> tuple:
    "The holder of a function and its name there."
    *parents, name = path.split(".")
    return operator.attrgetter(".".join(parents))(importlib.import_module(module)) if parents else importlib.import_module(module), name


def busy_seconds() -> float | None:
    "Processor seconds of all processes since the machine was started; None where the system does not say."
    path = Path("/proc/stat")
    if not path.is_file():
        return None
    user, nice, system, _, _, irq, softirq, *_ = map(int, path.read_text().splitlines()[0].split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def phases(record: list[dict], begin: float) -> list[dict]:
    "Seconds of every phase of every arm: each line of a record is written when its phase is over."
    rows, last = [], begin
    for line in record:
        if line["phase"] in ("train", "regrow"):
            continue
        rows.append({"phase": line["phase"], "arm": line.get("arm"), "seconds": round(line["time"] - last, 2)})
        last = line["time"]
    return rows


def run(config, prepared) -> dict:
    "The main job."
    from common import clocked

    from neural_plasticity.experiment import read_record, run_experiment

    spent = {name: [] for name in WITHIN}
    with ExitStack() as clocks:
        for name, places in WITHIN.items():
            clocks.enter_context(clocked([found(*place) for place in places], spent[name]))
        started, begin, used, busy = time.time(), time.perf_counter(), time.process_time(), busy_seconds()
        result = run_experiment(config, prepared, progress=False)
        seconds, used = time.perf_counter() - begin, time.process_time() - used
        others = None if busy is None else round(max(0.0, busy_seconds() - busy - used), 2)
    return {"seconds": round(seconds, 2), "processor_seconds": round(used, 2), "others_processor_seconds": others,
            "phases": phases(read_record(result.folder), started), "within": {name: {"calls": len(times), "seconds": round(sum(times), 2)} for name, times in spent.items()},
            "perplexity": {row["arm"]: row["perplexity"] for row in result.table}}


def slider(prepared, positions) -> dict:
    "How soon the sliders answer."
    from neural_plasticity.widgets import explore

    begin = time.perf_counter()
    explorer = explore(prepared.model, prepared.tokenizer, prepared.selection, prepared.validation)
    opening, answers, shown = time.perf_counter() - begin, [], []
    explorer.children[-1].observe(lambda change: shown.append(time.perf_counter()), "value")  # the numbers and the text, which come last
    for level, strategy in positions:
        shown.clear()
        begin = time.perf_counter()
        if explorer.level.value != level:
            explorer.level.value = level
        if explorer.strategy.value != strategy:
            explorer.strategy.value = strategy
        answers.append((shown[-1] if shown else time.perf_counter()) - begin)  # where the numbers are the same, nothing is sent
    return {"tokens": explorer.tokens, "opening_seconds": round(opening, 2), "answers": [round(value, 3) for value in answers], "median": round(statistics.median(answers), 3), "worst": round(max(answers), 3)}


def demo() -> dict:
    "The whole page, kernel start included."
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "papermill", str(ROOT / "nbs" / "demo.ipynb"), "out.ipynb", "--no-progress-bar"], cwd=folder, capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))})
        seconds = time.perf_counter() - begin
    if done.returncode:
        sys.exit(done.stderr)
    return {"seconds": round(seconds, 2)}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="processor threads that torch may use; default: as many as it would use anyway")
    parser.add_argument("--quick", action="store_true", help="a run of seconds, to see that it works")
    parser.add_argument("--no-demo", action="store_true", help="leave out the run by papermill")
    parser.add_argument("--out", type=Path, help=f"where the results go; default: {RESULTS.relative_to(ROOT) / 'main_job.json'}, with --quick nowhere")
    return parser.parse_args()


def main():
    options, begin = arguments(), time.perf_counter()
    import torch
    import transformers

    from neural_plasticity.experiment import ExperimentConfig, prepare_experiment

    importing = time.perf_counter() - begin
    from common import device_name  # here, so that what it imports is not left out of the time

    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        config = ExperimentConfig(mode="gate", training_steps=60, learning_rate=1e-4, output_dir=folder, minimal=options.quick, device="cpu")  # as in nbs/demo.ipynb
        begin = time.perf_counter()
        prepared = prepare_experiment(config)
        result = {"schema": 1, "quick": options.quick, "command": "python benchmarks/main_job.py" + (f" --threads {options.threads}" if options.threads else "") + " --quick" * options.quick,
                  "environment": {"processor": device_name(torch.device("cpu")), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"), "python": platform.python_version(), "torch": torch.__version__,
                                  "transformers": transformers.__version__},
                  "import_seconds": round(importing, 2), "prepare_seconds": round(time.perf_counter() - begin, 2)}
        result["slider"] = slider(prepared, POSITIONS[:3] if options.quick else POSITIONS)
        result["run"] = run(config, prepared)
    if not (options.quick or options.no_demo):
        result["demo"] = demo()
    text = json.dumps(result, indent=1)
    print(text)
    out = options.out or (None if options.quick else RESULTS / "main_job.json")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
