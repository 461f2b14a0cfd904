"""Blocks below a change are left out of a pass, and nothing changes by that: not a bit of what comes out. Where it would, every block runs."""
import pytest
import torch
from models import RANDOM, batches, build, weights
from torch import nn

import neural_plasticity.compensation as compensation
from neural_plasticity.compensation import compensate_heads
from neural_plasticity.gates import put_to_sleep
from neural_plasticity.probing import anatomy_of
from neural_plasticity.unchanged_blocks import UnchangedBlocks, block_of

HEADS = [(0, 1), (1, 0), (1, 2), (2, 3)]


class Unaware(UnchangedBlocks):
    "Lets every block run."

    def __init__(self, *args):
        super().__init__(*args)
        self.give_up()


def compensated(model, data, monkeypatch, kind):
    "The model's weights afterwards, and how often its output projections ran."
    runs, sites = [], anatomy_of(model).sites
    handles = [model.get_submodule(site.projection).register_forward_pre_hook(lambda *_: runs.append(1)) for site in sites]
    monkeypatch.setattr(compensation, "UnchangedBlocks", kind)
    compensate_heads(model, data, HEADS)
    for handle in handles:
        handle.remove()
    return weights(model), len(runs)


@pytest.mark.parametrize("name", RANDOM)
def test_compensation_is_the_same_with_fewer_blocks(name, monkeypatch):
    data = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches(build(name), 4)]
    shortened, few = compensated(build(name), data, monkeypatch, UnchangedBlocks)
    whole, many = compensated(build(name), data, monkeypatch, Unaware)
    assert all(torch.equal(shortened[key], whole[key]) for key in whole)
    if len(anatomy_of(build(name)).sites) > 3:  # an encoder-decoder has more sites, two of them in each block of the decoder
        assert few <= many
    else:  # each pass ends before the projection that it is made for. Dense: 3 in each of 4 batches; pruned: 0 + 1 + 2, or 0 + 1 + 1, and the first batch both ways for the last
        assert (few, many) == (4 * 3 + 4 * 2 + 2, 4 * 3 + 4 * 3)


class Remembers(nn.Module):
    "A block that writes down what it was given, or adds what was written down."

    def __init__(self, block, notes, writes):
        super().__init__()
        self.block, self.notes, self.writes = block, notes, writes

    def forward(self, hidden, *args, **kwargs):
        if self.writes:
            self.notes["seen"] = hidden
            return self.block(hidden, *args, **kwargs)
        return self.block(hidden + self.notes["seen"], *args, **kwargs)


def test_a_model_that_goes_another_way_runs_in_full(monkeypatch):
    "Its third block reads what its first was given, which is that of another batch if the first does not run."
    def model():
        whole, notes = build("gpt2"), {}
        for number in (0, 2):
            whole.transformer.h[number] = Remembers(whole.transformer.h[number], notes, number == 0)
        return whole

    data = [{"input_ids": batch["input_ids"]} for batch in batches(build("gpt2"), 3)]
    found, _ = compensated(model(), data, monkeypatch, UnchangedBlocks)
    whole, _ = compensated(model(), data, monkeypatch, Unaware)
    assert all(torch.equal(found[key], whole[key]) for key in whole)


@pytest.mark.parametrize("limit, left_out", [(0, [0, 0, 0]), (10**6, [0, 0, 1])])
def test_what_does_not_fit_is_computed(limit, left_out):
    model, data = build("gpt2"), batches(build("gpt2"), 1)[0]
    sites, found = anatomy_of(model).sites, []
    unchanged = UnchangedBlocks(model, sites, limit)
    assert unchanged.blocks == [block_of(model, site) for site in sites] == [f"transformer.h.{number}" for number in range(3)]
    with torch.no_grad():
        expected = model(**data).logits
        for site in sites:
            with unchanged.passing(0, site) as count:
                assert torch.equal(model(**data).logits, expected)
            found.append(count)
    assert found == left_out and unchanged.bytes <= limit
    assert not any("forward" in module.__dict__ for module in model.modules()) and not any(module._forward_hooks for module in model.modules())


def test_what_an_error_interrupts_is_put_back():
    model, data = build("gpt2"), batches(build("gpt2"), 1)[0]
    sites = anatomy_of(model).sites
    unchanged = UnchangedBlocks(model, sites)
    with torch.no_grad():
        for site in sites:
            with pytest.raises(KeyError), unchanged.passing(0, site):
                model(**data)
                raise KeyError
    assert not any("forward" in module.__dict__ for module in model.modules()) and not any(module._forward_hooks for module in model.modules())


def test_a_model_without_a_list_of_blocks_runs_in_full():
    model = build("gpt2")
    model.transformer.h = nn.Sequential(*model.transformer.h)
    put_to_sleep(model, HEADS)
    sites = anatomy_of(model).sites
    assert block_of(model, sites[0]) is None and UnchangedBlocks(model, sites).blocks == []
