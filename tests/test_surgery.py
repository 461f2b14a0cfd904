"""DESIGN.md, "What must hold" 2: gated ≡ zeroed ≡ removed, in logits and in what is generated; a cut that fails leaves the model as it was."""
import contextlib

import pytest
import torch
from models import CAUSAL, RANDOM, build, cuttable, fingerprint, inputs, logits, padded, same_weights, weights
from transformers import BitNetConfig, BitNetForCausalLM, DiffLlamaConfig, DiffLlamaForCausalLM

import neural_plasticity.operations as operations
import neural_plasticity.proof as proof
import neural_plasticity.surgery as surgery
from neural_plasticity.compensation import compensate_heads
from neural_plasticity.errors import InvalidArgument, NotRemovable
from neural_plasticity.gates import dormant_heads, gate_heads, put_to_sleep, restore_heads, revive_heads
from neural_plasticity.probing import anatomy_of
from neural_plasticity.proof import TOLERANCE
from neural_plasticity.pruning import apply_pruning_mask
from neural_plasticity.surgery import kept_heads, remove_heads

WAYS = ("gate_heads", "gate", "zero_weights", "zeroed by hand", "remove")


@contextlib.contextmanager
def without(model, heads, way):
    "The model with these heads silent, in one of the ways."
    if way == "gate_heads":
        with gate_heads(model, heads):
            yield
        return
    if way == "zeroed by hand":
        for layer, head in heads:
            site = anatomy_of(model).sites[layer]
            projection = model.get_submodule(site.projection)
            columns = projection.weight.data if type(projection).__name__ == "Conv1D" else projection.weight.data.T
            columns[site.columns[head]] = 0
    else:
        apply_pruning_mask(model, heads, way)
    yield


def tokens(model, batch, cache):
    found = model.generate(**batch, max_new_tokens=16, min_new_tokens=16, do_sample=False, cache_implementation=cache, pad_token_id=0)
    return found[:, batch["input_ids"].shape[1]:]


@pytest.mark.parametrize("name", (*RANDOM, "gpt2-trained", "llama-trained"))
def test_five_ways_to_silence_heads_give_the_same_logits(name):
    found, untouched = {}, logits(build(name))
    for way in WAYS:
        model = build(name)
        with without(model, cuttable(name), way):
            found[way] = logits(model)
            if name != "vit":
                batch = {key: value for key, value in padded(model, side="left").items() if key != "labels"}
                found[way, "padded"] = logits(model, batch)[batch["attention_mask"].bool()]
    assert (untouched - found["gate_heads"]).abs().max() > 1e-2  # the heads do say something
    for key, value in found.items():
        reference = found["gate_heads"] if isinstance(key, str) else found["gate_heads", "padded"]
        torch.testing.assert_close(value, reference, atol=1e-5, rtol=0, msg=f"{key}")


@pytest.mark.parametrize("padding", (False, True))
@pytest.mark.parametrize("cache", ("dynamic", "static"))
@pytest.mark.parametrize("name", CAUSAL)
def test_five_ways_to_silence_heads_generate_the_same_tokens(name, cache, padding):
    found, untouched = {}, build(name)
    batch = inputs(untouched, length=6)
    if padding:
        batch = {key: value for key, value in padded(untouched, (6, 3), "left").items() if key != "labels"}
    for way in WAYS:
        model = build(name)
        with without(model, cuttable(name), way):
            found[way] = tokens(model, batch, cache)
    assert all(value.equal(found["gate_heads"]) for value in found.values())
    assert not found["gate_heads"].equal(tokens(untouched, batch, cache))


COMPILED = [(name, way, how) for name in ("gpt2", "llama-grouped") for way in WAYS for how in ("torch.compile", "model.compile")]
COMPILED += [(name, way, "model.compile") for name in ("gpt2-trained", "llama-trained") for way in ("gate_heads", "remove")]


@pytest.mark.parametrize("name, way, how", COMPILED)
def test_models_that_were_compiled_before(name, way, how):
    "A hook added after compiling would be ignored without a word."
    torch._dynamo.reset()
    reference, model = build(name), build(name)
    compiled = torch.compile(model, backend="eager") if how == "torch.compile" else model
    if how == "model.compile":
        model.compile(backend="eager")
    before = logits(compiled, inputs(model))
    torch.testing.assert_close(before, logits(reference), atol=1e-5, rtol=0)
    with without(reference, cuttable(name), "gate_heads"):
        expected = logits(reference)
    with without(compiled, cuttable(name), way) if way != "zeroed by hand" else without(model, cuttable(name), way):
        torch.testing.assert_close(logits(compiled, inputs(model)), expected, atol=1e-5, rtol=0)
    if way in ("gate_heads", "gate", "zero_weights"):
        if way != "gate_heads":
            revive_heads(compiled, cuttable(name)[:1])
            with without(reference, cuttable(name)[1:], "gate_heads"):
                torch.testing.assert_close(logits(compiled, inputs(model)), logits(reference), atol=1e-5, rtol=0)
            restore_heads(compiled)
        assert logits(compiled, inputs(model)).equal(before)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ("gpt2", "llama-grouped"))
def test_models_that_were_compiled_with_inductor_before(name, way):
    torch._dynamo.reset()
    reference, model = build(name), build(name)
    model.compile()
    torch.testing.assert_close(logits(model), logits(reference), atol=1e-4, rtol=0)
    with without(reference, cuttable(name), "gate_heads"), without(model, cuttable(name), way):
        torch.testing.assert_close(logits(model), logits(reference), atol=1e-4, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CAUSAL)
def test_generation_that_was_compiled_before(name, way):
    "On a GPU a static cache makes generate() compile the decoding step."
    torch._dynamo.reset()
    reference, model = build(name).cuda(), build(name).cuda()
    batch = {key: value.cuda() for key, value in inputs(build(name), length=6).items()}
    tokens(model, batch, "static")
    with without(reference, cuttable(name), "gate_heads"):
        expected = tokens(reference, batch, "dynamic")
    with without(model, cuttable(name), way):
        assert tokens(model, batch, "static").equal(expected)


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
@pytest.mark.parametrize("name", RANDOM)
def test_other_dtypes(name, dtype):
    model = build(name).to(dtype)
    with gate_heads(model, cuttable(name)):
        expected = logits(model)
    report = remove_heads(model, cuttable(name))
    scale = float(expected.abs().max())
    torch.testing.assert_close(logits(model), expected, atol=TOLERANCE[dtype] * scale, rtol=0)
    assert report.parameters_after == sum(parameter.numel() for parameter in model.parameters()) < report.parameters_before
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize("name", RANDOM)
def test_a_cut_keeps_modes_flags_and_config(name):
    model = build(name).train()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    flags, config = {n: p.requires_grad for n, p in model.named_parameters()}, model.config.to_dict()
    remove_heads(model, cuttable(name))
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(module.training for module in model.modules()) and model.config.to_dict() == config
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert (module.out_features, module.in_features) == tuple(module.weight.shape)


def test_cutting_twice_equals_cutting_once():
    once, twice = build("gpt2"), build("gpt2")
    remove_heads(once, [(0, 0), (0, 2), (1, 1)])
    remove_heads(twice, [(0, 0)])
    remove_heads(twice, [(0, 1), (1, 1)])  # head 2 of layer 0 is its head 1 now
    assert same_weights(twice, weights(once)) and kept_heads(once) == kept_heads(twice) == [[1, 3], [0, 2, 3], [0, 1, 2, 3]]


def test_dormant_heads_go_together_with_what_made_up_for_them():
    model = build("gpt2")
    compensate_heads(model, [inputs(model)], [(0, 1), (2, 2)])
    expected = logits(model)
    with pytest.raises(InvalidArgument, match=r"\(2, 2\).*Remove them too, or restore them first"):
        remove_heads(model, [(0, 1)])
    assert logits(model).equal(expected) and dormant_heads(model) == [(0, 1), (2, 2)]
    assert apply_pruning_mask(model, [(0, 1), (2, 2), (1, 0)], "remove") == [(1, 0)]
    reference = build("gpt2")
    compensate_heads(reference, [inputs(reference)], [(0, 1), (2, 2)])
    put_to_sleep(reference, [(1, 0)])
    torch.testing.assert_close(logits(model), logits(reference), atol=1e-5, rtol=0)
    assert dormant_heads(model) == []


# --- cuts that fail ---
def everything(model):
    return fingerprint(model), {name: id(parameter) for name, parameter in model.named_parameters()}


def bitnet():
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=53)
    return BitNetForCausalLM(BitNetConfig(bos_token_id=None, eos_token_id=None, pad_token_id=None, **sizes)).eval()


def test_heads_that_are_mixed_before_their_projection():
    "BitNet's norm runs across all heads: they can be gated, and say why they cannot be cut."
    model = bitnet()
    before, values = everything(model), weights(model)
    with pytest.raises(NotRemovable, match=r"head \(1, 2\): its heads are mixed before model.layers.1.self_attn.o_proj"):
        remove_heads(model, [(1, 2)])
    assert everything(model) == before and same_weights(model, values) and kept_heads(model) is None


def test_units_go_together():
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, vocab_size=53)
    model = DiffLlamaForCausalLM(DiffLlamaConfig(bos_token_id=None, eos_token_id=None, **sizes)).eval()
    assert anatomy_of(model).sites[0].units == ((0, 2), (1, 3))
    with pytest.raises(NotRemovable, match=r"only be removed together"):
        remove_heads(model, [(0, 0)])
    with gate_heads(model, [(0, 0), (0, 2)]):
        expected = logits(model, {"input_ids": torch.arange(18).view(2, 9)})
    remove_heads(model, [(0, 0), (0, 2)])
    torch.testing.assert_close(logits(model, {"input_ids": torch.arange(18).view(2, 9)}), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dormant", (False, True))
@pytest.mark.parametrize("error", (RuntimeError, KeyboardInterrupt, MemoryError))
@pytest.mark.parametrize("where", ((operations.Cut, "apply"), (operations, "_sync_sizes"), (surgery, "prove"), (proof, "largest_difference"), (surgery, "_remember"),
                                   (surgery, "_anatomy_after")), ids=lambda where: where[1])
def test_an_error_in_the_middle_leaves_the_model_as_it_was(monkeypatch, where, error, dormant):
    model = build("gpt2")
    if dormant:
        apply_pruning_mask(model, [(0, 1)], "zero_weights")
    before, values, expected = everything(model), weights(model), logits(model)
    (home, name), calls = where, []
    real = getattr(home, name)

    def struck(*arguments):
        calls.append(where)
        if len(calls) == (3 if name in ("apply", "_sync_sizes") else 1):
            raise error("struck")
        return real(*arguments)

    monkeypatch.setattr(home, name, struck)
    with pytest.raises(error, match="struck"):
        remove_heads(model, cuttable("gpt2"))
    monkeypatch.undo()
    assert everything(model) == before and same_weights(model, values) and logits(model).equal(expected)
    assert dormant_heads(model) == ([(0, 1)] if dormant else []) and kept_heads(model) is None
    remove_heads(model, cuttable("gpt2"))  # and it can still be cut


def test_a_cut_that_cannot_be_proven_is_taken_back(monkeypatch):
    model = build("llama-grouped")
    before, values = everything(model), weights(model)
    real = operations.Cut.apply

    def clumsy(cut, model):
        size = model.get_parameter(cut.parameter).shape[cut.dim]
        return real(operations.Cut(cut.parameter, cut.dim, [(index + 1) % size for index in cut.gone]), model)  # the neighbour's weights

    monkeypatch.setattr(operations.Cut, "apply", clumsy)
    with pytest.raises(NotRemovable, match="no cut could be proven"):
        remove_heads(model, cuttable("llama-grouped"))
    assert everything(model) == before and same_weights(model, values)
