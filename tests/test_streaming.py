"""Statistics of attention are the same to 1e-4 whichever way they are computed: against the definitions on dense float64 maps."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import batches, build
from test_entropy import random_qk, reference_visible

import neural_plasticity.fused_call as fused_call_module
import neural_plasticity.row_blocks as row_blocks_module
from neural_plasticity.entropy import map_statistics
from neural_plasticity.errors import InvalidArgument, UnsupportedModel
from neural_plasticity.patterns import measure_attention, measure_entropy
from neural_plasticity.row_blocks import STATISTICS, state_problem
from neural_plasticity.streaming import attention_statistics, statistics_path

ALL = tuple(STATISTICS)
TOLERANCE = {"distance": 1e-3} | dict.fromkeys(("entropy", "top", "first", "self", "previous"), 1e-4)  # tokens, else nats and probabilities


def reference(query, key, scale=None, softcap=None, attention_mask=None, bias=None, first_key=None, **masks):
    "Every statistic from the dense map, in float64."
    q, k = query.double(), key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = q @ k.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    for added in (bias, attention_mask if attention_mask is not None and attention_mask.is_floating_point() else None):
        logits = logits if added is None else logits + added.double()
    seen = reference_visible(query, key, attention_mask=attention_mask, bias=bias, **masks)
    (B, H, T, _), S = query.shape, key.shape[2]
    p = logits.masked_fill(~seen, -math.inf).softmax(-1)
    first = reference_visible(query, key, attention_mask=attention_mask, bias=bias).any(2).int().argmax(-1)  # whatever causality and windows hide
    found = {name: torch.full((B, H, T), math.nan, dtype=torch.float64) for name in ALL}
    for b, h, t in seen.any(-1).nonzero().tolist():
        row, here = p[b, h, t], t + S - T
        found["entropy"][b, h, t] = -sum(x * math.log(x) for x in row.tolist() if x > 0)
        found["top"][b, h, t] = row.max()
        found["first"][b, h, t] = row[first[b, h]]
        found["self"][b, h, t] = row[here]
        found["previous"][b, h, t] = row[here - 1] if here else 0.0
        found["distance"][b, h, t] = (row * (torch.arange(S) - here).abs()).sum()
    return found


def assert_same(got, expected):
    for name, values in got.items():
        assert values.isnan().equal(expected[name].isnan()), name
        difference = (values.double() - expected[name]).nan_to_num(0).abs().max().item()
        assert difference < TOLERANCE[name], (name, difference)


@st.composite
def problems(draw):
    "Shapes, dtypes, masks and what changes logits, all at random."
    B, Hkv, group, T = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 18))
    S, H, D = T + draw(st.sampled_from([0, 0, 1, 5])), Hkv * group, draw(st.sampled_from([1, 8, 17, 32]))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    query, key = random_qk(draw(st.integers(0, 2**31)), B, H, Hkv, T, S, D, draw(st.sampled_from([0.0, 0.5, 4.0])), draw(st.sampled_from([torch.float32, torch.float16])))
    arguments = {"is_causal": draw(st.booleans()), "window": draw(st.one_of(st.none(), st.integers(1, 20))), "scale": draw(st.sampled_from([None, 0.3, -0.2, 0.0])),
                 "softcap": draw(st.sampled_from([None, None, 3.0]))}
    mask = draw(st.sampled_from([None, None, "padding", "bool", "added"]))
    if mask == "padding":
        arguments["attention_mask"] = torch.rand(B, S, generator=rng) > 0.3
    elif mask == "bool":
        arguments["attention_mask"] = torch.rand(draw(st.sampled_from([1, B])), draw(st.sampled_from([1, H])), T, S, generator=rng) > 0.3
    elif mask == "added":
        added = torch.randn(B, 1, T, S, generator=rng)
        arguments["attention_mask"] = added.masked_fill(torch.rand(B, 1, T, S, generator=rng) > 0.7, -math.inf)
    if draw(st.booleans()):
        arguments["bias"] = torch.randn(1, H, draw(st.sampled_from([1, T])), S, generator=rng)
    return query, key, arguments


@settings(max_examples=40, deadline=None)
@given(problem=problems())
def test_every_way_equals_the_definitions(problem):
    query, key, arguments = problem
    expected = reference(query, key, **arguments)
    stated = state_problem(query, key, **arguments)
    with pytest.MonkeyPatch.context() as patch:
        for room in (fused_call_module, row_blocks_module):
            patch.setattr(room, "BLOCK_ELEMENTS", 100)  # several blocks
        assert_same(attention_statistics(query, key, **arguments), expected)
        fused = tuple(name for name in ALL if fused_call_module.why_not_fused(stated, (name,)) is None)
        if fused:
            assert statistics_path(query, key, fused, **arguments) == "fused"
            assert_same(attention_statistics(query, key, fused, **arguments), expected)


@pytest.mark.parametrize("scale", [-0.2, 0.0])
def test_a_scale_of_zero_or_below_hides_what_masks_hide(scale):
    "Fused attention multiplies the -inf of a hidden key by the scale, which makes NaN of it, or the largest logit of all."
    for length, is_causal, padding in ((2, True, None), (40, True, None), (40, False, torch.arange(40)[None] > 5), (40, True, torch.arange(40)[None] > 5)):
        query, key = random_qk(3, 1, 2, 1, length, length, 8)
        query[:, :, 0] = 0.0
        arguments = {"scale": scale, "is_causal": is_causal, "attention_mask": padding}
        assert_same(attention_statistics(query, key, ("entropy", "first", "self"), **arguments, path="fused"), reference(query, key, **arguments))


def test_only_what_is_asked_for_is_returned():
    query, key = random_qk(2)
    for name in ALL:
        assert list(attention_statistics(query, key, name)) == [name]


def test_the_kernel_is_for_gpus():
    query, key = random_qk(2)
    with pytest.raises(InvalidArgument, match="it runs on a GPU, and the query is on cpu"):
        attention_statistics(query, key, path="kernel")


def test_the_first_key_can_be_said():
    query, key = random_qk(3, B=2, T=9)
    said = torch.tensor([4, 2])
    for path in ("fused", "blocks"):
        found = attention_statistics(query, key, "first", first_key=said, path=path)["first"]
        probabilities = (query.double() @ key.double().repeat_interleave(2, 1).mT / 8**0.5).softmax(-1)
        assert torch.allclose(found.double(), torch.stack([probabilities[0, ..., 4], probabilities[1, ..., 2]]), atol=1e-6)
    with pytest.raises(InvalidArgument, match="first_key is torch.float32"):
        attention_statistics(query, key, first_key=said.float())


@pytest.mark.parametrize("name", ["gpt2", "llama-grouped", "bert"])
def test_a_model_s_statistics_are_those_of_its_maps(name):
    model = build(name)
    data = batches(model, count=2)
    for batch in data:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, :3 if name != "bert" else 0] = 0  # padded on the left, where that is allowed
    streamed = measure_attention(model, data)
    model.set_attn_implementation("eager")
    from_maps = measure_attention(model, data)
    for key in ALL:
        assert torch.allclose(streamed[key], from_maps[key], atol=1e-3 if key == "distance" else 1e-5), key
    found = {key: [] for key in ALL}
    for batch in data:
        with torch.no_grad():
            maps = model(**batch, output_attentions=True).attentions
        real = batch["attention_mask"].bool()
        for map_ in maps:
            rows = map_statistics(map_, first_key=batch["attention_mask"].argmax(-1))
            for key in ALL:
                counted = (real & ((real.cumsum(-1) if name != "bert" else real.sum(-1, keepdim=True)) > 1))[:, None].expand_as(rows[key])
                found[key].append(rows[key].masked_fill(~counted, 0).sum(-1) / counted.sum(-1))
    layers = len(maps)
    for key in ALL:
        by_layer = [torch.cat(found[key][layer::layers]).mean(0) for layer in range(layers)]
        assert torch.allclose(torch.stack(by_layer), streamed[key], atol=1e-3 if key == "distance" else 1e-5), key


def test_weights_that_are_not_finite_are_said():
    model = build("gpt2")
    model.transformer.h[1].attn.c_attn.weight.data[0, 0] = math.nan
    with pytest.raises((InvalidArgument, UnsupportedModel), match="layer 1 hold NaN"):
        measure_entropy(model, batches(model, count=1))


@pytest.mark.gpu
@pytest.mark.parametrize("size, dtype", [(32, torch.bfloat16), (64, torch.float16), (64, torch.float32), (80, torch.bfloat16), (128, torch.bfloat16), (192, torch.bfloat16), (256, torch.float32)])
def test_on_a_gpu_every_head_size_is_exact(size, dtype):
    rng = torch.Generator("cuda").manual_seed(size)
    query = torch.randn(2, 700, 4, size, device="cuda", dtype=dtype, generator=rng).transpose(1, 2) * 2
    key = torch.randn(2, 700, 2, size, device="cuda", dtype=dtype, generator=rng).transpose(1, 2)
    assert_kernel_exact(query, key, is_causal=True)


@pytest.mark.gpu
@pytest.mark.parametrize("what", ["both directions", "window", "padding", "bias", "softcap", "dense"])
def test_on_a_gpu_every_mask_is_exact(what):
    rng = torch.Generator("cuda").manual_seed(0)
    query, key = (torch.randn(2, 700, heads, 64, device="cuda", dtype=torch.bfloat16, generator=rng).transpose(1, 2) for heads in (4, 2))
    place = torch.arange(700, device="cuda")
    padding = torch.ones(2, 700, dtype=torch.bool, device="cuda")
    padding[0, :130] = False
    arguments = {"both directions": {}, "window": dict(is_causal=True, window=300), "padding": dict(is_causal=True, attention_mask=padding),
                 "bias": dict(is_causal=True, bias=-0.01 * (place[:, None] - place).abs().float()[None, None]), "softcap": dict(softcap=20.0),
                 "dense": dict(attention_mask=padding[:, None, None] & (place <= place[:, None]))}[what]
    assert_kernel_exact(query, key, **arguments)


def assert_kernel_exact(query, key, **arguments):
    assert statistics_path(query, key, **arguments) == "kernel"
    assert_same(attention_statistics(query, key, **arguments), attention_statistics(query.double(), key.double(), **arguments, path="blocks"))
