"""Experiments: texts that never mix, a configuration that is checked, arms that do what one plain cycle does, sweeps with one table."""

import copy
import json
from dataclasses import asdict, replace

import pytest
import torch

from neural_plasticity import arms, experiment, sources, training
from neural_plasticity.cells import CellsFailed
from neural_plasticity.config import ExperimentConfig
from neural_plasticity.errors import InvalidArgument, MissingSplit, StorageError, WrongType
from neural_plasticity.evaluation import evaluate_model
from neural_plasticity.experiment import prepare_experiment, read_record, run_experiment
from neural_plasticity.gates import state_of
from neural_plasticity.importance import measure_heads
from neural_plasticity.regrowth import PlasticitySchedule
from neural_plasticity.sources import load_splits, load_texts
from neural_plasticity.sweep import mean_and_error, run_sweep
from neural_plasticity.training import run_plasticity_loop

PARAGRAPHS = [f"Paragraph number {number} of a small text." for number in range(30)]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "small.txt"
    path.write_text("\n\n".join(PARAGRAPHS))
    return path


def test_a_plain_file_is_split_three_ways(file):
    with pytest.raises(MissingSplit, match="there are 'train'"):
        load_texts(str(file), split="validation")
    train, selection, validation = load_splits(str(file))
    assert sorted(train + selection + validation) == sorted(PARAGRAPHS) and len(validation) == 3 and len(selection) == 3


def test_a_validation_split_that_cannot_be_read_is_an_error(file, monkeypatch):
    def broken(name, split=None, **source):
        if split == "validation":
            raise InvalidArgument("text_column is 'text', but that column is not there")
        return load_texts(name, split=split, **source)

    monkeypatch.setattr(sources, "load_texts", broken)
    with pytest.raises(InvalidArgument, match="text_column"):
        load_splits(str(file))


SMALL = ExperimentConfig(minimal=True, device="cpu", strategy="taylor", training_steps=4, eval_interval=2, regrow_every=2, block_size=32, eval_batches=1)


@pytest.fixture(scope="module")
def ready():
    return prepare_experiment(SMALL)


def test_one_cycle_is_the_plasticity_loop(ready, tmp_path):
    config = replace(SMALL, prune_level=0.5, control=False, output_dir=str(tmp_path))
    plain = run_plasticity_loop(copy.deepcopy(ready.model), ready.in_order(1), ready.validation, 0.5, "taylor", config.learning_rate, config.training_steps, selection_dataloader=ready.selection,
                                selection_batches=config.selection_batches, schedule=PlasticitySchedule(regrow_every=2), eval_interval=2, progress=False)
    arm = run_experiment(config, ready, progress=False).arms["chosen"]
    assert arm["pruned_heads"] == plain["pruned_heads"] and arm["revived_heads"] == plain["revived_heads"] and torch.equal(arm["pruning_mask"], plain["pruning_mask"])
    for stage in ("baseline", "pruned", "compensated", "final"):
        assert arm[f"{stage}_metrics"] == plain[f"{stage}_metrics"], stage
    assert str(arm["training_metrics"]) == str(plain["training_metrics"]) and arm["recovery_rate"] == plain["recovery_rate"]
    assert plain.keys() <= arm.keys()


def test_no_model_is_evaluated_or_measured_twice(ready, tmp_path, monkeypatch):
    "In a run of all three arms: each evaluation sees other weights or other gates than every one before, and heads are measured for the figures once."
    seen, measured = [], []

    def state(model):
        gates = state_of(model).gates.tolist() if state_of(model) else None
        return hash((str(gates), *(value.double().sum().item() for value in model.state_dict().values())))

    def evaluate(model, *args, **options):
        seen.append(state(model))
        return evaluate_model(model, *args, **options)

    def measure(model, *args, **options):
        measured.append(state(model))
        return measure_heads(model, *args, **options)

    for module in (arms, experiment, training):
        monkeypatch.setattr(module, "evaluate_model", evaluate)
    monkeypatch.setattr(arms, "measure_heads", measure)
    result = run_experiment(replace(SMALL, prune_level=0.5, output_dir=str(tmp_path)), ready, progress=False)
    steps = SMALL.training_steps // SMALL.eval_interval
    assert len(seen) == len(set(seen)) == 1 + 2 * (2 + steps) + steps  # before; pruned, compensated and recovering, twice; the control
    assert len(measured) == 1 and all(result.arms[name]["grad_norm_values"].equal(result.arms["chosen"]["grad_norm_values"]) for name in ("chosen", "random"))
    for name in ("chosen", "random"):
        arm = result.arms[name]
        assert arm["training_metrics"]["eval_loss"][0] == arm["compensated_metrics"]["loss"] and result.arms["control"]["training_metrics"]["eval_loss"][0] == arm["baseline_metrics"]["loss"]


def test_cycles_prune_in_steps(ready, tmp_path):
    config = replace(SMALL, levels=(0.25, 0.375, 0.5), control=False, regrow_every=0, output_dir=str(tmp_path))
    result = run_experiment(config, ready, progress=False)
    assert [len(cycle["pruned_heads"]) for cycle in result.arms["chosen"]["cycles"]] == [12, 6, 6] and result.table[1]["heads"] == 24
    measured = [line["gradient"] for line in read_record(result.folder) if line["phase"] == "measure"]
    assert len(measured) == 3 and measured[0] != measured[1] != measured[2]  # each cycle measures the model that it finds
    assert result.arms["chosen"]["training_metrics"]["step"] == [0, 2, 4, 4, 6, 8, 8, 10, 12]


def test_nothing_compensated_nothing_regrown(ready, tmp_path):
    result = run_experiment(replace(SMALL, compensate=False, regrow_every=0, control=False, prune_level=0.5, output_dir=str(tmp_path), keep_model=False), ready, progress=False)
    assert result.arms["chosen"]["compensated_metrics"] is None and not result.arms["chosen"]["revived_heads"]
    assert not (result.folder / "model").exists() and not (result.folder / "checkpoints").exists() and result.model is not None


def test_removed_before_recovery(ready, tmp_path):
    result = run_experiment(replace(SMALL, mode="remove", control=False, prune_level=0.5, output_dir=str(tmp_path), keep_checkpoints=True), ready, progress=False)
    assert result.table[1]["heads"] == 24 and result.table[1]["parameters"] < result.table[0]["parameters"]
    assert [path.name for path in (result.folder / "checkpoints").iterdir()] == ["chosen-1-remove"]


def test_what_it_learns_from_matters(ready, tmp_path):
    ends = [run_experiment(replace(SMALL, distill=distill, control=False, prune_level=0.5, output_dir=str(tmp_path)), ready, progress=False).table[1]["perplexity"] for distill in (None, "self")]
    assert ends[0] != ends[1]


@pytest.mark.parametrize("values, error, words", [
    ({"prune_levle": 0.4}, InvalidArgument, "do you mean 'prune_level'"),
    ({"prune_level": "a lot"}, WrongType, "prune_level is 'a lot'"),
    ({"cycles": 0}, InvalidArgument, "cycles is 0; it must be at least 1"),
    ({"levels": [0.2, 0.1]}, InvalidArgument, "must rise"),
    ({"levels": [0.2, 0.4], "cycles": 3}, InvalidArgument, "one entry a cycle"),
    ({"levels": [20]}, InvalidArgument, "20 % is levels=0.2"),
    ({"levels": ["a"]}, WrongType, "levels is"),
    ({"mode": "remove", "cycles": 2}, InvalidArgument, "mode='gate'"),
    ({"distill": "other"}, InvalidArgument, "there are None, self"),
    ({"control": 1}, WrongType, "control is 1"),
])
def test_a_configuration_that_makes_no_sense(values, error, words):
    with pytest.raises(error, match=words):
        ExperimentConfig.from_dict(values)


@pytest.mark.parametrize("name, text, words", [
    ("a.yaml", "prune_level: [", "is no YAML"), ("a.json", "{", "is no JSON"), ("a.yaml", "just words", "holds no names"), ("a.toml", "", "neither .yaml nor .json"), ("b/a.yaml", None, "cannot be read")])
def test_a_file_that_is_no_configuration(tmp_path, name, text, words):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises((StorageError, InvalidArgument), match=words):
        ExperimentConfig.from_file(tmp_path / name)


def test_a_configuration_survives_its_file(tmp_path):
    config = ExperimentConfig(levels=[0.1, 0.5], distill="self", learning_rate=1e-4, device="cpu")
    (tmp_path / "config.json").write_text(json.dumps(asdict(config)))
    assert ExperimentConfig.from_file(tmp_path / "config.json") == config
    (tmp_path / "config.yml").write_text("learning_rate: 1e-4\nlevels: [0.1, 0.5]\ndistill: self\ndevice: cpu\n")
    assert ExperimentConfig.from_file(tmp_path / "config.yml") == config
    assert ExperimentConfig.from_words(["levels=0.1,0.5", "distill=self", "learning-rate=1e-4", "device=cpu"]) == config


def test_means_and_errors():
    assert mean_and_error([1.0, 3.0]) == (2.0, 1.0) and mean_and_error([2.0]) == (2.0, None) and mean_and_error([None]) == (None, None)


def test_a_sweep_has_control_and_random_and_goes_on(tmp_path):
    config = replace(SMALL, training_steps=1, eval_interval=1, regrow_every=0)
    first = run_sweep(config, ["taylor"], [0.25, 0.5], [0], tmp_path, workers=0, progress=False)
    assert [(row["strategy"], row["level"], row["seeds"]) for row in first.table] == [("taylor", 0.25, 1), ("random", 0.25, 1), ("taylor", 0.5, 1), ("random", 0.5, 1), ("control", None, 1)]
    assert {row["baseline"] for row in first.rows} == {first.rows[0]["baseline"]} and first.rows[-1]["heads"] == 48 and first.rows[0]["heads"] == 36
    [taylor] = [row for row in first.table if row["strategy"] == "taylor" and row["level"] == 0.5]
    assert taylor["above"][0] == pytest.approx(taylor["final"][0] - first.table[-1]["final"][0])
    collected = {"table.txt", "table.json", "figure.png"}  # written anew, from the same rows

    def written():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file() and path.name not in collected}

    files, table = written(), (tmp_path / "table.json").read_text()
    assert len(files) > 10 and run_sweep(config, ["taylor"], [0.25, 0.5], [0], tmp_path, workers=0, progress=False).rows == first.rows
    assert written() == files and (tmp_path / "table.json").read_text() == table and all((tmp_path / name).is_file() for name in collected)
    with pytest.raises(InvalidArgument, match="learning_rate"):
        run_sweep(replace(config, learning_rate=1e-3), ["taylor"], [0.25], [0], tmp_path, workers=0, progress=False)


def test_a_sweep_with_a_run_that_fails_keeps_the_others(tmp_path):
    config = replace(SMALL, training_steps=1, eval_interval=1, regrow_every=0, control=False)
    with pytest.raises(CellsFailed, match="1 of 2 runs failed") as error:
        run_sweep(config, ["random"], [0.25, 1.0], [0], tmp_path, workers=0, progress=False)  # a layer cannot lose all its heads
    assert "final" in error.value.rows[0] and "InvalidArgument" in error.value.rows[1]["error"]
