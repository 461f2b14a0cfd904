"""DESIGN.md, "What must hold" 5: streaming entropy ≡ float64 reference to 1e-4 nats, whatever hides or shifts the logits."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import neural_plasticity.attention_masks as attention_masks_module
import neural_plasticity.fused_call as fused_call_module
import neural_plasticity.row_blocks as row_blocks_module
from neural_plasticity.attention_masks import visible_keys
from neural_plasticity.entropy import attention_entropy, calculate_head_entropy, entropy_path, map_entropy, normalize_entropy
from neural_plasticity.errors import InvalidArgument, WrongType

TOLERANCE = 1e-4  # nats, the promise


# --- the reference: every rule once more, densely and in float64 ---
def reference_visible(query, key, is_causal=False, attention_mask=None, window=None, bias=None):
    """Bool [B,H,T,S], written as loops so that it shares no reasoning with the library."""
    (B, H, T, _), S = query.shape, key.shape[2]
    seen = torch.ones(B, H, T, S, dtype=torch.bool)
    for row in range(T):
        position = row + S - T
        for column in range(S):
            if is_causal and column > position:
                seen[:, :, row, column] = False
            if window is not None and is_causal and column <= position - window:
                seen[:, :, row, column] = False
            if window is not None and not is_causal and abs(column - position) > window:
                seen[:, :, row, column] = False
    if attention_mask is not None and attention_mask.ndim == 2:
        seen &= attention_mask.bool()[:, None, None]
    elif attention_mask is not None:
        seen &= attention_mask if attention_mask.dtype == torch.bool else attention_mask > -1e4
    if bias is not None:
        seen &= bias > -1e4
    return seen


def reference_entropy(query, key, scale=None, softcap=None, attention_mask=None, bias=None, **masks):
    q, k = query.double(), key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = q @ k.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    if bias is not None:
        logits = logits + bias.double()
    if attention_mask is not None and attention_mask.ndim == 4 and attention_mask.is_floating_point():
        logits = logits + attention_mask.double()
    seen = reference_visible(query, key, attention_mask=attention_mask, bias=bias, **masks)
    log_p = logits.masked_fill(~seen, -math.inf).log_softmax(-1)
    entropy = -(log_p.exp() * log_p.masked_fill(~seen, 0)).sum(-1)
    return entropy.masked_fill(~seen.any(-1), math.nan)


def assert_same(got, expected):
    assert got.shape == expected.shape
    assert got.isnan().equal(expected.isnan())
    difference = (got.double() - expected).nan_to_num(0).abs().max().item()
    assert difference < TOLERANCE, difference


def random_qk(seed, B=2, H=4, Hkv=2, T=9, S=None, D=8, size=1.0, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    return (torch.randn(B, H, T, D, generator=rng) * size).to(dtype), torch.randn(B, Hkv, T if S is None else S, D, generator=rng).to(dtype)


# --- properties ---
@st.composite
def problems(draw, exotic):
    """A random problem; `exotic` adds what only row blocks can do (bias, softcap, finite additive masks)."""
    integer = st.integers
    B, Hkv, group = draw(integer(1, 3)), draw(integer(1, 3)), draw(integer(1, 3))
    H, T, D = Hkv * group, draw(integer(1, 20)), draw(st.sampled_from([1, 3, 8, 16]))
    S = T + draw(st.sampled_from([0, 0, 1, 7]))
    seed = draw(integer(0, 2**31))
    rng = torch.Generator().manual_seed(seed)
    query, key = random_qk(seed, B, H, Hkv, T, S, D, draw(st.sampled_from([0.0, 0.3, 1.0, 6.0])),
                           draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])))
    arguments = {"is_causal": draw(st.booleans()), "window": draw(st.one_of(st.none(), integer(1, 24))),
                 "scale": draw(st.sampled_from([None, 1.0, 0.25]))}
    b, h, t = draw(st.sampled_from([1, B])), draw(st.sampled_from([1, H])), draw(st.sampled_from([1, T]))
    seen = torch.rand(b, h, t, S, generator=rng) < draw(st.sampled_from([0.2, 0.7, 1.0]))
    arguments["attention_mask"] = draw(st.sampled_from([
        None, seen, (torch.rand(B, S, generator=rng) < 0.7).long(), torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min),
        torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill(~seen, -math.inf)]
        + ([torch.randn(seen.shape, generator=rng).masked_fill(~seen, -1e4)] if exotic else [])))
    if exotic:
        distance = (torch.arange(S) - torch.arange(S - T, S)[:, None]).abs().float()
        alibi = -distance * (2.0 ** -torch.arange(1, H + 1).float())[:, None, None]
        arguments["bias"] = draw(st.sampled_from([None, alibi[None], 2 * torch.randn(b, h, t, S, generator=rng)]))
        arguments["softcap"] = draw(st.sampled_from([None, 5.0, 50.0]))
        arguments["sinks"] = draw(st.sampled_from([None, torch.randn(H, generator=rng)]))
    return query, key, arguments


def compare(problem, path, block):
    query, key, arguments = problem
    expected = reference_entropy(query, key, **{name: value for name, value in arguments.items() if name != "sinks"})
    with pytest.MonkeyPatch.context() as patch:  # blocks of every size, a single row too
        for room in (fused_call_module, row_blocks_module):
            patch.setattr(room, "BLOCK_ELEMENTS", block)
        assert_same(attention_entropy(query, key, **arguments, path=path), expected)


@settings(max_examples=150, deadline=None)
@given(problems(exotic=False), st.sampled_from([1, 150, 1 << 20]))
def test_fused_path_equals_float64_reference(problem, block):
    compare(problem, "fused", block)


@settings(max_examples=150, deadline=None)
@given(problems(exotic=True), st.sampled_from([1, 150, 1 << 20]))
def test_blocks_path_equals_float64_reference(problem, block):
    compare(problem, "blocks", block)


@settings(max_examples=100, deadline=None)
@given(problems(exotic=True), st.sampled_from([1, 150, 1 << 20]))
def test_visible_keys_counts_the_reference_mask(problem, block):
    query, key, arguments = problem
    masks = {name: arguments[name] for name in ("is_causal", "window", "attention_mask", "bias")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_masks_module, "_BLOCK_ELEMENTS", block)
        counted = visible_keys(query, key, **masks)
    assert counted.expand(query.shape[:3]).equal(reference_visible(query, key, **masks).sum(-1))
    entropy = attention_entropy(query, key, **arguments)
    assert entropy.isnan().equal(counted.expand(query.shape[:3]) == 0)
    share = normalize_entropy(entropy, counted)
    assert share.isnan().equal(counted.expand(query.shape[:3]) <= 1)
    assert share.nan_to_num(0).min() >= 0 and share.nan_to_num(0).max() <= 1 + 1e-5


# --- cases that deserve a name ---
def both_paths(query, key, **arguments):
    fused, blocks = (attention_entropy(query, key, **arguments, path=path) for path in ("fused", "blocks"))
    expected = reference_entropy(query, key, **arguments)
    assert_same(fused, expected)
    assert_same(blocks, expected)
    return fused


@pytest.mark.parametrize("T", [1, 2, 17, 64])
@pytest.mark.parametrize("path", ["fused", "blocks"])
def test_uniform_causal_attention_scores_one(T, path):
    query, key = torch.zeros(1, 4, T, 8), random_qk(0, 1, 4, 2, T)[1]
    share = normalize_entropy(attention_entropy(query, key, is_causal=True, path=path), visible_keys(query, key, is_causal=True))
    assert share[:, :, 0].isnan().all()
    assert (share[:, :, 1:] - 1).abs().max() < 1e-6 if T > 1 else True
    assert attention_entropy(query, key, is_causal=True, path=path)[:, :, 0].eq(0).all()  # one key: exactly nothing to spread


def test_cached_queries_are_the_last_rows():
    query, key = random_qk(1, T=12)
    whole = both_paths(query, key, is_causal=True)
    for kept in (1, 5):
        assert_same(both_paths(query[:, :, -kept:], key, is_causal=True), whole[:, :, -kept:].double())
    with pytest.raises(InvalidArgument, match="cannot be more of them than keys"):
        attention_entropy(query, key[:, :, :5], is_causal=True)


def test_windows_as_transformers_draws_them():
    from transformers.masking_utils import sdpa_mask, sliding_window_bidirectional_mask_function, sliding_window_causal_mask_function
    query, key = random_qk(2, T=11)
    for causal, function in ((True, sliding_window_causal_mask_function(4)), (False, sliding_window_bidirectional_mask_function(4))):
        drawn = sdpa_mask(batch_size=1, q_length=11, kv_length=11, mask_function=function, allow_is_causal_skip=False)
        by_window = both_paths(query, key, window=4, is_causal=causal)
        assert torch.equal(by_window, attention_entropy(query, key, attention_mask=drawn))


def test_left_and_right_padding_leave_out_the_rows_that_see_nothing():
    query, key = random_qk(3, T=8)
    padding = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0]])
    entropy = both_paths(query, key, is_causal=True, attention_mask=padding)
    assert entropy[0, :, :3].isnan().all() and not entropy[0, :, 3:].isnan().any() and not entropy[1].isnan().any()
    assert_same(entropy[:1, :, 3:], attention_entropy(query[:1, :, 3:], key[:1, :, 3:], is_causal=True).double())
    everything_hidden = both_paths(query, key, attention_mask=torch.zeros(2, 8))
    assert everything_hidden.isnan().all()


def test_many_blocks_with_a_window_reach_every_row():
    query, key = random_qk(4, B=1, H=2, Hkv=1, T=300)
    expected = both_paths(query, key, is_causal=True, window=16)
    with pytest.MonkeyPatch.context() as patch:
        for room in (fused_call_module, row_blocks_module):
            patch.setattr(room, "BLOCK_ELEMENTS", 4000)  # 20 or more blocks, each with few keys
        assert_same(both_paths(query, key, is_causal=True, window=16), expected.double())


def test_blocks_stay_within_their_budget():
    query, key = random_qk(5, B=1, H=2, Hkv=1, T=400)
    for arguments in (dict(is_causal=True), dict(is_causal=True, window=10), dict(window=10), {}):
        masks = attention_masks_module.read_masks(query, key, **arguments)
        blocks = list(masks.blocks(elements=8000, planes=2))
        assert [row for rows, _, _ in blocks for row in range(rows.start, rows.stop)] == list(range(400))
        assert all(2 * (rows.stop - rows.start) * (keys.stop - keys.start) <= 8000 for rows, keys, _ in blocks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_upcast_before_anything_is_computed(dtype):
    query, key = random_qk(6, T=64, size=4.0, dtype=dtype)
    entropy = both_paths(query, key, is_causal=True)
    assert entropy.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):  # nor does autocast get a say
        assert torch.equal(attention_entropy(query, key, is_causal=True, path="blocks"), attention_entropy(query, key, is_causal=True, path="blocks"))
        assert_same(attention_entropy(query, key, is_causal=True, path="blocks"), entropy.double())


def test_reduced_matmul_precision_is_set_aside_and_put_back():
    query, key = random_qk(7, T=64, size=4.0)
    expected = reference_entropy(query, key)
    torch.set_float32_matmul_precision("medium")
    try:
        assert_same(attention_entropy(query, key, path="blocks"), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("path", ["fused", "blocks"])
def test_any_memory_layout(path):
    query = torch.randn(2, 16, 8, 3).permute(0, 3, 1, 2)[..., ::2]  # neither contiguous nor with unit stride
    key = torch.randn(2, 3, 4, 16).mT
    assert_same(attention_entropy(query, key, is_causal=True, path=path), reference_entropy(query, key, is_causal=True))


def test_sinks_have_no_say():
    query, key = random_qk(8)
    plain = attention_entropy(query, key, is_causal=True)
    assert torch.equal(plain, attention_entropy(query, key, is_causal=True, sinks=torch.tensor([0.0, 9.0, -9.0, 1e4])))
    # the same from probabilities: with a sink column, renormalised over the keys
    logits = (query.double() @ key.double().repeat_interleave(2, 1).mT / 8**0.5)
    logits = logits.masked_fill(~reference_visible(query, key, True), -math.inf)
    with_sink = torch.cat([logits, torch.full((2, 4, 9, 1), 1.5)], -1).softmax(-1)[..., :-1]
    assert_same(map_entropy(with_sink / with_sink.sum(-1, keepdim=True)), plain.double())
    with pytest.raises(InvalidArgument, match="4 query heads"):
        attention_entropy(query, key, sinks=torch.zeros(3))


def test_one_key_with_all_the_weight_is_zero_and_never_negative():
    query, key = random_qk(9, size=80.0)
    for path in ("fused", "blocks"):
        assert attention_entropy(query, key, path=path).min() >= 0


def test_a_large_common_part_of_the_keys_does_not_drown_the_rest():
    query, key = random_qk(13, T=64, D=64)
    common = torch.randn(64, generator=torch.Generator().manual_seed(1))
    query, key = query + 3 * common, key + 100 * common
    assert (query @ key.repeat_interleave(2, 1).mT / 8).abs().max() > 1000  # float32 keeps logits of that size to about 1e-4
    both_paths(query, key, is_causal=True)


def test_measuring_leaves_inputs_and_gradients_alone():
    query, key = (x.requires_grad_() for x in random_qk(10))
    before = query.detach().clone()
    for path in ("fused", "blocks"):
        assert not attention_entropy(query, key, path=path).requires_grad
    assert torch.equal(query, before)


# --- which way ---
def test_the_path_can_be_asked_for_and_asked_about(monkeypatch):
    query, key = random_qk(11)
    additive = torch.zeros(1, 1, 9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf)
    assert entropy_path(query, key, is_causal=True, window=3) == "fused"
    assert entropy_path(query, key, attention_mask=additive) == "fused"  # only hides
    assert entropy_path(query, key, attention_mask=additive + 0.5) == "blocks"  # also adds
    for only_blocks in (dict(bias=torch.zeros(1, 1, 9, 9)), dict(softcap=30.0)):
        assert entropy_path(query, key, **only_blocks) == "blocks"
        with pytest.raises(InvalidArgument, match="leave path out"):
            attention_entropy(query, key, **only_blocks, path="fused")
    with pytest.raises(InvalidArgument, match="'fast'"):
        attention_entropy(query, key, path="fast")


def test_an_operator_that_changed_its_meaning_is_not_used(monkeypatch):
    query, key = random_qk(12)
    expected = attention_entropy(query, key, is_causal=True)
    honest = fused_call_module._mean_keys
    monkeypatch.setattr(fused_call_module, "_mean_keys", lambda *a, **k: [x / math.log(2) for x in honest(*a, **k)])  # say, bits for nats
    fused_call_module._works.cache_clear()
    try:
        assert entropy_path(query, key, is_causal=True) == "blocks"
        assert_same(attention_entropy(query, key, is_causal=True), expected.double())
    finally:
        fused_call_module._works.cache_clear()
    monkeypatch.undo()
    assert entropy_path(query, key, is_causal=True) == "fused"


def test_the_examination_is_fair_under_reduced_precision():
    query, key = random_qk(14)
    fused_call_module._works.cache_clear()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert entropy_path(query, key) == "fused"
    finally:
        torch.set_float32_matmul_precision("highest")
        fused_call_module._works.cache_clear()


# --- bad input ---
Q, K = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)


@pytest.mark.parametrize("arguments, kind, words", [
    (dict(query=Q[0]), InvalidArgument, "four dimensions"),
    (dict(query=Q.long()), InvalidArgument, "float tensor"),
    (dict(query=Q.numpy()), WrongType, "must be a tensor"),
    (dict(query=Q[:, :, :0]), InvalidArgument, "none empty"),
    (dict(key=K[:1]), InvalidArgument, "do not go together"),
    (dict(key=K[..., :4]), InvalidArgument, "do not go together"),
    (dict(query=Q[:, :3]), InvalidArgument, "multiple of the key heads"),
    (dict(query=Q / 0), InvalidArgument, "query holds NaN"),
    (dict(key=K * math.nan), InvalidArgument, "key holds NaN"),
    (dict(scale=math.inf), InvalidArgument, "scale"),
    (dict(softcap=0.0), InvalidArgument, "softcap"),
    (dict(window=0), InvalidArgument, "window"),
    (dict(window=2.5), InvalidArgument, "window"),
    (dict(bias=torch.zeros(5, 5)), InvalidArgument, "bias has shape"),
    (dict(bias=torch.ones(1, 1, 5, 5).bool()), WrongType, "attention_mask takes bool"),
    (dict(bias=torch.full((1, 1, 5, 5), math.nan)), InvalidArgument, "NaN or"),
    (dict(attention_mask=torch.full((1, 1, 5, 5), math.inf)), InvalidArgument, "NaN or"),
    (dict(attention_mask=torch.ones(2, 6)), InvalidArgument, r"\[1,1,T,S\]"),
    (dict(attention_mask=torch.ones(2, 5, 5).bool()), InvalidArgument, "all four dimensions"),
    (dict(attention_mask=torch.ones(1, 1, 5, 5).long()), WrongType, "bool"),
    (dict(attention_mask=torch.full((2, 5), -1e9)), InvalidArgument, "additive mask must have four"),
    (dict(attention_mask=[[1, 1]]), WrongType, "must be a tensor"),
])
def test_bad_input_says_what_is_wrong(arguments, kind, words):
    with pytest.raises(kind, match=words):
        attention_entropy(**{"query": Q, "key": K, **arguments})


def test_normalize_entropy_refuses_counts_of_another_shape():
    with pytest.raises(InvalidArgument, match="must broadcast"):
        normalize_entropy(torch.zeros(2, 4, 5), torch.ones(2, 1, 6))


# --- maps ---
def uniform_map(T, B=1, H=2, causal=True):
    allowed = torch.ones(T, T).tril() if causal else torch.ones(T, T)
    return (allowed / allowed.sum(-1, keepdim=True)).expand(B, H, T, T).clone()


def test_map_entropy_equals_streaming():
    query, key = random_qk(20, T=16)
    logits = query @ key.repeat_interleave(2, 1).mT / 8**0.5
    probabilities = logits.masked_fill(torch.ones(16, 16).triu(1).bool(), -math.inf).softmax(-1)
    assert_same(map_entropy(probabilities), attention_entropy(query, key, is_causal=True).double())
    empty = probabilities.clone()
    empty[0, 0, 3] = 0
    assert map_entropy(empty)[0, 0, 3].isnan() and map_entropy(empty).isnan().sum() == 1


@pytest.mark.parametrize("bad, words", [
    (torch.full((1, 1, 2, 2), math.nan), "NaN"),
    (torch.tensor([[[[1.5, -0.5], [0.5, 0.5]]]]), "negative"),
    (torch.full((1, 1, 2, 2), 0.4), "sums to 0.8"),
    (torch.ones(1, 1, 2, 2).long(), "float tensor"),
    (torch.ones(2, 2), "float tensor"),
])
def test_map_entropy_refuses_what_is_no_probability(bad, words):
    with pytest.raises(InvalidArgument, match=words):
        map_entropy(bad)


@pytest.mark.parametrize("T", [2, 7, 50])
@pytest.mark.parametrize("causal", [True, False])
def test_head_entropy_of_uniform_attention_is_one(T, causal):
    assert (calculate_head_entropy(uniform_map(T, causal=causal)) - 1).abs().max() < 1e-6


def test_head_entropy_in_nats_is_the_mean_over_rows_that_have_a_choice():
    expected = sum(math.log(n) for n in range(2, 7)) / 5  # rows 2 … 6 of six; the first sees one key
    torch.testing.assert_close(calculate_head_entropy(uniform_map(6), normalize=False), torch.full((2,), expected))


@pytest.mark.parametrize("mask", [torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6]), torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_head_entropy_with_padding_equals_the_unpadded_sequences(mask, causal, normalize):
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 6, 6, generator=rng)
    real = mask.bool()
    seen = real[:, None, None] & (torch.ones(6, 6).tril().bool() if causal else torch.ones(6, 6).bool())
    maps = logits.masked_fill(~seen, -math.inf).softmax(-1)
    maps = torch.where(real[:, None, :, None], maps, math.nan)  # padded queries may hold anything
    got = calculate_head_entropy(maps, mask, normalize)
    rows = []  # every row of the unpadded sequences that has a choice
    for sequence, kept in zip(maps, real):
        sequence = sequence[:, kept][:, :, kept]
        entropy = -torch.special.xlogy(sequence, sequence).sum(-1)
        for row in range(1 if causal else 0, int(kept.sum())):
            choices = row + 1 if causal else int(kept.sum())
            rows.append(entropy[:, row] / (math.log(choices) if normalize else 1))
    torch.testing.assert_close(got, torch.stack(rows).mean(0))


def test_head_entropy_of_layers():
    wide, narrow = uniform_map(5, H=4), uniform_map(5, H=2, causal=False)
    for layers in ([wide, narrow], (wide, narrow)):
        both = calculate_head_entropy(layers)
        assert both.shape == (2, 4) and both[1, 2:].isnan().all() and (both[0] - 1).abs().max() < 1e-6 and (both[1, :2] - 1).abs().max() < 1e-6
    assert calculate_head_entropy([wide]).shape == (1, 4)
    assert calculate_head_entropy(wide.bfloat16()).sub(1).abs().max() < 5e-3  # bf16 keeps three digits of a probability


@pytest.mark.parametrize("maps, mask, kind, words", [
    ((), None, InvalidArgument, "eager"),
    ([None], None, InvalidArgument, "eager"),
    ("maps", None, WrongType, "str"),
    (["map"], None, WrongType, "str"),
    (torch.ones(1, 1, 2, 3) / 3, None, InvalidArgument, "B,H,T,T"),
    (uniform_map(1), None, InvalidArgument, "two keys or more"),
    (uniform_map(4), torch.tensor([[1, 0, 0, 0]]), InvalidArgument, "two keys or more"),
    (uniform_map(4), torch.tensor([[0, 1, 1, 1]]), InvalidArgument, "calls padding"),
    (uniform_map(4), torch.ones(1, 5), InvalidArgument, "shape"),
    (uniform_map(4), [1, 1, 1, 1], WrongType, "tensor"),
    (uniform_map(4) / 2, None, InvalidArgument, "sums to 0.5"),
])
def test_head_entropy_refuses(maps, mask, kind, words):
    with pytest.raises(kind, match=words):
        calculate_head_entropy(maps, mask)
