"""The trainings behind the evidence pages, in parallel on whatever there is; stopped at any moment, the same command goes on.

    python benchmarks/evidence.py --devices cuda:0 --workers 12 --folder evidence-cells
    python benchmarks/evidence.py shift --devices cuda:0,cuda:1 --workers 28 --folder evidence-cells

The results are collected in benchmarks/results/criteria.json and shift.json, which the pages nbs/evidence/criteria.ipynb and regrowth.ipynb read.
"""
import argparse
import json
import time
from pathlib import Path

from neural_plasticity.cells import run_cells
from neural_plasticity.criteria_study import choosing_cells, recovery_cells
from neural_plasticity.durable import write_whole
from neural_plasticity.environment import get_environment_info
from neural_plasticity.shift_study import shift_cells

MODELS = ["embedded:gpt2", "embedded:llama"]


def machine() -> dict:
    "What the figures were made with, without names."
    info = get_environment_info()
    found = {name: info[name] for name in ("device", "pytorch_version", "transformers_version", "python_version") if name in info}
    import torch

    return found | ({"gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]} if torch.cuda.is_available() else {})


def write(path: Path, about: dict, tables: dict[str, list[dict]]) -> None:
    "One JSON file, a row a line."
    parts = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in about.items()]
    parts += [f"{json.dumps(name)}: [\n" + ",\n".join(json.dumps(_short(row)) for row in rows) + "\n]" for name, rows in tables.items()]
    write_whole(path, "{" + ",\n".join(parts) + "}\n")


def _short(value):
    "Numbers with six digits."
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: _short(part) for name, part in value.items()}
    return [_short(part) for part in value] if isinstance(value, list) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="*", default=["criteria", "shift"], help="criteria, shift; both if left out")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--devices", default="cpu", help="with commas between them")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folder", default="evidence-cells", help="where finished cells are kept")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results"))
    arguments = parser.parse_args()
    models, seeds = arguments.models.split(","), range(arguments.seeds)
    how = dict(folder=arguments.folder, workers=arguments.workers, devices=arguments.devices.split(","))
    command = f"python benchmarks/evidence.py {' '.join(arguments.study)} --devices {arguments.devices} --workers {arguments.workers}"
    for study in arguments.study:
        started = time.monotonic()
        if study == "criteria":
            choosing = run_cells("neural_plasticity.criteria_study:choosing_cell", choosing_cells(models, seeds), **how)
            print(f"choosing: {time.monotonic() - started:.0f} s", flush=True)
            recovery = run_cells("neural_plasticity.criteria_study:recovery_cell", recovery_cells(choosing, models, seeds), **how)
            found = {"choosing": choosing, "recovery": recovery}
        else:
            found = {"trainings": run_cells("neural_plasticity.shift_study:shift_cell", shift_cells(models, seeds), **how)}
        seconds = round(time.monotonic() - started)
        print(f"{study}: {seconds} s", flush=True)
        write(Path(arguments.out) / f"{study}.json", {"command": command, "seconds": seconds, "machine": machine()}, found)


if __name__ == "__main__":
    main()
