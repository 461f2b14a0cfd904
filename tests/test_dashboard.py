"""The dashboard: what it shows is what the record says, from a training, an experiment, or a file that another process is writing; with widgets and without."""
import asyncio
import gc
import json
import math
import os
import re
import subprocess
import sys
import time
import weakref
from dataclasses import replace

import pytest

from neural_plasticity import Dashboard, PlasticityCallback, PlasticitySchedule, dormant_heads, run_plasticity_loop, track_lines, train_with_plasticity
from neural_plasticity.course import Course, RecordReader, charts_html, decisions_html, film_frames, film_html, film_names, life_html
from neural_plasticity.data import load_embedded_model, load_embedded_text, text_dataloader
from neural_plasticity.durable import read_lines
from neural_plasticity.errors import EnvironmentProblem, InvalidArgument, StorageError, WrongType
from neural_plasticity.experiment import ExperimentConfig, run_experiment
from neural_plasticity.gates import put_to_sleep

SMALL = ExperimentConfig(minimal=True, strategy="taylor", prune_level=0.4, cycles=2, keep_model=False)
SCHEDULE = PlasticitySchedule(prune_to=0.25, prune_every=2, prune_until=0.5, regrow_every=3, fraction=0.5, stop_after=1.0, cooldown=2, num_batches=2, verify_batches=1, confidence=0.0)


@pytest.fixture(scope="module")
def parts():
    model, tokenizer = load_embedded_model("gpt2")
    return tokenizer, list(text_dataloader(load_embedded_text("selection")[:2], tokenizer, block_size=32, batch_size=4))[:4]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "An experiment with a dashboard beside it."
    live = Dashboard(every=0)
    result = run_experiment(replace(SMALL, output_dir=str(tmp_path_factory.mktemp("runs"))), progress=False, on_line=live.add)
    return result.folder, live


def titles(text):
    "The words of every mark of a drawing."
    return re.findall("<title>(.*?)</title>", text)


def test_what_is_shown_is_what_the_record_says(run):
    folder, live = run
    dashboard, record = Dashboard(folder), read_lines(folder / "record.jsonl")
    assert dashboard.course.ended and list(dashboard.course.arms) == ["chosen", "random", "control"]
    for name, arm in dashboard.course.arms.items():
        lines = [line for line in record if line["phase"] == "train" and line["arm"] == name]
        for curve in ("eval_loss", "perplexity", "learning_rate", "head_learning_rate", "active_heads", "pruned_heads", "revived_heads"):
            assert arm.curves[curve] == [(line["step"], line[curve]) for line in lines], curve
        assert len(lines) == 6  # steps 0, 3 and 6 of two cycles
        assert live.course.arms[name].decisions == arm.decisions and live.course.arms[name].events == arm.events
        assert len(arm.asleep) == lines[-1]["pruned_heads"]
    shown = titles(charts_html(dashboard.course, "chosen"))
    for line in record:
        if line["phase"] == "train":
            assert f"{line['arm']}, step {line['step']:g}: perplexity {line['perplexity']:.4g}" in shown
    assert dashboard.course.arms["control"].decisions == []


def test_learning_rates_of_pruned_heads_are_three_times_the_others(run):
    for line in read_lines(run[0] / "record.jsonl"):
        if line["phase"] == "train":
            assert line["head_learning_rate"] == pytest.approx(3 * line["learning_rate"])


def test_every_decision_has_its_reason_and_its_score_map(run):
    record = read_lines(run[0] / "record.jsonl")
    for line in record:
        if line["phase"] != "choose":
            continue
        assert {head for made in line["rounds"] for head in made["reasons"]} == {str(tuple(head)) for head in line["heads"]}
        for made in line["rounds"]:
            if line["arm"] == "random":
                assert set(made["reasons"].values()) == {f"drawn by lot from {48 if line['cycle'] == 1 else 48 - len(gone)}"} and "scores" not in made
                continue
            before = set() if line["cycle"] == 1 else gone  # noqa: F821
            awake = sorted(score for layer, row in enumerate(made["scores"]) for head, score in enumerate(row) if (layer, head) not in before)
            for head, reason in made["reasons"].items():
                layer, place = json.loads(f"[{head.strip('()')}]")
                score, number = made["scores"][layer][place], awake.index(made["scores"][layer][place])
                assert reason.startswith(f"taylor {score:.4g} ± ") and reason.endswith(f"{'lowest' if number == 0 else f'number {number + 1} from below'} of {len(awake)}")
        gone = asleep_before_next(record, line)
    decisions = Course(record).arms["chosen"].decisions
    assert re.fullmatch(r"\(\d,\d\) pruned: taylor [\d.e-]+ ± [\d.e-]+, (lowest|number \d+ from below) of 48", str(decisions[0]))


def asleep_before_next(record, line):
    "The heads of an arm that sleep when the next cycle chooses."
    asleep = set()
    for other in record:
        if other.get("arm") == line["arm"] and other.get("cycle") == line["cycle"]:
            asleep |= {tuple(head) for head in other.get("pruned_heads", ())} if other["phase"] in ("prune", "regrow") else set()
            asleep -= {tuple(head) for head in other.get("revived_heads", ())} if other["phase"] == "regrow" else set()
    return asleep


def test_the_slider_shows_the_film(run):
    pytest.importorskip("ipywidgets")
    dashboard = Dashboard(run[0])
    assert dashboard.map.value == "taylor" and {"gradient", "entropy", "taylor"} <= set(dashboard.map.options)
    frames = film_frames(dashboard.course, "chosen", "taylor")
    assert dashboard.moment.value == dashboard.moment.max == dashboard.play.max == len(frames) - 1 == 1  # one decision a cycle
    pictures = []
    for place in (0, 1):
        dashboard.moment.value = place
        pictures.append(dashboard._parts["film"].value)
        words = titles(pictures[-1])
        assert [word.removesuffix(", pruned") for word in words] == [f"head ({layer}, {head}): taylor {score:.4g}" for layer, row in enumerate(frames[place].scores) for head, score in enumerate(row)]
        assert {tuple(map(int, re.findall(r"\d+", word)[:2])) for word in words if word.endswith(", pruned")} == frames[place].asleep
    assert pictures[0] != pictures[1]
    dashboard.map.value = "gradient"
    assert "gradient" in dashboard._parts["film"].value
    dashboard.arm.value = "random"
    assert "drawn by lot" in dashboard._parts["decisions"].value and dashboard._arm == "random"
    dashboard.close()


def test_a_slider_that_was_moved_back_stays_and_one_at_the_end_follows():
    pytest.importorskip("ipywidgets")
    dashboard = Dashboard(every=0)
    line = {"phase": "regrow", "revived_heads": [], "scores": {"taylor": [[1.0, 2.0]]}}
    for step in (1, 2, 3):
        dashboard.record(**line, step=step)
    assert dashboard.moment.value == 2
    dashboard.moment.value = 0
    dashboard.record(**line, step=4)
    assert dashboard.moment.value == 0 and dashboard.moment.max == 3
    dashboard.close()


def test_a_plain_trainer_shows_what_it_logs(parts, tmp_path):
    from transformers import Trainer, TrainingArguments

    model, rows = load_embedded_model("gpt2")[0], [{name: tensor[0] for name, tensor in batch.items()} for batch in parts[1]]
    put_to_sleep(model, [(5, 5)])
    dashboard = Dashboard()
    callback = PlasticityCallback(SCHEDULE, parts[1], fast_heads=[(0, 0)], multiplier=2.0)
    arguments = TrainingArguments(str(tmp_path), max_steps=9, per_device_train_batch_size=2, logging_steps=1, eval_strategy="steps", eval_steps=3, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no")
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=[dashboard, callback])  # before the one that it watches
    trainer.train()
    arm, log = dashboard.course.arms["training"], trainer.state.log_history
    assert arm.curves["train_loss"] == [(entry["step"], entry["loss"]) for entry in log if "loss" in entry] and len(arm.curves["train_loss"]) == 9
    assert arm.curves["perplexity"] == [(entry["step"], math.exp(entry["eval_loss"])) for entry in log if "eval_loss" in entry] and len(arm.curves["perplexity"]) == 3
    assert arm.curves["head_learning_rate"] == [(step, 2 * rate) for step, rate in arm.curves["learning_rate"]]
    assert arm.asleep == set(dormant_heads(model)) and (5, 5) in arm.asleep
    found = [(change["step"], head, why) for change in callback.history.changes for head, why in change["reasons"]]
    assert sorted((each.step, each.head, each.reason) for each in arm.decisions) == sorted(found)
    assert len(found) == len(callback.pruned) + len(callback.revived) > 10
    assert {frame.step for frame in arm.frames} == {change["step"] for change in callback.history.changes}


def test_the_loop_tells_everything(parts):
    model, seen = load_embedded_model("gpt2")[0], Dashboard()
    batches = parts[1]
    results = run_plasticity_loop(model, batches, batches[:1], 0.25, "gradient", training_steps=6, eval_interval=3, callback=seen, progress=False, schedule=PlasticitySchedule(regrow_every=3, num_batches=2, verify_batches=1))
    arm, history = seen.course.arms["training"], results["training_metrics"]
    assert seen.course.baseline["perplexity"] == results["baseline_metrics"]["perplexity"]
    assert arm.curves["perplexity"] == list(zip(history["step"], history["perplexity"])) and arm.curves["active_heads"] == list(zip(history["step"], history["active_heads"]))
    assert {each.head for each in arm.decisions if each.what == "pruned"} == set(results["pruned_heads"]) and all(each.reason.startswith("gradient ") for each in arm.decisions if each.what == "pruned")
    assert [each.head for each in arm.decisions if each.what == "revived"] == results["revived_heads"]
    assert arm.asleep == set(dormant_heads(model)) and film_names(seen.course, "training")[0] == "gradient"


def test_a_dashboard_keeps_no_model(parts):
    model, dashboard = load_embedded_model("gpt2")[0], Dashboard()
    train_with_plasticity(model, parts[1], parts[1][:1], [(0, 0)], training_steps=2, eval_interval=2, callback=dashboard, progress=False)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and dashboard.course.arms["training"].curves["perplexity"]


def test_a_second_training_counts_on(parts):
    model, dashboard = load_embedded_model("gpt2")[0], Dashboard()
    for _ in range(2):
        train_with_plasticity(model, parts[1], parts[1][:1], [], training_steps=2, eval_interval=2, callback=dashboard, progress=False)
    assert [step for step, _ in dashboard.course.arms["training"].curves["perplexity"]] == [0, 2, 2, 4]


WRITER = """
import sys, time
from neural_plasticity.durable import add_line
for step in range(40):
    add_line(sys.argv[1], {"phase": "train", "arm": "chosen", "step": step, "perplexity": 40 - step / 2})
    time.sleep(0.02)
add_line(sys.argv[1], {"phase": "end"})
"""


def test_it_follows_what_another_process_writes(tmp_path):
    (tmp_path / "config.json").write_text("{}")  # a run begins with it
    dashboard, steps, beats = Dashboard(tmp_path), [], []

    async def notebook():
        writer = await asyncio.create_subprocess_exec(sys.executable, "-c", WRITER, str(tmp_path / "record.jsonl"))
        dashboard.follow(seconds=0.05)
        until = time.monotonic() + 120
        while dashboard.following and time.monotonic() < until:
            beats.append(1)  # the notebook does other things meanwhile
            arm = dashboard.course.arms.get("chosen")
            steps.append(len(arm.curves["perplexity"]) if arm else 0)
            await asyncio.sleep(0.01)
        await writer.wait()

    asyncio.run(notebook())
    assert dashboard.course.ended and not dashboard.following
    assert dashboard.course.arms["chosen"].curves["perplexity"] == [(step, 40 - step / 2) for step in range(40)]
    assert steps == sorted(steps) and len(set(steps)) > 2  # it was seen to grow
    assert "The run has ended" in dashboard.html()


def test_following_can_be_stopped_and_says_what_goes_wrong(tmp_path):
    record = tmp_path / "record.jsonl"
    record.write_text('{"phase": "train", "step": 0, "perplexity": 30.0}\n')

    async def notebook():
        dashboard = Dashboard(tmp_path).follow(seconds=0.01)
        assert dashboard.following
        dashboard.stop()
        record.write_text(record.read_text() + '{"phase": "train", "step": 1, "perplexity": 29.0}\n')
        await asyncio.sleep(0.1)
        assert len(dashboard.course.arms["training"].curves["perplexity"]) == 1
        record.write_text(record.read_text() + "no json\n")
        dashboard.follow(seconds=0.01)
        assert not dashboard.following and "no JSON" in dashboard.problem

    asyncio.run(notebook())
    with pytest.raises(EnvironmentProblem, match=r"update\(\)"):
        Dashboard(make_run(tmp_path / "other")).follow()


def make_run(folder, text='{"phase": "baseline", "perplexity": 29.5}\n'):
    folder.mkdir()
    (folder / "record.jsonl").write_text(text)
    return folder


def test_half_a_line_is_left_until_it_is_whole(tmp_path):
    folder = make_run(tmp_path / "run")
    line = '{"phase": "train", "arm": "chosen", "step": 3, "perplexity": 30.25, "said": "ä"}\n'.encode()
    dashboard = Dashboard(folder)
    for count in range(1, len(line)):
        with open(folder / "record.jsonl", "ab") as file:
            file.write(line[count - 1 : count])
        assert dashboard.update() == 0 and not dashboard.course.arms
    with open(folder / "record.jsonl", "ab") as file:
        file.write(line[-1:])
    assert dashboard.update() == 1 and dashboard.update() == 0
    assert dashboard.course.arms["chosen"].curves["perplexity"] == [(3, 30.25)]


def test_a_record_that_was_cut_back_is_read_anew(tmp_path):
    "As a run does that is resumed: it goes back to its last finished phase, and on from there."
    lines = [json.dumps({"phase": "train", "step": step, "perplexity": 30.0 + step}) + "\n" for step in range(9)]
    folder = make_run(tmp_path / "run", "".join(lines[:4]))
    dashboard, reader = Dashboard(folder), RecordReader(folder)
    assert [line["step"] for line in reader.read()[1]] == [0, 1, 2, 3]
    (folder / "record.jsonl").write_text("".join(lines[:2]))
    dashboard.update()
    assert dashboard.course.arms["training"].curves["perplexity"] == [(0, 30.0), (1, 31.0)]
    other = json.dumps({"phase": "train", "step": 3, "perplexity": 77.0}) + "\n"
    (folder / "record.jsonl").write_text("".join([*lines[:3], other, *lines[4:]]))  # longer than what was read, and another line where that ended
    assert reader.read()[0]
    dashboard.update()
    assert dashboard.course.arms["training"].curves["perplexity"][3:5] == [(3, 77.0), (4, 34.0)]


def test_records_without_reasons_and_maps_are_read():
    "As they were written before these were kept."
    course = Course([{"phase": "baseline", "arm": "before", "perplexity": 29.0}, {"phase": "measure", "arm": "chosen", "cycle": 1, "gradient": [[1.0, 2.0]], "entropy": [[0.5, math.nan]]},
                     {"phase": "choose", "arm": "chosen", "cycle": 1, "heads": [[0, 1]]}, {"phase": "prune", "arm": "chosen", "cycle": 1, "pruned_heads": [[0, 1]], "pruned": None},
                     {"phase": "train", "arm": "chosen", "cycle": 1, "step": 0, "train_loss": math.nan, "perplexity": 40}, {"phase": "regrow", "arm": "chosen", "cycle": 1, "step": 5, "revived_heads": [[0, 1]]},
                     {"phase": "recover", "arm": "chosen", "cycle": 1, "history": {}, "events": []}, {"phase": "something new", "arm": "chosen"}])
    assert [str(each) for each in course.arms["chosen"].decisions] == ["(0,1) pruned", "(0,1) revived"] and course.arms["chosen"].asleep == set()
    assert "the record does not say why" in decisions_html(course, "chosen") and film_names(course, "chosen") == ["gradient", "entropy"]


def test_what_is_no_run_or_no_line_is_refused(tmp_path):
    with pytest.raises(StorageError, match="has no record.jsonl; a run folder is"):
        Dashboard(tmp_path)
    with pytest.raises(StorageError, match="no JSON"):
        Dashboard(make_run(tmp_path / "run", "hello\n"))
    dashboard = Dashboard()
    for line, kind, words in ((None, WrongType, "no line of a record"), ({"step": 1}, WrongType, "a dict with a phase"), ({"phase": "train"}, InvalidArgument, "'step'"),
                              ({"phase": "choose", "heads": [3]}, InvalidArgument, "'choose'")):  # fmt: skip
        with pytest.raises(kind, match=words):
            dashboard.add(line)
    for verb in (dashboard.update, dashboard.follow):
        with pytest.raises(InvalidArgument, match="no run folder"):
            verb()
    with pytest.raises(InvalidArgument, match="every is -1"):
        Dashboard(every=-1)
    with pytest.raises(InvalidArgument, match="seconds is 0"):
        Dashboard(make_run(tmp_path / "fine")).follow(0)


def test_text_of_a_record_is_no_html():
    nasty = "<script>alert(1)</script>"
    dashboard = Dashboard(every=0)
    dashboard.record("choose", arm=nasty, heads=[[0, 0]], rounds=[{"criterion": nasty, "scores": [[1.0]], "heads": [[0, 0]], "reasons": {"(0, 0)": nasty}}])
    dashboard.record("train", arm=nasty, step=1, perplexity=3.0)
    assert "<script" not in dashboard.html() and dashboard.html().count("&lt;script") > 3


def test_the_page_without_widgets_is_whole(run):
    page = Dashboard(run[0]).html()
    frames = film_frames(Dashboard(run[0]).course, "chosen", "taylor")
    assert not re.search(r"<script|src=|href=|@import|url\(", page) and all("aria-label" in tag for tag in re.findall("<svg.*?>", page))
    film = film_html(frames, "a")
    assert film.count('type="radio"') == len(frames) == 2 and film.count(" checked") == 1 and all("aria-label" in tag for tag in re.findall("<input.*?>", film))


def test_long_runs_of_large_models_stay_small():
    course, heads = Course(), [[layer, head] for layer in range(30) for head in range(9)]
    for step in range(0, 5000, 5):
        course.add({"phase": "train", "step": step, "train_loss": 3.0, "eval_loss": 3.1, "perplexity": 22.0, "learning_rate": 1e-4, "active_heads": 200, "pruned_heads": 70, "revived_heads": 0})
        if step % 50 == 0:
            course.add({"phase": "regrow", "step": step, "pruned_heads": heads[step // 50 % 270 :][:1], "reasons": {}, "scores": {"taylor": [[0.1] * 9] * 30}})
    dashboard = Dashboard()
    dashboard.course = course
    dashboard.show()
    assert len(dashboard.html()) < 3e6 and charts_html(course, "training").count("<title>") < 7 * 130
    if dashboard.widget:
        assert sum(len(part.value) for part in dashboard._parts.values()) < 5e5
    life = titles(life_html(course, "training"))
    assert "step 4995: head (0, 3) dormant" in life and len(life) < 1700


def test_the_page_is_told_at_most_so_often(monkeypatch):
    dashboard, shown = Dashboard(every=3600), []
    monkeypatch.setattr(dashboard, "show", lambda over=False, show=dashboard.show: (shown.append(over), show(over)))
    for step in range(100):
        dashboard.record("train", step=step, perplexity=3.0)
    assert shown == [False]
    dashboard.record("end")
    assert shown == [False, True] and "ended" in repr(dashboard)


WITHOUT = """
import sys
sys.modules["ipywidgets"] = None
from neural_plasticity.dashboard import Dashboard
dashboard = Dashboard(sys.argv[1])
assert dashboard.widget is None and dashboard.course.ended
print(dashboard.html())
"""


def test_no_widgets_at_all(run):
    done = subprocess.run([sys.executable, "-c", WITHOUT, str(run[0])], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "pruned</b>: taylor" in done.stdout and done.stdout.count("<svg") >= 6


def test_importing_the_page_does_not_import_ipywidgets():
    code = "import sys, neural_plasticity.dashboard; sys.exit('ipywidgets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_it_is_a_widget_of_the_library():
    from neural_plasticity import widgets

    assert widgets.Dashboard is Dashboard


class Tracker:
    "What trackio and wandb have, written down."

    def __init__(self):
        self.calls = []

    def init(self, **options):
        self.calls.append(("init", options))

    def log(self, numbers, step):
        self.calls.append((step, numbers))

    def finish(self):
        self.calls.append("finish")


def test_a_tracker_gets_the_numbers_of_the_record(run):
    tracker, record = Tracker(), read_lines(run[0] / "record.jsonl")
    send = track_lines("heads", tracker, name="try", group="a")
    for line in record:
        send(line)
    assert [call[1]["name"] for call in tracker.calls if call[0] == "init"] == ["try chosen", "try random", "try control"] and tracker.calls.count("finish") == 3
    logged = [(step, numbers["perplexity"]) for step, numbers in (call for call in tracker.calls if call != "finish" and call[0] != "init")]
    assert logged == [(line["step"], line["perplexity"]) for line in record if line["phase"] == "train"]


def test_without_trackio_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(EnvironmentProblem, match=r"neural_plasticity\[track\]"):
        track_lines("heads")


TRACKED = """
import sys
from transformers import TrainingArguments
from neural_plasticity import PlasticitySchedule, track_lines
from neural_plasticity.data import load_embedded_model, load_embedded_text, text_dataloader
from neural_plasticity.durable import read_lines
from neural_plasticity.trainer import PlasticityTrainer
import trackio
model, tokenizer = load_embedded_model("gpt2")
batches = list(text_dataloader(load_embedded_text("selection")[:1], tokenizer, block_size=32, batch_size=4))[:3]
args = TrainingArguments(sys.argv[1] + "/out", max_steps=4, logging_steps=2, report_to="trackio", project="trained", run_name="one", use_cpu=True, disable_tqdm=True, save_strategy="no")
schedule = PlasticitySchedule(prune_to=0.25, prune_every=2, prune_until=0.5, num_batches=2, verify_batches=0)
PlasticityTrainer(model, args, train_dataloader=batches, schedule=schedule, regrow_dataloader=batches).train()
send = track_lines("recorded", auto_log_gpu=False)
for line in read_lines(sys.argv[2] + "/record.jsonl"):
    send(line)
api = trackio.Api()
for project, key in (("trained", "train/active_heads"), ("recorded", "perplexity")):
    for run in sorted(api.runs(project), key=lambda run: run.name):
        print("FOUND", project, run.name, trackio.SQLiteStorage.get_logs(project, run.name) and [entry[key] for entry in trackio.SQLiteStorage.get_logs(project, run.name) if key in entry])
"""


def test_trackio_offline(run, tmp_path):
    pytest.importorskip("trackio")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TRACKIO")} | {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", TRACKED, str(tmp_path), str(run[0])], capture_output=True, text=True, timeout=600, env=environ)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {tuple(line.split(maxsplit=3)[1:3]): json.loads(line.split(maxsplit=3)[3]) for line in done.stdout.splitlines() if line.startswith("FOUND")}
    assert found["trained", "one"][-1] == 36  # a quarter of 48 sleeps
    record = read_lines(run[0] / "record.jsonl")
    for arm in ("chosen", "random", "control"):
        assert found["recorded", arm] == [line["perplexity"] for line in record if line["phase"] == "train" and line["arm"] == arm]
