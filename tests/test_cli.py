"""The command `neural-plasticity`: the doctor finds what is wrong and says what to do; help, version and exit codes."""
import hashlib
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from email.message import Message
from pathlib import Path
from types import SimpleNamespace

import pytest

import neural_plasticity
from neural_plasticity import cli
from neural_plasticity.cli import EMBEDDED_FILES, Check, main
from neural_plasticity.zoo import Outcome, Row, read_rows

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "import sys; from neural_plasticity.cli import main; sys.exit(main())"


def command(*words, folder=None, flags=()):
    "The command in a process of its own, started in `folder`."
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *flags, "-c", COMMAND, *words], cwd=folder, env=environ, capture_output=True, text=True, timeout=600
    )


def states(checks):
    return {check.name: check.state for check in checks}


# the command


@pytest.mark.parametrize("words, text", [(["--help"], "neural-plasticity doctor   "), (["--version"], neural_plasticity.__version__), (["demo", "--help"], "--prune-level"), (["zoo", "--help"], "--workers")])
def test_help_and_version(words, text, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0 and text in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["doktor"], ["doctor", "--fast"], ["demo", "--steps", "many"], ["zoo", "--workers", "two"]])
def test_a_misspelt_command_exits_2(words, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2 and "usage: neural-plasticity" in capsys.readouterr().err


def test_the_entry_point_is_this_command():
    scripts = importlib.metadata.entry_points(group="console_scripts", name="neural-plasticity")
    assert {script.load() for script in scripts} == {main}


def test_a_library_error_is_one_line_and_exit_code_1(capsys):
    assert main(["demo", "--device", "gpu"]) == 1
    assert capsys.readouterr().err == "neural-plasticity: device is 'gpu'; allowed are 'cpu', 'cuda', 'cuda:N' and 'mps', or None to choose\n"


def test_demo_prunes_and_recovers():
    result = command("demo", "--steps", "2", "--prune-level", "0.1", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("perplexity")]
    before, pruned, final = (float(line.split()[-1]) for line in lines)
    assert "4 heads pruned by taylor" in result.stdout  # floor(0.1 x 48)
    assert 1 < before < pruned


# experiments


@pytest.mark.parametrize("words, message", [
    (["run", "prune_levle=0.4"], "'prune_levle' is no field of an experiment; do you mean 'prune_level'?"),
    (["run", "missing.yaml"], "'missing.yaml' cannot be read: No such file or directory"),
    (["run", "--resume", "nowhere"], "'nowhere' has no config.json, so no run was begun there"),
    (["run", "prune_level=40"], "40 % is prune_level=0.4"),
    (["sweep", "out", "--seeds", "1.5"], "--seeds whole numbers such as 0,1,2"),
    (["sweep", "out", "--strategies", "best"], "unknown strategy 'best'"),
])
def test_mistakes_in_experiments_are_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not [*tmp_path.iterdir()]


def test_a_run_from_a_file_and_resumed(tmp_path):
    (tmp_path / "small.yaml").write_text("minimal: true\nstrategy: taylor\ntraining_steps: 1\ncontrol: false\ndevice: cpu\noutput_dir: runs\n")
    first = command("run", "small.yaml", "prune_level=0.5", folder=tmp_path)
    assert first.returncode == 0, first.stderr
    run = tmp_path / "runs" / "001"
    assert json.loads((run / "config.json").read_text())["prune_level"] == 0.5 and "chosen     24" in first.stdout
    record = (run / "record.jsonl").read_text().splitlines(keepends=True)
    (run / "record.jsonl").write_text("".join(record[:-1]) + record[-1][:20])  # killed in its last line
    again = command("run", "--resume", "runs/001", folder=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout == first.stdout and (run / "record.jsonl").read_text().splitlines(keepends=True)[:-1] == record[:-1]
    other = command("run", "small.yaml", "prune_level=0.25", "--resume", "runs/001", folder=tmp_path)
    assert other.returncode == 1 and "prune_level (0.5 there, 0.25 now)" in other.stderr


# the zoo


def test_the_zoo_prints_a_line_for_each_model_and_the_counts(tmp_path):
    result = command("zoo", "--task", "causal-lm", "--types", "gpt2, mamba", "--workers", "2", "--out", str(tmp_path / "zoo.json"))
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert {line.split(":")[0] for line in lines[:2]} == {"causal-lm gpt2", "causal-lm mamba"} and lines[2] == ""
    assert lines[3].startswith("causal-lm: 2 entries, 2 built, 1 with attention, 1 gated, 1 removed")
    rows, about = read_rows(tmp_path / "zoo.json")
    assert [row.model_type for row in rows] == ["gpt2", "mamba"] and about["command"].startswith("neural-plasticity zoo --task causal-lm --types gpt2, mamba --workers 2 --out ")


def test_the_zoo_exits_1_if_something_failed_or_is_misspelt(monkeypatch, capsys):
    failed = Row("causal-lm", "gpt2", "GPT2LMHeadModel", "attention", stages={"gate": Outcome("failed", "because")})
    monkeypatch.setattr("neural_plasticity.zoo.sweep", lambda *args, on_row, **kwargs: on_row(failed) or [failed])
    assert main(["zoo"]) == 1
    assert "causal-lm gpt2: gate failed (because)" in capsys.readouterr().out
    monkeypatch.undo()
    assert main(["zoo", "--types", "gtp2"]) == 1 and main(["zoo", "--task", "poetry"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and "gtp2" in errors[0] and "poetry" in errors[1]


# the doctor


def test_this_installation_is_well():
    result = command("doctor")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Nothing is wrong." in result.stdout and "WRONG" not in result.stdout


def test_the_doctor_speaks_where_nothing_is_installed():
    result = command("doctor", flags=["-S"])  # no site-packages: no torch, no transformers, no packaging
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    for words in ("WRONG packaging", "WRONG torch.Tensor", "pip install 'datasets>=3.6'", "things are wrong"):
        assert words in result.stdout, result.stdout


def test_a_local_datasets_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").write_text("")
    monkeypatch.chdir(tmp_path)
    (check,) = cli.check_datasets()
    assert check.state == "wrong" and os.path.join("datasets", "__init__.py") in check.found and "setup()" in check.remedy
    (tmp_path / "datasets" / "__init__.py").unlink()  # a folder of data hides nothing
    assert states(cli.check_datasets()) == {"import datasets": "ok"}


@pytest.mark.parametrize("name, state, code", [("ok", "ok", 0), ("note", "note", 0), ("wrong", "wrong", 1)])
def test_exit_code_and_remedies(name, state, code, monkeypatch, capsys):
    monkeypatch.setattr(cli, "CHECKS", (lambda: [Check("first", "ok", "fine")], lambda: [Check(name, state, "found this", "do that")]))
    assert main(["doctor"]) == code
    printed = capsys.readouterr().out
    assert "found this" in printed and "-> do that" in printed and ("Nothing is wrong." in printed) == (code == 0)


def test_a_look_that_fails_is_a_finding_and_the_others_go_on(monkeypatch, capsys):
    def check_broken():
        raise OSError("cannot look")

    monkeypatch.setattr(cli, "CHECKS", (check_broken, lambda: [Check("second", "ok", "was reached")]))
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "OSError: cannot look" in printed and "was reached" in printed


def metadata(python, *requirements):
    message = Message()
    message["Requires-Python"] = python
    for line in requirements:
        message["Requires-Dist"] = line
    return message


def test_packages_are_held_against_the_installed_metadata(monkeypatch):
    versions = {"torch": "2.5.1", "transformers": "5.0.0", "ipywidgets": "7.6", "datasets": "4.0.0rc1"}

    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    requirements = ["torch>=2.6", "transformers>=5.0", "datasets>=3.6", "accelerate>=1.1", "ipywidgets>=7.7; extra == 'demo'",
                    "papermill>=2.6; extra == 'demo'", "nbdev==2.4.14; extra == 'dev'", "nothing>=1; python_version < '3'"]  # fmt: skip
    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: metadata(">=3.10", *requirements))
    monkeypatch.setattr(importlib.metadata, "version", version)
    checks = {check.name: check for check in cli.check_packages()}
    assert states(checks.values()) == {"Python": "ok", "torch": "wrong", "transformers": "ok", "datasets": "ok", "accelerate": "wrong",
                                       "ipywidgets": "wrong", "papermill": "note"}  # fmt: skip
    assert "2.5.1" in checks["torch"].found and checks["torch"].remedy == "pip install 'torch>=2.6' --upgrade"
    assert checks["accelerate"].remedy == "pip install 'accelerate>=1.1'"

    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: metadata(">=99"))
    assert states(cli.check_packages()) == {"Python": "wrong"}


def test_the_real_requirements_are_looked_at():
    names = set(states(cli.check_packages()))
    assert {"Python", "torch", "transformers", "datasets", "accelerate", "ipywidgets", "papermill", "ipykernel"} <= names
    assert "nbdev" not in names


def test_a_folder_that_is_not_installed_is_told(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "metadata", missing)
    (check,) = cli.check_packages()
    assert check.state == "wrong" and "pip install -e ." in check.remedy


def test_packages_that_do_not_load_are_found(monkeypatch):
    real = importlib.import_module

    def import_module(name, package=None):
        if name == "transformers":
            raise RuntimeError("Failed to import transformers.trainer\nbecause of this and that")
        return SimpleNamespace() if name == "matplotlib.figure" else real(name, package)

    monkeypatch.setattr(importlib, "import_module", import_module)
    checks = {check.name: check for check in cli.check_imports()}
    assert states(checks.values()) == {"transformers.Trainer": "wrong", "matplotlib.figure.Figure": "wrong"}
    assert checks["transformers.Trainer"].found == "RuntimeError: Failed to import transformers.trainer"
    assert checks["transformers.Trainer"].remedy == "pip install --force-reinstall transformers"


@pytest.mark.parametrize("program, state", [(sys.executable, "ok"), ("python3.11", "ok"), ("/nowhere/bin/python", "wrong"), ("/bin/sh", "note")])
def test_the_kernel_is_there_and_runs_this_python(program, state, monkeypatch):
    from jupyter_client.kernelspec import KernelSpecManager

    monkeypatch.setattr(KernelSpecManager, "get_kernel_spec", lambda self, name: SimpleNamespace(argv=[program, "-m", "ipykernel_launcher"]))
    (check,) = cli.check_kernel()
    assert check.state == state and bool(check.remedy) == (state != "ok")


def test_a_missing_kernel_is_wrong(monkeypatch):
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    def missing(self, name):
        raise NoSuchKernel(name)

    monkeypatch.setattr(KernelSpecManager, "get_kernel_spec", missing)
    (check,) = cli.check_kernel()
    assert check.state == "wrong" and "neural_plasticity[demo]" in check.remedy


@pytest.fixture
def embedded(tmp_path):
    "A folder laid out as the embedded one, with both manifests."
    for file in EMBEDDED_FILES:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(file)
    checksum = lambda file: hashlib.sha256(file.encode()).hexdigest()
    (tmp_path / "text" / "manifest.json").write_text(json.dumps({"train": {"file": "train.txt.gz", "file_sha256": checksum("text/train.txt.gz")}}))
    (tmp_path / "training.json").write_text(json.dumps({"seed": 0, "gpt2": {"sha256": checksum("gpt2/model.safetensors")}}))
    return tmp_path


def test_embedded_files_that_are_whole(embedded):
    (check,) = cli.check_embedded(embedded)
    assert (check.state, check.found) == ("ok", f"{len(EMBEDDED_FILES)} there, 2 checksums right")


@pytest.mark.parametrize("file", ["text/train.txt.gz", "gpt2/model.safetensors"])
def test_an_altered_embedded_file_is_found(embedded, file):
    (embedded / file).write_text("something else")
    (check,) = cli.check_embedded(embedded)
    assert (check.state, check.found) == ("wrong", f"altered: {file}")


@pytest.mark.parametrize("file", EMBEDDED_FILES)
def test_a_missing_embedded_file_is_found(embedded, file):
    (embedded / file).unlink()
    (check,) = cli.check_embedded(embedded)
    assert (check.state, check.found) == ("wrong", f"missing: {file}")


def test_an_unreadable_manifest_is_a_finding(embedded, monkeypatch):
    (embedded / "training.json").write_text("{")
    monkeypatch.setattr(cli, "CHECKS", (lambda: cli.check_embedded(embedded),))
    (check,) = cli.diagnose()
    assert check.state == "wrong" and "JSONDecodeError" in check.found


def test_the_shipped_files_are_whole():
    (check,) = cli.check_embedded()
    assert check.state == "ok", check.found
