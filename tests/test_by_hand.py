"""A description by hand says what the probe would find, carries gates and removal where the probe sees nothing, and is refused where it is wrong."""
import copy
from dataclasses import replace

import pytest
import torch
from models import HEADS, LAYERS, RANDOM, build, cuttable, inputs, logits
from torch import nn
from transformers import FalconConfig, FalconForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, Phi3Config, Phi3ForCausalLM
from transformers.pytorch_utils import Conv1D

from neural_plasticity.anatomy import exclusive_slices
from neural_plasticity.by_hand import AnatomyByHand, anatomy_by_hand, describe_site, smaller
from neural_plasticity.errors import InvalidArgument, NotRemovable, UnsupportedModel, WrongType
from neural_plasticity.gates import gate_heads
from neural_plasticity.probing import anatomy_of, probe
from neural_plasticity.surgery import remove_heads

IDS = dict(bos_token_id=None, eos_token_id=None, pad_token_id=0)
SMALL = dict(vocab_size=53, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, **IDS)
SEPARATE = dict(query="q_proj", key="k_proj", value="v_proj", output="o_proj")
DESCRIBED = {  # model → module of layer i, and the rest of the description
    "gpt2": ("transformer.h.{}.attn", dict(output="c_proj", fused="c_attn")),
    "llama": ("model.layers.{}.self_attn", SEPARATE),
    "llama-grouped": ("model.layers.{}.self_attn", SEPARATE | dict(key_value_heads=2)),
    "bert": ("bert.encoder.layer.{}.attention.self", dict(query="query", key="key", value="value", output="bert.encoder.layer.{}.attention.output.dense")),
    "neox": ("gpt_neox.layers.{}.attention", dict(output="dense", fused="query_key_value", layout="(q k v)")),
    "falcon": ("transformer.h.{}.self_attention", dict(output="dense", fused="query_key_value", layout="(q k v)", key_value_heads=2)),
    "falcon-one": ("transformer.h.{}.self_attention", dict(output="dense", fused="query_key_value", key_value_heads=1)),
    "phi3": ("model.layers.{}.self_attn", dict(output="o_proj", fused="qkv_proj", key_value_heads=2)),
}
OTHERS = {
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL)),
    "falcon": lambda: FalconForCausalLM(FalconConfig(**SMALL, num_kv_heads=2, new_decoder_architecture=True)),
    "falcon-one": lambda: FalconForCausalLM(FalconConfig(**SMALL, multi_query=True, new_decoder_architecture=False)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SMALL, num_key_value_heads=2)),
}


def facts(anatomy):
    "What an anatomy says about heads and weights, in a form that can be compared."
    return [(site.index, site.name, site.projection, site.num_heads, site.num_key_value_heads, site.head_dim, site.columns.tolist(), set(site.groups), set(site.units), site.gate,
             {(part.parameter, part.dim, str(part.used.tolist()), part.only_values) for part in site.slices}) for site in anatomy.sites]


def described(name, model):
    module, rest = DESCRIBED[name]
    layers = LAYERS if name in RANDOM else 2
    return [describe_site(model, module.format(i), HEADS, **{key: value.format(i) if isinstance(value, str) else value for key, value in rest.items()}) for i in range(layers)]


@pytest.mark.parametrize("name", DESCRIBED)
def test_a_description_equals_what_the_probe_finds(name):
    torch.manual_seed(0)
    model = build(name) if name in RANDOM else OTHERS[name]().eval()
    by_hand, found = anatomy_by_hand(model, described(name, model), example=inputs(model)), probe(model)
    assert facts(by_hand) == facts(found)
    assert anatomy_of(model) is by_hand


@pytest.mark.parametrize("name, heads", [*((name, cuttable(name)) for name in ("gpt2", "llama", "llama-grouped", "bert")),
                                         ("llama-grouped", [(0, 0), (2, 0), (2, 1)]), ("gpt2", [(1, head) for head in range(HEADS)])])
def test_what_is_left_after_a_cut_is_what_the_probe_finds(name, heads):
    model = build(name)
    before = anatomy_by_hand(model, described(name, model))
    remove_heads(model, heads)
    after = smaller(model, before, heads)
    assert isinstance(after, AnatomyByHand)
    for mine, found in zip(facts(after), facts(probe(model))):
        assert mine[:5] == found[:5] and mine[6:] == found[6:]


class Attention(nn.Module):
    "Attention that nobody sees: exp and a division, or no map at all. `reads`: which key/value head each head reads."

    def __init__(self, layout, reads, kind, linear=nn.Linear, width=24, size=6):
        super().__init__()
        self.layout, self.kind, self.num_heads, self.num_groups, self.size = layout, kind, len(reads), max(reads) + 1, size
        heads, groups = self.num_heads * size, self.num_groups * size
        make = (lambda inside, out: Conv1D(out, inside)) if linear is Conv1D else linear
        if layout == "apart":
            self.q, self.k, self.v = make(width, heads), make(width, groups), make(width, groups)
        else:
            self.qkv = make(width, heads + 2 * groups)
        self.out, self.temperature = make(heads, width), nn.Parameter(torch.rand(1, self.num_heads, 1, 1) + 0.5)
        self.tiled = reads != sorted(reads)

    def parts(self, x):
        batch, length, heads, groups, size = *x.shape[:2], self.num_heads, self.num_groups, self.size
        if self.layout == "apart":
            q, k, v = self.q(x), self.k(x), self.v(x)
        elif self.layout == "q k v":
            q, k, v = self.qkv(x).split([heads * size, groups * size, groups * size], dim=-1)
        elif self.layout == "q (k v)":
            q, rest = self.qkv(x).split([heads * size, 2 * groups * size], dim=-1)
            k, v = rest.view(batch, length, groups, 2, size).unbind(3)
        else:
            q, k, v = self.qkv(x).view(batch, length, groups, heads // groups + 2, size).split([heads // groups, 1, 1], dim=3)
        q, k, v = q.reshape(batch, length, heads, size), k.reshape(batch, length, groups, size), v.reshape(batch, length, groups, size)
        spread = (lambda x: x.repeat(1, 1, heads // groups, 1)) if self.tiled else (lambda x: x.repeat_interleave(heads // groups, dim=2))
        return q.transpose(1, 2), spread(k).transpose(1, 2), spread(v).transpose(1, 2)

    def forward(self, x):
        q, k, v = self.parts(x)  # [B,H,T,D]
        if self.kind == "linear":
            q, k = nn.functional.elu(q * self.temperature) + 1, nn.functional.elu(k) + 1
            mixed = q @ (k.mT @ v) / (q @ k.sum(2, keepdim=True).mT)
        else:
            scores = torch.exp(q @ k.mT * self.temperature / self.size**0.5).tril()
            mixed = scores @ v / scores.sum(-1, keepdim=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, layout="apart", reads=(0, 1, 2, 3), kind="exp", linear=nn.Linear, layers=2):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed, self.norm, self.head = nn.Embedding(11, 24), nn.LayerNorm(24), nn.Linear(24, 11)
            self.layers = nn.ModuleList(Attention(layout, list(reads), kind, linear) for _ in range(layers))
            for parameter in self.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
        self.eval()

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(self.norm(x))
        return self.head(x)


EXAMPLE = {"tokens": torch.arange(14).view(2, 7) % 11}


def sites_of(model, reads, **changes):
    layout = model.layers[0].layout
    layers = dict(query="q", key="k", value="v") if layout == "apart" else dict(fused="qkv", layout=layout)
    own = sorted(set(reads)) == list(range(len(reads))) and len(set(reads)) == len(reads)
    rest = dict(output="out", others={"temperature": 1}, key_value_heads=None if own else list(reads)) | layers | changes
    return [describe_site(model, f"layers.{i}", len(reads), **rest) for i in range(len(model.layers))]


@pytest.mark.parametrize("layout, reads, linear", [
    ("apart", (0, 1, 2, 3), nn.Linear), ("apart", (0, 1, 2, 3), Conv1D), ("q k v", (0, 1, 2, 3), nn.Linear), ("q k v", (0, 1, 2, 3), Conv1D),
    ("(q k v)", (0, 1, 2, 3), nn.Linear), ("apart", (0, 0, 1, 1), nn.Linear), ("q k v", (0, 0, 1, 1), nn.Linear), ("(q k v)", (0, 0, 1, 1), Conv1D),
    ("q (k v)", (0, 0, 1, 1), nn.Linear), ("apart", (0, 1, 0, 1), nn.Linear), ("q k v", (0, 0, 0, 0), nn.Linear)])
@pytest.mark.parametrize("kind", ("exp", "linear"))
def test_gated_equals_removed_where_no_attention_can_be_seen(kind, layout, reads, linear):
    model = Model(layout, reads, kind, linear)
    anatomy = anatomy_by_hand(model, sites_of(model, reads), EXAMPLE)
    whole = [head for head, group in enumerate(reads) if group == max(reads)]  # a whole group, or a head of each where all read one
    first = [(0, head) for head in (whole if max(reads) else [1])]
    dense, before = model(**EXAMPLE), sum(parameter.numel() for parameter in model.parameters())
    own = sum(model.get_parameter(name).numel() // model.get_parameter(name).shape[dim] * len(indices) for name, dim, indices in exclusive_slices(anatomy, first))
    with gate_heads(model, first):
        expected = model(**EXAMPLE)
    assert (expected - dense).abs().max() > 1e-3  # the heads do say something
    remove_heads(model, first, example=EXAMPLE)
    torch.testing.assert_close(model(**EXAMPLE), expected, atol=1e-5, rtol=0)
    assert sum(parameter.numel() for parameter in model.parameters()) == before - own
    anatomy = anatomy_of(model)
    assert [site.num_heads for site in anatomy.sites] == [len(reads) - len(first), len(reads)]
    second = [(0, 0)] if anatomy.sites[0].num_key_value_heads > 1 else [(1, head) for head in (whole if max(reads) else [0])]  # and a second time
    with gate_heads(model, second):
        expected = model(**EXAMPLE)
    remove_heads(model, second, example=EXAMPLE)
    torch.testing.assert_close(model(**EXAMPLE), expected, atol=1e-5, rtol=0)


def test_a_model_that_the_probe_cannot_see_works_by_hand():
    "All heads read one key/value head, so that not even their weights tell them apart."
    model = Model("apart", (0, 0, 0, 0))
    with pytest.raises(UnsupportedModel):
        probe(model, EXAMPLE)
    with pytest.raises(UnsupportedModel):
        gate_heads(model, [(0, 1)]).__enter__()
    anatomy_by_hand(model, sites_of(model, (0, 0, 0, 0)), EXAMPLE)
    dense = model(**EXAMPLE)
    with gate_heads(model, [(0, 1)]):
        assert not model(**EXAMPLE).allclose(dense, atol=1e-3)
    assert model(**EXAMPLE).equal(dense)


@pytest.mark.parametrize("layout", ("apart", "q k v", "(q k v)"))
def test_masks_that_do_not_suit_the_code(layout):
    "One head of a pair: what the code computes stays as wide, but the weights are fewer, and the library goes on knowing them."
    model = Model(layout, (0, 0, 1, 1))
    anatomy_by_hand(model, sites_of(model, (0, 0, 1, 1)), EXAMPLE)
    for heads, groups in (([(0, 0)], ((0,), (1, 2))), ([(0, 1)], ((0,), (1,))), ([(0, 1)], ((0,),))):
        before = sum(parameter.numel() for parameter in model.parameters())
        with gate_heads(model, heads):
            expected = model(**EXAMPLE)
        remove_heads(model, heads, example=EXAMPLE)
        torch.testing.assert_close(model(**EXAMPLE), expected, atol=1e-5, rtol=0)
        assert anatomy_of(model).sites[0].groups == groups and sum(parameter.numel() for parameter in model.parameters()) < before


def test_a_removed_head_leaves_exactly_the_weights_of_a_narrower_model():
    model = Model("apart", (0, 0, 1, 1))
    anatomy_by_hand(model, sites_of(model, (0, 0, 1, 1)), EXAMPLE)
    remove_heads(model, [(layer, head) for layer in (0, 1) for head in (0, 1)], example=EXAMPLE)
    narrow = Model("apart", (0, 0))
    assert {name: value.shape for name, value in model.state_dict().items()} == {name: value.shape for name, value in narrow.state_dict().items()}
    narrow.load_state_dict(model.state_dict())
    torch.testing.assert_close(narrow(**EXAMPLE), model(**EXAMPLE), atol=1e-6, rtol=0)


@pytest.mark.parametrize("layout, said", [("(q k v)", dict(layout="q k v")), ("apart", dict(query=None, key=None, value=None, others=None)), ("apart", dict(others=None))])
def test_a_description_that_is_wrong_or_says_little_never_gives_a_wrong_model(layout, said):
    "Not put to the test, it meets the proof of the cut: less is cut, or nothing."
    model = Model(layout)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    anatomy_by_hand(model, sites_of(model, (0, 1, 2, 3), **said))
    with gate_heads(model, [(0, 0)]):
        expected = model(**EXAMPLE)  # the output projection is enough for a gate
    try:
        remove_heads(model, [(0, 0)], example=EXAMPLE)
    except NotRemovable:
        assert all(value.equal(weights[name]) for name, value in model.state_dict().items())
    else:
        torch.testing.assert_close(model(**EXAMPLE), expected, atol=1e-5, rtol=0)
        assert model.layers[0].out.in_features == 18


@pytest.mark.parametrize("layout, reads, wrong, words", [
    ("q k v", (0, 1, 2, 3), dict(layout="(q k v)"), "while those are silent"),
    ("(q k v)", (0, 0, 1, 1), dict(layout="q k v"), "while those are silent"),
    ("apart", (0, 1, 0, 1), dict(key_value_heads=[0, 0, 1, 1]), "while those are silent"),
])
def test_a_description_that_is_wrong_does_not_stand_the_test(layout, reads, wrong, words):
    model = Model(layout, reads)
    with pytest.raises(InvalidArgument, match=words):
        anatomy_by_hand(model, sites_of(model, reads, **wrong), EXAMPLE)
    anatomy_by_hand(model, sites_of(model, reads), EXAMPLE)


def test_layers_of_another_site_do_not_stand_the_test():
    model = Model()
    first, second = sites_of(model, (0, 1, 2, 3))
    swapped = [replace(first, slices=first.slices[:1] + second.slices[1:]), replace(second, slices=second.slices[:1] + first.slices[1:])]
    with pytest.raises(InvalidArgument, match="belonging to the heads of layers.0, but .*does the layer belong to another site"):
        anatomy_by_hand(model, swapped, EXAMPLE)


def test_the_test_leaves_no_trace():
    model = Model().train()
    model.layers[0].q.weight.requires_grad_(False)
    model.register_buffer("unused", torch.ones(3))
    state, seed = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    anatomy_by_hand(model, sites_of(model, (0, 1, 2, 3)), EXAMPLE)
    assert all(value.equal(state[name]) for name, value in model.state_dict().items()) and torch.get_rng_state().equal(seed)
    assert model.training and not model.layers[0].q.weight.requires_grad and all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_parameter_that_nothing_depends_on_is_no_layer_of_the_heads():
    model = Model()
    model.spare = nn.Linear(24, 24)
    with pytest.raises(InvalidArgument, match="spare.weight has no influence"):
        anatomy_by_hand(model, sites_of(model, (0, 1, 2, 3), query="spare"), EXAMPLE)


GOOD = dict(module="layers.0", num_heads=4, output="out", query="q", key="k", value="v")


@pytest.mark.parametrize("change, error, words", [
    (dict(module="layers.7"), InvalidArgument, "no module of that name.*layers"), (dict(output="proj"), InvalidArgument, "no linear layer.*layers.0.out"),
    (dict(output=3), WrongType, "must be the name"), (dict(output="embed"), InvalidArgument, "no linear layer"), (dict(query="query"), InvalidArgument, "nearest are .*layers.0.q"),
    (dict(num_heads=5), InvalidArgument, "24 inputs, which do not divide among 5"), (dict(num_heads=0), InvalidArgument, "at least 1"), (dict(num_heads=4.0), WrongType, "whole number"),
    (dict(num_heads=True), WrongType, "whole number"), (dict(head_dim=7), InvalidArgument, "need 28 inputs"), (dict(head_dim=-1), InvalidArgument, "at least 1"),
    (dict(key_value_heads=3), InvalidArgument, "does not divide"), (dict(key_value_heads=2), InvalidArgument, "value|layers.0.[kv] has 24"), (dict(key_value_heads=0), InvalidArgument, "at least 1"),
    (dict(key_value_heads=[0, 0, 1]), InvalidArgument, "4 entries"), (dict(key_value_heads=[0, 0, 2, 2]), InvalidArgument, "from 0 on"), (dict(key_value_heads="two"), WrongType, "a number, or"),
    (dict(value="head"), InvalidArgument, "11 output features"), (dict(fused="q"), InvalidArgument, "leave 'q' out"), (dict(fused="q", query=None, key=None, value=None), InvalidArgument, "cannot be 4 queries"),
    (dict(fused="q", layout="head by head"), InvalidArgument, "cannot be read"), (dict(fused="q", layout=None), WrongType, "it is a string"), (dict(fused="q", layout="(q k"), InvalidArgument, "cannot be read"),
    (dict(others={"temperature": 0}), InvalidArgument, "is 1; it must count the heads, 4"), (dict(others={"temperature": 4}), InvalidArgument, "-4 to 3"),
    (dict(others={"heat": 0}), InvalidArgument, "no parameter"), (dict(others=["temperature"]), WrongType, "it is a dict"), (dict(others={"slopes": 0}), InvalidArgument, "buffer.*nn.Parameter"),
])
def test_bad_descriptions_are_refused_with_words(change, error, words):
    model = Model()
    model.layers[0].register_buffer("slopes", torch.ones(4))
    describe_site(model, **GOOD)
    with pytest.raises(error, match=words):
        describe_site(model, **GOOD | change)


def test_query_and_key_must_meet():
    model = Model("apart", (0, 0, 1, 1))
    model.layers[0].v = nn.Linear(24, 24)
    with pytest.raises(InvalidArgument, match="equally large"):
        describe_site(Model(), **GOOD | dict(key="q", value=None, key_value_heads=2))
    with pytest.raises(InvalidArgument, match="equally large.*check num_heads and key_value_heads"):
        describe_site(model, **GOOD)


def test_bad_anatomies_are_refused_with_words():
    model, site = Model(), describe_site(Model(), **GOOD)
    for sites in ([], site, "layers.0", [GOOD]):
        with pytest.raises(WrongType, match="describe_site"):
            anatomy_by_hand(model, sites)
    with pytest.raises(WrongType, match="example is a Tensor"):
        anatomy_by_hand(model, [site], EXAMPLE["tokens"])
    with pytest.raises(InvalidArgument, match="described once"):
        anatomy_by_hand(model, [site, site])
    with pytest.raises(InvalidArgument, match="another model: here layers.0.out has 24 inputs, not 12"):
        anatomy_by_hand(model, [replace(site, columns=site.columns[:, :12])])
    with pytest.raises(InvalidArgument, match="layers.0.out does not exist"):
        anatomy_by_hand(nn.Linear(2, 2), [site])


def test_a_cut_that_never_happened_is_noticed():
    model = Model()
    anatomy = anatomy_by_hand(model, sites_of(model, (0, 1, 2, 3)))
    with pytest.raises(InvalidArgument, match="was the model cut with this mask"):
        smaller(model, anatomy, [(0, 1)])
    remove_heads(model, [(0, 1)], example=EXAMPLE)
    with pytest.raises(InvalidArgument, match="was the model cut with this mask"):
        smaller(model, anatomy, [(0, 1), (0, 2)])
    assert facts(smaller(model, anatomy, [(0, 1)])) == facts(anatomy_by_hand(model, [
        describe_site(model, f"layers.{i}", 4 - (i == 0), output="out", query="q", key="k", value="v", others={"temperature": 1}) for i in (0, 1)], EXAMPLE))


def test_heads_that_feed_only_the_first_columns():
    "As where a feed-forward layer shares the output projection."
    class Side(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.qkv, self.up, self.out = nn.Linear(8, 24), nn.Linear(8, 5), nn.Linear(13, 8)
            self.num_heads = 2

        def forward(self, x):
            q, k, v = (part.unflatten(-1, (self.num_heads, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
            scores = torch.exp(q @ k.mT)
            heads = (scores @ v / scores.sum(-1, keepdim=True)).transpose(1, 2).flatten(2)
            return self.out(torch.cat([heads, self.up(x)], dim=-1))

    model, x = Side().eval(), torch.randn(2, 5, 8)
    with pytest.raises(InvalidArgument, match="head_dim"):
        describe_site(model, "", 2, output="out", fused="qkv")
    anatomy_by_hand(model, [describe_site(model, "", 2, output="out", fused="qkv", head_dim=4)], {"x": x})
    with gate_heads(model, [(0, 0)]):
        expected = model(x)
    remove_heads(model, [(0, 0)], example={"x": x})
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=0)
    assert model.out.in_features == 9
