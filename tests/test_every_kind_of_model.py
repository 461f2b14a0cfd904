"""One line for each kind of model and wrapper that people bring: gates act, heads can be cut, and both say the same."""
import copy
import subprocess
import sys

import pytest
import torch
from models import build, cuttable, fingerprint, inputs, logits, same_weights, weights
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, UMT5Config, UMT5ForConditionalGeneration

from neural_plasticity.compensation import compensate_heads
from neural_plasticity.errors import InvalidArgument, NotRemovable, UnsupportedModel
from neural_plasticity.examples import example_inputs
from neural_plasticity.export import export_dense
from neural_plasticity.gates import dormant_heads, gate_heads, put_to_sleep, restore_heads
from neural_plasticity.importance import heads_first, measure_entropy, measure_heads
from neural_plasticity.operations import MapHeads, Rewire, Silence
from neural_plasticity.probing import anatomy_of, probe
from neural_plasticity.proof import ask, largest_difference
from neural_plasticity.storage import load_pruned, save_pruned
from neural_plasticity.surgery import kept_heads, operations_of, remove_heads
from neural_plasticity.taps import observe_attention
from neural_plasticity.zoo_models import small_model

KINDS = {  # what it stands for: (task, type), heads to cut
    "latent attention (MLA)": ("causal-lm", "deepseek_v3", [(0, 1), (1, 0), (1, 5)]),
    "attention sinks": ("causal-lm", "gpt_oss", [(0, 1), (1, 0), (1, 4), (2, 3)]),
    "sliding windows": ("causal-lm", "gemma3_text", [(0, 1), (1, 0), (1, 4), (2, 3)]),
    "ragged groups": ("causal-lm", "llama", [(0, 1), (1, 0), (1, 1), (1, 4)]),
    "fused projections and a config read while running": ("causal-lm", "phi3", [(0, 0), (0, 1), (0, 2), (1, 3), (1, 4), (1, 5)]),
    "a norm across heads": ("causal-lm", "olmo2", [(0, 1), (1, 0), (1, 1), (1, 2)]),
    "ALiBi from outside": ("causal-lm", "bloom", [(0, 1), (1, 0), (1, 4)]),
    "code that insists on its widths": ("causal-lm", "trocr", [(0, 1), (1, 0), (1, 4)]),
    "heads in pairs": ("causal-lm", "diffllama", [(0, 0), (0, 3), (1, 1), (1, 4)]),
    "shared relative position bias": ("seq2seq", "t5", [(0, 1), (1, 0), (4, 2), (4, 3), (7, 5)]),
    "cross attention": ("seq2seq", "bart", [(0, 1), (3, 0), (4, 2), (4, 3), (6, 5)]),
    "sound": ("speech", "whisper", [(0, 1), (3, 0), (4, 2), (4, 3)]),
    "windows of a picture": ("image-classification", "swin", [(0, 1), (1, 0)]),
    "an encoder": ("masked-lm", "bert", [(0, 1), (1, 0), (1, 4)]),
}


def difference(model, reference_answers, example):
    return largest_difference(ask(model, example, set(reference_answers)), reference_answers)[1]


@pytest.mark.parametrize("kind", KINDS)
def test_gated_equals_removed(kind):
    task, model_type, heads = KINDS[kind]
    model = small_model(task, model_type)
    example = example_inputs(model, length=9)
    before = ask(model, example)
    with gate_heads(model, torch.ones(anatomy_of(model).exists.shape)):
        assert all(answer.equal(before[way]) for way, answer in ask(model, example, set(before)).items())
    with gate_heads(model, heads):
        expected = ask(model, example, set(before))
    assert largest_difference(expected, before)[1] > 1e-3
    report = remove_heads(model, heads)
    assert difference(model, expected, example) <= 1e-5
    assert report.parameters_after < report.parameters_before and report.flops_after < report.flops_before
    assert sum(len(layer) for layer in kept_heads(model)) == len(anatomy_of(model).heads)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_bit_for_bit(kind, tmp_path):
    task, model_type, heads = KINDS[kind]
    model = small_model(task, model_type)
    remove_heads(model, heads)
    loaded = load_pruned(save_pruned(model, tmp_path / "saved"))
    assert same_weights(loaded, weights(model)) and kept_heads(loaded) == kept_heads(model) and operations_of(loaded) == operations_of(model)
    example = example_inputs(model)
    expected, found = ask(model, example), ask(loaded, example)
    assert all(found[way].equal(answer) for way, answer in expected.items())
    export_dense(loaded, tmp_path / "dense")
    plain = type(model).from_pretrained(tmp_path / "dense").eval()
    assert difference(plain, expected, example) <= 1e-5
    remove_heads(loaded, [next(head for head in anatomy_of(loaded).units if len(head) == 1)[0]] if kind != "heads in pairs" else anatomy_of(loaded).units[0])  # and it can be cut again


@pytest.mark.parametrize("model_type", ("llama", "phi3", "olmo2", "gpt_oss", "deepseek_v3", "trocr"))
def test_generation_after_a_cut(model_type):
    "Greedy tokens of a left-padded batch, with a growing and with a static cache."
    model, heads = small_model("causal-lm", model_type), next(heads for _, name, heads in KINDS.values() if name == model_type)
    ids = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    greedy = dict(input_ids=ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    with gate_heads(model, heads):
        expected = model.generate(**greedy)
    remove_heads(model, heads)
    assert model.generate(**greedy).equal(expected)
    if model_type != "trocr":  # its positions do not know a static cache
        assert model.generate(**greedy, cache_implementation="static").equal(expected)


@pytest.mark.parametrize("model_type", ("gpt2", "llama", "phi3", "bloom", "olmo2"))
def test_gradients_of_the_weights_that_remain(model_type):
    "One training step of the gated and of the cut model."
    model = small_model("causal-lm", model_type)
    heads = [(0, 1), (1, 0), (1, 4)] if model_type in ("gpt2", "bloom") else next(heads for _, name, heads in KINDS.values() if name == model_type)
    cut = copy.deepcopy(model)
    remove_heads(cut, heads)
    batch = {**example_inputs(model), "labels": example_inputs(model)["input_ids"]}
    with gate_heads(model, heads):
        model(**batch).loss.backward()
    cut(**batch).loss.backward()
    gone = {}
    for step in operations_of(cut):
        if hasattr(step, "parameter"):
            gone.setdefault(step.parameter, []).append((step.dim, step.gone))
    for name, parameter in cut.named_parameters():
        expected = model.get_parameter(name).grad
        for dim, indices in gone.get(name, ()):
            expected = expected.index_select(dim, torch.tensor([i for i in range(expected.shape[dim]) if i not in indices]))
        if parameter.grad is not None or expected is not None:
            torch.testing.assert_close(parameter.grad, expected, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


# --- layers without heads ---
@pytest.mark.parametrize("model_type", ("gpt2", "llama", "phi3", "deepseek_v3", "gpt_oss", "codegen", "bloom"))
def test_a_layer_may_lose_all_its_heads(model_type, tmp_path):
    model = small_model("causal-lm", model_type)
    width = anatomy_of(model).sites[0].num_heads
    heads = [(0, head) for head in range(width)] + [(1, 0)]
    example = example_inputs(model)
    with gate_heads(model, heads):
        expected = ask(model, example)
    remove_heads(model, heads)
    assert difference(model, expected, example) <= 1e-5
    assert any(isinstance(step, (Silence, Rewire)) for step in operations_of(model))
    anatomy = anatomy_of(model)
    assert anatomy.sites[0].num_heads == 0 and not anatomy.exists[0].any() and kept_heads(model)[0] == []
    scores = measure_heads(model, [{**example, "labels": example["input_ids"]}], ("taylor", "magnitude", "entropy"))
    assert all(scores[name][0].isnan().all() and scores[name][1, : width - 1].isfinite().all() for name in scores)
    with gate_heads(model, [(1, 0)]):
        gated = ask(model, example)
    put_to_sleep(model, [(1, 0)])
    assert difference(model, gated, example) == 0
    loaded = load_pruned(save_pruned(model, tmp_path / "saved"))
    assert dormant_heads(loaded) == [(1, 0)] and difference(loaded, gated, example) == 0


# --- dtypes, wrappers, quantised weights ---
@pytest.mark.parametrize("model_type", ("llama", "phi3", "olmo2", "trocr"))
def test_bfloat16(model_type):
    model = small_model("causal-lm", model_type).to(torch.bfloat16)
    heads = next(heads for _, name, heads in KINDS.values() if name == model_type)
    with gate_heads(model, heads):
        expected = ask(model, example_inputs(model))
    remove_heads(model, heads)
    assert difference(model, expected, example_inputs(model)) <= 4e-2 and {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ("sdpa", "eager"))
@pytest.mark.parametrize("model_type", ("llama", "phi3", "olmo2", "gpt_oss", "deepseek_v3", "bloom", "trocr"))
def test_float16_on_a_gpu(model_type, implementation):
    model = small_model("causal-lm", model_type)
    if implementation == "eager" or model_type not in ("gpt_oss", "bloom"):
        model.set_attn_implementation(implementation)
    model = model.to("cuda", torch.float16)
    heads = next(heads for _, name, heads in KINDS.values() if name == model_type)
    with gate_heads(model, heads):
        expected = ask(model, example_inputs(model))
    remove_heads(model, heads)
    assert difference(model, expected, example_inputs(model)) <= 5e-3
    assert all(tensor.is_cuda for tensor in (*model.parameters(), *model.buffers()))


def test_ragged_heads_follow_the_models_attention_implementation():
    model = small_model("causal-lm", "llama")
    heads = KINDS["ragged groups"][2]
    with gate_heads(model, heads):
        expected = logits(model, example_inputs(model))
    remove_heads(model, heads)
    assert any(isinstance(step, MapHeads) for step in operations_of(model))
    for implementation in ("eager", "sdpa", "flex_attention"):
        model.set_attn_implementation(implementation)
        torch.testing.assert_close(logits(model, example_inputs(model)), expected, atol=1e-5, rtol=0)
    assert [site.num_heads for site in probe(model).sites] == [5, 3, 6]


@pytest.mark.parametrize("order", ("before", "after"))
@pytest.mark.parametrize("model_type", ("llama", "olmo2", "diffllama", "trocr"))
def test_compiled(model_type, order):
    "Compiled before or after the gates and the cut came."
    torch._dynamo.reset()
    model = small_model("causal-lm", model_type)
    heads = next(heads for _, name, heads in KINDS.values() if name == model_type)
    example = example_inputs(model)
    with gate_heads(copy.deepcopy(model), heads) as _:
        pass
    reference = copy.deepcopy(model)
    put_to_sleep(reference, heads)
    expected = logits(reference, example)

    def compiled(thing):
        return torch.compile(thing, backend="eager")

    run = compiled(model)
    if order == "before":
        logits(run, example)
    put_to_sleep(model, heads)
    run = run if order == "before" else compiled(model)
    torch.testing.assert_close(logits(run, example), expected, atol=1e-5, rtol=0)
    remove_heads(model, heads)
    run = run if order == "before" else compiled(model)
    torch.testing.assert_close(logits(run, example), expected, atol=1e-5, rtol=0)
    torch._dynamo.reset()


def lora(model, targets=("q_proj", "v_proj", "o_proj")):
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)  # other weights, other rounding
        return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False))


def test_a_peft_adapter_on_top():
    model = lora(small_model("causal-lm", "llama")).eval()
    example = example_inputs(model)
    assert [site.num_heads for site in probe(model).sites] == [6, 6, 6]
    with gate_heads(model, [(0, 1), (1, 2)]):
        gated = logits(model, example)
    merged = copy.deepcopy(model).merge_and_unload()
    with gate_heads(merged, [(0, 1), (1, 2)]):
        torch.testing.assert_close(gated, logits(merged, example), atol=1e-5, rtol=0)
    with pytest.raises(NotRemovable, match="carries an adapter; merge it first"):
        remove_heads(model, [(0, 1)])
    with pytest.raises(UnsupportedModel, match="merge the adapter first"):
        compensate_heads(model, [example], [(0, 1)])


def test_adapters_trained_on_a_pruned_model_load_onto_the_loaded_model(tmp_path):
    peft = pytest.importorskip("peft")
    model = small_model("causal-lm", "llama")
    remove_heads(model, KINDS["ragged groups"][2])
    save_pruned(model, tmp_path / "pruned")
    adapted = lora(model)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    example = example_inputs(model)
    adapted(**example, labels=example["input_ids"]).loss.backward()
    optimizer.step()
    adapted.save_pretrained(tmp_path / "adapter")
    expected = logits(adapted.eval(), example)
    loaded = peft.PeftModel.from_pretrained(load_pruned(tmp_path / "pruned"), tmp_path / "adapter").eval()
    assert logits(loaded, example).equal(expected)


def test_wrapped_by_ddp(tmp_path):
    "In a process of its own: a process group is for a process."
    script = """
import torch, torch.distributed as dist, tempfile
from neural_plasticity import gate_heads, probe, remove_heads
from neural_plasticity.errors import InvalidArgument
from neural_plasticity.examples import example_inputs
from neural_plasticity.zoo_models import small_model
dist.init_process_group("gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1)
model = small_model("causal-lm", "llama")
wrapped, example = torch.nn.parallel.DistributedDataParallel(model), example_inputs(model)
assert probe(wrapped).num_heads == 6
with torch.no_grad():
    before = model(**example).logits
    with gate_heads(wrapped, [(0, 1)]):
        gated = wrapped(**example).logits
    with gate_heads(model, [(0, 1)]):
        assert gated.equal(model(**example).logits) and not gated.equal(before)
try:
    remove_heads(wrapped, [(0, 1)])
except InvalidArgument as error:
    assert "remove heads first, then wrap it" in str(error)
else:
    raise AssertionError("should have been refused")
dist.destroy_process_group()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.mark.filterwarnings("ignore")
def test_eight_bit_weights_can_be_gated(tmp_path):
    pytest.importorskip("bitsandbytes")
    plain = small_model("causal-lm", "llama")
    plain.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True)).eval()
    example = example_inputs(model)
    assert [site.num_key_value_heads for site in probe(model).sites] == [site.num_key_value_heads for site in probe(plain).sites]
    before = logits(model, example)
    with gate_heads(model, torch.ones(3, 6)):
        assert logits(model, example).equal(before)
    heads = [(0, 1), (1, 2), (2, 5)]
    columns = probe(plain).sites[0].columns[1]
    seen = []
    handle = model.get_submodule(probe(plain).sites[0].projection).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    put_to_sleep(model, heads)
    assert not logits(model, example).equal(before)
    handle.remove()
    model.get_submodule(probe(plain).sites[0].projection).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits(model, example)
    assert seen[-1][..., columns].eq(0).all() and seen[0][..., columns].ne(0).any()  # before the gate and after it
    with pytest.raises(NotRemovable, match="quantised"):
        remove_heads(model, [(0, 3)])


# --- what it costs ---
def test_a_cut_needs_little_memory(monkeypatch):
    "While the proof runs, no more is kept than what was cut out, on the CPU; the old parameters are empty."
    import neural_plasticity.surgery as surgery

    model = build("gpt2")
    old = list(model.parameters())
    whole = sum(parameter.numel() for parameter in old)
    held = []
    real = surgery.prove

    def watching(model, *rest):
        now = {id(parameter) for parameter in model.parameters()}
        held.append(sum(parameter.numel() for parameter in old if id(parameter) not in now))
        return real(model, *rest)

    monkeypatch.setattr(surgery, "prove", watching)
    remove_heads(model, cuttable("gpt2"))
    assert held and all(numbers == 0 for numbers in held) and sum(parameter.numel() for parameter in model.parameters()) < whole


# --- entropy of unusual layouts ---
@pytest.mark.parametrize("kind", ("attention sinks", "windows of a picture", "ALiBi from outside", "sliding windows", "cross attention", "code that insists on its widths"))
def test_entropy_of_every_head(kind):
    "Against maps taken as they are: sinks left out and the rest renormalised, windows and merged dimensions sorted by sample and head."
    task, model_type, heads = KINDS[kind]
    model = small_model(task, model_type)
    remove_heads(model, heads)
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")
    example = example_inputs(model, batch_size=2)
    anatomy, maps = anatomy_of(model), {}
    sites = {(site.name, site.call): site for site in anatomy.sites}

    def keep(call):
        if call.site in sites and call.kind == "softmax":
            maps[sites[call.site].index] = heads_first(call.output, sites[call.site], 2, trailing=1)

    with torch.no_grad(), observe_attention(model, keep):
        model(**example)
    found = measure_entropy(model, [example], normalize=False)
    for site in anatomy.sites:
        p = maps[site.index].double()
        if kind == "attention sinks":
            p = p[..., :-1] / p[..., :-1].sum(-1, keepdim=True)
        entropy = -(p * p.clamp(min=1e-300).log()).sum(-1)
        counted = (p > 1e-30).sum(-1) > 1
        expected = torch.stack([(entropy * counted)[sample].sum(-1) / counted[sample].sum(-1) for sample in range(2)]).mean(0)
        torch.testing.assert_close(found[site.index, : site.num_heads].double(), expected, atol=1e-4, rtol=0)
    assert anatomy.sites[0].sink == (kind == "attention sinks")


# --- what cannot be done says so ---
def test_gates_of_heads_that_are_mixed_act_in_the_attention():
    model = small_model("causal-lm", "bitnet")
    anatomy = anatomy_of(model)
    assert {site.gate for site in anatomy.sites} == {"attention"} and not anatomy.removable.any()
    state, example = fingerprint(model), example_inputs(model)
    with gate_heads(model, [(0, 1)]):
        gated = logits(model, example)
    put_to_sleep(model, [(0, 1)])
    assert logits(model, example).equal(gated) and dormant_heads(model) == [(0, 1)]
    again = copy.deepcopy(model)
    assert logits(again, example).equal(gated)
    with pytest.raises(InvalidArgument, match="no columns of their own"):
        put_to_sleep(model, [(0, 2)], zero_weights=True)
    assert compensate_heads(model, [example]).undone[0] > 0.5  # all columns take part
    with pytest.raises(UnsupportedModel, match="use a criterion on gates"):
        measure_heads(model, [{**example, "labels": example["input_ids"]}], ("magnitude",))
    restore_heads(model)
    assert fingerprint(model) == state


def test_per_sample_gates_in_the_attention_and_in_windows():
    for task, model_type in (("causal-lm", "bitnet"), ("image-classification", "swin"), ("causal-lm", "bloom")):
        model = small_model(task, model_type)
        shape = anatomy_of(model).exists.shape
        example = example_inputs(model, batch_size=2)
        gates = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
        with gate_heads(model, gates):
            together = logits(model, example)
        for sample in range(2):
            with gate_heads(model, gates[sample]):
                alone = logits(model, {name: value[sample : sample + 1] for name, value in example.items()})
            torch.testing.assert_close(together[sample : sample + 1], alone, atol=1e-5, rtol=1e-5)
        with gate_heads(model, gates.repeat(2, 1, 1)[:3]), pytest.raises(InvalidArgument, match="batch of"):
            logits(model, example)


def test_a_model_of_ones_own_needs_an_example():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = build("gpt2")

        def forward(self, tokens):
            return self.inner(input_ids=tokens).logits

    model = Odd()
    with pytest.raises(UnsupportedModel, match="example="):
        probe(model)
    example = {"tokens": inputs(model.inner)["input_ids"]}
    with torch.no_grad():
        anatomy_of(model, example)
        with gate_heads(model, [(0, 1), (2, 2)]):
            expected = model(**example)
        remove_heads(model, [(0, 1), (2, 2)], example=example)
        torch.testing.assert_close(model(**example), expected, atol=1e-5, rtol=0)
    with pytest.raises(UnsupportedModel, match="no transformers model"):
        save_pruned(model, "anywhere")


# --- traps ---
def test_numbers_that_only_long_inputs_need():
    "UMT5 with as many buckets of relative positions as heads: that number is no number of heads, and a short input does not tell."
    sizes = dict(vocab_size=60, d_model=32, d_kv=4, d_ff=32, num_layers=2, num_heads=8, relative_attention_num_buckets=8, relative_attention_max_distance=20)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = UMT5ForConditionalGeneration(UMT5Config(decoder_start_token_id=0, **sizes)).eval()
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    heads = [(site.index, site.index % 8) for site in anatomy_of(model).sites]
    ids = torch.randint(3, 60, (1, 60), generator=torch.Generator().manual_seed(0))
    with gate_heads(model, heads):
        expected = logits(model, {"input_ids": ids, "decoder_input_ids": ids})
    remove_heads(model, heads)
    found = logits(model, {"input_ids": ids, "decoder_input_ids": ids})
    assert float((found - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))


def test_nothing_is_pruned_inside_a_gate_context():
    model = build("gpt2")
    put_to_sleep(model, [(0, 0)], zero_weights=True)
    state, values = fingerprint(model), weights(model)
    with gate_heads(model, [(1, 1)]):
        for verb in (lambda: put_to_sleep(model, [(2, 2)]), lambda: restore_heads(model), lambda: remove_heads(model, [(0, 0)])):
            with pytest.raises(InvalidArgument, match="a gate_heads context is open"):
                verb()
    assert fingerprint(model) == state and same_weights(model, values)


@pytest.mark.parametrize("implementation", ("eager", "sdpa"))
def test_heads_whose_weights_are_zero_are_heads(implementation):
    "As `export_dense` leaves them."
    model = build("gpt2")
    for attention in (block.attn for block in model.transformer.h):
        for part in range(3):
            attention.c_attn.weight.data[:, 32 * part + 8 : 32 * part + 16] = 0
            attention.c_attn.bias.data[32 * part + 8 : 32 * part + 16] = 0
    model.set_attn_implementation(implementation)
    anatomy = probe(model)
    assert anatomy.removable.all() and [site.columns.tolist() for site in anatomy.sites] == [site.columns.tolist() for site in probe(build("gpt2")).sites]
    plain = build("gpt2")
    assert remove_heads(model, [(0, 1), (1, 0)]).parameters_after == remove_heads(plain, [(0, 1), (1, 0)]).parameters_after


def test_per_sample_gates_where_the_sequence_comes_first():
    model = small_model("seq2seq", "fsmt")
    example = example_inputs(model, batch_size=3, length=6)
    gates = torch.rand(3, *anatomy_of(model).exists.shape, generator=torch.Generator().manual_seed(0))
    with gate_heads(model, gates):
        together = logits(model, example)
    for sample in range(3):
        with gate_heads(model, gates[sample]):
            alone = logits(model, {name: value[sample : sample + 1] for name, value in example.items()})
        torch.testing.assert_close(together[sample : sample + 1], alone, atol=1e-5, rtol=1e-5)


def test_a_projection_that_something_else_uses_is_not_cut():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)

        def forward(self, x):
            q, k, v = (part.unflatten(-1, (4, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
            heads = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            return self.out(heads.transpose(1, 2).flatten(2)) + self.out(x)

    model, example = Twice().eval(), {"x": torch.randn(1, 5, 16)}
    [site] = anatomy_of(model, example).sites
    assert site.gate == "attention" and "also used for something else" in site.obstacle
    with pytest.raises(NotRemovable, match="also used for something else"):
        remove_heads(model, [(0, 1)], example=example)


@pytest.mark.parametrize("key", ("attn_implementation", "_attn_implementation"))
def test_a_config_cannot_ask_for_kernels_from_elsewhere(key, tmp_path):
    import hashlib
    import json

    from neural_plasticity.errors import StorageError
    from neural_plasticity.folders import _checksum

    folder = save_pruned(build("gpt2"), tmp_path / "model")
    config = {**json.loads((folder / "config.json").read_text()), key: "somebody/kernel"}
    (folder / "config.json").write_text(json.dumps(config))
    content, manifest = (folder / "config.json").read_bytes(), json.loads((folder / "plasticity.json").read_text())
    manifest["files"]["config.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest["checksum"] = _checksum(manifest)
    (folder / "plasticity.json").write_text(json.dumps(manifest))
    with pytest.raises(StorageError, match="could be code from elsewhere"):
        load_pruned(folder)
