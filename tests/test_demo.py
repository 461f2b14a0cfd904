"""The demo notebook runs end to end under papermill, records what it says, and refuses what makes no sense in words."""
import json
import os
import re
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from demo_in_kernel import execute, shown, write_kernelspec
from house import NBS, ROOT
from local_hub import local_hub

for package in ("papermill", "ipykernel", "ipywidgets", "nbformat"):
    pytest.importorskip(package)

from transformers import AutoTokenizer  # noqa: E402

from neural_plasticity.data import embedded_folder, load_embedded_text, text_dataloader  # noqa: E402
from neural_plasticity.evaluation import evaluate_model  # noqa: E402
from neural_plasticity.experiment import ExperimentConfig, read_record  # noqa: E402
from neural_plasticity.storage import load_pruned  # noqa: E402

DEMO = NBS / "demo.ipynb"
SOURCES = ["".join(cell["source"]) for cell in json.loads(DEMO.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
MISTAKES = {  # parameters that make no sense, and words of the answer
    "a percentage": ({"prune_level": "40"}, "prune_level is 40; it is a fraction, so 40 % is prune_level=0.4"),
    "a word for a number": ({"prune_level": "abc"}, "prune_level is 'abc', a str; it must be a number"),
    "an unknown strategy": ({"strategy": "foo"}, "unknown strategy 'foo'; there are gradient, entropy,"),
    "a missing model": ({"model_name": "nobody/no-such-model"}, "model_name='embedded:gpt2'"),
    "a text on a hub out of reach": ({"dataset_name": "wikitext", "dataset_config": "wikitext-2-raw-v1"}, "offline mode is on (HF_HUB_OFFLINE)"),
    "an empty text file": ({"dataset_name": "empty.txt"}, "has no text in the split 'train': it is empty"),
    "no column of text": ({"dataset_name": "rows.jsonl"}, "text_column='title'"),
}


def papermill(folder, **parameters):
    "Run the demo in a folder; returns exit code, what the terminal showed (without colours), and the executed notebook."
    options = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "cache"), "NO_COLOR": "1"}
    done = subprocess.run([sys.executable, "-m", "papermill", str(DEMO), "out.ipynb", *options], cwd=folder, env=environ, capture_output=True, text=True, timeout=900)
    terminal = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
    return done.returncode, terminal, json.loads((folder / "out.ipynb").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    "All short runs, two at a time: those that must work first, because they take longest."
    jobs = {"minimal": {"minimal": True}, "entropy on a local model": {"minimal": True, "prune_level": 0.4, "strategy": "entropy", "model_name": embedded_folder() / "llama"}}
    jobs |= {name: parameters for name, (parameters, _) in MISTAKES.items()}
    folders = {name: tmp_path_factory.mktemp("demo") for name in jobs}
    (folders["an empty text file"] / "empty.txt").write_text("\n \n", encoding="utf-8")
    rows = [json.dumps({"title": f"title {i}", "body": f"body {i}"}) for i in range(20)]
    (folders["no column of text"] / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    with ThreadPoolExecutor(2) as pool:
        futures = {name: pool.submit(papermill, folders[name], **parameters) for name, parameters in jobs.items()}
        return {name: (folders[name], *future.result()) for name, future in futures.items()}


def outputs(notebook):
    return [output for cell in notebook["cells"] for output in cell.get("outputs", [])]


def check_run(folder, code, terminal, notebook):
    "A run that worked: no error, a whole record, figures, and a model that loads and is as good as recorded."
    assert code == 0, terminal[-3000:]
    assert not [output for output in outputs(notebook) if output["output_type"] == "error"]
    run = folder / "neural-plasticity-runs" / "001"
    config, record = json.loads((run / "config.json").read_text(encoding="utf-8")), read_record(run)
    arms = {line["arm"]: line["perplexity"] for line in record if line["phase"] == "arm"}
    assert set(arms) == {"chosen", "random", "control"}
    assert set(arms["control"]) == {"baseline", "final"}
    for name in ("chosen", "random"):
        assert set(arms[name]) == {"baseline", "pruned", "compensated", "final"} and arms[name]["baseline"] == arms["control"]["baseline"]
        assert arms[name]["pruned"] != arms[name]["baseline"]
    assert record[-1]["phase"] == "end"
    figures = {path.name for path in (run / "figures").iterdir()}
    assert {"gradient.png", "entropy.png", "decisions.png", "training.png", "timeline.png", "chosen_on_taylor.png"} <= figures
    model, tokenizer = load_pruned(run / "model"), AutoTokenizer.from_pretrained(run / "model")
    loader = text_dataloader(load_embedded_text("validation"), tokenizer, config["block_size"], config["batch_size"])
    assert evaluate_model(model, loader, max_eval_steps=config["eval_batches"])["perplexity"] == pytest.approx(arms["chosen"]["final"], rel=1e-4)
    return config, record


def test_a_minimal_run(runs):
    config, record = check_run(*runs["minimal"])
    assert config["minimal"] and config["strategy"] == "iterative" and config["training_steps"] == 6
    notebook = runs["minimal"][3]
    pictures = sum("image/png" in output.get("data", {}) for output in outputs(notebook))
    assert pictures >= 6 and any("data:image/png" in "".join(output.get("data", {}).get("text/html", "")) for output in outputs(notebook))
    said = "\n".join("".join(output["data"]["text/markdown"]) for output in outputs(notebook) if "text/markdown" in output.get("data", {}))
    [arm] = [line for line in record if line["phase"] == "arm" and line["arm"] == "chosen"]
    assert f"rose by **{arm['perplexity']['pruned'] - arm['perplexity']['baseline']:.2f}**" in said
    assert f"Without {len(arm['pruned_heads'])} of its 48 heads" in said


def test_another_strategy_on_a_local_model(runs):
    config, record = check_run(*runs["entropy on a local model"])
    assert config["strategy"] == "entropy" and config["model_name"] == str(embedded_folder() / "llama")
    assert [len(line["pruned_heads"]) for line in record if line["phase"] == "arm"][:2] == [config["prune_level"] * 48 // 1] * 2


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_the_run_with_words(runs, name):
    folder, code, terminal, notebook = runs[name]
    words = MISTAKES[name][1]
    assert code == 1 and words in " ".join(terminal.split())
    [error] = [output for output in outputs(notebook) if output["output_type"] == "error"]
    assert words in error["evalue"] and "\n" not in error["evalue"]
    assert not (folder / "neural-plasticity-runs").exists()  # nothing was begun


def test_the_parameters_are_those_of_an_experiment():
    from papermill.inspection import inspect_notebook

    found = inspect_notebook(DEMO)
    assert list(found) == ["model_name", "dataset_name", "dataset_config", "text_column", "prune_level", "strategy", "training_steps", "learning_rate", "block_size",
                           "batch_size", "seed", "device", "output_dir", "minimal"]
    assert all(entry["help"] and entry["inferred_type_name"] not in ("", "None") for entry in found.values())
    defaults = {name: eval(entry["default"]) for name, entry in found.items()}
    assert ExperimentConfig(**defaults).prune_level == 0.4
    from neural_plasticity.importance import CRITERIA
    from neural_plasticity.pruning import PruningStrategy

    assert set(re.findall(r"\w+", found["strategy"]["help"].split(":")[1])) == {*CRITERIA, *(strategy.value for strategy in PruningStrategy)}


def test_it_installs_on_colab_only():
    [setup] = [source for source in SOURCES if "pip install" in source]
    lines = setup.splitlines()
    [install] = [number for number, line in enumerate(lines) if "pip install" in line]
    assert lines[install - 1] == 'if "google.colab" in sys.modules and importlib.util.find_spec("neural_plasticity") is None:' and lines[install].startswith("    %pip install -q git+https://")


def test_one_edit_takes_model_and_text_from_the_hub(tmp_path, monkeypatch):
    edit = "# model_name, dataset_name, dataset_config = "
    assert sum(source.count(edit) for source in SOURCES) == 1
    (tmp_path / "edited.ipynb").write_text(DEMO.read_text(encoding="utf-8").replace(edit, edit.removeprefix("# ")), encoding="utf-8")
    wikitext = tmp_path / "hub" / "wikitext"  # not where the notebook runs: a folder of that name goes before the hub
    wikitext.mkdir(parents=True)
    for split in ("train", "validation"):
        (wikitext / f"{split}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in load_embedded_text(split)[:100]), encoding="utf-8")
    card = [{"config_name": "wikitext-2-raw-v1", "data_files": [{"split": split, "path": f"{split}.jsonl"} for split in ("train", "validation")]}]
    (wikitext / "README.md").write_text(f"---\nconfigs: {json.dumps(card)}\n---\n", encoding="utf-8")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    with local_hub({"models/distilgpt2": embedded_folder() / "gpt2", "datasets/Salesforce/wikitext": wikitext}) as (endpoint, asked):
        write_kernelspec(tmp_path / "jupyter", sys.executable, path=[ROOT], HF_ENDPOINT=endpoint, HF_HUB_OFFLINE=0, HF_HOME=tmp_path / "home", OMP_NUM_THREADS=1)
        page = execute(tmp_path / "edited.ipynb", tmp_path, cells=7, parameters={"minimal": True}, then=["print(config.model_name, config.dataset_name, config.dataset_config)"])
    assert not shown(page)["errors"] and shown(page)["explorer"]
    assert outputs(page)[-1]["text"] == "distilgpt2 wikitext wikitext-2-raw-v1\n"
    for source, file in (("distilgpt2", "model.safetensors"), ("datasets/Salesforce/wikitext", "train.jsonl")):
        assert any(path.startswith(f"{source}/resolve/") and path.endswith(f"/{file}") for path in asked), file


def arm(pruned, compensated, final, heads=19, revived=()):
    metrics = {f"{name}_metrics": None if value is None else {"perplexity": value} for name, value in dict(baseline=20.0, pruned=pruned, compensated=compensated, final=final).items()}
    return metrics | {"pruned_heads": [(0, i) for i in range(heads)], "revived_heads": list(revived)}


def conclusions(chosen, random, control):
    "What the cells between the figures say about given results."
    said = []
    names = dict(chosen=chosen, random=random, control=control, total=48, config=SimpleNamespace(strategy="taylor", training_steps=60), Markdown=str, display=said.append)
    for mark in ("def damage", "behind =", "verdict ="):
        [source] = [source for source in SOURCES if mark in source]
        exec(source, names)
    return "\n".join(said)


def test_conclusions_follow_from_the_numbers():
    good = conclusions(arm(24.0, 21.0, 20.5, revived=[(0, 1)]), arm(30.0, 24.0, 22.0), arm(20.0, None, 19.9))
    assert "rose by **4.00**" in good and "undid 75% of that" in good and "0.60 worse" in good and "**1 of 19** dormant heads were revived" in good
    assert good.count("beats") == 3 and "loses" not in good and "right after pruning, taylor beats the random choice: +4.00 against +10.00" in good
    bad = conclusions(arm(30.0, 31.0, 19.0), arm(24.0, 23.0, 22.0), arm(20.0, None, 21.5))
    assert "did not help" in bad and "2.50 better" in bad and "No dormant head was revived" in bad
    assert bad.count("**loses to**") == 2 and bad.count("beats") == 1
    lucky = conclusions(arm(19.5, 19.4, 19.3), arm(19.5, 19.0, 22.0), arm(20.0, None, 19.3))
    assert "did not rise (-0.50)" in lucky and "ties with" in lucky
    overshot = conclusions(arm(22.0, 19.0, 19.0), arm(22.0, 19.0, 22.0), arm(20.0, None, 19.3))
    assert "undid all of that, and more" in overshot


@pytest.mark.slow
def test_the_defaults_take_under_three_minutes_and_three_gigabytes(tmp_path):
    begin = time.monotonic()
    config, record = check_run(tmp_path, *papermill(tmp_path))
    print(f"{time.monotonic() - begin:.0f} s, {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20:.2f} GiB")
    assert not config["minimal"] and resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 3 * 2**20  # KiB
    [chosen] = [line["perplexity"] for line in record if line["phase"] == "arm" and line["arm"] == "chosen"]
    [random] = [line["perplexity"] for line in record if line["phase"] == "arm" and line["arm"] == "random"]
    assert chosen["compensated"] < chosen["pruned"] and chosen["final"] < random["final"]
