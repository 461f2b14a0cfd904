"""The command `neural-plasticity`: its help, its exit codes, what it says of mistakes, and what each command leaves behind."""
import csv
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import neural_plasticity
from neural_plasticity.cli import ABOUT, MORE, main
from neural_plasticity.data import load_embedded_text
from neural_plasticity.importance import CRITERIA
from neural_plasticity.probing import probe
from neural_plasticity.storage import load_pruned
from neural_plasticity.zoo import Outcome, Row, read_rows

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "import sys; from neural_plasticity.cli import main; sys.exit(main())"
SETTINGS = ["minimal=true", "training_steps=1", "block_size=32", "batch_size=2", "regrow_every=0", "compensate=false", "eval_batches=1", "keep_model=false", "device=cpu"]
SMALL = ("--batches", "1", "--batch-size", "2", "--block-size", "32", "--device", "cpu")


def command(*words, folder=None, flags=()):
    "The command in a process of its own, started in `folder`, without a network."
    environ = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *flags, "-c", COMMAND, *map(str, words)], cwd=folder, env=environ, capture_output=True, text=True, timeout=600
    )


@pytest.fixture
def inside(tmp_path, monkeypatch):
    "An empty folder to be in."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


# help


@pytest.mark.parametrize("words, text", [(["--help"], "neural-plasticity doctor"), (["--version"], neural_plasticity.__version__), (["demo", "--help"], "--prune-level"), (["zoo", "--help"], "--workers")])
def test_help_and_version(words, text, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0 and text in capsys.readouterr().out


@pytest.mark.parametrize("name", ABOUT)
def test_every_command_has_examples_that_fit_a_terminal(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([name, "--help"])
    said = capsys.readouterr().out
    examples = said.partition("examples:\n")[2].splitlines()
    assert examples[0].startswith(f"  neural-plasticity {name}") and max(map(len, said.splitlines())) <= 80


def test_the_examples_are_commands_that_can_be_read():
    from neural_plasticity.cli import _arguments

    for name, (_, examples) in ABOUT.items():
        for line in examples.strip().splitlines():
            words = line.split()
            assert words[:2] == ["neural-plasticity", name] and _arguments(words[1:]).parser.prog == f"neural-plasticity {name}"


def test_the_help_of_measure_names_every_criterion():
    assert set(re.findall(r"[a-z_]+", MORE["measure"])) - {"he", "criteria", "slow"} == set(CRITERIA)


def test_help_needs_nothing_heavy():
    "No torch, no transformers: the doctor must speak where they are missing, and help must come at once."
    done = subprocess.run([sys.executable, "-c", "import sys; from neural_plasticity.cli import _parser; _parser().format_help(); print(*{'torch', 'transformers', 'matplotlib'} & set(sys.modules))"],
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == [], done.stderr


def test_the_entry_point_is_this_command():
    scripts = importlib.metadata.entry_points(group="console_scripts", name="neural-plasticity")
    assert {script.load() for script in scripts} == {main}


# mistakes


@pytest.mark.parametrize("words, message", [
    (["doktor"], "there is no command 'doktor'; do you mean 'doctor'?"),
    (["doctor", "--fast"], "neural-plasticity doctor: there is no option --fast; there are"),
    (["prune", "embedded:gpt2", "out", "--levle", "0.4"], "there is no option --levle; do you mean '--level'?"),
    (["prune", "embedded:gpt2", "out", "--overwrit"], "do you mean '--overwrite'?"),
    (["prune", "embedded:gpt2", "out", "--level", "40"], "'40' is no share of the heads; 40 % is 0.4"),
    (["prune", "embedded:gpt2", "out", "--level", "half"], "'half' is no share of the heads; it is a number from 0 to 1"),
    (["prune", "embedded:gpt2"], "the following arguments are required: FOLDER"),
    (["prune", "embedded:gpt2", "out", "more"], "'more' is one word too many"),
    (["measure", "embedded:gpt2", "--criterai=taylor"], "there is no option --criterai; do you mean '--criteria'?"),
    (["sweep", "out", "--levels", "40"], "40 % is 0.4"),
    (["sweep", "out", "--seeds", "1.5"], "'1.5' should be"),
    (["sweep", "out", "minimal=true", "--wrokers", "2"], "there is no option --wrokers; do you mean '--workers'?"),
    (["demo", "--steps", "many"], "'many' should be a whole number of at least 1"),
    (["zoo", "--workers", "two"], "'two' should be a whole number"),
])
def test_what_is_misspelt_is_one_line_and_exit_code_2(words, message, capsys, inside):
    with pytest.raises(SystemExit) as end:
        main(words)
    said = capsys.readouterr()
    assert end.value.code == 2 and message in said.err and said.err.count("\n") == 1 and not said.out and not [*inside.iterdir()]


def test_without_a_command_the_help_is_shown(capsys):
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2 and "neural-plasticity measure embedded:gpt2" in capsys.readouterr().err


@pytest.mark.parametrize("words, message", [
    (["demo", "--device", "gpu"], "device is 'gpu'; allowed are 'cpu', 'cuda', 'cuda:N' and 'mps', or None to choose"),
    (["demo", "--strategy", "tailor"], "unknown strategy 'tailor'; do you mean 'taylor'?"),
    (["measure", "embedded:gpt2", "--criteria", "taylor,entrpy"], "unknown criterion 'entrpy'; do you mean 'entropy'?"),
    (["measure", "embedded:gpt2", "--out", "heads.xlsx"], "'heads.xlsx' should end in one of .json"),
    (["measure", "embedded:gtp2"], "embedded are 'embedded:gpt2', 'embedded:llama'"),
    (["measure", "./no-such-folder"], "there is no such folder"),
    (["measure", "nobody/no-such-model"], "offline mode is on"),
    (["measure", "embedded:gpt2", "--text", "no.txt"], "there is no such file or folder"),
    (["measure", "embedded:gpt2", "--block-size", "4096"], "block_size is 4096"),
    (["prune", "embedded:gpt2", "out", "--strategy", "fischer"], "unknown strategy 'fischer'; do you mean 'fisher'?"),
    (["report", "nowhere"], "'nowhere' is neither a run (record.jsonl) nor a sweep (cells)"),
    (["run", "prune_levle=0.4"], "'prune_levle' is no field of an experiment; do you mean 'prune_level'?"),
    (["run", "steps=4"], "do you mean 'training_steps'?"),
    (["run", "strategy=tayler"], "unknown strategy 'tayler'; do you mean 'taylor'?"),
    (["run", "missing.yaml"], "'missing.yaml' cannot be read: No such file or directory"),
    (["run", "--resume", "nowhere"], "'nowhere' has no config.json, so no run was begun there"),
    (["run", "prune_level=40"], "40 % is prune_level=0.4"),
    (["run", "device=gpu"], "device is 'gpu'"),
    (["sweep", "out", "--strategies", "best"], "unknown strategy 'best'"),
    (["sweep", "out", "--devices", "gpu:0"], "device is 'gpu:0'"),
    (["sweep", "out", "minimal=maybe"], "minimal is 'maybe'"),
])
def test_what_makes_no_sense_is_one_line_and_exit_code_1(words, message, capsys, inside):
    assert main(words) == 1
    said = capsys.readouterr()
    [line] = [line for line in said.err.splitlines() if line.startswith("neural-plasticity: ")]
    assert message in line and "Traceback" not in said.err and not [*inside.iterdir()]


# demo, measure, prune, report


def test_demo_prunes_and_recovers():
    result = command("demo", "--steps", "2", "--prune-level", "0.1", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("perplexity")]
    before, pruned, final = (float(line.split()[-1]) for line in lines)
    assert "4 heads pruned by taylor" in result.stdout  # floor(0.1 x 48)
    assert 1 < before < pruned


def test_measure_prints_the_heads_lowest_first(capsys):
    assert main(["measure", "embedded:gpt2", "--criteria", "taylor,magnitude", "--show", "0", *SMALL]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layer", "head", "taylor", "magnitude"] and "48 heads, 2 samples of embedded text" in lines[-1]
    values = [float(line.split()[2]) for line in lines[1:49]]
    assert values == sorted(values) and len({tuple(line.split()[:2]) for line in lines[1:49]}) == 48 and all("±" in line for line in lines[1:49])


def test_measure_writes_what_it_would_print(inside, capsys):
    assert main(["measure", "embedded:llama", "--criteria", "taylor,entropy", "--out", "a/heads.json", "--out", "heads.csv", "--out", "heads.png", *SMALL]) == 0
    assert capsys.readouterr().out.split() == [os.path.join("a", "heads.json"), "heads.csv", "heads-taylor.png", "heads-entropy.png"]
    found = json.loads((inside / "a" / "heads.json").read_text())
    with open(inside / "heads.csv") as file:
        rows = [*csv.DictReader(file)]
    assert found["model"] == "embedded:llama" and found["samples"] == 2
    for row in rows:
        assert float(row["taylor"]) == found["criteria"]["taylor"]["scores"][int(row["layer"])][int(row["head"])]
        assert float(row["entropy_stderr"]) == found["criteria"]["entropy"]["stderr"][int(row["layer"])][int(row["head"])]
    assert (inside / "heads-taylor.png").read_bytes().startswith(b"\x89PNG")


def test_prune_saves_a_smaller_model_that_measure_reads(inside, capsys):
    words = ["prune", "embedded:gpt2", "small", "--level", "0.25", "--strategy", "taylor", *SMALL]
    assert main(words) == 0
    said = capsys.readouterr().out
    model = load_pruned(inside / "small")
    assert re.search(r"heads +48 +36 +-25.0%", said) and len(probe(model).heads) == 36
    assert sum(len(line.split(": ")[1].split()) for line in said.splitlines() if line.startswith("layer ")) == 12
    [parameters] = [line.split() for line in said.splitlines() if line.startswith("parameters")]
    assert int(parameters[2].replace(",", "")) == sum(p.numel() for p in model.parameters()) < int(parameters[1].replace(",", ""))
    manifest = (inside / "small" / "plasticity.json").read_bytes()
    assert main(words) == 1 and "small is there already" in capsys.readouterr().err
    assert (inside / "small" / "plasticity.json").read_bytes() == manifest
    assert main([*words, "--level", "0.5", "--overwrite"]) == 0 and len(probe(load_pruned(inside / "small")).heads) == 24
    capsys.readouterr()
    assert main(["measure", "small", "--show", "1", *SMALL]) == 0 and "24 heads" in capsys.readouterr().out


def test_prune_never_replaces_what_it_did_not_write(inside, capsys):
    (inside / "mine").mkdir()
    (inside / "mine" / "thesis.txt").write_text("years of work")
    (inside / "file").write_text("also mine")
    words = ["--level", "0.1", "--strategy", "magnitude", "--no-compensation", *SMALL]
    assert main(["prune", "embedded:gpt2", "mine", "--overwrite", *words]) == 1
    assert main(["prune", "embedded:gpt2", "file", "--overwrite", *words]) == 1
    assert [path.read_text() for path in (inside / "mine" / "thesis.txt", inside / "file")] == ["years of work", "also mine"]
    assert capsys.readouterr().err.count("neural-plasticity: ") == 2


def test_an_interrupted_command_is_one_line_and_exit_code_130(monkeypatch, capsys):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("neural_plasticity.commands.measure", interrupted)
    assert main(["measure", "embedded:gpt2"]) == 130
    assert capsys.readouterr().err == "neural-plasticity: interrupted; nothing was kept; the same command begins anew\n"


# run and sweep


def test_a_run_from_a_file_and_resumed(tmp_path):
    (tmp_path / "small.yaml").write_text("minimal: true\nstrategy: taylor\ntraining_steps: 1\ncontrol: false\ndevice: cpu\noutput_dir: runs\n")
    first = command("run", "small.yaml", "prune_level=0.5", folder=tmp_path)
    assert first.returncode == 0, first.stderr
    run = tmp_path / "runs" / "001"
    assert json.loads((run / "config.json").read_text())["prune_level"] == 0.5 and "chosen     24" in first.stdout
    assert max(map(len, first.stdout.partition("\n\n")[0].splitlines())) <= 80
    record = (run / "record.jsonl").read_text().splitlines(keepends=True)
    (run / "record.jsonl").write_text("".join(record[:-1]) + record[-1][:20])  # killed in its last line
    again = command("run", "--resume", "runs/001", folder=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout == first.stdout and (run / "record.jsonl").read_text().splitlines(keepends=True)[:-1] == record[:-1]
    other = command("run", "small.yaml", "prune_level=0.25", "--resume", "runs/001", folder=tmp_path)
    assert other.returncode == 1 and "prune_level (0.5 there, 0.25 now)" in other.stderr
    page = command("report", "runs/001", folder=tmp_path)
    assert page.stdout.strip() == os.path.join("runs", "001", "report.html") and "<!doctype html>" in (run / "report.html").read_text()
    above = command("report", "runs", folder=tmp_path)
    assert above.returncode == 1 and f"runs below it are {os.path.join('runs', '001')}" in above.stderr


def start_sweep(folder, *words):
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    (folder / "text.txt").write_text("\n\n".join(address[:1000] for address in load_embedded_text("train")[:20]))
    settings = ["dataset_name=text.txt", *SETTINGS]
    return subprocess.Popen([sys.executable, "-c", COMMAND, "sweep", "sweep", "--strategies", "magnitude", "--levels", "0.25", "--seeds", "0", *words, *settings],
                            cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # what a shell starts in the background ignores it


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_sweep_goes_on_without_what_is_finished(number, tmp_path):
    cells = tmp_path / "sweep" / "cells"
    process = start_sweep(tmp_path)
    while not [*cells.glob("*.json")]:  # the first of three is finished
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 130 and said.splitlines()[-1] == "neural-plasticity: interrupted; the same command goes on, without what is finished" and "Traceback" not in said
    finished = {path: path.stat().st_mtime_ns for path in cells.glob("*.json")}
    assert 1 <= len(finished) < 3
    again = start_sweep(tmp_path)
    out, said = again.communicate(timeout=600)
    assert again.returncode == 0, said
    assert {path: path.stat().st_mtime_ns for path in finished} == finished and len([*cells.glob("*.json")]) == 3
    assert f"{len(finished)} of 3 cells were done before" in said and "3 of 3 cells" in said
    assert [line.split()[0] for line in out.splitlines()[1:4]] == ["magnitude", "random", "control"] and max(map(len, out.splitlines()[:4])) <= 80
    assert (tmp_path / "sweep" / "figure.png").read_bytes().startswith(b"\x89PNG") and "magnitude" in (tmp_path / "sweep" / "table.txt").read_text()


def test_a_run_that_fails_is_told_by_name_and_the_others_are_tabled(inside, capsys):
    words = ["sweep", "sweep", "control=false", *SETTINGS, "--strategies", "magnitude", "--seeds", "0", "--workers", "0"]
    assert main([*words, "--levels", "0.25,1"]) == 1  # a layer cannot lose all its heads
    said = capsys.readouterr()
    assert "1 of 2 runs failed (the same call tries them again):\n  magnitude 100% seed 0: InvalidArgument: " in said.err
    assert [line.split()[:2] for line in said.out.splitlines()[1:2]] == [["magnitude", "25%"]]
    assert main(["report", "sweep"]) == 0
    page = (inside / capsys.readouterr().out.strip()).read_text()
    assert "1 runs finished, 1 failed" in page and "magnitude 100% seed 0" in page and "http" not in page


# the zoo


def test_the_zoo_prints_a_line_for_each_model_and_the_counts(tmp_path):
    result = command("zoo", "--task", "causal-lm", "--types", "gpt2, mamba", "--workers", "2", "--out", str(tmp_path / "zoo.json"))
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert {line.split(":")[0] for line in lines[:2]} == {"causal-lm gpt2", "causal-lm mamba"} and lines[2] == ""
    assert lines[3].startswith("causal-lm: 2 entries, 2 built, 1 with attention, 1 gated, 1 removed")
    rows, about = read_rows(tmp_path / "zoo.json")
    assert [row.model_type for row in rows] == ["gpt2", "mamba"] and about["command"].startswith("neural-plasticity zoo --task causal-lm --types gpt2,mamba --workers 2 --out ")


def test_the_zoo_exits_1_if_something_failed_or_is_misspelt(monkeypatch, capsys):
    failed = Row("causal-lm", "gpt2", "GPT2LMHeadModel", "attention", stages={"gate": Outcome("failed", "because")})
    monkeypatch.setattr("neural_plasticity.zoo.sweep", lambda *args, on_row, **kwargs: on_row(failed) or [failed])
    assert main(["zoo"]) == 1
    assert "causal-lm gpt2: gate failed (because)" in capsys.readouterr().out
    monkeypatch.undo()
    assert main(["zoo", "--types", "gtp2"]) == 1 and main(["zoo", "--task", "poetry"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and "gtp2" in errors[0] and "poetry" in errors[1]
