"""`repair_datasets_import()` in every conflict, each in a process of its own, with the real package `datasets`."""
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PRELUDE = """
import sys, types
from neural_plasticity.datasets_repair import datasets_conflict, repair_datasets_import
from neural_plasticity.errors import EnvironmentProblem
loaded = lambda: {name: module for name, module in sys.modules.items() if name.split(".")[0] == "datasets"}
path_before = list(sys.path)
def check_repaired():
    from datasets import Dataset, load_dataset
    import datasets
    assert load_dataset.__module__ == "datasets.load", load_dataset.__module__
    assert Dataset.from_dict({"text": ["one", "two"]})["text"][1] == "two"
    assert sys.path == path_before
    assert datasets_conflict() is None and repair_datasets_import().status == "intact"
"""


def run(code, folder, *flags, path=(), prelude=PRELUDE):
    "Run code in a fresh Python whose current folder is searched first; return what it printed."
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, path), str(ROOT)])}
    environ.pop("PYTHONSAFEPATH", None)
    result = subprocess.run(
        [sys.executable, *flags, "-c", prelude + textwrap.dedent(code)], cwd=folder, env=environ, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def local_folder(folder, init=True):
    (folder / "datasets").mkdir()
    (folder / "datasets" / "mine.py").write_text("value = 1\n")
    if init:
        (folder / "datasets" / "__init__.py").write_text("from datasets.mine import value\n")


@pytest.mark.parametrize("imported", [False, True])
def test_local_folder_with_init(tmp_path, imported):
    local_folder(tmp_path)
    dropped = ("datasets", "datasets.mine") if imported else ()
    run(
        f"""
        {"import datasets; assert datasets.value == 1" if imported else ""}
        assert "datasets" in datasets_conflict()
        repair = repair_datasets_import()
        assert (repair.status, repair.dropped, repair.kept) == ("repaired", {dropped}, ())
        assert "__init__.py" in repair.explanation
        check_repaired()
        """,
        tmp_path,
    )


def test_local_folder_without_init_does_not_hide_the_package(tmp_path):
    local_folder(tmp_path, init=False)
    run(
        """
        assert repair_datasets_import().status == "intact" and not loaded()
        check_repaired()
        """,
        tmp_path,
    )


def test_local_folder_without_init_loaded_before_the_package_was_there(tmp_path):
    local_folder(tmp_path, init=False)
    run(
        """
        sys.path[:] = [""]
        import datasets, datasets.mine
        assert datasets.__file__ is None
        sys.path[:] = path_before  # as after an installation from within the notebook
        assert repair_datasets_import().dropped == ("datasets", "datasets.mine")
        check_repaired()
        """,
        tmp_path,
    )


@pytest.mark.parametrize("imported", [False, True])
def test_local_file(tmp_path, imported):
    (tmp_path / "datasets.py").write_text("value = 1\n")
    run(
        f"""
        {"import datasets; assert datasets.value == 1" if imported else ""}
        assert "datasets.py" in datasets_conflict()
        assert repair_datasets_import().status == "repaired"
        check_repaired()
        """,
        tmp_path,
    )


def test_local_file_that_repairs_while_it_is_being_imported(tmp_path):
    (tmp_path / "datasets.py").write_text(
        "from neural_plasticity.datasets_repair import repair_datasets_import\n"
        "repair_datasets_import()\n"
        "from datasets import load_dataset\n"
    )
    run("import datasets; check_repaired()", tmp_path)


@pytest.mark.parametrize("stub", ["types.ModuleType('datasets')", "None"])
def test_stub(tmp_path, stub):
    run(
        f"""
        import transformers.utils
        sys.modules["datasets"] = {stub}
        assert "stub" in datasets_conflict()
        assert repair_datasets_import().dropped == ("datasets",)
        assert not hasattr(transformers.utils, "datasets")  # only who held the false module gets the real one
        check_repaired()
        """,
        tmp_path,
    )


def test_half_initialised_module(tmp_path):
    run(
        """
        import importlib.util
        spec = importlib.util.find_spec("datasets")
        sys.modules["datasets"] = importlib.util.module_from_spec(spec)  # genuine, but its code never ran
        assert "never finished" in datasets_conflict()
        assert repair_datasets_import().status == "repaired"
        check_repaired()
        """,
        tmp_path,
    )


def test_genuine_children_are_kept(tmp_path):
    run(
        """
        import datasets
        children = {name: module for name, module in loaded().items() if name != "datasets"}
        sys.modules["datasets"] = types.ModuleType("datasets")
        sys.modules["datasets.false"] = types.ModuleType("datasets.false")
        repair = repair_datasets_import()  # loading the children again would raise ArrowKeyError
        assert repair.dropped == ("datasets", "datasets.false") and set(repair.kept) == set(children)
        assert all(sys.modules[name] is module for name, module in children.items())
        import datasets
        assert datasets.features.features is children["datasets.features.features"]
        check_repaired()
        """,
        tmp_path,
    )


@pytest.mark.parametrize("imported", [False, True])
def test_nothing_broken_nothing_touched(tmp_path, imported):
    run(
        f"""
        {"import datasets" if imported else ""}
        before = loaded()
        repair = repair_datasets_import()
        assert (repair.status, repair.dropped, repair.kept) == ("intact", (), ())
        assert loaded() == before and bool(before) == {imported}
        """,
        tmp_path,
    )


def test_package_not_installed(tmp_path):
    run(
        """
        stub = sys.modules["datasets"] = types.ModuleType("datasets")
        try:
            repair_datasets_import()
        except EnvironmentProblem as error:
            assert "not installed" in str(error) and "pip install" in str(error), error
        else:
            raise AssertionError("no error")
        assert loaded() == {"datasets": stub}
        """,
        tmp_path,
        "-S",  # no site-packages
    )


def installed(folder, init):
    "A stand-in for the installed package, to break in ways in which the real one is not broken."
    (folder / "datasets").mkdir(parents=True)
    (folder / "datasets-9.9.dist-info").mkdir()
    (folder / "datasets-9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: datasets\nVersion: 9.9\n")
    (folder / "datasets" / "load.py").write_text("def load_dataset(): pass\n")
    # like the real one's Arrow types: a second import in the same process fails
    (folder / "datasets" / "features.py").write_text("import sys\nassert not hasattr(sys, 'twice')\nsys.twice = True\n")
    (folder / "datasets" / "__init__.py").write_text(init)


def test_nothing_is_lost_when_loading_fails(tmp_path):
    site = tmp_path / "site"
    installed(site, "from . import features\nimport a_missing_dependency\nfrom .load import load_dataset\n")
    local_folder(tmp_path)
    run(
        """
        import datasets, datasets.mine
        before = loaded()
        try:
            repair_datasets_import()
        except EnvironmentProblem as error:
            assert "a_missing_dependency" in str(error) and "pip install" in str(error), error
            assert isinstance(error.__cause__, ModuleNotFoundError)
        else:
            raise AssertionError("no error")
        assert {name: loaded()[name] for name in before} == before
        assert sys.path == path_before

        sys.modules["a_missing_dependency"] = types.ModuleType("a_missing_dependency")
        assert repair_datasets_import().kept == ("datasets.features",)  # the second attempt builds on the first
        from datasets import load_dataset
        """,
        tmp_path,
        path=[site],
    )


def test_refused_while_the_package_is_being_imported(tmp_path):
    site = tmp_path / "site"
    installed(
        site,
        "from neural_plasticity.datasets_repair import repair_datasets_import\n"
        "try:\n    repair_datasets_import()\n"
        "except RuntimeError as error:\n    refusal = str(error)\n"
        "from .load import load_dataset\n",
    )
    run(
        """
        import datasets
        assert "in progress" in datasets.refusal and "after it has finished" in datasets.refusal
        assert repair_datasets_import().status == "intact"
        """,
        tmp_path,
        path=[site],
    )


def test_trainer_imports_after_the_repair(tmp_path):
    run(
        """
        sys.modules["datasets"] = types.ModuleType("datasets")
        try:
            from transformers import Trainer
        except Exception as error:
            print(type(error).__name__)
        else:
            raise AssertionError("the stub does no harm: this test shows nothing")
        repair_datasets_import()
        from transformers import Trainer
        import transformers.trainer
        assert transformers.trainer.datasets.Dataset.__module__ == "datasets.arrow_dataset"
        """,
        tmp_path,
    )


def test_trainer_that_was_imported_before_the_repair(tmp_path):
    local_folder(tmp_path)
    run(
        """
        import transformers.trainer
        assert transformers.trainer.datasets.value == 1  # it took the local folder for the package
        repair_datasets_import()
        assert transformers.trainer.datasets.Dataset.__module__ == "datasets.arrow_dataset"
        """,
        tmp_path,
    )
