"""The zoo: a chosen dozen of architectures goes through every stage; the committed sweep is whole and holds what was promised; the trials themselves can fail."""
import os
import time
from dataclasses import replace

import pytest
import torch
import transformers
from house import ROOT

from neural_plasticity import zoo
from neural_plasticity.errors import InvalidArgument, StorageError
from neural_plasticity.probing import probe
from neural_plasticity.zoo import GOALS, LIMIT, Outcome, Row, examine, read_rows, summary, sweep, to_markdown, write_rows
from neural_plasticity.zoo_models import TASKS, entries, small_model
from neural_plasticity.zoo_stages import MASKS, STAGES, Failed, NotAsked, Subject, answer, gate, prove, pruning_mask, remove, save, train, two_batches

DOZEN = [  # task, type, what it stands for
    ("causal-lm", "gpt2"),  # one fused projection, Conv1D
    ("causal-lm", "llama"),  # grouped key/value heads
    ("causal-lm", "deepseek_v3"),  # latent attention
    ("causal-lm", "gpt_oss"),  # attention sinks
    ("causal-lm", "gemma3_text"),  # sliding windows
    ("causal-lm", "olmo2"),  # a norm across the queries of all heads
    ("causal-lm", "bloom"),  # ALiBi, interleaved projection
    ("causal-lm", "phi3"),  # fused projection, sizes read from the config
    ("causal-lm", "diffllama"),  # heads in pairs
    ("causal-lm", "zamba"),  # layers that share their weights
    ("masked-lm", "bert"),
    ("seq2seq", "t5"),  # relative bias, cross attention
    ("speech", "whisper"),
    ("speech", "wav2vec2"),
    ("image-classification", "vit"),
]
RESULTS = ROOT / "benchmarks" / "results" / "zoo.json"


def states(rows):
    "What must be the same each time, differences in the last digits aside."
    return {(row.task, row.model_type): (row.kind, row.heads, row.removal.get("mask"), row.removal.get("how"), {name: outcome.state for name, outcome in row.stages.items()}) for row in rows}


@pytest.mark.parametrize("task, model_type", DOZEN, ids=lambda word: word)
def test_the_chosen_dozen_goes_through_every_stage(task, model_type):
    row = examine(task, model_type)
    assert row.kind == "attention" and not row.failures, str(row)
    assert set(row.stages) == set(STAGES)
    not_asked = [name for name, outcome in row.stages.items() if outcome.state == "not asked"]
    assert not_asked == ([] if task in ("causal-lm", "seq2seq") or model_type == "whisper" else ["generate"]), str(row)
    assert row.removal["mask"] == ("same" if model_type == "zamba" else "uneven") and row.removal["parameters"] < 1
    assert "left-padded" in row.stages["prove"].note or task in ("speech", "image-classification")


# the masks


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "diffllama"])
def test_the_uneven_mask_is_uneven_and_leaves_units_whole(model_type):
    anatomy = probe(small_model("causal-lm", model_type))
    mask = pruning_mask(anatomy, "uneven")
    counts = mask.sum(1).tolist()
    if model_type == "llama":  # layer 1 keeps 3 + 2 query heads on its two key/value heads, layers 0 and 2 lose a whole group each
        assert counts == [3, 1, 3] and [sorted(sum(not mask[1, head] for head in group) for group in anatomy.sites[1].groups)] == [[2, 3]]
        assert all(any(mask[layer, list(group)].all() for group in anatomy.sites[layer].groups) for layer in (0, 2))
    if model_type == "gpt2":
        assert len(set(counts)) > 1 and len({tuple(layer) for layer in mask.tolist()}) > 1
    for name in MASKS:
        for unit in anatomy.units:
            assert len({bool(pruning_mask(anatomy, name)[head]) for head in unit}) == 1
        assert not any(layer[:6].all() for layer in pruning_mask(anatomy, name))  # six heads a layer; one at least stays
        assert pruning_mask(anatomy, name).any() or (model_type, name) == ("diffllama", "whole groups")  # a whole group would take every pair along


def test_sites_that_cannot_be_cut_are_left_out_and_named():
    model = small_model("causal-lm", "gpt2")
    anatomy = probe(model)
    anatomy.sites = (*anatomy.sites[:2], replace(anatomy.sites[2], obstacle="its heads are glued to layer 7"))
    subject = Subject(model, anatomy, *two_batches(model))
    assert not pruning_mask(anatomy, "same")[2].any()
    assert "site 2 cannot be cut: its heads are glued to layer N" in remove(subject)
    anatomy.sites = tuple(replace(site, obstacle="glue") for site in anatomy.sites)
    with pytest.raises(Failed, match="sites 0, 1, 2 cannot be cut: glue"):
        remove(Subject(model, anatomy, *two_batches(model)))


# the trials can fail


@pytest.fixture
def subject():
    "A GPT-2 whose heads were removed."
    model = small_model("causal-lm", "gpt2")
    subject = Subject(model, probe(model), *two_batches(model))
    remove(subject)
    return subject


def test_a_gate_on_the_wrong_columns_is_noticed(subject):
    sites = subject.anatomy.sites
    subject.anatomy.sites = tuple(replace(site, columns=site.columns.roll(1, 0)) for site in sites)  # the gates go by the library's own probe
    with pytest.raises(Failed, match="silenced by other means differ"):
        gate(subject)


def test_a_gate_that_does_nothing_is_noticed(subject):
    for site in subject.anatomy.sites:
        subject.model.get_submodule(site.projection).weight.data.zero_()
    with pytest.raises(Failed, match="do not change the output"):
        gate(subject)


def test_a_cut_that_changes_something_is_noticed(subject):
    next(subject.cut.parameters()).data.mul_(1.001)
    with pytest.raises(Failed, match="answers of the gated and the cut model differ by"):
        prove(subject)
    with pytest.raises(Failed, match="gradients differ by"):
        train(subject)


def test_heads_that_say_nothing_prove_nothing(subject):
    for site in subject.anatomy.sites:
        for model in (subject.model, subject.cut):
            model.get_submodule(site.projection).weight.data.zero_()
    with pytest.raises(Failed, match="nothing is proven"):
        prove(subject)


def test_a_weight_that_storage_changes_is_noticed(subject, monkeypatch):
    def forgetful(folder):
        loaded = original(folder)
        list(loaded.parameters())[5].data.view(-1)[0] += 1e-6
        return loaded

    original = zoo.STAGES["save"].__globals__["load_pruned"]
    monkeypatch.setitem(zoo.STAGES["save"].__globals__, "load_pruned", forgetful)
    with pytest.raises(Failed, match="1 weights are not as they were saved"):
        save(subject)


def test_stages_that_need_a_cut_are_not_asked_without_one():
    model = small_model("masked-lm", "bert")
    subject = Subject(model, probe(model), *two_batches(model))
    for stage in ("prove", "train", "save"):
        with pytest.raises(NotAsked, match="no head was removed"):
            STAGES[stage](subject)


def test_the_two_batches_share_no_sample():
    for task, model_type in (("causal-lm", "llama"), ("image-classification", "vit"), ("speech", "wav2vec2")):
        usual, fresh = two_batches(small_model(task, model_type))
        (name,) = usual
        assert not any(one[..., :7].equal(other[..., :7]) for one in usual[name] for other in fresh[name])


# one row


def test_an_exception_nobody_thought_of_is_a_failure_with_its_reason(monkeypatch):
    def broken(subject):
        raise ZeroDivisionError("one by\nnothing")

    monkeypatch.setitem(zoo.STAGES, "train", broken)
    row = examine("causal-lm", "gpt2")
    assert row.failures == {"train": "ZeroDivisionError: one by nothing"} and row.is_ok("gate", "save", "generate")


@pytest.mark.parametrize("task, model_type, kind", [("causal-lm", "mamba2", "no attention heads"), ("masked-lm", "fnet", "no attention heads"), ("image-classification", "resnet", "no attention heads"),
                                                    ("causal-lm", "reformer", "attention"), ("speech", "sew-d", "attention"), ("causal-lm", "gemma4_assistant", "not built")])
def test_what_has_no_heads_is_told_from_what_hides_them(task, model_type, kind):
    row = examine(task, model_type)
    assert row.kind == kind and bool(row.failures) == (kind == "attention")
    assert "no attention heads found" in row.failures["probe"] if kind == "attention" else row.note


def test_global_randomness_is_left_alone():
    state = torch.get_rng_state()
    examine("causal-lm", "gpt2")
    assert torch.get_rng_state().equal(state)


def test_unknown_tasks_and_types_are_refused():
    for call in (lambda: examine("causal-lm", "resnet"), lambda: examine("poetry", "gpt2"), lambda: sweep(["causal-lm"], ["gtp2"]), lambda: sweep(["causal-lm"], ["gpt2"], workers=0), lambda: sweep([])):
        with pytest.raises(InvalidArgument):
            call()


# the sweep


def serve_and_die(connection):
    connection.send("ready")
    if connection.recv()[1] == "gpt2":
        os._exit(3)
    time.sleep(3600)


def test_models_that_crash_or_never_end_cost_one_row_each(monkeypatch):
    monkeypatch.setattr(zoo, "_serve", serve_and_die)
    seen = []
    rows = sweep(["causal-lm"], ["llama", "gpt2"], limit=5, on_row=seen.append)
    assert [row.model_type for row in rows] == ["gpt2", "llama"] and seen == rows  # as the table has it
    assert [row.failures["probe"] for row in rows] == ["the process that examined it ended with exit code 3", "it took more than 5 seconds"]


def test_two_workers_find_what_one_finds():
    rows = sweep(["causal-lm", "masked-lm"], ["gpt2", "mamba", "bert"], workers=2)
    assert states(rows) == states([examine("causal-lm", name) for name in ("bert", "gpt2", "mamba")] + [examine("masked-lm", "bert")])


def test_counts():
    ok, no = Outcome("ok", ""), Outcome("failed", "because")
    rows = [Row("t", "a", "A", "attention", removal={"mask": "uneven", "how": "cut", "fixed_sites": 2}, stages=dict.fromkeys(STAGES, ok)),
            Row("t", "b", "B", "attention", removal={"mask": "same", "how": "cut", "fixed_sites": 0}, stages={**dict.fromkeys(STAGES, ok), "prove": no, "generate": Outcome("not asked", "")}),
            Row("t", "c", "C", "attention", stages={"probe": no}), Row("t", "d", "D", "no attention heads", "none"), Row("t", "e", "", "not built", "why")]
    assert summary(rows) == {"t": {"entries": 5, "built": 4, "with attention": 3, "gated": 2, "removed": 1, "removed unevenly": 1, "removed in part": 1, "trained alike": 2, "emptied": 2, "saved and loaded": 2,
                                   "asked to generate": 1, "generated": 1}}
    assert len({line.count("|") for line in to_markdown(rows).splitlines()}) == 1


def test_a_sweep_is_read_as_it_was_written(tmp_path):
    rows = [examine("causal-lm", "llama"), examine("causal-lm", "mamba")]
    write_rows(rows, tmp_path / "new" / "zoo.json", "the command")
    assert read_rows(tmp_path / "new" / "zoo.json") == (rows, {"schema": 1, "command": "the command", "transformers": transformers.__version__, "torch": torch.__version__,
                                                               "python": zoo.platform.python_version()})


@pytest.mark.parametrize("content", ["", "[]", '{"schema": 2, "rows": []}', '{"schema": 1}', '{"schema": 1, "rows": [{"task": "x"}]}', '{"schema": 1, "rows": [3]}'])
def test_what_is_no_sweep_is_refused(content, tmp_path):
    (tmp_path / "zoo.json").write_text(content)
    with pytest.raises(StorageError):
        read_rows(tmp_path / "zoo.json")
    with pytest.raises(StorageError):
        read_rows(tmp_path / "none.json")


# the committed results


@pytest.fixture(scope="module")
def committed():
    return read_rows(RESULTS)


def test_the_committed_sweep_reaches_the_goals(committed):
    counts = summary(committed[0])
    assert set(counts) == set(GOALS) == set(TASKS)
    for task, goals in GOALS.items():
        for name, goal in goals.items():
            assert counts[task][name] >= goal * counts[task]["with attention"], (task, name, counts[task])
    assert counts["causal-lm"]["built"] >= 140
    rows = {(row.task, row.model_type): row for row in committed[0]}
    for job in DOZEN:
        assert not rows[job].failures, job


def test_the_committed_sweep_is_whole_and_every_failure_has_a_reason(committed):
    rows, about = committed
    assert len({(row.task, row.model_type) for row in rows}) == len(rows) and "neural-plasticity zoo" in about["command"]
    for row in rows:
        assert row.kind in ("attention", "no attention heads", "not built")
        assert row.note or row.kind == "attention"
        assert row.kind != "attention" or set(row.stages) in ({"probe"}, set(STAGES))
        assert all(outcome.note for outcome in row.stages.values() if outcome.state != "ok"), str(row)
    if about["transformers"] != transformers.__version__:
        pytest.skip(f"the sweep is of transformers {about['transformers']}; installed is {transformers.__version__}")
    assert [(row.task, row.model_type) for row in rows] == [(task, model_type) for task in TASKS for model_type in entries(task)]


@pytest.mark.slow
def test_a_new_sweep_finds_what_is_committed(committed):
    rows, about = committed
    if about["transformers"] != transformers.__version__:
        pytest.skip(f"the sweep is of transformers {about['transformers']}; installed is {transformers.__version__}")

    found, expected = states(sweep(TASKS, workers=2, limit=3 * LIMIT)), states(rows)
    assert found == expected, {job: (found[job], expected[job]) for job in expected if found[job] != expected[job]}
