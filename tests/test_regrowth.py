"""What comes back is what the loss asks for: scores along the way a revival takes, tried before they are believed, the same every time."""

import copy
import json
import math
import os
import random
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from models import batches, build

from neural_plasticity.candidates import difference, losses_if
from neural_plasticity.compensation import compensate_heads
from neural_plasticity.data import load_embedded_model, load_embedded_text, text_dataloader
from neural_plasticity.errors import InvalidArgument
from neural_plasticity.gates import dormant_heads, gate_heads, put_to_sleep, revive_heads, state_of
from neural_plasticity.importance import collect_quantities, measure_heads
from neural_plasticity.pruning import generate_pruning_mask
from neural_plasticity.regrowth import Change, PlasticityMemory, PlasticitySchedule, as_if_dormant, choose_regrowth, plasticity_step, regrow, regrowth_scores

ASLEEP = [(0, 0), (0, 1), (1, 2), (2, 1), (2, 3)]
SWAP = PlasticitySchedule(regrow_every=1, fraction=0.5, stop_after=1.0, confidence=0.0, swap=True, warmup_steps=0, cooldown=3, num_batches=3, verify_batches=2)


def sleeping(name="gpt2", compensated=False, asleep=ASLEEP):
    model = build(name)
    put_to_sleep(model, asleep)
    if compensated:
        compensate_heads(model, batches(model, count=16, batch=4))
    return model


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def untouched(model, before):
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama-grouped", "bert"])
def test_as_if_dormant_is_what_really_happens(name, compensated):
    model = sleeping(name, compensated)
    before, [batch] = weights(model), batches(model, count=1)
    other = [(0, 1), (0, 3), (1, 2), (2, 3)]  # (0, 0) and (2, 1) wake, (0, 3) goes to sleep
    with torch.no_grad(), as_if_dormant(model, other):
        seen = model(**batch).logits
    assert untouched(model, before) and dormant_heads(model) == ASLEEP
    put_to_sleep(model, [(0, 3)])
    revive_heads(model, [(0, 0), (2, 1)])
    with torch.no_grad():
        assert torch.allclose(seen, model(**batch).logits, atol=2e-4)


def test_as_if_dormant_without_a_state():
    model = build("gpt2")
    [batch] = batches(model, count=1)
    with torch.no_grad():
        with as_if_dormant(model, ASLEEP):
            seen = model(**batch).logits
        with gate_heads(model, ASLEEP):
            assert torch.equal(seen, model(**batch).logits)
    assert state_of(model) is None


@pytest.mark.parametrize("name", ["gpt2", "llama-grouped", "bert", "vit"])
def test_scores_are_the_gates_gradients_where_nothing_is_compensated(name):
    model = sleeping(name)
    data = batches(model, count=3)
    scores = regrowth_scores(model, data)
    gains = -collect_quantities(model, data, {"gate_gradients"}, None).per_sample("gate_gradients")
    asleep = state_of(model).dormant
    assert torch.allclose(scores[asleep], gains.mean(0)[asleep], rtol=1e-4, atol=1e-7) and scores[~asleep].isnan().all()
    assert torch.allclose(scores.stderr[asleep], (gains.std(0) / math.sqrt(len(gains)))[asleep], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["gpt2", "llama-grouped"])
def test_scores_are_the_slope_along_a_revival_where_layers_are_compensated(name):
    "A hundredth of the way from the model as it is to the model with the head back, taken for real."
    model = sleeping(name, compensated=True)
    data = batches(model, count=2)
    scores, step = regrowth_scores(model, data), 1e-2
    asleep = state_of(model).dormant
    before = losses_if(model, data, asleep)
    for layer, head in ASLEEP:
        back = copy.deepcopy(model)
        revive_heads(back, [(layer, head)])
        site = state_of(model).anatomy.sites[layer]
        here, there = (m.get_submodule(site.projection) for m in (model, back))
        columns = site.columns[head]
        small = copy.deepcopy(model)
        target = small.get_submodule(site.projection)
        gates = state_of(small).gates.clone()
        gates[layer, head] = 1.0  # its columns are scaled instead
        with torch.no_grad():
            ours, theirs, mine = (w if type(here).__name__ == "Conv1D" else w.T for w in (here.weight, there.weight, target.weight))
            mine.copy_(ours + step * (theirs - ours))
            mine[columns] = step * theirs[columns]
            mine[site.columns[[h for lay, h in ASLEEP if lay == layer and h != head]].any(0)] = 0
            if target.bias is not None:
                target.bias.copy_(here.bias + step * (there.bias - here.bias))
            with gate_heads(small, gates):
                slope, _ = difference(losses_if_as_is(small, data), before)
        assert -slope / step == pytest.approx(float(scores[layer, head]), rel=0.1, abs=2e-3)


def losses_if_as_is(model, data):
    from neural_plasticity.running import sample_losses
    return torch.cat([sample_losses(model, batch)[0].detach() for batch in data])


def test_in_a_compensated_model_the_score_tells_more_than_the_gate():
    "Of 19 heads that were pruned and made up for, each is brought back: the slope along its revival is a better measure of what the loss then does than the gate's slope is."
    model, tokenizer = load_embedded_model("gpt2")
    data = list(text_dataloader(load_embedded_text("selection")[:6], tokenizer, block_size=64, batch_size=16, shuffle=True))[:10]
    put_to_sleep(model, generate_pruning_mask(None, 0.4, scores=measure_heads(model, data[:2])["taylor"]))
    compensate_heads(model, data[:6])
    asleep, seen = state_of(model).dormant, data[6:9]
    along = regrowth_scores(model, seen)[asleep].as_subclass(torch.Tensor)
    gate = -collect_quantities(model, seen, {"gate_gradients"}, None).per_sample("gate_gradients").mean(0)[asleep]
    before, really = losses_if(model, seen, asleep), []
    for layer, head in dormant_heads(model):
        without = asleep.clone()
        without[layer, head] = False
        really.append(-difference(losses_if(model, seen, without), before)[0])
    really = torch.tensor(really)

    def error(scores):  # both are slopes of a convex function and promise too much, by some factor
        return (scores * (scores @ really) / (scores @ scores) - really).abs().mean()

    assert error(along) < 0.8 * error(gate)
    assert torch.corrcoef(torch.stack([along, really]))[0, 1] > max(0.8, torch.corrcoef(torch.stack([gate, really]))[0, 1])


def test_measuring_leaves_model_and_random_state_alone():
    model = sleeping(compensated=True).train()
    before, modes = weights(model), [module.training for module in model.modules()]
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    expected = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    regrowth_scores(model, torch.utils.data.DataLoader(batches(model), batch_size=None, shuffle=True))
    losses_if(model, batches(model), torch.zeros_like(state_of(model).dormant))
    assert untouched(model, before) and modes == [module.training for module in model.modules()] and all(p.grad is None for p in model.parameters())
    assert random.getstate() == expected[0] and np.random.get_state()[1].tolist() == expected[1] and torch.equal(torch.get_rng_state(), expected[2])
    assert not any(module._forward_hooks for module in model.modules())


def test_nothing_is_left_behind_after_an_error():
    model = sleeping(compensated=True)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(ValueError, match="on purpose"):
        with as_if_dormant(model, [(0, 2)]):
            raise ValueError("on purpose")
    with pytest.raises(InvalidArgument, match="no labels"):
        regrowth_scores(model, [{"input_ids": torch.ones(1, 4, dtype=torch.long)}])
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def test_padding_does_not_count():
    model, [batch] = sleeping(), batches(build("gpt2"), count=1)
    padded = {**batch, "labels": torch.cat([batch["labels"], torch.full_like(batch["labels"], -100)]), "input_ids": batch["input_ids"].repeat(2, 1)}
    assert torch.allclose(regrowth_scores(model, [padded]).nan_to_num(), regrowth_scores(model, [batch]).nan_to_num(), atol=1e-6)
    with pytest.raises(InvalidArgument, match="-100"):
        regrowth_scores(model, [{**batch, "labels": torch.full_like(batch["labels"], -100)}])


def test_only_what_lowers_the_loss_elsewhere_comes_back(monkeypatch):
    model = sleeping()
    data = batches(model, count=4)
    asked = []

    def judge(model, held_out, asleep):
        asked.append([batch["input_ids"].tolist() for batch in held_out])
        worse = float(not asleep[0, 0]) - float(not asleep[2, 1])  # (0, 0) would do harm, (2, 1) good, the others nothing
        return torch.full((4,), worse)

    monkeypatch.setattr("neural_plasticity.regrowth.regrowth_scores", lambda model, batches: all_wanted(model))
    monkeypatch.setattr("neural_plasticity.regrowth.losses_if", judge)
    revived = regrow(model, data, 5, PlasticitySchedule(num_batches=2, verify_batches=2, warmup_steps=0))
    assert revived == [(2, 1)] and dormant_heads(model) == [head for head in ASLEEP if head != (2, 1)]
    assert {str(batches_) for batches_ in asked} == {str([batch["input_ids"].tolist() for batch in data[2:]])}  # not those that they were scored on


def all_wanted(model):
    from neural_plasticity.regrowth import RegrowthScores
    scores = torch.where(state_of(model).dormant, 1.0, math.nan).as_subclass(RegrowthScores)
    scores.stderr = torch.zeros(scores.shape)
    return scores


def test_one_batch_cannot_verify():
    model = sleeping()
    with pytest.raises(InvalidArgument, match="verify_batches=0"):
        regrow(model, batches(model, count=1), 2)
    regrow(model, batches(model, count=1), 2, PlasticitySchedule(verify_batches=0))


@pytest.mark.parametrize("swap_by", ["score", "random"])
def test_swaps_keep_the_number_the_floor_and_the_cool_down(swap_by):
    model = sleeping(asleep=[(0, 0), (0, 1), (0, 2), (1, 2), (2, 1), (2, 3)])
    data, memory, changes = batches(model, count=5), PlasticityMemory(), {}
    schedule = PlasticitySchedule(**{**SWAP.__dict__, "swap_by": swap_by, "verify_batches": 0})
    for step in range(1, 9):
        change = plasticity_step(model, data, schedule, step, 20, memory)
        assert len(change.pruned) == len(change.revived) and len(dormant_heads(model)) == 6 and set(change.reasons) == {*change.pruned, *change.revived}
        assert (~state_of(model).dormant).sum(1).min() >= 1
        for head in change.pruned + change.revived:
            assert step - changes.get(head, -99) >= schedule.cooldown
            changes[head] = step
    assert changes == memory.changed and len(changes) >= 4
    assert PlasticityMemory.from_dict(json.loads(json.dumps(memory.to_dict()))) == memory


def test_swaps_lower_the_loss_on_the_batches_that_verified_them():
    model = sleeping()
    data = batches(model, count=5, batch=4)
    before = losses_if(model, data[3:], state_of(model).dormant)
    change = plasticity_step(model, data, SWAP, 1, 20, PlasticityMemory())
    assert change and all("verified: loss −" in change.reasons[head] for head in change.revived) and all("gives way to" in change.reasons[head] for head in change.pruned)
    assert difference(losses_if(model, data[3:], state_of(model).dormant), before)[0] < 0
    strict = PlasticitySchedule(**{**SWAP.__dict__, "hysteresis": 1e6})
    assert not plasticity_step(sleeping(), data, strict, 1, 20, PlasticityMemory())


def test_the_same_every_time_and_random_state_left_alone():
    finals = []
    for swap_by in ("score", "score", "random", "random"):
        model, memory = sleeping(compensated=True), PlasticityMemory()
        torch.manual_seed(len(finals))
        expected = torch.get_rng_state()
        schedule = PlasticitySchedule(**{**SWAP.__dict__, "swap_by": swap_by, "verify_batches": 0, "seed": 5})
        changes = [plasticity_step(model, batches(model, count=5), schedule, step, 20, memory) for step in range(1, 4)]
        assert torch.equal(torch.get_rng_state(), expected)
        finals.append((changes, weights(model)))
    for one, other in (finals[:2], finals[2:]):
        assert one[0] == other[0] and any(one[0]) and all(torch.equal(one[1][name], other[1][name]) for name in one[1])
    other_seed = PlasticitySchedule(**{**SWAP.__dict__, "swap_by": "random", "seed": 6})
    assert plasticity_step(sleeping(), batches(build("gpt2")), other_seed, 1, 20, PlasticityMemory()) != finals[2][0][0]


def test_a_step_without_anything_to_do_touches_nothing():
    class Untouchable:
        def __iter__(self):
            raise AssertionError("the batches were asked for")

    schedule = PlasticitySchedule(regrow_every=10, prune_to=0.5, prune_every=10, prune_from=0.5)
    memory = PlasticityMemory()
    for step in (0, 1, 9, 11, 99):
        assert plasticity_step(sleeping(), Untouchable(), schedule, step, 100, memory) == Change()
    assert plasticity_step(build("gpt2"), Untouchable(), schedule, 10, 100, memory) == Change()  # nothing is dormant
    assert memory == PlasticityMemory()


def test_the_ramp_reaches_its_level_lowest_first():
    model, memory = build("gpt2"), PlasticityMemory()
    schedule = PlasticitySchedule(prune_to=0.5, prune_every=2, prune_until=0.5, fraction=0.0, num_batches=2)
    sizes = []
    for step in range(1, 21):
        change = plasticity_step(model, batches(model, count=4), schedule, step, 20, memory)
        assert all("taylor" in reason for reason in change.reasons.values())
        sizes.append(len(dormant_heads(model)))
    assert sizes[-1] == 6 and sizes[0] == 0 and sizes == sorted(sizes) and len(set(sizes)) > 3


@pytest.mark.parametrize("compensate", [False, True])
def test_the_ramp_compensates_if_asked(compensate):
    model = build("gpt2")
    plasticity_step(model, batches(model, count=12, batch=4), PlasticitySchedule(prune_to=0.5, prune_until=0.0, compensate=compensate, num_batches=10), 1, 20, PlasticityMemory())
    assert len(dormant_heads(model)) == 6 and bool(state_of(model).compensation) == compensate


def test_pruning_keeps_within_the_bound():
    model, memory = copy.deepcopy(load_embedded_model("gpt2")[0]), PlasticityMemory()
    _, tokenizer = load_embedded_model("gpt2")
    data = list(text_dataloader(load_embedded_text("train")[:1], tokenizer, block_size=32, batch_size=4))[:6]
    schedule = PlasticitySchedule(prune_to=0.9, prune_every=1, prune_until=0.2, max_perplexity_rise=0.1, fraction=0.0)
    for step in range(1, 5):
        plasticity_step(model, data, schedule, step, 20, memory)
    rise = float(losses_if(model, data[:4], state_of(model).dormant).mean()) - memory.baseline_loss
    assert 5 < len(dormant_heads(model)) < 43 and rise <= math.log(1.1)


@pytest.mark.parametrize("on_rise", ["stop", "give_back"])
def test_past_the_bound(on_rise):
    model = sleeping()
    data = batches(model, count=5)
    memory = PlasticityMemory(baseline_loss=-9.0)  # whatever the loss is, it is far above
    schedule = PlasticitySchedule(regrow_every=1, swap=True, prune_to=0.9, prune_every=1, prune_until=1.0, max_perplexity_rise=0.1, on_rise=on_rise, stop_after=0.0, warmup_steps=0)
    change = plasticity_step(model, data, schedule, 5, 20, memory)
    assert not change.pruned and bool(change.revived) == (on_rise == "give_back")
    assert all("past its bound" in reason for reason in change.reasons.values())


def test_a_criterion_of_any_name_and_an_unknown_one():
    model = build("gpt2")
    change = plasticity_step(model, batches(model, count=4), PlasticitySchedule(prune_to=0.25, prune_until=0.0, criterion="magnitude"), 1, 20, PlasticityMemory())
    assert len(change.pruned) == 3 and all(reason.startswith("magnitude") for reason in change.reasons.values())
    with pytest.raises(InvalidArgument, match="unknown criteria"):
        plasticity_step(model, batches(model, count=4), PlasticitySchedule(prune_to=0.5, prune_until=0.0, criterion="beauty"), 1, 20, PlasticityMemory())


def test_a_memory_that_is_none():
    with pytest.raises(InvalidArgument, match="no memory of a schedule"):
        PlasticityMemory.from_dict({"changed": 3})


def test_choosing_by_score():
    assert choose_regrowth(torch.tensor([[0.3, -0.9, math.nan, 0.1]]), count=4) == [(0, 0), (0, 3)]
    with pytest.raises(InvalidArgument, match="count is -1"):
        choose_regrowth(torch.zeros(1, 2), -1)
    with pytest.raises(InvalidArgument, match="nothing to revive"):
        regrowth_scores(build("gpt2"), [])


TOGETHER = textwrap.dedent("""
    import sys, torch, torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from models import batches, build
    from test_regrowth import SWAP, sleeping
    from neural_plasticity.gates import dormant_heads
    from neural_plasticity.probing import anatomy_of
    from neural_plasticity.regrowth import PlasticityMemory, PlasticitySchedule, plasticity_step
    torch.set_num_threads(1)
    rank, folder, how = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    if how != "alone":
        dist.init_process_group("gloo", init_method=f"file://{folder}/{how}", rank=rank, world_size=2)
    model = sleeping("llama-grouped", compensated=how != "sharded" and sys.argv[4] == "compensated")
    if how == "sharded":
        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model)
    schedule = PlasticitySchedule(**{**SWAP.__dict__, "verify_batches": 3, "max_perplexity_rise": 0.5, "prune_to": 0.6, "prune_every": 1, "prune_until": 0.1})
    memory, data = PlasticityMemory(), batches(model, count=6)
    for step in range(1, 4):
        change = plasticity_step(model, data, schedule, step, 20, memory)
        print("step", step, change.pruned, change.revived, sorted(change.reasons.items()), memory.to_dict())
    print("asleep", dormant_heads(model), flush=True)
    if how != "alone":
        dist.destroy_process_group()
""")


def ask(folder, how, number, kind):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))]), "OMP_NUM_THREADS": "1"}
    runs = [subprocess.Popen([sys.executable, "-c", TOGETHER, str(rank), str(folder), how, kind], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in range(number)]
    outputs = [run.communicate(timeout=300) for run in runs]
    assert all(run.returncode == 0 for run in runs), "\n".join(error for _, error in outputs)[-3000:]
    return [[line for line in output.splitlines() if line.startswith(("step", "asleep"))] for output, _ in outputs]


@pytest.mark.parametrize("how, kind", [("together", "plain"), ("together", "compensated"), ("sharded", "plain")])
def test_two_processes_decide_as_one(tmp_path, how, kind):
    [alone], (one, other) = ask(tmp_path, "alone", 1, kind), ask(tmp_path, how, 2, kind)
    assert one == other and len(one) == 4 and "[(" in one[0]
    if how == "together":
        assert one == alone
    else:
        assert one[-1] == alone[-1]  # sharded products are summed in another order: the same heads, other last digits
