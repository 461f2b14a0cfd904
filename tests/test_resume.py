"""A run that is killed in any phase goes on, and ends as if nothing had happened; a disk that says no breaks nothing."""
import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from neural_plasticity import run_folder
from neural_plasticity.config import ExperimentConfig
from neural_plasticity.durable import add_line, read_lines, write_whole
from neural_plasticity.errors import InvalidArgument, StorageError
from neural_plasticity.experiment import prepare_experiment, resume_experiment, run_experiment
from neural_plasticity.run_folder import RunFolder

CONFIG = ExperimentConfig(training_steps=6, eval_interval=3, regrow_every=2, checkpoint_every=2, selection_batches=2, eval_batches=1, batch_size=4, block_size=32, learning_rate=3e-4,
                          strategy="taylor", levels=(0.25, 0.5), device="cpu")

# Every run below is a process of its own, forked from one that has loaded model and text. `deaths` says where each but the last is killed: `at(module, name, call)` at a call of a function,
# `line(phase, arm, cycle, step, written)` when a line is about to be written, or when so many characters of it have been.
DRIVER = """
import json, os, signal, sys, traceback
from pathlib import Path
import torch
torch.set_num_threads(1)
from neural_plasticity import arms, experiment, run_folder, storage
from neural_plasticity.config import ExperimentConfig
from neural_plasticity.experiment import prepare_experiment, resume_experiment, run_experiment

config, deaths, folder = ExperimentConfig.from_dict(json.loads(sys.argv[1])), json.loads(sys.argv[2]), Path(sys.argv[3])
prepared = prepare_experiment(config)
die = lambda: os.kill(os.getpid(), signal.SIGKILL)

def at(module, name, call):
    module, left = {"arms": arms, "experiment": experiment, "storage": storage}[module], [call]
    real = getattr(module, name)
    def function(*args, **kwargs):
        left[0] -= 1
        return real(*args, **kwargs) if left[0] else die()
    setattr(module, name, function)

def line(phase, arm=None, cycle=None, step=None, written=0):
    real = run_folder.add_line
    def function(path, line):
        if line["phase"] != phase or any(wanted is not None and line.get(name) != wanted for name, wanted in dict(arm=arm, cycle=cycle, step=step).items()):
            return real(path, line)
        text = json.dumps(line) + "\\n"
        with open(path, "a") as file:
            file.write(text[:written])
        die()
    run_folder.add_line = function

def process(death, last):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if death:
                {"at": at, "line": line}[death[0]](*death[1:])
            if last and deaths:
                resume_experiment(folder, progress=False)  # with everything loaded anew
            else:
                run_experiment(config, prepared, progress=False, resume=folder)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

for death in deaths:
    code = process(death, False)
    if code != -signal.SIGKILL:
        sys.exit(f"the run that was to die at {death} ended with {code}")
sys.exit(process(None, True))
"""


def drive(folder, deaths, config=CONFIG):
    "A run in a folder, killed at each of these points and resumed after it."
    command = [sys.executable, "-c", DRIVER, json.dumps(asdict(config)), json.dumps(deaths), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def without_times(folder):
    return [json.dumps({name: value for name, value in line.items() if name not in ("time", "seconds")}) for line in read_lines(folder / "record.jsonl")]


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    return drive(tmp_path_factory.mktemp("whole") / "run", [])


def assert_same(folder, whole):
    assert without_times(folder) == without_times(whole)
    record = read_lines(folder / "record.jsonl")
    assert record[-1]["phase"] == "end" and (folder / "record.jsonl").read_bytes().endswith(b"\n")
    for name in ("config.json", "model/plasticity.json", "model/model.safetensors", "model/config.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}  # nothing half-written stays
    assert {path.name for path in (folder / "figures").iterdir()} == {path.name for path in (whole / "figures").iterdir()}
    perplexity = [[line["perplexity"] for line in read_lines(each / "record.jsonl") if line["phase"] == "summary"] for each in (folder, whole)]
    assert perplexity[0] == perplexity[1] and len(perplexity[0]) == 3


def test_the_uninterrupted_run_has_all_phases(uninterrupted):
    phases = [line["phase"] for line in read_lines(uninterrupted / "record.jsonl")]
    assert {"baseline", "measure", "choose", "prune", "train", "regrow", "recover", "arm", "remove", "save", "summary", "end"} == set(phases)
    assert not (uninterrupted / "checkpoints").exists()
    trained = {arm: [line["step"] for line in read_lines(uninterrupted / "record.jsonl") if line["phase"] == "train" and line["arm"] == arm] for arm in ("chosen", "random", "control")}
    assert set(map(tuple, trained.values())) == {(0, 3, 6, 6, 9, 12)}


def test_killed_while_recovering_and_while_saving(uninterrupted, tmp_path):
    deaths = [["line", "train", "chosen", 1, 3, 40], ["line", "train", "chosen", 1, 6], ["at", "storage", "seal", 1], ["line", "prune", "random", 2]]
    assert_same(drive(tmp_path / "run", deaths), uninterrupted)


@pytest.mark.slow
def test_killed_in_every_phase(uninterrupted, tmp_path):
    regrown = next(line for line in read_lines(uninterrupted / "record.jsonl") if line["phase"] == "regrow")
    deaths = [
        ["at", "experiment", "evaluate_model", 1], ["line", "baseline"],
        ["at", "arms", "measure_heads", 1], ["line", "measure", "chosen", 1, None, 100], ["at", "arms", "choose_heads", 1], ["line", "choose"], ["at", "arms", "apply_pruning_mask", 1],
        ["at", "arms", "compensate_heads", 1], ["at", "storage", "seal", 1], ["line", "prune", "chosen", 1],
        ["line", "train", "chosen", 1, 0], ["line", "train", "chosen", 1, 3, 50], ["line", "train", "chosen", 1, 6], ["line", "recover", "chosen", 1],
        ["at", "arms", "measure_heads", 1], ["at", "arms", "choose_heads", 1], ["at", "arms", "compensate_heads", 1], ["line", "train", "chosen", 2, 9], ["at", "storage", "seal", 1], ["line", "arm", "chosen"],
        ["at", "arms", "remove_heads", 1], ["line", "remove"], ["at", "experiment", "save_pruned", 1], ["at", "storage", "seal", 1], ["line", "save"], ["line", "summary", "chosen"],
        ["at", "arms", "choose_heads", 2], ["line", "train", "random", 2, 12], ["line", "recover", "random", 2], ["line", "train", "control", 1, 3], ["line", "recover", "control", 2],
        ["at", "experiment", "_save_figures", 1], ["line", "end", None, None, None, 20],
    ]
    assert_same(drive(tmp_path / "run", deaths), uninterrupted)
    before, after = [["line", "regrow", regrown["arm"], regrown["cycle"], regrown["step"], written] for written in (0, 10_000)]
    assert_same(drive(tmp_path / "regrow", [before, after]), uninterrupted)


def test_a_finished_run_is_read(uninterrupted, monkeypatch):
    monkeypatch.setattr(run_folder, "add_line", lambda path, line: pytest.fail(f"{line['phase']} was computed again"))
    before = (uninterrupted / "record.jsonl").read_bytes()
    result = resume_experiment(uninterrupted, progress=False)
    assert (uninterrupted / "record.jsonl").read_bytes() == before
    [last] = [line["perplexity"] for line in read_lines(uninterrupted / "record.jsonl") if line["phase"] == "summary" and line["arm"] == "chosen"]
    assert result.arms["chosen"]["final_metrics"]["perplexity"] == last == result.table[1]["perplexity"]
    weights = load_file(uninterrupted / "model" / "model.safetensors")
    assert all((result.model.state_dict()[name] == value).all() for name, value in weights.items())


def test_another_configuration_is_refused_by_its_fields(uninterrupted):
    other = replace(CONFIG, learning_rate=1e-4, strategy="random", output_dir="elsewhere")
    with pytest.raises(InvalidArgument, match=r"strategy \('taylor' there, 'random' now\), learning_rate \(0.0003 there, 0.0001 now\)"):
        run_experiment(other, resume=uninterrupted)


def test_no_run_no_resuming(tmp_path):
    with pytest.raises(StorageError, match="has no config.json, so no run was begun there"):
        resume_experiment(tmp_path)
    with pytest.raises(InvalidArgument, match="neither config nor resume"):
        run_experiment()


def test_a_record_that_was_altered_is_not_believed(tmp_path):
    with RunFolder(tmp_path / "run", CONFIG) as folder:
        folder.phase("choose", lambda: {})
    with RunFolder(tmp_path / "run") as folder, pytest.raises(StorageError, match="does not go with its config.json"):
        folder.phase("measure", lambda: {})


@pytest.fixture
def small_disk():
    "Nothing larger than 20 kB can be written: the system itself refuses, as a full disk does."
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size=20_000: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_in_the_middle_of_a_run(uninterrupted, tmp_path, small_disk):
    prepared = prepare_experiment(CONFIG)
    small_disk()
    with pytest.raises(StorageError, match="disk is full, or a limit on file sizes is reached; make room"):
        run_experiment(CONFIG, prepared, progress=False, resume=tmp_path / "run")
    phases = [line["phase"] for line in read_lines(tmp_path / "run" / "record.jsonl")]
    assert phases == ["baseline", "measure", "choose"]  # what follows has a model to save
    small_disk(2**40)
    resumed = run_experiment(CONFIG, prepared, progress=False, resume=tmp_path / "run")
    assert without_times(tmp_path / "run") == without_times(uninterrupted) and resumed.model is not None


def test_a_full_disk_leaves_whole_files_and_lines(tmp_path, small_disk):
    write_whole(tmp_path / "file", "old")
    add_line(tmp_path / "record", {"text": "first"})
    small_disk()
    with pytest.raises(StorageError, match="disk is full"):
        write_whole(tmp_path / "file", "x" * 30_000)
    with pytest.raises(StorageError, match="disk is full"):
        add_line(tmp_path / "record", {"text": "y" * 30_000})
    add_line(tmp_path / "record", {"text": "second"})
    assert (tmp_path / "file").read_text() == "old" and [line["text"] for line in read_lines(tmp_path / "record")] == ["first", "second"]
    assert {path.name for path in tmp_path.iterdir()} == {"file", "record"}


@pytest.mark.parametrize("folder", ["file/run", "/proc/run"])  # nobody can make folders there, root included
def test_a_folder_that_cannot_be_written_to(tmp_path, folder):
    (tmp_path / "file").write_text("mine")
    if folder.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("no /proc here")
    with pytest.raises(StorageError, match="could not be written"), RunFolder(tmp_path / folder, CONFIG):
        pass
    with pytest.raises(StorageError, match="could not be written"):
        run_experiment(replace(CONFIG, output_dir=str(tmp_path / folder)), object())
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tmp_path):
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed").chmod(0o500)
    with pytest.raises(StorageError, match="may not write there"), RunFolder(tmp_path / "closed" / "run", CONFIG):
        pass
