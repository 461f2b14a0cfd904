"""A training that was killed goes on from its newest whole checkpoint, with the same numbers to the last bit."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from models import batches, build

from neural_plasticity.callback import STATE_FILE, load_state, save_state
from neural_plasticity.compensation import compensate_heads
from neural_plasticity.errors import InvalidArgument, StorageError
from neural_plasticity.gates import dormant_heads, put_to_sleep, restore_heads, state_of
from neural_plasticity.schedule import PlasticitySchedule
from neural_plasticity.training import HISTORY_FILE, checkpoints, train_with_plasticity

SCHEDULE = PlasticitySchedule(regrow_every=2, fraction=0.6, stop_after=1.0, confidence=0.0, warmup_steps=3, num_batches=2, verify_batches=0, cooldown=0)


def train(folder, stop=None, **options):
    "A compensated model in training, five batches an epoch in an order of their own each time."
    model = build("gpt2")
    data = batches(model, count=5)
    compensate_heads(model, data, [(0, 1), (1, 0), (1, 2), (2, 3)])
    loader = torch.utils.data.DataLoader(data, batch_size=None, shuffle=True, generator=torch.Generator().manual_seed(3))
    events = []
    history = train_with_plasticity(model, loader, data[:2], [(0, 1)], 1e-3, options.pop("training_steps", 13), eval_interval=4, progress=False, schedule=SCHEDULE, regrow_dataloader=data,
                                    events=events, checkpoint_folder=folder, checkpoint_every=3, callback=stop, **options)
    return model, history, events


def die_at(step):
    "A callback that kills its process at an evaluation."
    def callback(now, metrics):
        if now >= step:
            os.kill(os.getpid(), signal.SIGKILL)
    return callback


def same(a, b):
    first, second = a[0].state_dict(), b[0].state_dict()
    return a[1:] == b[1:] or str(a[1:]) == str(b[1:]), all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize("when", [4, 8, 12])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, when):
    whole = train(tmp_path / "whole")
    script = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        import torch
        torch.set_num_threads({torch.get_num_threads()})
        from test_checkpoints import die_at, train
        train({str(tmp_path / "killed")!r}, stop=die_at({when}))
    """)
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    steps = [path.name for path in checkpoints(tmp_path / "killed")]
    assert steps == [f"checkpoint-{3 * (when // 3) if when % 3 else when - 3}"]  # the evaluation comes before the checkpoint of the same step
    resumed = train(tmp_path / "killed")
    assert whole[2], "nothing was revived, so the test shows less than it says"
    assert same(whole, resumed) == (True, True)
    assert dormant_heads(whole[0]) == dormant_heads(resumed[0])
    for model in (whole[0], resumed[0]):
        restore_heads(model)
    assert same(whole, resumed) == (True, True)  # what lay in the bank, too


def test_a_checkpoint_that_is_not_whole_is_not_used(tmp_path):
    whole = train(tmp_path / "a")
    newest, = checkpoints(tmp_path / "a")[-1:]
    assert newest.name == "checkpoint-13"
    (newest / HISTORY_FILE).unlink()
    assert same(whole, train(tmp_path / "a")) == (True, True)  # from the start


def test_a_finished_training_is_not_trained_on(tmp_path):
    whole = train(tmp_path, training_steps=12)
    assert same(whole, train(tmp_path, training_steps=12)) == (True, True)


def test_other_arguments_are_refused(tmp_path):
    train(tmp_path, training_steps=6)
    with pytest.raises(InvalidArgument, match="training_steps=6 .now 12.*checkpoint_folder"):
        train(tmp_path, training_steps=12)


def test_a_damaged_state_is_refused(tmp_path):
    model = build("gpt2")
    put_to_sleep(model, [(0, 1)], zero_weights=True)
    save_state(model, tmp_path)
    content = (tmp_path / STATE_FILE).read_bytes()
    (tmp_path / STATE_FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises(StorageError, match=STATE_FILE):
        load_state(build("gpt2"), tmp_path)
    (tmp_path / STATE_FILE).write_bytes(content)
    with pytest.raises(StorageError, match="shape"):
        load_state(build("gpt2-trained"), tmp_path)


def test_state_survives_with_bank_compensation_and_warm_up(tmp_path):
    model = build("llama-grouped")
    data = batches(model)
    put_to_sleep(model, [(0, 2)], zero_weights=True)
    compensate_heads(model, data, [(1, 0), (1, 3)])
    save_state(model, tmp_path, note="so")
    other = build("llama-grouped")
    put_to_sleep(other, [(2, 2)])  # is forgotten
    other.load_state_dict(model.state_dict())
    assert load_state(other, tmp_path)["note"] == "so" and dormant_heads(other) == dormant_heads(model)
    assert torch.equal(other(**data[0]).logits, model(**data[0]).logits)
    restore_heads(other)
    assert state_of(other) is None and all(torch.equal(value, other.state_dict()[key]) for key, value in build("llama-grouped").state_dict().items())
