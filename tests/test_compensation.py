"""What is left makes up for what is gone, as far as least squares can."""
import pytest
import torch
from models import RANDOM, TRAINED, batches, build, cuttable, fingerprint, logits, padded, same_weights, weights

from neural_plasticity.compensation import compensate_heads
from neural_plasticity.errors import InvalidArgument
from neural_plasticity.gates import dormant_heads, gate_heads, put_to_sleep, restore_heads, revive_heads, state_of
from neural_plasticity.probing import anatomy_of
from neural_plasticity.surgery import remove_heads

HEADS = [(1, 0), (1, 2)]


def inputs_of(model, layer, batch, **context):
    "The output projection's input [tokens, C] of one layer, seen from outside."
    seen = []
    projection = model.get_submodule(anatomy_of(model).sites[layer].projection)
    handle = projection.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].detach()))
    logits(model, batch)
    handle.remove()
    kept = batch["attention_mask"].bool() if "attention_mask" in batch else ...
    return seen[0][kept].flatten(0, -2).double()


@pytest.mark.parametrize("padding", (False, True))
@pytest.mark.parametrize("name", RANDOM)
def test_it_is_the_ridge_solution(name, padding):
    "One layer against a plain augmented least-squares problem in float64; padded positions must not count."
    if padding and name == "vit":
        pytest.skip("pictures have no padding")
    model, ridge = build(name), 1e-2
    batch = {key: value for key, value in (padded(model, (9, 5, 7, 8)) if padding else batches(model, 1, 4)[0]).items() if key != "labels"}
    site = anatomy_of(model).sites[1]
    linear = model.get_submodule(site.projection)
    transposed = type(linear).__name__ != "Conv1D"
    dense = (linear.weight.T if transposed else linear.weight).detach().double().clone()
    x = inputs_of(model, 1, batch)
    kept = ~site.columns[[0, 2]].any(0)
    target, seen = x @ dense, x[:, kept]
    if linear.bias is not None:
        target, shift, seen, mean = target - target.mean(0), target.mean(0), seen - seen.mean(0), seen.mean(0)
    penalty = ridge * seen.pow(2).mean(0).mean()
    left = torch.cat([seen, (penalty * len(seen)).sqrt() * torch.eye(int(kept.sum()), dtype=torch.float64)])
    right = torch.cat([target, (penalty * len(seen)).sqrt() * dense[kept]])
    expected = torch.linalg.lstsq(left, right).solution
    compensate_heads(model, [batch], HEADS, ridge=ridge)
    found = (linear.weight.T if transposed else linear.weight).detach().double()
    torch.testing.assert_close(found[kept], expected, atol=1e-5, rtol=1e-4)
    assert found[~kept].equal(dense[~kept])
    if linear.bias is not None:
        torch.testing.assert_close(linear.bias.detach().double(), build(name).get_submodule(site.projection).bias.double() + shift - mean @ expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", (*RANDOM, *TRAINED))
def test_the_output_comes_closer(name):
    model = build(name)
    data = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches(model, 4, 8, 16)]
    dense = torch.cat([logits(model, batch) for batch in data])
    with gate_heads(model, cuttable(name)):
        gated = torch.cat([logits(model, batch) for batch in data])
    report = compensate_heads(model, data, cuttable(name))
    compensated = torch.cat([logits(model, batch) for batch in data])
    assert (compensated - dense).pow(2).mean() < 0.9 * (gated - dense).pow(2).mean()
    assert set(report.undone) == {layer for layer, _ in cuttable(name)} and all(0 < share <= 1 for share in report.undone.values())


def test_reviving_some_solves_anew_for_the_rest():
    one, other = build("gpt2"), build("gpt2")
    compensate_heads(one, batches(one), [(1, 0), (1, 2)])
    revive_heads(one, [(1, 0)])
    compensate_heads(other, batches(other), [(1, 2)])
    assert dormant_heads(one) == [(1, 2)]
    name = anatomy_of(one).sites[1].projection + ".weight"
    dense = build("gpt2").get_parameter(name)
    a, b = ((model.get_parameter(name) - dense).detach() for model in (one, other))
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)  # the layer's inputs are the same, for nothing changed below it
    assert a.abs().max() > 1e-3


def test_compensated_heads_can_be_removed():
    model = build("llama-grouped")
    compensate_heads(model, batches(model), cuttable("llama-grouped"))
    expected = logits(model)
    remove_heads(model, cuttable("llama-grouped"))
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("data, words", [([], "dataloader is empty"), ([(1, 2)], "batches must be dicts")])
def test_bad_batches_put_nothing_to_sleep(data, words):
    model = build("gpt2")
    anatomy_of(model)
    before, values = fingerprint(model), weights(model)
    with pytest.raises((InvalidArgument, TypeError), match=words):
        compensate_heads(model, data, HEADS)
    assert fingerprint(model) == before and same_weights(model, values)


@pytest.mark.parametrize("error", (RuntimeError, KeyboardInterrupt))
def test_an_error_in_the_middle_leaves_what_can_be_restored(monkeypatch, error):
    import neural_plasticity.compensation as compensation

    model = build("gpt2")
    values, real, calls = weights(model), compensation._statistics, []

    def struck(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return real(*arguments)

    monkeypatch.setattr(compensation, "_statistics", struck)
    with pytest.raises(error):
        compensate_heads(model, batches(model), [(0, 0), (1, 1), (2, 2)])
    assert dormant_heads(model) == [(0, 0), (1, 1), (2, 2)]
    restore_heads(model)
    assert same_weights(model, values) and state_of(model) is None


def test_what_cannot_be_made_up_for():
    model = build("gpt2")
    with pytest.raises(InvalidArgument, match="no head is dormant"):
        compensate_heads(model, batches(model))
    with pytest.raises(InvalidArgument, match="ridge"):
        compensate_heads(model, batches(model), HEADS, ridge=0)
    broken = build("gpt2")
    broken.transformer.wte.weight.data[3] = float("nan")
    with pytest.raises(InvalidArgument, match="NaN or infinite"):
        compensate_heads(broken, [{"input_ids": torch.tensor([[3, 4, 5]])}], HEADS)
    put_to_sleep(model, HEADS)
    assert compensate_heads(model, batches(model)).tokens == 36  # two batches of 2 × 9 tokens
