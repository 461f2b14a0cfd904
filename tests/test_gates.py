"""DESIGN.md, "What must hold" 1 and 3: open gates change no bit, contexts leave nothing behind, pruning can be undone bit for bit."""
import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import HEADS, LAYERS, RANDOM, batches, build, cuttable, fingerprint, inputs, logits, same_weights, weights
from transformers import AutoModelForCausalLM

from neural_plasticity.compensation import compensate_heads, dense_again
from neural_plasticity.errors import InvalidArgument
from neural_plasticity.gates import advance_warmup, dormant_heads, gate_heads, put_to_sleep, restore_heads, revive_heads, state_of
from neural_plasticity.probing import anatomy_of
from neural_plasticity.pruning import apply_pruning_mask

DTYPES = (torch.float32, torch.bfloat16)
SOME = [(0, 1), (0, 2), (2, 0)]


def loss_and_gradients(model):
    model.zero_grad()
    loss = model(**batches(model)[0]).loss
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return loss.detach(), found


# --- 1: open gates ---
@pytest.mark.parametrize("shape", ("model", "sample"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RANDOM)
def test_open_gates_change_no_bit(name, dtype, shape):
    model = build(name).to(dtype)
    expected, (loss, gradients) = logits(model), loss_and_gradients(model)
    gates = torch.ones(LAYERS, HEADS) if shape == "model" else torch.ones(2, LAYERS, HEADS)
    with gate_heads(model, gates):
        assert logits(model).equal(expected)
        gated_loss, gated_gradients = loss_and_gradients(model)
    assert gated_loss.equal(loss) and gated_gradients.keys() == gradients.keys()
    assert all(gradients[key].equal(value) for key, value in gated_gradients.items())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RANDOM)
def test_a_state_with_open_gates_changes_no_bit(name, dtype):
    "While a head sleeps elsewhere, layers before it compute exactly what they did."
    model = build(name).to(dtype)
    with torch.no_grad():
        expected = model(**inputs(model), output_hidden_states=True).hidden_states
        put_to_sleep(model, [(LAYERS - 1, 0)])
        found = model(**inputs(model), output_hidden_states=True).hidden_states
    assert all(a.equal(b) for a, b in zip(expected[:LAYERS], found[:LAYERS]))
    assert not expected[-1].equal(found[-1])


class Stop(Exception):
    pass


@pytest.mark.parametrize("ending", ("well", "exception", "interrupt", "forward"))
@pytest.mark.parametrize("dormant", (False, True))
@pytest.mark.parametrize("name", RANDOM)
def test_contexts_leave_nothing_behind(name, dormant, ending):
    model = build(name).train()
    next(model.parameters()).requires_grad_(False)
    if dormant:
        put_to_sleep(model, SOME, zero_weights=True)
    anatomy_of(model)
    before, values = fingerprint(model), weights(model)
    gates = torch.rand(5 if ending == "forward" else 2, LAYERS, HEADS, generator=torch.Generator().manual_seed(0))
    for context in (lambda: gate_heads(model, gates), lambda: gate_heads(model, [(1, 1)]), lambda: dense_again(model)):
        try:
            with context(), gate_heads(model, gates), torch.no_grad():
                model(**inputs(model))  # with five rows of gates for a batch of two: an error from inside the model
                if ending != "well":
                    raise {"exception": Stop, "interrupt": KeyboardInterrupt}[ending]
        except (Stop, KeyboardInterrupt):
            assert ending in ("exception", "interrupt")
        except InvalidArgument as error:
            assert ending == "forward" and "batch of 2" in str(error)
        assert fingerprint(model) == before and same_weights(model, values)


def test_gates_nest_and_the_outer_ones_come_back():
    model = build("gpt2")
    with gate_heads(model, [(0, 0)]):
        outer = logits(model)
        with gate_heads(model, torch.ones(LAYERS, HEADS)):
            assert logits(model).equal(logits(build("gpt2")))
        assert logits(model).equal(outer)


def test_a_mask_closes_gates_on_top_of_what_sleeps():
    model, other = build("gpt2"), build("gpt2")
    put_to_sleep(model, [(0, 0)])
    with gate_heads(model, [(1, 1)]), gate_heads(other, [(0, 0), (1, 1)]):
        assert logits(model).equal(logits(other))


@pytest.mark.parametrize("name", RANDOM)
def test_per_sample_gates_are_each_samples_own(name):
    model = build(name)
    gates = torch.rand(2, LAYERS, HEADS, generator=torch.Generator().manual_seed(3))
    with gate_heads(model, gates):
        together = logits(model)
    for row in range(2):
        with gate_heads(model, gates[row]):
            alone = logits(model, {key: value[row:row + 1] for key, value in inputs(model).items()})
        torch.testing.assert_close(together[row:row + 1], alone, atol=1e-5, rtol=0)


# --- 3: prune and restore ---
@pytest.mark.parametrize("mode", ("gate", "zero_weights", "compensated", "zeroed and compensated"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RANDOM)
def test_restoring_gives_back_every_bit(name, dtype, mode):
    model = build(name).to(dtype)
    before, untouched, values, expected = fingerprint(model), logits(model), weights(model), logits(model)
    apply_pruning_mask(model, SOME, "zero_weights" if mode.startswith("zero") else "gate")
    if "compensated" in mode:
        compensate_heads(model, batches(model))
    assert not logits(model).equal(untouched) and dormant_heads(model) == SOME
    assert same_weights(model, values) == (mode == "gate")
    revive_heads(model, [(0, 1)])  # a part first, with its compensation solved anew
    apply_pruning_mask(model, [(1, 3)], "zero_weights")
    assert dormant_heads(model) == [(0, 2), (1, 3), (2, 0)]
    restore_heads(model)
    assert same_weights(model, values) and logits(model).equal(expected) and state_of(model) is None
    assert fingerprint(model) == before


ONE_HEAD = st.tuples(st.integers(0, LAYERS - 1), st.integers(0, HEADS - 1))
ACTIONS = st.lists(st.one_of(
    st.tuples(st.just("gate"), st.sets(ONE_HEAD, max_size=5)),
    st.tuples(st.just("zero_weights"), st.sets(ONE_HEAD, max_size=5)),
    st.tuples(st.just("compensate"), st.sampled_from([1e-3, 0.1])),
    st.tuples(st.just("revive"), st.integers(0, 11), st.sampled_from([0, 1, 3])),
    st.tuples(st.just("restore"), st.integers(0, 11)),
    st.tuples(st.just("warm up")),
), min_size=1, max_size=8)


@settings(max_examples=25, deadline=None)
@given(ACTIONS, st.sampled_from(("gpt2", "llama-grouped")), st.sampled_from(DTYPES))
def test_any_sequence_of_verbs_can_be_undone(actions, name, dtype):
    model = build(name).to(dtype)
    values, asleep = weights(model), set()
    for verb, *arguments in actions:
        awake_again = sorted(asleep)[arguments[0] % len(asleep):] if verb in ("revive", "restore") and asleep else []
        if verb in ("gate", "zero_weights"):
            assert set(apply_pruning_mask(model, arguments[0], verb)) == arguments[0] - asleep
            asleep |= arguments[0]
        elif verb == "compensate" and asleep:
            compensate_heads(model, batches(model, 1), ridge=arguments[0])
        elif verb == "warm up":
            advance_warmup(model)
        elif awake_again:
            revive_heads(model, awake_again, arguments[1]) if verb == "revive" else restore_heads(model, awake_again)
            asleep -= set(awake_again)
        assert dormant_heads(model) == sorted(asleep)
        assert logits(model).isfinite().all()
    restore_heads(model)
    assert same_weights(model, values) and state_of(model) is None and logits(model).equal(logits(build(name).to(dtype)))


def test_reviving_by_degrees():
    model = build("gpt2")
    put_to_sleep(model, SOME)
    revive_heads(model, [(0, 1)], warmup_steps=4)
    opened = []
    for _ in range(5):
        opened.append(float(state_of(model).gates[0, 1]))
        advance_warmup(model)
    assert opened == [0.25, 0.5, 0.75, 1, 1] and dormant_heads(model) == [(0, 2), (2, 0)]


@pytest.mark.parametrize("verb", (revive_heads, restore_heads))
def test_waking_what_does_not_sleep(verb):
    model = build("gpt2")
    with pytest.raises(InvalidArgument, match="no head of this model is dormant"):
        verb(model, [(0, 0)])
    put_to_sleep(model, [(0, 0)])
    with pytest.raises(InvalidArgument, match="are not dormant"):
        verb(model, [(0, 0), (0, 1)])
    assert dormant_heads(model) == [(0, 0)]
    with pytest.raises(InvalidArgument, match="warmup_steps"):
        revive_heads(model, [(0, 0)], warmup_steps=-1)


# --- what becomes of a model with dormant heads ---
@pytest.fixture(params=("gate", "zero_weights", "compensated"))
def sleeping(request):
    "A GPT-2 with dormant heads and its weights before."
    model = build("gpt2")
    values = weights(model)
    apply_pruning_mask(model, SOME, "zero_weights" if request.param == "zero_weights" else "gate")
    if request.param == "compensated":
        compensate_heads(model, batches(model))
    return model, values


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", (copy.deepcopy, by_pickle, by_torch_save))
def test_a_copy_sleeps_on_its_own(sleeping, duplicate):
    model, values = sleeping
    expected = logits(model)
    twin = duplicate(model)
    assert dormant_heads(twin) == SOME and logits(twin).equal(expected)
    restore_heads(twin)
    assert same_weights(twin, values) and logits(model).equal(expected) and dormant_heads(model) == SOME
    restore_heads(model)
    assert same_weights(model, values)


def test_a_state_dict_holds_weights_and_nothing_about_sleep(sleeping):
    model, values = sleeping
    assert model.state_dict().keys() == values.keys()
    other = build("gpt2")
    other.load_state_dict(model.state_dict())
    with gate_heads(other, SOME):
        assert logits(other).equal(logits(model))


def test_save_pretrained_writes_an_ordinary_model(sleeping, tmp_path):
    model, _ = sleeping
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert state_of(plain) is None and same_weights(plain, weights(model))
    with gate_heads(plain, SOME):
        assert logits(plain).equal(logits(model))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
def test_another_dtype_keeps_the_sleep_and_restores_the_converted_weights(sleeping, dtype):
    model, values = sleeping
    model.to(dtype)
    assert dormant_heads(model) == SOME and logits(model).isfinite().all()
    restore_heads(model)
    assert same_weights(model, {name: value.to(dtype) for name, value in values.items()})


def test_a_foreign_optimizer_cannot_wake_a_head(sleeping):
    "It may move a dormant head's weights (decay, momentum); the gate stays closed, and what was banked comes back as it was."
    model, values = sleeping
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(5):
        optimizer.zero_grad()
        model(**batches(model)[step % 2]).loss.backward()
        optimizer.step()
    assert dormant_heads(model) == SOME
    trained = logits(model)
    site = anatomy_of(model).sites[0]
    columns, weight = site.columns[[1, 2]].any(0), model.get_parameter(f"{site.projection}.weight")
    moved = weight.detach().clone()
    weight.data[columns] = 7.0  # whatever the optimizer makes of a dormant head's columns, nobody hears of it
    assert logits(model).equal(trained)
    weight.data.copy_(moved)
    banked = 0 in state_of(model).original
    restore_heads(model)
    assert weight[columns].equal(values[f"{site.projection}.weight"][columns] if banked else moved[columns])
    assert not weight[~columns].equal(values[f"{site.projection}.weight"][~columns])  # training is kept


def test_training_stays_when_a_compensated_head_wakes():
    "What training added to the remaining columns is added to the restored weights."
    model = build("gpt2")
    values = weights(model)
    compensate_heads(model, batches(model), SOME)
    site = anatomy_of(model).sites[0]
    weight, columns = model.get_parameter(f"{site.projection}.weight"), site.columns[[1, 2]].any(0)
    weight.data[~columns] += 0.125
    restore_heads(model)
    original = values[f"{site.projection}.weight"]
    assert weight[columns].equal(original[columns])
    torch.testing.assert_close(weight[~columns], original[~columns] + 0.125, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ("gpt2", "llama-grouped", "bert", "vit"))
def test_gradients_of_what_remains_equal_those_of_the_removed_model(name):
    "One training step on the gated and on the cut model gives the same gradients on the weights that both have."
    from neural_plasticity.anatomy import exclusive_slices
    from neural_plasticity.surgery import remove_heads

    gated, cut = build(name), build(name)
    heads = cuttable(name)
    gone = {}
    for parameter, dim, index in exclusive_slices(anatomy_of(gated), heads):
        gone.setdefault(parameter, []).append((dim, index))
    put_to_sleep(gated, heads)
    remove_heads(cut, heads)
    expected, found = loss_and_gradients(gated)[1], loss_and_gradients(cut)[1]
    for parameter, gradient in found.items():
        reference = expected[parameter]
        for dim, index in gone.get(parameter, []):
            kept = [i for i in range(reference.shape[dim]) if i not in set(index.tolist())]
            reference = reference.index_select(dim, torch.tensor(kept))
        torch.testing.assert_close(gradient, reference, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama-grouped"])
def test_other_values_of_gates_compile_nothing_anew(name):
    "Heads that fall asleep, wake and fade in change numbers in a compiled model, not its code."
    model, compilations = build(name), []
    batch = inputs(model)
    put_to_sleep(model, [(0, 0)])  # the gates are there when it is compiled

    def backend(graph, examples):
        compilations.append(1)
        return graph.forward

    run = torch.compile(model, backend=backend)
    with torch.no_grad():
        run(**batch)
        once = len(compilations)
        for change in (lambda: put_to_sleep(model, [(1, 2), (2, 1)]), lambda: revive_heads(model, [(1, 2)]), lambda: revive_heads(model, [(2, 1)], warmup_steps=4), lambda: advance_warmup(model)):
            change()
            expected = copy.deepcopy(model)(**batch).logits
            torch.testing.assert_close(run(**batch).logits, expected, atol=1e-5, rtol=0)
    assert once >= 1 and len(compilations) == once
