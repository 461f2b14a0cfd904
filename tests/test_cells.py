"""A sweep's cells: each is computed once, whatever fails, dies or is killed."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from neural_plasticity.cells import CellsFailed, cell_name, run_cells
from neural_plasticity.errors import InvalidArgument, StorageError, WrongType

MODULE = """
import os, time
from pathlib import Path

def work(number, log, device=None, slow=0):
    with open(log, "a") as file:
        file.write(f"{number}\\n")
    if number == 13:
        raise ValueError("thirteen\\nand more")
    if number == 99 and not Path(log + ".again").exists():
        Path(log + ".again").touch()
        os.kill(os.getpid(), 9)
    time.sleep(slow)
    import torch
    return {"square": number**2, "threads": torch.get_num_threads(), "where": device, "pid": os.getpid()}

def together(folder, number, device):
    "Waits until three processes are at it."
    Path(folder, str(os.getpid())).touch()
    while len(os.listdir(folder)) < 3:
        time.sleep(0.05)
    return {"pid": os.getpid(), "where": device}

def not_a_dict(number):
    return number

def other_number(number):
    return {"number": number + 1}
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    "A module that other processes can import, and a log of its calls."
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "cells_of_a_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path / "code")
    yield tmp_path
    sys.modules.pop("cells_of_a_test", None)


def calls(folder):
    return (folder / "log").read_text().split() if (folder / "log").exists() else []


def cells(folder, *numbers, **more):
    return [{"number": number, "log": str(folder / "log"), **more} for number in numbers]


def test_cells_are_computed_once_in_processes_and_rows_keep_the_order(module):
    rows = run_cells("cells_of_a_test:work", cells(module, 3, 1, 2, 1), module / "out", workers=2, devices=["cuda:0", "cuda:1"], progress=False)
    assert [row["number"] for row in rows] == [3, 1, 2, 1] and [row["square"] for row in rows] == [9, 1, 4, 1]
    assert sorted(calls(module)) == ["1", "2", "3"] and {row["threads"] for row in rows} == {1}
    assert {row["where"] for row in rows} <= {"cuda:0", "cuda:1"} and os.getpid() not in {row["pid"] for row in rows}
    again = run_cells("cells_of_a_test:work", cells(module, 1, 2, 3, 4), module / "out", workers=0, progress=False)
    assert again[:3] == [rows[1], rows[2], rows[0]] and calls(module)[3:] == ["4"]


def test_devices_go_round(module):
    (module / "meeting").mkdir()
    rows = run_cells("cells_of_a_test:together", [{"folder": str(module / "meeting"), "number": n} for n in range(3)], module / "out", workers=3, devices=["a", "b"], progress=False)
    assert len({row["pid"] for row in rows}) == 3 and sorted(row["where"] for row in rows) == ["a", "a", "b"]


def test_failures_are_recorded_and_tried_again(module):
    out = module / "out"
    with pytest.raises(CellsFailed, match=r"1 of 3 cells failed[^\n]*\n  number=13[^\n]*: ValueError: thirteen$") as error:
        run_cells("cells_of_a_test:work", cells(module, 5, 13, 6), out, progress=False)
    assert [row.get("square") for row in error.value.rows] == [25, None, 36]
    [failed] = [cell for path in out.iterdir() if "error" in (cell := json.loads(path.read_text()))]
    assert failed["error"] == "ValueError: thirteen" and "Traceback" in failed["traceback"]
    rows = run_cells("cells_of_a_test:work", cells(module, 5, 13, 6), out, workers=0, progress=False, failures="keep")
    assert "error" in rows[1] and calls(module) == ["5", "13", "6", "13"]


def test_a_worker_that_dies_costs_its_cell_only(module):
    out = module / "out"
    rows = run_cells("cells_of_a_test:work", cells(module, 99, 1, 2), out, progress=False, failures="keep")
    assert "exit code -9" in rows[0]["error"] and [row["square"] for row in rows[1:]] == [1, 4]
    assert run_cells("cells_of_a_test:work", cells(module, 99, 1, 2), out, progress=False)[0]["square"] == 9801


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_sweep_goes_on_and_leaves_nobody_behind(module, number):
    script = f"""
import signal, sys
sys.path.insert(0, {str(module / 'code')!r})
from neural_plasticity.cells import run_cells
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
if __name__ == "__main__":
    run_cells("cells_of_a_test:work", {cells(module, *range(4), slow=1.5)!r}, {str(module / 'out')!r}, workers=2, progress=False)
"""
    (module / "script.py").write_text(script)
    process = subprocess.Popen([sys.executable, str(module / "script.py")], stderr=subprocess.PIPE, text=True)
    while len(calls(module)) < 3:  # two cells are done or nearly so, a third has begun
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(number)
    assert "KeyboardInterrupt" in process.communicate()[1] or number == signal.SIGKILL
    time.sleep(3)
    assert len(calls(module)) <= 4  # no worker goes on by itself
    for path in (module / "out").glob("*.json"):
        assert json.loads(path.read_text())["result"]
    finished, before = len([*(module / "out").glob("*.json")]), len(calls(module))
    rows = run_cells("cells_of_a_test:work", cells(module, *range(4), slow=1.5), module / "out", workers=2, progress=False)
    assert [row["square"] for row in rows] == [0, 1, 4, 9] and len(calls(module)) - before == 4 - finished


def test_what_other_processes_cannot_use_is_refused(module):
    with pytest.raises(InvalidArgument, match="workers=0"):
        run_cells(lambda: {}, [{}], module / "out")
    with pytest.raises(InvalidArgument, match="names no function"):
        run_cells("math:nothing", [{}], module / "out")
    with pytest.raises(InvalidArgument, match="cannot be imported"):
        run_cells("no_such_module_here:f", [{}], module / "out")
    with pytest.raises(WrongType, match="cell 1"):
        run_cells("math:sqrt", [{"x": 1}, 3], module / "out")
    with pytest.raises(InvalidArgument, match="cell 0 cannot be written as JSON"):
        run_cells("math:sqrt", [{"x": object()}], module / "out")
    with pytest.raises(InvalidArgument, match="workers is -1"):
        run_cells("math:sqrt", [], module / "out", workers=-1)
    with pytest.raises(InvalidArgument, match="devices is 'cuda:0'"):
        run_cells("math:sqrt", [], module / "out", devices="cuda:0")
    assert not (module / "out").exists()


@pytest.mark.parametrize("function, words", [("not_a_dict", "a cell's result is a dict"), ("other_number", "other values to number")])
def test_results_that_would_mislead_fail(module, function, words):
    [row] = run_cells(f"cells_of_a_test:{function}", [{"number": 1}], module / "out", workers=0, progress=False, failures="keep")
    assert words in row["error"]


def test_a_foreign_file_is_not_taken_for_a_cell(module):
    out = module / "out"
    run_cells("cells_of_a_test:work", cells(module, 1), out, workers=0, progress=False)
    [path] = out.iterdir()
    path.write_text(path.read_text().replace('"number": 1', '"number": 2'))
    with pytest.raises(StorageError, match="is not a cell of cells_of_a_test:work"):
        run_cells("cells_of_a_test:work", cells(module, 1), out, workers=0, progress=False)


def test_a_folder_that_cannot_be(module):
    (module / "file").write_text("")
    with pytest.raises(StorageError, match="part of its path is a file"):
        run_cells("cells_of_a_test:work", cells(module, 1), module / "file" / "out", workers=0, progress=False)
    assert calls(module) == []


def test_names_are_files_everywhere():
    name = cell_name("f:g", {"model": "a/b\\c:d é*?", "x": 1e-5, "long": "y" * 300})
    assert len(name) < 120 and not set(name) & set('/\\:*?"<>| é')
    assert cell_name("f:g", {"x": 1}) != cell_name("f:h", {"x": 1})
