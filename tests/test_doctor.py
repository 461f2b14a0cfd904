"""`neural-plasticity doctor` finds what is wrong with an installation and says what to do."""
import hashlib
import importlib
import importlib.metadata
import json
import os
import sys
from email.message import Message
from types import SimpleNamespace

import pytest
from test_cli import command

from neural_plasticity import doctor
from neural_plasticity.cli import main
from neural_plasticity.doctor import EMBEDDED_FILES, Check


def states(checks):
    return {check.name: check.state for check in checks}


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
    (check,) = doctor.check_datasets()
    assert check.state == "wrong" and os.path.join("datasets", "__init__.py") in check.found and "setup()" in check.remedy
    (tmp_path / "datasets" / "__init__.py").unlink()  # a folder of data hides nothing
    assert states(doctor.check_datasets()) == {"import datasets": "ok"}


@pytest.mark.parametrize("name, state, code", [("ok", "ok", 0), ("note", "note", 0), ("wrong", "wrong", 1)])
def test_exit_code_and_remedies(name, state, code, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CHECKS", (lambda: [Check("first", "ok", "fine")], lambda: [Check(name, state, "found this", "do that")]))
    assert main(["doctor"]) == code
    printed = capsys.readouterr().out
    assert "found this" in printed and "-> do that" in printed and ("Nothing is wrong." in printed) == (code == 0)


def test_a_look_that_fails_is_a_finding_and_the_others_go_on(monkeypatch, capsys):
    def check_broken():
        raise OSError("cannot look")

    monkeypatch.setattr(doctor, "CHECKS", (check_broken, lambda: [Check("second", "ok", "was reached")]))
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
    checks = {check.name: check for check in doctor.check_packages()}
    assert states(checks.values()) == {"Python": "ok", "torch": "wrong", "transformers": "ok", "datasets": "ok", "accelerate": "wrong",
                                       "ipywidgets": "wrong", "papermill": "note"}  # fmt: skip
    assert "2.5.1" in checks["torch"].found and checks["torch"].remedy == "pip install 'torch>=2.6' --upgrade"
    assert checks["accelerate"].remedy == "pip install 'accelerate>=1.1'"

    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: metadata(">=99"))
    assert states(doctor.check_packages()) == {"Python": "wrong"}


def test_the_real_requirements_are_looked_at():
    names = set(states(doctor.check_packages()))
    assert {"Python", "torch", "transformers", "datasets", "accelerate", "ipywidgets", "papermill", "ipykernel"} <= names
    assert "nbdev" not in names


def test_a_folder_that_is_not_installed_is_told(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "metadata", missing)
    (check,) = doctor.check_packages()
    assert check.state == "wrong" and "pip install -e ." in check.remedy


def test_packages_that_do_not_load_are_found(monkeypatch):
    real = importlib.import_module

    def import_module(name, package=None):
        if name == "transformers":
            raise RuntimeError("Failed to import transformers.trainer\nbecause of this and that")
        return SimpleNamespace() if name == "matplotlib.figure" else real(name, package)

    monkeypatch.setattr(importlib, "import_module", import_module)
    checks = {check.name: check for check in doctor.check_imports()}
    assert states(checks.values()) == {"transformers.Trainer": "wrong", "matplotlib.figure.Figure": "wrong"}
    assert checks["transformers.Trainer"].found == "RuntimeError: Failed to import transformers.trainer"
    assert checks["transformers.Trainer"].remedy == "pip install --force-reinstall transformers"


@pytest.mark.parametrize("program, state", [(sys.executable, "ok"), ("python3.11", "ok"), ("/nowhere/bin/python", "wrong"), ("/bin/sh", "note")])
def test_the_kernel_is_there_and_runs_this_python(program, state, monkeypatch):
    from jupyter_client.kernelspec import KernelSpecManager

    monkeypatch.setattr(KernelSpecManager, "get_kernel_spec", lambda self, name: SimpleNamespace(argv=[program, "-m", "ipykernel_launcher"]))
    (check,) = doctor.check_kernel()
    assert check.state == state and bool(check.remedy) == (state != "ok")


def test_a_missing_kernel_is_wrong(monkeypatch):
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    def missing(self, name):
        raise NoSuchKernel(name)

    monkeypatch.setattr(KernelSpecManager, "get_kernel_spec", missing)
    (check,) = doctor.check_kernel()
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
    (check,) = doctor.check_embedded(embedded)
    assert (check.state, check.found) == ("ok", f"{len(EMBEDDED_FILES)} there, 2 checksums right")


@pytest.mark.parametrize("file", ["text/train.txt.gz", "gpt2/model.safetensors"])
def test_an_altered_embedded_file_is_found(embedded, file):
    (embedded / file).write_text("something else")
    (check,) = doctor.check_embedded(embedded)
    assert (check.state, check.found) == ("wrong", f"altered: {file}")


@pytest.mark.parametrize("file", EMBEDDED_FILES)
def test_a_missing_embedded_file_is_found(embedded, file):
    (embedded / file).unlink()
    (check,) = doctor.check_embedded(embedded)
    assert (check.state, check.found) == ("wrong", f"missing: {file}")


def test_an_unreadable_manifest_is_a_finding(embedded, monkeypatch):
    (embedded / "training.json").write_text("{")
    monkeypatch.setattr(doctor, "CHECKS", (lambda: doctor.check_embedded(embedded),))
    (check,) = doctor.diagnose()
    assert check.state == "wrong" and "JSONDecodeError" in check.found


def test_the_shipped_files_are_whole():
    (check,) = doctor.check_embedded()
    assert check.state == "ok", check.found
