"""A scoring pass computes what its gradients need and nothing else, keeps no more than it must, asks the processor for little, and is exact on every path."""
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from house import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from models import HEADS, LAYERS, batches, build, fingerprint, padded
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from neural_plasticity.errors import InvalidArgument, UnsupportedModel
from neural_plasticity.gates import gate_heads, put_to_sleep
from neural_plasticity.grams import Gram
from neural_plasticity.importance import collect_quantities, measure_heads
from neural_plasticity.lean import checkpointed, fused_activations
from neural_plasticity.losses import token_losses
from neural_plasticity.probing import anatomy_of
from neural_plasticity.running import sample_losses

ALL = {"gate_gradients", "weight_gradients", "entropy", "contributions", "input_grams", "output_gradients"}


# --- no work that is not needed ---
def products(work):
    "Floating-point operations, by operation."
    with FlopCounterMode(display=False) as counter:
        work()
    return Counter({str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()})


def linear(counts):
    return counts["aten.mm"] + counts["aten.addmm"]


@pytest.mark.parametrize("name", ("gpt2", "llama-grouped", "bert"))
def test_not_one_product_for_weights(name):
    "Backwards, every linear layer takes what it took forwards, but those before the first gate: the first layer's queries, keys and values."
    model, data = build(name), batches(build(name), 1, batch=4)
    measure_heads(model, data)  # some things are found out once for each model
    with torch.no_grad():
        forward = products(lambda: sample_losses(model, data[0]))
    both = products(lambda: measure_heads(model, data))
    width, rows = 32, data[0]["labels"].numel()
    outputs = width + 2 * (width // 2 if name == "llama-grouped" else width)
    assert linear(both) == 2 * linear(forward) - 2 * rows * width * outputs
    assert both.total() <= 2.02 * forward.total()
    four = products(lambda: measure_heads(model, data, ("taylor", "taylor_per_layer", "fisher")))
    assert four == both
    weights = linear(products(lambda: measure_heads(model, data, ("taylor", "gradient")))) - linear(both)
    assert weights == 2 * rows * width * width * LAYERS  # of the output projections


def test_grams_come_with_the_same_pass():
    model, data = build("gpt2"), batches(build("gpt2"), 1, batch=4)
    measure_heads(model, data)
    alone, together = (linear(products(lambda: collect_quantities(model, data, needs))) for needs in ({"gate_gradients"}, {"gate_gradients", "input_grams"}))
    assert together - alone == 2 * data[0]["labels"].numel() * 32 * 32 * LAYERS


class Watched(TorchDispatchMode):
    "Counts what makes the processor wait for numbers, and new tensors of a size."

    WAITS = {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.masked_select.default"}

    def __init__(self, size=None):
        super().__init__()
        self.size, self.waits, self.large = size, 0, []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.waits += str(operation) in self.WAITS
        if isinstance(result, torch.Tensor) and result.numel() == self.size and not operation.is_view:
            self.large.append(str(operation))
        return result


def waits(work):
    with Watched() as watched:
        work()
    return watched.waits


@pytest.mark.parametrize("needs", ({"gate_gradients"}, {"gate_gradients", "weight_gradients", "input_grams", "contributions", "output_gradients"}))
def test_a_batch_more_waits_for_its_labels_alone(needs):
    "Is there one, and, where they are on the processor, are they words: before anything is computed. Beside that the model waits as it does by itself."
    model = build("gpt2")
    data = [padded(model, (9, 4, 6), seed=seed) for seed in range(6)]
    collect_quantities(model, data[:1], needs)
    own = waits(lambda: model(**data[0], use_cache=False))
    more = waits(lambda: collect_quantities(model, data, needs)) - waits(lambda: collect_quantities(model, data[:2], needs))
    assert more <= 4 * (own + 2)


def test_one_tensor_more_as_large_as_the_logits():
    "Their gradient. The model makes the logits; nothing is upcast, normalised, sliced or padded as a whole."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=9001, n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None)).bfloat16()
    data = batches(model, 1, batch=3, length=50)
    measure_heads(model, data)
    with Watched(3 * 50 * 9001) as watched:
        measure_heads(model, data)
    assert sorted(set(watched.large) - {"aten._unsafe_view.default"}) == ["aten.empty_like.default", "aten.mm.default"] and len(watched.large) == 3


def test_projection_inputs_are_not_kept_for_their_grams():
    model, data = build("gpt2"), batches(build("gpt2"), 1)
    found = collect_quantities(model, data, {"input_grams"})
    rows = []
    handle = model.transformer.h[1].attn.c_proj.register_forward_pre_hook(lambda _, args: rows.append(args[0].flatten(0, 1).double()))
    model(**data[0])
    handle.remove()
    torch.testing.assert_close(found.input_grams[1].products, rows[0].T @ rows[0], rtol=1e-5, atol=1e-6)
    assert found.input_grams[1].rows == len(rows[0])


# --- exact ---
@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize("name", ("gpt2", "bert"))
def test_a_loop_over_samples_in_double_precision(name, checkpointing):
    model = build(name).double()
    data = [padded(model, (9, 4, 6)), padded(model, (3, 9), seed=2)]
    expected = []
    for batch in data:
        for row in range(len(batch["labels"])):
            gates = torch.ones(LAYERS, HEADS, dtype=torch.float64, requires_grad=True)
            one = {key: value[row : row + 1, : int(batch["attention_mask"][row].sum())] for key, value in batch.items()}
            with gate_heads(model, gates):
                logits = model(input_ids=one["input_ids"]).logits
            labels = one["labels"]
            if name == "gpt2":
                logits, labels = logits[:, :-1], labels[:, 1:]
            expected.append(torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), labels.flatten()), gates)[0])
    found = collect_quantities(model, data, {"gate_gradients"}, checkpointing=checkpointing).per_sample("gate_gradients")
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-9, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 40), words=st.integers(1, 300), dtype=st.sampled_from((torch.float64, torch.float32, torch.bfloat16, torch.float16)),
       unlabelled=st.sampled_from((0.0, 0.5, 1.0)), scale=st.sampled_from((0.0, 1.0, 30.0)), strided=st.booleans(), seed=st.integers(0, 99))
def test_token_losses_are_cross_entropies(rows, words, dtype, unlabelled, scale, strided, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(rows, words, generator=generator)).to(dtype)
    logits = (torch.cat([logits, logits], 1)[:, :words] if strided else logits).requires_grad_()
    labels = torch.randint(words, (rows,), generator=generator).masked_fill(torch.rand(rows, generator=generator) < unlabelled, -100)
    factors = torch.rand(rows, generator=generator).to(torch.float64 if dtype == torch.float64 else torch.float32)
    same = logits.detach().to(factors.dtype).requires_grad_()
    expected = F.cross_entropy(same, labels, ignore_index=-100, reduction="none")
    found = token_losses(logits, labels)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected)
    slopes, expected = torch.autograd.grad((found * factors).sum(), logits)[0], torch.autograd.grad((expected * factors).sum(), same)[0]
    torch.testing.assert_close(slopes, expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_labels_that_are_no_words():
    model = build("gpt2")
    [batch] = batches(model, 1)
    measure_heads(model, [batch])
    batch["labels"][0, 3] = 53
    with pytest.raises(InvalidArgument, match="0 to 52"):
        measure_heads(model, [batch])
    with pytest.raises(InvalidArgument, match="a label for every row"):
        token_losses(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.long))


def test_the_kernels_give_what_pytorch_gives():
    "In Triton's interpreter, which needs no GPU."
    pytest.importorskip("triton")
    code = "import torch; from neural_plasticity.loss_kernels import working; print([working(torch.device('cpu'), d) for d in (torch.float32, torch.bfloat16, torch.float16)])"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[(True, ''), (True, ''), (True, '')]", done.stdout + done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_gpu_gives_what_a_processor_gives(dtype):
    model, data = build("gpt2"), [padded(build("gpt2"), (9, 4, 6)), padded(build("gpt2"), (3, 9), seed=2)]
    expected = collect_quantities(model, data, ALL)
    found = collect_quantities(model.to("cuda", dtype), data, ALL)
    rough = dict(rtol=1e-3, atol=1e-5) if dtype == torch.float32 else dict(rtol=0.1, atol=0.02)
    for name in ("gate_gradients", "weight_gradients", "entropy", "contributions"):
        torch.testing.assert_close(found.per_sample(name).float(), expected.per_sample(name), **rough)
    for layer in range(LAYERS):
        torch.testing.assert_close(found.input_grams[layer].mean(), expected.input_grams[layer].mean(), **rough)
        assert found.input_grams[layer].rows == expected.input_grams[layer].rows == 31


def test_rows_of_a_gram_that_do_not_count():
    rows = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    real = torch.tensor([[True, False, True, True, False], [False] * 5])
    rows[~real] = torch.nan  # whatever stands there
    gram, expected = Gram(3, 2), Gram(3, 2)
    gram.add(rows, rows[..., :2], real=real)
    expected.add(rows[real], rows[real][:, :2])
    for name in ("products", "left", "right", "rows"):
        torch.testing.assert_close(getattr(gram.total(), name), getattr(expected.total(), name))


def test_gates_of_heads_whose_columns_do_not_lie_side_by_side():
    "The same gradient by the general way and by autograd alone."
    model = build("gpt2").double()
    [batch] = batches(model, 1)
    gates = torch.rand(2, LAYERS, HEADS, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    with gate_heads(model, gates):
        [even] = torch.autograd.grad(sample_losses(model, batch)[0].sum(), gates)
        for block in model.transformer.h:
            assert block.attn.c_proj.plasticity_even
            block.attn.c_proj.plasticity_even = False
        [general] = torch.autograd.grad(sample_losses(model, batch)[0].sum(), gates)
    handles = [block.attn.c_proj.register_forward_pre_hook(lambda _, args, layer=layer: (args[0] * gates[:, None, layer].repeat_interleave(8, -1),))
               for layer, block in enumerate(model.transformer.h)]
    [plain] = torch.autograd.grad(sample_losses(model, batch)[0].sum(), gates)
    for handle in handles:
        handle.remove()
    for found in (even, general):
        torch.testing.assert_close(found, plain, rtol=1e-10, atol=1e-14)


# --- checkpointing ---
@pytest.mark.parametrize("name", ("gpt2", "llama-grouped", "bert", "vit"))
def test_checkpointing_gives_the_same_for_less_memory(name):
    model, needs = build(name), ALL
    data = batches(model) if name == "vit" else [padded(model, (9, 4, 6)), padded(model, (3, 9), seed=2)]
    put_to_sleep(model, [(1, 2)], zero_weights=True)
    measure_heads(model, data)  # ViT notes in its config what kind of labels it has seen
    before = fingerprint(model)
    plain, slim = (collect_quantities(model, data, needs, checkpointing=flag) for flag in (False, True))
    for quantity in ("gate_gradients", "weight_gradients", "entropy", "contributions"):
        torch.testing.assert_close(slim.per_sample(quantity), plain.per_sample(quantity), rtol=1e-6, atol=1e-8)
    for layer in range(LAYERS):
        for quantity in ("input_grams", "output_gradients"):
            torch.testing.assert_close(getattr(slim, quantity)[layer].products, getattr(plain, quantity)[layer].products, rtol=1e-6, atol=1e-8)
    assert fingerprint(model) == before
    kept = {}
    for flag in (False, True):
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.update({tensor.data_ptr(): tensor.numel()}) or tensor, lambda tensor: tensor):
            measure_heads(model, data[:1], checkpointing=flag)
        kept[flag] = sum(sizes.values())
    assert kept[True] < kept[False]


def test_checkpointing_computes_the_layers_once_more():
    model, data = build("gpt2"), batches(build("gpt2"), 1, batch=4)
    measure_heads(model, data)
    with torch.no_grad():
        forward = products(lambda: sample_losses(model, data[0])).total()
    assert forward * 2.5 < products(lambda: measure_heads(model, data, checkpointing=True)).total() < forward * 3.02


def test_where_checkpointing_cannot_work():
    model = build("gpt2")
    [batch] = batches(model, 1)
    block, calls = model.transformer.h[1], []
    forward = block.forward
    block.forward = lambda hidden, *args, **kwargs: calls.append(1) or forward(hidden if len(calls) < 5 else hidden.sin(), *args, **kwargs)
    measure_heads(model, [batch])
    assert len(calls) == 3  # with the probe and the shift of labels; the fourth is the next forward pass
    before = fingerprint(model)
    with pytest.raises(UnsupportedModel, match="GPT2LMHeadModel computes something else when it runs again"):
        measure_heads(model, [batch], checkpointing=True)
    assert fingerprint(model) == before
    flat = nn.Module()
    flat.attention = nn.Identity()
    with pytest.raises(UnsupportedModel, match="in no nn.ModuleList"), checkpointed(flat, anatomy_like("attention")):
        pass


def anatomy_like(name):
    site = type("Site", (), {"name": name})
    return type("Anatomy", (), {"sites": [site]})


# --- activations ---
def test_formulas_come_back_and_other_forwards_stay():
    model = build("gpt2")
    [batch] = batches(model, 1)
    before, expected = fingerprint(model), model(**batch).logits
    own = model.transformer.h[2].mlp.act
    own.forward = lambda inputs: torch.zeros_like(inputs)
    with pytest.raises(KeyError), fused_activations(model):
        assert "forward" in vars(model.transformer.h[0].mlp.act) and own(torch.ones(1)) == 0
        raise KeyError
    assert own(torch.ones(1)) == 0
    del own.forward
    assert fingerprint(model) == before
    with fused_activations(model):
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-6)
    assert model(**batch).logits.equal(expected)


# --- no keys and values for later ---
def test_nothing_is_cached_unless_positions_need_it():
    model, seen = build("gpt2"), []
    [batch] = batches(model, 1)
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs.get("use_cache")), with_kwargs=True)
    positions = torch.arange(9).repeat(2, 1)
    sample_losses(model, batch)
    sample_losses(model, {**batch, "position_ids": positions})
    sample_losses(model, {**batch, "position_ids": positions, "attention_mask": torch.ones_like(positions)})
    sample_losses(model, {**batch, "use_cache": True})
    handle.remove()
    assert seen == [False, False, None, False, True]  # the first twice, to find how labels are shifted
    assert anatomy_of(model).num_layers == LAYERS
