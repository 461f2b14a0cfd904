"""Masks are what was asked for: how many, from where, the same every time."""
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import RANDOM, batches, build, fingerprint, logits, same_weights, weights

from neural_plasticity.compensation import compensate_heads
from neural_plasticity.errors import InvalidArgument
from neural_plasticity.gates import dormant_heads, put_to_sleep
from neural_plasticity.importance import CRITERIA, measure_heads
from neural_plasticity.pruning import PruningMode, PruningStrategy, apply_pruning_mask, choose_heads, generate_pruning_mask


@st.composite
def score_maps(draw):
    "Scores with many ties, which heads exist, which are dormant."
    layers, heads = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    scores = torch.tensor(draw(st.lists(st.integers(-3, 3), min_size=layers * heads, max_size=layers * heads))).view(layers, heads) / 2
    widths = torch.tensor(draw(st.lists(st.integers(1, heads), min_size=layers, max_size=layers)))
    exists = torch.arange(heads)[None] < widths[:, None]
    asleep = torch.tensor(draw(st.lists(st.booleans(), min_size=layers * heads, max_size=layers * heads))).view(layers, heads) & exists
    return scores.masked_fill(~exists, float("nan")), exists, asleep & (scores > 0)


@settings(deadline=None)
@given(score_maps(), st.floats(0, 1), st.integers(0, 3))
def test_masks_keep_their_promises(maps, percent, floor):
    scores, exists, asleep = maps
    count = math.floor(int(exists.sum()) * percent + 1e-9)
    allowed = exists & ~asleep
    options = dict(scores=scores, exists=exists, exclude=asleep, min_heads_per_layer=floor)
    if count > int((allowed.sum(1) - floor).clamp(min=0).sum()):
        with pytest.raises(InvalidArgument, match="at least"):
            generate_pruning_mask(None, percent, **options)
        return
    mask = generate_pruning_mask(None, percent, **options)
    assert mask.dtype == torch.bool and mask.shape == exists.shape and int(mask.sum()) == count
    assert not (mask & ~allowed).any()
    assert ((allowed & ~mask).sum(1) >= torch.minimum(allowed.sum(1), torch.tensor(floor))).all()
    assert mask.equal(generate_pruning_mask(None, percent, **options))
    for layer in range(len(scores)):  # within a layer the lowest go first, and of equals the first
        ranked = sorted(allowed[layer].nonzero().flatten().tolist(), key=lambda head: (float(scores[layer, head]), head))
        assert mask[layer].nonzero().flatten().tolist() == sorted(ranked[: int(mask[layer].sum())])
    full = mask.sum(1) == (allowed.sum(1) - floor).clamp(min=0)  # layers that can give no more
    if mask.any() and not full.all():  # elsewhere no head that stays is worth less than one that goes
        assert scores[allowed & ~mask & ~full[:, None]].min() >= scores[mask & ~full[:, None]].max() if (mask & ~full[:, None]).any() else True


@settings(deadline=None)
@given(score_maps(), st.floats(0, 1), st.floats(0, 1), st.sampled_from(("gradient", "entropy", "combined", "random", "scores")))
def test_more_percent_only_adds_heads(maps, low, high, strategy):
    scores, exists, _ = maps
    low, high = sorted((low, high))
    first = dict(scores=scores) if strategy == "scores" else dict(strategy=strategy, entropy_values=scores.abs(), random_seed=3)
    values = None if strategy == "scores" else scores
    assume(exists.any())
    fewer, more = (generate_pruning_mask(values, percent, exists=exists, min_heads_per_layer=0, **first) for percent in (low, high))
    assert not (fewer & ~more).any()


@pytest.mark.parametrize("percent, count", [(0, 0), (0.1, 1), (0.2, 2), (0.3, 3), (0.7, 7), (0.29, 2), (1 / 3, 3), (1, 10)])
def test_the_count_is_not_spoilt_by_binary_fractions(percent, count):
    mask = generate_pruning_mask(torch.arange(10.0)[None], percent, min_heads_per_layer=0)
    assert mask.tolist() == [[index < count for index in range(10)]]


def test_strategies_prune_what_they_say():
    gradient = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    entropy = torch.tensor([[0.0, 0.2, 0.4, 1.0]])
    assert generate_pruning_mask(gradient, 0.5).tolist() == [[True, True, False, False]]
    assert generate_pruning_mask(gradient, 0.5, "entropy", entropy).tolist() == [[False, False, True, True]]
    # 0.6·(0, .2, .4, 1) + 0.4·(1, 2/3, 1/3, 0) = .4, .387, .373, .6
    assert generate_pruning_mask(gradient, 0.5, "combined", entropy).tolist() == [[True, False, False, True]]
    assert generate_pruning_mask(gradient, 0.25, scores=None, strategy=PruningStrategy.GRADIENT).tolist() == [[True, False, False, False]]


def test_random_masks_depend_on_their_seed_alone():
    shape = torch.zeros(6, 8)
    masks = [generate_pruning_mask(shape, 0.3, "random", random_seed=seed) for seed in (0, 1, 0)]
    torch.manual_seed(99)
    assert masks[0].equal(masks[2]) and masks[0].equal(generate_pruning_mask(shape + 5, 0.3, "random", random_seed=0)) and not masks[0].equal(masks[1])


@pytest.mark.parametrize("strategy", [*PruningStrategy, *(name for name in CRITERIA if name not in list(PruningStrategy))])
@pytest.mark.parametrize("name", RANDOM)
def test_choosing_leaves_the_model_and_repeats_itself(name, strategy):
    model = build(name)
    first = choose_heads(model, batches(model), 0.4, strategy)
    before, values = fingerprint(model), weights(model)
    torch.manual_seed(5)
    assert choose_heads(model, batches(model), 0.4, str(strategy)).equal(first) and int(first.sum()) == 4
    assert fingerprint(model) == before and same_weights(model, values)


def test_choosing_goes_on_from_what_sleeps():
    model = build("gpt2")
    put_to_sleep(model, [(0, 0), (1, 2)])
    for strategy in ("taylor", "gradient", "random", "magnitude"):
        mask = choose_heads(model, batches(model), 0.4, strategy, min_heads_per_layer=2)
        assert int(mask.sum()) == 4 and not mask[0, 0] and not mask[1, 2] and dormant_heads(model) == [(0, 0), (1, 2)]
    with pytest.raises(InvalidArgument, match="restore_heads"):
        choose_heads(model, batches(model), 0.4, "iterative")


def test_an_interrupted_choice_leaves_the_model_as_it_was(monkeypatch):
    import neural_plasticity.pruning as pruning

    model = build("gpt2")
    values, calls = weights(model), []

    def struck(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure_heads(*arguments)

    monkeypatch.setattr(pruning, "measure_heads", struck)
    with pytest.raises(KeyboardInterrupt):
        choose_heads(model, batches(model), 0.5, "iterative")
    assert len(calls) == 3 and same_weights(model, values) and dormant_heads(model) == []


@pytest.mark.parametrize("mode", PruningMode)
def test_apply_names_the_heads_that_were_active(mode):
    model = build("gpt2")
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[0, 1] = mask[2, 2] = True
    put_to_sleep(model, [(0, 1)])
    assert apply_pruning_mask(model, mask, mode) == [(2, 2)]
    assert apply_pruning_mask(model, [], mode) == []


@pytest.mark.parametrize("mode", ("gate", "zero_weights"))
@pytest.mark.parametrize("name", RANDOM)
def test_a_whole_layer_can_sleep(name, mode):
    model, layer = build(name), [(1, head) for head in range(4)]
    assert apply_pruning_mask(model, layer, mode) == layer
    expected = logits(model)
    report = compensate_heads(model, batches(model))  # only a bias can make up for it
    assert logits(model).isfinite().all() and 0 <= report.undone[1] <= 1 + 1e-9
    assert logits(model).equal(expected) == (name in ("llama", "llama-grouped"))
