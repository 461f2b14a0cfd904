"""The optimizer and the heads: dormant ones do not move, those that come back start gently, and a removal leaves the moments of all others alone."""

import copy
import math
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from models import batches, build, slices, steps
from torch.optim import SGD, Adafactor, Adam, AdamW

from neural_plasticity.anatomy import exclusive_slices
from neural_plasticity.errors import UnsupportedModel, WrongType
from neural_plasticity.gates import dormant_heads, put_to_sleep, revive_heads
from neural_plasticity.moments import carrying
from neural_plasticity.optimizer import headwise_updates
from neural_plasticity.probing import anatomy_of
from neural_plasticity.surgery import remove_heads

GROUP = [(1, 0), (1, 1)]  # a whole key/value group of llama-grouped
RATE, DECAY = 1e-3, 0.1
OPTIMIZERS = {
    "adamw": lambda p: AdamW(p, lr=RATE, weight_decay=DECAY),
    "adamw-foreach": lambda p: AdamW(p, lr=RATE, weight_decay=DECAY, foreach=True),
    "adamw-fused": lambda p: AdamW(p, lr=RATE, weight_decay=DECAY, fused=True),
    "amsgrad": lambda p: AdamW(p, lr=RATE, weight_decay=DECAY, amsgrad=True),
    "adam": lambda p: Adam(p, lr=RATE, weight_decay=DECAY),
    "sgd-momentum": lambda p: SGD(p, lr=RATE, momentum=0.9, weight_decay=DECAY),
}


def moments(model, optimizer):
    return {(name, what): value.clone() for name, p in model.named_parameters() for what, value in optimizer.state[p].items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("kind", ["adamw", "adamw-foreach", "adamw-fused", "amsgrad", "adam"])
@pytest.mark.parametrize("name, heads", [("gpt2", [(1, 0)]), ("llama-grouped", GROUP)])
@pytest.mark.parametrize("asleep", [0, 1, 20])
def test_the_first_step_of_a_revived_head_is_bounded(name, heads, kind, asleep):
    model, multiplier = build(name), 3.0
    data, optimizer = batches(model), OPTIMIZERS[kind](model.parameters())
    headwise_updates(optimizer, model, heads, multiplier)
    steps(model, optimizer, 3, data)
    put_to_sleep(model, heads)
    steps(model, optimizer, asleep, data)
    revive_heads(model, heads)
    before, t = slices(model, heads), 3 + asleep + 1
    steps(model, optimizer, 1, data)
    bound = (1 - 0.9) * math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
    if not asleep:
        return  # it never slept through a step, so there is nothing to seed
    for key, value in slices(model, heads).items():
        decay = 0 if kind == "adam" else DECAY * before[key].abs()
        moved = (value - before[key]).abs()
        assert moved.max() > 0 and (moved <= multiplier * RATE * (bound + decay) * (1 + 1e-3) + 1e-8).all(), key


def test_unseeded_the_first_step_would_break_the_bound():
    model = build("gpt2")
    data, optimizer = batches(model), AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    put_to_sleep(model, [(1, 0)])
    steps(model, optimizer, 20, data)
    revive_heads(model, [(1, 0)])
    before = slices(model, [(1, 0)])
    steps(model, optimizer, 1, data)
    bound = (1 - 0.9) * math.sqrt(1 - 0.999**21) / (1 - 0.9**21)
    assert max(float((value - before[key]).abs().max()) for key, value in slices(model, [(1, 0)]).items()) > 3 * RATE * bound


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_seeding_leaves_all_other_moments_alone(kind):
    found = []
    for hooks in (True, False):
        model = build("llama-grouped")
        data, optimizer = batches(model), OPTIMIZERS[kind](model.parameters())
        updates = headwise_updates(optimizer, model)
        put_to_sleep(model, GROUP)
        steps(model, optimizer, 5, data)
        revive_heads(model, GROUP)
        if not hooks:
            updates.remove()
        steps(model, optimizer, 1, data)
        found.append(moments(model, optimizer))
    part = {(name, dim): index for name, dim, index in exclusive_slices(anatomy_of(model), GROUP)}
    changed = 0
    for (name, what), value in found[0].items():
        other = found[1][name, what]
        for (owner, dim), index in part.items():
            if owner == name and value.dim():
                rest = torch.ones(value.shape[dim], dtype=torch.bool)
                rest[index] = False
                changed += not torch.equal(value.index_select(dim, index), other.index_select(dim, index))
                value, other = (v.index_select(dim, rest.nonzero().flatten()) for v in (value, other))
        assert torch.equal(value, other), (name, what)
    assert changed >= 4 or kind == "sgd-momentum"


def test_a_head_without_a_gradient_waits_for_one():
    model = build("gpt2")
    data, optimizer = batches(model), AdamW(model.parameters(), lr=RATE)
    updates = headwise_updates(optimizer, model)
    put_to_sleep(model, [(1, 0)])
    steps(model, optimizer, 2, data)
    revive_heads(model, [(1, 0)])
    assert updates.just_revived == [(1, 0)]
    for value in (0.0, math.nan):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        with torch.no_grad():
            updates._before_step(optimizer, (), {})
        assert updates.fresh and updates.just_revived == []
    steps(model, optimizer, 1, data)
    assert not updates.fresh


def test_a_resumed_run_seeds_what_the_first_would_have():
    finals = []
    for interrupted in (False, True):
        model = build("gpt2")
        data, optimizer = batches(model), AdamW(model.parameters(), lr=RATE)
        updates = headwise_updates(optimizer, model)
        put_to_sleep(model, [(1, 0), (2, 1)])
        steps(model, optimizer, 4, data)
        revive_heads(model, [(1, 0)])
        if interrupted:
            saved = copy.deepcopy(optimizer.state_dict()), updates.just_revived
            optimizer = AdamW(model.parameters(), lr=RATE)
            optimizer.load_state_dict(saved[0])
            headwise_updates(optimizer, model, just_revived=saved[1])
        steps(model, optimizer, 2, data)
        finals.append(model.state_dict())
    assert all(torch.equal(value, finals[1][name]) for name, value in finals[0].items())


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name, heads", [("gpt2", [(0, 1), (0, 2), (2, 3)]), ("llama-grouped", [(0, 0), (0, 1), (1, 0), (1, 3)]), ("bert", [(0, 1), (1, 0)])])
def test_surgery_cuts_moments_and_leaves_those_of_others_alone(name, heads, kind):
    model = build(name)
    data, optimizer = batches(model), OPTIMIZERS[kind](model.parameters())
    steps(model, optimizer, 3, data)
    before, weights, group = moments(model, optimizer), dict(model.named_parameters()), [len(g["params"]) for g in optimizer.param_groups]
    shapes = {key: tuple(p.shape) for key, p in weights.items()}
    with carrying(optimizer, model):
        remove_heads(model, heads)
    now = dict(model.named_parameters())
    assert [len(g["params"]) for g in optimizer.param_groups] == group and {id(p) for g in optimizer.param_groups for p in g["params"]} == set(map(id, now.values()))
    assert {key for key in now if tuple(now[key].shape) != shapes[key]}
    for (key, what), value in moments(model, optimizer).items():
        old = before[key, what]
        if value.dim():
            for dim in range(value.dim()):  # what is left is what was there, in order
                if value.shape[dim] != old.shape[dim]:
                    rows = old.movedim(dim, 0)
                    kept = value.movedim(dim, 0)
                    places = iter(range(len(rows)))
                    picked = [next(place for place in places if torch.equal(rows[place], row)) for row in kept] if old.dim() == value.dim() else []
                    old = old.index_select(dim, torch.tensor(picked))
        assert torch.equal(value, old), (key, what)
    steps(model, optimizer, 2, data)


@pytest.mark.parametrize("kind", ["adamw", "adamw-fused", "sgd-momentum"])
@pytest.mark.parametrize("name, heads", [("gpt2", [(0, 1), (2, 0), (2, 3)]), ("llama-grouped", [(0, 0), (0, 1), (1, 0), (1, 1)])])
def test_training_after_removal_is_training_with_gates(name, heads, kind):
    ends = []
    for removed in (True, False):
        model = build(name)
        data, optimizer = batches(model), OPTIMIZERS[kind](model.parameters())
        headwise_updates(optimizer, model)
        steps(model, optimizer, 5, data)
        if removed:
            with carrying(optimizer, model):
                remove_heads(model, heads)
        else:
            put_to_sleep(model, heads)
        steps(model, optimizer, 10, data)
        with torch.no_grad():
            ends.append(model.eval()(**data[0]).logits)
    assert torch.allclose(*ends, atol=2e-4), (ends[0] - ends[1]).abs().max()


def test_boosted_heads_keep_their_rate_under_their_new_numbers():
    model = build("gpt2")
    data, optimizer = batches(model), SGD(model.parameters(), lr=RATE)
    updates = headwise_updates(optimizer, model, [(0, 1), (0, 3), (2, 0)], multiplier=3.0)
    with carrying(optimizer, model):
        remove_heads(model, [(0, 0), (0, 1)])
    start = slices(model, [(0, 1)])
    twin, plain = copy.deepcopy(model), None
    steps(model, optimizer, 1, data)
    plain = SGD(twin.parameters(), lr=RATE)
    steps(twin, plain, 1, data)
    assert updates.boosted.nonzero().tolist() == [[0, 1], [2, 0]]
    once, thrice = slices(twin, [(0, 1)]), slices(model, [(0, 1)])
    assert all(torch.allclose(thrice[key] - start[key], 3 * (once[key] - start[key]), atol=1e-6) for key in start)


def test_accelerates_wrapper_and_wrong_things():
    from accelerate import Accelerator
    model = build("gpt2")
    data, optimizer = batches(model), Accelerator(cpu=True).prepare(AdamW(model.parameters(), lr=RATE))
    steps(model, optimizer, 1, data)
    with carrying(optimizer, model):
        remove_heads(model, [(0, 1)])
    steps(model, optimizer, 1, data)
    assert {id(p) for g in optimizer.optimizer.param_groups for p in g["params"]} == set(map(id, model.parameters()))
    with pytest.raises(WrongType, match="no torch optimizer"):
        with carrying("adam", model):
            pass
    factored = Adafactor(model.parameters())
    steps(model, factored, 1, data)
    size = sum(p.numel() for p in model.parameters())
    with pytest.raises(UnsupportedModel, match="row_var"):
        with carrying(factored, model):
            remove_heads(model, [(0, 0)])
    assert size == sum(p.numel() for p in model.parameters())


SHARDED = textwrap.dedent("""
    import sys, torch, torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from models import batches, build
    from test_optimizer import GROUP, steps
    from neural_plasticity.errors import UnsupportedModel
    from neural_plasticity.gates import put_to_sleep, revive_heads
    from neural_plasticity.moments import carrying
    from neural_plasticity.optimizer import headwise_updates
    from neural_plasticity.probing import anatomy_of
    torch.set_num_threads(1)
    rank, folder, name = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    heads = GROUP if name == "llama-grouped" else [(1, 0), (2, 3)]
    dist.init_process_group("gloo", init_method=f"file://{folder}/{name}", rank=rank, world_size=2)

    def run(sharded):
        model = build(name)
        anatomy_of(model)
        if sharded:
            for block in (model.transformer.h if name == "gpt2" else model.model.layers):
                fully_shard(block)
            fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        headwise_updates(optimizer, model, heads, 3.0)
        data = batches(model)
        steps(model, optimizer, 2, data)
        put_to_sleep(model, heads)
        steps(model, optimizer, 3, data)
        slept = {n: (p.full_tensor() if sharded else p).detach().clone() for n, p in model.named_parameters()}
        steps(model, optimizer, 2, data)
        still = {n: (p.full_tensor() if sharded else p).detach().clone() for n, p in model.named_parameters()}
        if sharded:
            try:
                with carrying(optimizer, model):
                    raise AssertionError("shards cannot be cut")
            except UnsupportedModel as error:
                assert "fully_shard" in str(error)
        return slept, still

    whole, sharded = run(False), run(True)
    from neural_plasticity.anatomy import exclusive_slices
    parts = exclusive_slices(anatomy_of(build(name)), heads)
    assert len(parts) >= 4
    for n, dim, index in parts:
        assert torch.equal(sharded[0][n].index_select(dim, index), sharded[1][n].index_select(dim, index)), n
    for n, p in whole[1].items():
        assert torch.allclose(p, sharded[1][n], atol=2e-5), (n, (p - sharded[1][n]).abs().max())
    print("fine", flush=True)
    dist.destroy_process_group()
""")


@pytest.mark.parametrize("name", ["gpt2", "llama-grouped"])
def test_shards_of_two_processes_move_as_the_whole_does(tmp_path, name):
    "FSDP2: head-wise updates act on each process's part."
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))]), "OMP_NUM_THREADS": "1"}
    runs = [subprocess.Popen([sys.executable, "-c", SHARDED, str(rank), str(tmp_path), name], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for rank in range(2)]
    outputs = [run.communicate(timeout=240)[0] for run in runs]
    assert all(run.returncode == 0 for run in runs) and all("fine" in output for output in outputs), "\n".join(outputs)[-3000:]
