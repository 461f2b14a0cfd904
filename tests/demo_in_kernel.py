"""Run a notebook in a kernel of another environment, a Colab-like one too, and say what an executed demo shows.

`.ci/matrix` runs this as a script in an environment of its own, so only nbclient and nbformat may be needed here."""
import argparse
import json
import os
from pathlib import Path

HERE = Path(__file__).resolve().parent
EXPLORER, COMPARISON, SETUP = "explore(", "comparison_table(result)", "environment = setup("  # what the cells that are looked at hold


def write_kernelspec(folder, python, colab=False, path=(), **environ):
    "Make the kernel `tested`, a Python with ipykernel and these folders on its path, inside a folder of Jupyter's data (`JUPYTER_DATA_DIR`, `JUPYTER_PATH`)."
    launcher = ["-m", "colab_kernel_launcher"] if colab else ["-m", "ipykernel_launcher"]
    environ["PYTHONPATH"] = os.pathsep.join(map(str, [HERE / "colab_like"] * colab + [*path]))
    spec = {"argv": [str(python), *launcher, "-f", "{connection_file}"], "display_name": "tested", "language": "python", "env": {key: str(value) for key, value in environ.items()}}
    target = Path(folder) / "kernels" / "tested" / "kernel.json"
    target.parent.mkdir(parents=True)
    target.write_text(json.dumps(spec), encoding="utf-8")


def execute(notebook, folder, cells=None, parameters=None, then=(), timeout=900):
    """Run a notebook file, or its first code cells, `then` more cells, in a folder and in the kernel `tested`; the parameters go into a cell behind the tagged one.
    Returns it executed, up to an error if there is one."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    page = nbformat.read(notebook, as_version=4)
    if cells is not None:
        codes = [number for number, cell in enumerate(page.cells) if cell.cell_type == "code"]
        page.cells = page.cells[:codes[cells - 1] + 1]
    for cell in page.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    page.metadata.pop("widgets", None)
    if parameters:
        [tagged] = [number for number, cell in enumerate(page.cells) if "parameters" in cell.metadata.get("tags", [])]
        page.cells.insert(tagged + 1, nbformat.v4.new_code_cell("\n".join(f"{name} = {value!r}" for name, value in parameters.items())))
    page.cells += [nbformat.v4.new_code_cell(source) for source in then]
    client = NotebookClient(page, kernel_name="tested", timeout=timeout, startup_timeout=120, resources={"metadata": {"path": str(folder)}})
    try:
        client.execute()
    except CellExecutionError:
        pass  # the notebook holds it
    return page


def text(value):
    return "".join(value)


def outputs(notebook, words=""):
    "The outputs of the code cells that hold these words."
    return [output for cell in notebook["cells"] if cell["cell_type"] == "code" and words in text(cell["source"]) for output in cell["outputs"]]


def shown(notebook):
    "What an executed demo shows: errors, the lines of the setup cell, the arms in the comparison, the explorer and the version of its widgets, pictures."
    state = notebook["metadata"].get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {}).get("state", {})
    tables = [text(output["data"]["text/html"]) for output in outputs(notebook, COMPARISON) if "text/html" in output.get("data", {})]
    views = [output["data"]["application/vnd.jupyter.widget-view+json"]["model_id"] for output in outputs(notebook, EXPLORER) if "application/vnd.jupyter.widget-view+json" in output.get("data", {})]
    return {
        "errors": [f"{output['ename']}: {output['evalue']}" for output in outputs(notebook) if output["output_type"] == "error"],
        "setup": "".join(text(output["text"]) for output in outputs(notebook, SETUP) if output["output_type"] == "stream"),
        "arms": [arm for arm in ("before", "chosen", "random", "control") if any(f">{arm}<" in table for table in tables)],
        "explorer": any(view in state for view in views),
        "sliders": sorted({model["model_module_version"] for model in state.values() if model["model_name"] == "FloatSliderModel"}),  # 1.5.0: ipywidgets 7, 2.0.0: 8
        "pictures": sum("image/png" in output.get("data", {}) for output in outputs(notebook)),
        "cells not run": sum(cell["cell_type"] == "code" and cell["execution_count"] is None for cell in notebook["cells"]),
    }


def missing(notebook, place, widgets):
    "What an executed demo should show on a place, with a major version of ipywidgets, and does not."
    found = shown(notebook)
    wanted = {
        "no error": not found["errors"],
        "every cell run": not found["cells not run"],
        f"setup names {place}": place in found["setup"],
        "four arms in the comparison": len(found["arms"]) == 4,
        "the explorer's widgets": found["explorer"] and found["sliders"] == [{7: "1.5.0", 8: "2.0.0"}[widgets]],
        "six pictures": found["pictures"] >= 6,
    }
    return [name for name, there in wanted.items() if not there]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Run a notebook in the kernel `tested` and write it, executed.")
    parser.add_argument("notebook")
    parser.add_argument("out", type=Path)
    parser.add_argument("--parameters", type=json.loads, default={}, help="JSON")
    options = parser.parse_args()
    page = execute(options.notebook, options.out.parent, parameters=options.parameters)
    options.out.write_text(json.dumps(page), encoding="utf-8")
