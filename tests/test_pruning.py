"""Masks are what was asked for: how many, from where, the same every time."""
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import RANDOM, batches, build, fingerprint, logits, same_weights, weights

from neural_plasticity.anatomy import exclusive_slices
from neural_plasticity.budgets import HeadCosts, Rules, head_pieces, one_each, pick_heads
from neural_plasticity.compensation import compensate_heads
from neural_plasticity.errors import InvalidArgument
from neural_plasticity.evaluation import model_cost
from neural_plasticity.gates import dormant_heads, put_to_sleep, revive_heads
from neural_plasticity.importance import CRITERIA, measure_heads
from neural_plasticity.probing import anatomy_of
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
    for strategy in ("taylor", "gradient", "random", "magnitude", "iterative"):
        mask = choose_heads(model, batches(model), 0.4, strategy, min_heads_per_layer=2)
        assert int(mask.sum()) == 4 and not mask[0, 0] and not mask[1, 2] and dormant_heads(model) == [(0, 0), (1, 2)]


def test_rounds_leave_compensated_sleepers_as_they_were():
    model, twin = build("gpt2"), build("gpt2")
    for one in (model, twin):
        compensate_heads(one, batches(one), [(0, 0), (0, 3)])
        put_to_sleep(one, [(1, 2)], zero_weights=True)
    choose_heads(model, batches(model), 0.4)
    assert same_weights(model, weights(twin)) and fingerprint(model) == fingerprint(twin)
    for one in (model, twin):
        revive_heads(one, [(0, 3)])
    assert same_weights(model, weights(twin)) and dormant_heads(model) == [(0, 0), (1, 2)]  # solved anew from the old statistics


def test_an_interrupted_choice_leaves_the_model_as_it_was(monkeypatch):
    import neural_plasticity.choosing as choosing

    model = build("gpt2")
    values, calls = weights(model), []

    def struck(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure_heads(*arguments)

    monkeypatch.setattr(choosing, "measure_heads", struck)
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


@st.composite
def pick_problems(draw):
    "Scores, rules and a budget: pieces of several heads, unequal costs with shared parts, sleepers, protected heads, floors."
    scores, exists, gone = draw(score_maps())
    widths, pieces, each, shared = exists.sum(1).tolist(), [], torch.zeros(exists.shape, dtype=torch.float64), []
    for layer, width in enumerate(widths):
        size = draw(st.integers(1, 3))
        pieces += [tuple((layer, head) for head in range(first, min(first + size, width))) for first in range(0, width, size)]
        each[layer, :width] = torch.tensor(draw(st.lists(st.integers(1, 4), min_size=width, max_size=width))).double()
        shared.append(((torch.arange(width)[:, None] // 2 == torch.arange(3)[None], draw(st.integers(0, 3)) / 2),))
    protect = (scores == 1.5) & ~gone
    costs = draw(st.sampled_from((one_each(exists), HeadCosts("parameters", each, tuple(shared)))))
    rules = Rules(exists, gone, protect, pieces, costs, draw(st.sampled_from(("global", "layer"))), draw(st.integers(0, 2)))
    return scores.double(), draw(st.floats(0, 1)), rules


@settings(deadline=None)
@given(pick_problems())
def test_budgets_are_kept_and_spent(problem):
    scores, share, rules = problem
    budget = rules.budget(share)
    try:
        mask = pick_heads(scores, budget, rules)
    except InvalidArgument:
        return
    spent = rules.costs.of(mask | rules.gone) - rules.costs.of(rules.gone)
    active = rules.exists & ~rules.gone
    assert spent <= budget + 1e-6 and not (mask & (rules.gone | rules.protect | ~rules.exists)).any()
    assert ((active & ~mask).sum(1) >= torch.minimum(active.sum(1), torch.tensor(rules.min_heads_per_layer))).all()
    for piece in rules.pieces:
        left = [head for head in piece if not rules.gone[head]]
        taken = {bool(mask[head]) for head in left}
        assert len(taken) < 2  # a whole piece or nothing
        if rules.scope == "global" and taken == {False}:  # nothing is left that would have fitted
            more = mask.clone()
            for head in left:
                more[head] = True
            assert rules.costs.of(more | rules.gone) - rules.costs.of(rules.gone) > budget - 1e-6


def test_the_same_share_of_every_layer():
    generator = torch.Generator().manual_seed(0)
    scores, exists = torch.rand(5, 8, generator=generator).double(), torch.ones(5, 8, dtype=torch.bool)
    none, singles = torch.zeros_like(exists), [((layer, head),) for layer in range(5) for head in range(8)]
    for share in (0.1, 0.25, 0.4, 0.5, 0.7):
        rules = Rules(exists, none, none, singles, one_each(exists), "layer")
        mask = pick_heads(scores, rules.budget(share), rules)
        assert int(mask.sum()) == math.floor(40 * share + 1e-9) and mask.sum(1).max() - mask.sum(1).min() <= 1
        assert all(mask[layer].equal(generate_pruning_mask(None, int(mask[layer].sum()) / 8, scores=scores[layer][None])[0]) for layer in range(5))


@pytest.mark.parametrize("strategy", ("iterative", "taylor", "random"))
@pytest.mark.parametrize("target", ("parameters", "flops"))
def test_what_a_mask_claims_to_save_is_saved(strategy, target):
    "A fifth of what the heads hold: no more, and no less than that by a piece. What is counted here is what the cut model lacks."
    model = build("llama-grouped")
    anatomy, example = anatomy_of(model), {"input_ids": torch.arange(20).view(2, 10)}
    mask = choose_heads(model, batches(model), 0.4, strategy, target=target, example=example, by="group")
    dense = model_cost(model, batch=example)[target]
    apply_pruning_mask(model, mask, "remove")
    saved = dense - model_cost(model, batch=example)[target]
    parameters = dict(build("llama-grouped").named_parameters())
    held = sum(len(index) * parameters[name].numel() / parameters[name].shape[dim] for name, dim, index in exclusive_slices(anatomy, anatomy.exists))
    attention = 4 * 10 * 10 * 2 * 8 * 4 * 3  # products for 10 × 10 pairs in 2 samples, 8 numbers a head, 4 heads, 3 layers
    total = held if target == "parameters" else 2 * 20 * held + attention
    assert 0.4 * total - total / 6 < saved <= 0.4 * total  # six groups in all


def test_whole_groups_protected_and_excluded_heads():
    model = build("llama-grouped")
    anatomy = anatomy_of(model)
    mask = choose_heads(model, batches(model), 0.5, "taylor", by="group")
    assert int(mask.sum()) == 6 and all(len({bool(mask[head]) for head in piece}) == 1 for piece in head_pieces(anatomy, "group"))
    scores = measure_heads(model, batches(model))["taylor"]
    worth = torch.stack([scores[:, :2].sum(1), scores[:, 2:].sum(1)], dim=1)  # two groups of two heads a layer, of which the floor keeps one
    assert mask[:, ::2].equal(worth == worth.min(1, keepdim=True).values)
    first = choose_heads(model, batches(model), 0.5, "taylor")
    kept, gone = [tuple(pair) for pair in first.nonzero().tolist()][:2], [tuple(pair) for pair in first.nonzero().tolist()][2:4]
    other = choose_heads(model, batches(model), 0.3, protect=kept, exclude=gone)
    assert int(other.sum()) == 3 and not any(other[head] for head in kept + gone)
    with pytest.raises(InvalidArgument, match="protected heads"):
        choose_heads(model, batches(model), 0.5, "taylor", protect=anatomy.heads[2:])


def test_latency_asks_for_as_few_heads_as_it_takes(monkeypatch):
    import neural_plasticity.choosing as choosing

    model = build("gpt2")
    monkeypatch.setattr(choosing, "_seconds", lambda model, mask, example, repeats: 0.010 - 0.0005 * int(mask.sum()))  # 12 heads; half a millisecond each
    for share, count in ((0, 0), (0.05, 1), (0.14, 3), (0.4, 8)):
        for strategy in ("taylor", "iterative"):
            assert int(choose_heads(model, batches(model), share, strategy, target="latency").sum()) == count
    with pytest.raises(InvalidArgument, match="without 9 heads, all that can go"):
        choose_heads(model, batches(model), 0.5, target="latency")


def test_latency_is_that_of_a_model_without_the_heads(monkeypatch):
    import neural_plasticity.choosing as choosing

    model, timed = build("gpt2"), []
    put_to_sleep(model, [(0, 0)])
    before, mask = fingerprint(model), torch.zeros(3, 4, dtype=torch.bool)
    mask[1, 2] = True
    monkeypatch.setattr(choosing, "measure_latency", lambda twin, example, repeats: timed.append(twin) or {"seconds": 1.0})
    assert choosing._seconds(model, mask, {"input_ids": torch.arange(8)[None]}, 2) == 1.0
    assert [site.num_heads for site in anatomy_of(timed[0]).sites] == [3, 3, 4] and fingerprint(model) == before


@pytest.mark.parametrize("options, words", [(dict(target="speed"), "target is 'speed'"), (dict(by="layer"), "by is 'layer'"), (dict(scope="model"), "scope is 'model'"),
                                            (dict(rounds=0), "rounds is 0"), (dict(criterion="iterative"), "criterion is what"), (dict(protect=[(9, 9)]), "protect: there is no head"),
                                            (dict(exclude=[(9, 9)]), "exclude: there is no head"), (dict(max_bytes=-1), "max_bytes")])
def test_options_that_cannot_be(options, words):
    model = build("gpt2")
    anatomy_of(model)
    before = fingerprint(model)
    with pytest.raises(InvalidArgument, match=words):
        choose_heads(model, batches(model), 0.4, **options)
    assert fingerprint(model) == before


def test_scores_that_are_no_numbers_choose_nothing():
    exists = torch.ones(1, 3, dtype=torch.bool)
    rules = Rules(exists, exists & False, exists & False, [((0, head),) for head in range(3)], one_each(exists))
    with pytest.raises(InvalidArgument, match=r"NaN or infinite, \(0, 1\) the first"):
        pick_heads(torch.tensor([[0.1, float("nan"), 0.3]]), 1, rules)
