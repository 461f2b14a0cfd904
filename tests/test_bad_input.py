"""Bad tensors and batches: a typed error that says what to do, or the right thing; and whatever happens, the model stays as it was."""
import random

import numpy as np
import pytest
import torch
from models import LAYERS, RANDOM, batches, build, fingerprint, inputs, logits, padded, same_weights, weights
from torch.utils.data import DataLoader

from neural_plasticity.compensation import compensate_heads
from neural_plasticity.errors import InvalidArgument, PlasticityError, UnsupportedModel, WrongType
from neural_plasticity.gates import gate_heads, put_to_sleep, restore_heads, revive_heads, state_of
from neural_plasticity.importance import analyze_attention_patterns, calculate_head_gradients, measure_entropy, measure_heads
from neural_plasticity.probing import anatomy_of, probe
from neural_plasticity.pruning import apply_pruning_mask, choose_heads, generate_pruning_mask
from neural_plasticity.surgery import remove_heads

nan, inf = float("nan"), float("inf")
GOOD = torch.arange(12.0).view(3, 4)


@pytest.mark.parametrize("options, words", [
    (dict(grad_norm_values=GOOD[0]), r"shape \(4,\); it must be \[layers, heads\]"),
    (dict(grad_norm_values=GOOD[None]), r"shape \(1, 3, 4\)"),
    (dict(grad_norm_values=torch.zeros(0, 4)), r"shape \(0, 4\)"),
    (dict(grad_norm_values=GOOD.log()), "1 values that are NaN or infinite"),
    (dict(grad_norm_values=GOOD.index_fill(0, torch.tensor(1), nan)), "4 values that are NaN or infinite"),
    (dict(grad_norm_values=None, scores=GOOD * inf), "12 values that are NaN or infinite"),
    (dict(grad_norm_values=GOOD, scores=GOOD), "not both"),
    (dict(grad_norm_values=None), "give either"),
    (dict(grad_norm_values=[[1, 2], [3]]), "grad_norm_values"),
    (dict(grad_norm_values="high"), "grad_norm_values"),
    (dict(strategy="entropy"), "needs entropy_values"),
    (dict(strategy="entropy", entropy_values=GOOD.T), r"shape \(4, 3\), but \(3, 4\)"),
    (dict(strategy="combined", entropy_values=GOOD * nan), "entropy_values has 12 values"),
    (dict(strategy="taylor"), r"scores=measure_heads\(model, dataloader, \['taylor'\]\)"),
    (dict(strategy="best"), "unknown strategy 'best'; there are gradient"),
    (dict(strategy=None), "unknown strategy None"),
    (dict(strategy=["gradient"]), "unknown strategy"),
    (dict(prune_percent=20), "20 % is prune_percent=0.2"),
    (dict(prune_percent=-0.1), "it is a fraction"),
    (dict(prune_percent=nan), "it is a fraction"),
    (dict(prune_percent=True), "it is a fraction"),
    (dict(prune_percent="0.2"), "it is a fraction"),
    (dict(prune_percent=1), "at least 1 active in every layer only 9 can be"),
    (dict(min_heads_per_layer=-1), "min_heads_per_layer is -1"),
    (dict(min_heads_per_layer=1.5), "min_heads_per_layer is 1.5"),
    (dict(exists=torch.ones(2, 2)), r"but \(2, 2\) is needed"),
    (dict(exclude=torch.zeros(2, 2, dtype=torch.bool)), r"exclude"),
    (dict(exclude=[(3, 0)]), r"exclude"),
    (dict(exclude=[(0, -1)]), r"exclude"),
    (dict(exclude=[(0, 1, 2)]), r"exclude"),
    (dict(exclude="most"), r"exclude"),
    (dict(strategy="random", random_seed="lucky"), "random_seed"),
    (dict(strategy="random", random_seed=1.5), "random_seed"),
])
def test_score_maps_that_cannot_be_used(options, words):
    with pytest.raises(InvalidArgument, match=words):
        generate_pruning_mask(**{"grad_norm_values": GOOD, **options})


def test_numpy_lists_integers_and_half_precision_are_fine():
    expected = generate_pruning_mask(GOOD, 0.25)
    for values in (GOOD.numpy(), GOOD.tolist(), GOOD.long(), GOOD.bfloat16(), GOOD.clone().requires_grad_()):
        assert generate_pruning_mask(values, np.float32(0.25)).equal(expected)
    asleep = torch.zeros(3, 4, dtype=torch.bool)
    asleep[0, 0] = True
    for exclude in (asleep, asleep.numpy(), asleep.tolist(), [(0, 0)], {(0, 0)}):
        assert generate_pruning_mask(GOOD, 0.25, exclude=exclude).equal(generate_pruning_mask(GOOD, 0.25, exclude=asleep))


BAD_MASKS = [
    (torch.ones(6, 8, dtype=torch.bool), "another model"), (torch.ones(4, dtype=torch.bool), "another model"), (torch.rand(3, 4), "pairs"),
    ([(0, 4)], "no head"), ([(9, 0)], "no head"), ([(-1, 0)], "no head"), ("all", "pairs"), (None, "pairs"), ([(0, nan)], "pairs"),
]


@pytest.mark.parametrize("mask, words", BAD_MASKS)
@pytest.mark.parametrize("verb", (
    lambda model, mask: apply_pruning_mask(model, mask, "gate"), lambda model, mask: apply_pruning_mask(model, mask, "zero_weights"),
    lambda model, mask: apply_pruning_mask(model, mask, "remove"), remove_heads, put_to_sleep,
    lambda model, mask: gate_heads(model, mask).__enter__(),
    lambda model, mask: compensate_heads(model, batches(model), mask if mask is not None else [(0, None)]),
))
def test_masks_for_another_model(verb, mask, words):
    model = build("gpt2")
    anatomy_of(model)
    before, values = fingerprint(model), weights(model)
    if isinstance(mask, torch.Tensor) and mask.is_floating_point():
        words = "pairs|gates have shape"
        mask = mask[:, :3]
    with pytest.raises(InvalidArgument, match=words):
        verb(model, mask)
    assert fingerprint(model) == before and same_weights(model, values)


@pytest.mark.parametrize("verb", (revive_heads, restore_heads))
def test_waking_heads_of_another_model(verb):
    model = build("gpt2")
    put_to_sleep(model, [(0, 0)], zero_weights=True)
    expected = logits(model)
    for mask, words in BAD_MASKS:
        if mask is not None:
            with pytest.raises(InvalidArgument, match=words):
                verb(model, mask)
    assert logits(model).equal(expected)


@pytest.mark.parametrize("gates, words", [
    (torch.ones(3, 5), "gates have shape"), (torch.ones(4), "gates have shape"), (torch.ones(1, 2, 3, 4), "gates have shape"),
    (torch.full((3, 4), nan), "finite"), (torch.full((3, 4), inf), "finite"),
])
def test_gates_that_cannot_be(gates, words):
    model = build("gpt2")
    before = fingerprint(model)
    with pytest.raises(InvalidArgument, match=words), gate_heads(model, gates):
        pass
    assert fingerprint(model) == before


def test_an_unknown_mode():
    with pytest.raises(InvalidArgument, match="unknown mode 'delete'; there are gate, zero_weights, remove"):
        apply_pruning_mask(build("gpt2"), [(0, 0)], "delete")


MEASURES = {
    "taylor": lambda model, data: measure_heads(model, data), "entropy": measure_entropy, "gradients": calculate_head_gradients,
    "compensate": lambda model, data: compensate_heads(model, data, [(0, 0)]), "choose": lambda model, data: choose_heads(model, data, 0.2),
    "iterative": lambda model, data: choose_heads(model, data, 0.3, "iterative"),
}


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("data, kind, words", [
    ([], InvalidArgument, "dataloader is empty"), (iter(()), InvalidArgument, "dataloader is empty"),
    ([torch.ones(2, 3)], WrongType, "a batch is a Tensor; batches must be dicts"), ([(1, 2)], WrongType, "a batch is a tuple"),
    (7, WrongType, "dataloader"), (None, WrongType, "dataloader"),
])
def test_loaders_that_give_nothing_useful(measure, data, kind, words):
    model = build("gpt2")
    anatomy_of(model)
    before, values = fingerprint(model), weights(model)
    with pytest.raises(kind, match=words):
        MEASURES[measure](model, data)
    assert fingerprint(model) == before and same_weights(model, values)


@pytest.mark.parametrize("name", RANDOM)
def test_batches_without_labels(name):
    model, data = build(name), [inputs(build(name), seed=0)]
    for measure in ("taylor", "gradients", "choose", "iterative"):
        with pytest.raises(InvalidArgument, match="no labels, so there is no loss"):
            MEASURES[measure](model, data)
    assert state_of(model) is None
    expected = measure_entropy(model, batches(model, 1))
    assert measure_entropy(model, data).equal(expected)  # needs none
    MEASURES["compensate"](model, data)


def test_labels_that_fit_nothing():
    model = build("gpt2")
    [batch] = batches(model, 1)
    with pytest.raises((PlasticityError, ValueError)):
        measure_heads(model, [{**batch, "labels": batch["labels"][:, :4]}])
    with pytest.raises(InvalidArgument, match="no batch has a label"):
        measure_heads(build("gpt2"), [{**batch, "labels": torch.full_like(batch["labels"], -100)}])
    measure_heads(model, [batch])
    only_padding = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    for criterion in ("taylor", "gradient", "entropy", "combined"):
        with pytest.raises(InvalidArgument, match="no batch has a label"):
            measure_heads(model, [only_padding], criterion)
        assert measure_heads(model, [only_padding, batch], criterion)[criterion].equal(measure_heads(model, [batch], criterion)[criterion])


def test_a_row_without_labels_does_not_count():
    model = build("gpt2")
    [batch] = batches(model, 1, batch=3)
    labels = batch["labels"].clone()
    labels[1] = -100
    expected = measure_heads(model, [{key: value[[0, 2]] for key, value in batch.items()}])
    found = measure_heads(model, [{**batch, "labels": labels}])
    assert found.samples == 2
    torch.testing.assert_close(found["taylor"], expected["taylor"], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("count", (0, -1, 1.5, True, "two"))
def test_numbers_of_batches_that_cannot_be(count):
    model = build("gpt2")
    for measure in (measure_heads, measure_entropy, calculate_head_gradients):
        with pytest.raises(InvalidArgument, match="number of batches"):
            measure(model, batches(model), num_batches=count)


@pytest.mark.parametrize("criteria", ("loss", ("taylor", "loss"), ()))
def test_unknown_criteria(criteria):
    with pytest.raises(InvalidArgument, match="there are taylor"):
        measure_heads(build("gpt2"), batches(build("gpt2")), criteria)


def test_a_model_with_nan_weights_says_so():
    model = build("gpt2")
    model.transformer.wte.weight.data[:] = nan
    with pytest.raises(InvalidArgument, match="loss .* is nan"):
        measure_heads(model, batches(model))


def test_an_attention_mask_of_another_shape():
    model = build("gpt2")
    ids = inputs(model)["input_ids"]
    with pytest.raises(InvalidArgument, match="attention_mask has shape"):
        analyze_attention_patterns(model, ids, torch.ones(2, 5))


def test_batches_on_another_device():
    "A batch goes where the model is. Without a second device: a tensor that says where it was sent."
    sent = []

    class Elsewhere(torch.Tensor):
        def to(self, *arguments, **options):
            sent.append(arguments[0])
            return self.as_subclass(torch.Tensor)

    model = build("gpt2")
    data = [{key: value.as_subclass(Elsewhere) for key, value in batch.items()} for batch in batches(model)]
    assert measure_heads(model, data)["taylor"].equal(measure_heads(model, batches(model))["taylor"])
    assert sent == [torch.device("cpu")] * 4
    with pytest.raises(InvalidArgument, match="meta"):
        measure_heads(model, [{key: value.to("meta") for key, value in batch.items()} for batch in batches(model)])
    with pytest.raises(UnsupportedModel, match="meta"):
        measure_heads(build("gpt2").to("meta"), batches(model))


@pytest.mark.gpu
@pytest.mark.parametrize("name", RANDOM)
def test_batches_on_the_other_side_of_the_bus(name):
    "CPU batches for a CUDA model, CUDA batches for a CPU model, CUDA masks and scores everywhere."
    model, far = build(name), build(name).cuda()
    data = batches(model)
    far_data = [{key: value.cuda() for key, value in batch.items()} for batch in data]
    for criterion in ("taylor", "gradient", "entropy"):
        expected = measure_heads(model, data, criterion)[criterion]
        for one, loader in ((far, data), (far, far_data), (model, far_data)):
            torch.testing.assert_close(measure_heads(one, loader, criterion)[criterion], expected, atol=1e-4, rtol=1e-3)
    mask = generate_pruning_mask(expected.cuda(), 0.2)
    values = weights(far)
    assert apply_pruning_mask(far, mask.cuda(), "zero_weights") == apply_pruning_mask(model, mask.cuda(), "zero_weights")
    compensate_heads(far, data)
    compensate_heads(model, far_data)
    batch = {key: value for key, value in data[0].items() if key != "labels"}
    torch.testing.assert_close(logits(far, {key: value.cuda() for key, value in batch.items()}).cpu(), logits(model, batch), atol=1e-3, rtol=0)
    restore_heads(far)
    assert same_weights(far, values)


# --- 7: the same every time, and global random state is nobody's business ---
def every_verb(name):
    "Every public verb on a model, with what it gave."
    model, found = build(name).train(), {}
    data = DataLoader([{key: value[0] for key, value in batch.items()} for batch in batches(model, 6, 1)], batch_size=2, shuffle=True,
                      generator=torch.Generator().manual_seed(0))
    found["scores"] = [measure_heads(model, data, (criterion,))[criterion] for criterion in ("taylor", "entropy", "gradient", "combined", "random", "magnitude")]
    found["entropy"], found["gradients"] = measure_entropy(model, data), calculate_head_gradients(model, data)
    found["masks"] = [choose_heads(model, data, 0.3, strategy) for strategy in ("taylor", "entropy", "random", "iterative", "combined")]
    found["mask"] = generate_pruning_mask(found["gradients"], 0.2, "random", random_seed=0)
    if name != "vit":
        found["patterns"] = analyze_attention_patterns(model, inputs(model)["input_ids"])["entropy_values"]
    compensate_heads(model, data, found["masks"][0])
    found["weights"] = list(weights(model).values())
    revive_heads(model, [head for head in found["masks"][0].nonzero().tolist()][:1])
    restore_heads(model)
    apply_pruning_mask(model, [(0, 0), (0, 1)], "zero_weights")
    apply_pruning_mask(model, [(0, 0), (0, 1)], "remove")
    found["cut"] = list(weights(model).values())
    return found


def flat(found):
    return [tensor for value in found.values() for tensor in (value if isinstance(value, list) else [value])]


@pytest.mark.parametrize("name", RANDOM)
def test_the_same_twice(name):
    first = flat(every_verb(name))
    torch.manual_seed(123)
    np.random.seed(123)
    random.seed(123)
    for a, b in zip(first, flat(every_verb(name)), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("name", RANDOM)
def test_global_random_state_is_left_as_found(name):
    "Also by a plain DataLoader without a generator of its own, which draws from the global one."
    model, plain = build(name), batches(build(name), 6, 1)
    loader = DataLoader([{key: value[0] for key, value in batch.items()} for batch in plain], batch_size=2, shuffle=True)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()

    def unchanged(verb):
        assert torch.get_rng_state().equal(states[0]) and np.random.get_state()[1].tolist() == states[1] and random.getstate() == states[2], verb

    probe(model)
    unchanged("probe")
    for verb, measure in MEASURES.items():
        measure(model, loader)
        unchanged(verb)
        restore_heads(model)
    generate_pruning_mask(GOOD, 0.2, "random")
    unchanged("random mask without a seed")
    remove_heads(model, [(0, 0), (0, 1)])
    unchanged("remove")


def test_every_error_is_one_of_ours():
    "Each typed error can be caught as PlasticityError or as the built-in it specialises."
    assert issubclass(InvalidArgument, ValueError) and issubclass(WrongType, TypeError) and issubclass(UnsupportedModel, RuntimeError)
    for kind in (InvalidArgument, WrongType, UnsupportedModel):
        assert issubclass(kind, PlasticityError)
