"""The probe finds every head and who owns which weight, and leaves no trace."""
import pytest
import torch
from models import HEADS, LAYERS, RANDOM, build, fingerprint, logits, same_weights, weights

from neural_plasticity.anatomy import exclusive_slices, heads_to_mask
from neural_plasticity.errors import InvalidArgument, UnsupportedModel
from neural_plasticity.gates import gate_heads
from neural_plasticity.probing import anatomy_of, detect_model_structure, probe

KEY_VALUE_HEADS = {"llama-grouped": 2}


@pytest.mark.parametrize("name", RANDOM)
def test_finds_the_heads_that_the_config_says(name):
    model = build(name)
    anatomy = probe(model)
    assert tuple(detect_model_structure(model)) == (LAYERS, HEADS)
    assert [(site.num_heads, site.num_key_value_heads, site.head_dim) for site in anatomy.sites] == [(HEADS, KEY_VALUE_HEADS.get(name, HEADS), 8)] * LAYERS
    assert anatomy.exists.all() and anatomy.removable.all() and len(anatomy.units) == LAYERS * HEADS
    for site in anatomy.sites:  # head h feeds columns 8h to 8h+7
        assert site.columns.equal(torch.arange(32)[None] // 8 == torch.arange(HEADS)[:, None])


@pytest.mark.parametrize("name", ("gpt2-trained", "llama-trained"))
def test_finds_the_heads_of_trained_models(name):
    anatomy = probe(build(name))
    assert [(site.num_heads, site.num_key_value_heads) for site in anatomy.sites] == [(8, 2 if name == "llama-trained" else 8)] * 6


@pytest.mark.parametrize("attention", ("eager", "sdpa"))
@pytest.mark.parametrize("name", RANDOM)
def test_the_attention_implementation_does_not_matter(name, attention):
    model = build(name)
    model.set_attn_implementation(attention)
    model.requires_grad_(False)
    with torch.no_grad():
        found = probe(model)
    for site, expected in zip(found.sites, probe(build(name)).sites):
        assert (site.projection, site.groups, site.columns.tolist()) == (expected.projection, expected.groups, expected.columns.tolist())


@pytest.mark.parametrize("name", RANDOM)
def test_probing_leaves_no_trace(name):
    model = build(name).train()
    next(model.parameters()).requires_grad_(False)
    before, values, state = fingerprint(model), weights(model), torch.get_rng_state()
    probe(model)
    assert fingerprint(model) == before and same_weights(model, values) and torch.get_rng_state().equal(state)


@pytest.mark.parametrize("name", RANDOM)
def test_exclusive_slices_are_nobody_elses(name):
    "Changing all slices that are exclusively some heads' changes nothing when these heads are silent."
    model = build(name)
    heads = [(0, 0), (0, 1), (1, 3)]
    with gate_heads(model, heads):
        before = logits(model)
        for parameter, dim, index in exclusive_slices(anatomy_of(model), heads):
            part = model.get_parameter(parameter).data
            part.index_copy_(dim, index, torch.randn_like(part.index_select(dim, index)))
        assert logits(model).equal(before)
    assert not logits(model).allclose(before, atol=1e-2)


def test_key_value_rows_belong_to_a_whole_group():
    model = build("llama-grouped")
    names = {name.split(".")[-2] for name, _, _ in exclusive_slices(anatomy_of(model), [(0, 0)])}
    assert names == {"q_proj", "o_proj"}
    names = {name.split(".")[-2] for name, _, _ in exclusive_slices(anatomy_of(model), [(0, 0), (0, 1)])}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_a_model_without_attention_says_so():
    class Config:
        hidden_size = 4

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.config = torch.nn.Linear(4, 4), Config()

        def forward(self, x):
            return self.linear(x)

    with pytest.raises(UnsupportedModel, match="no attention call was seen"):
        probe(Model(), example={"x": torch.ones(1, 4)})
    with pytest.raises(UnsupportedModel, match="example="):
        probe(Model())


def test_a_model_without_loaded_weights_says_so():
    with pytest.raises(UnsupportedModel, match="meta"):
        probe(build("gpt2").to("meta"))


@pytest.mark.parametrize("heads, words", [
    ([(3, 0)], "no head"), ([(0, -1)], "no head"), ([(0, 4)], "no head"), ([(0.0, 1.0)], "pairs"), ([(0, 1, 2)], "pairs"),
    (torch.zeros(3, 5, dtype=torch.bool), "another model"), (torch.zeros(12, dtype=torch.bool), "another model"),
    (torch.zeros(3, 4), "pairs"), ([(0, 1), (2,)], "pairs"), ("all", "pairs"), ([("0", "1")], "pairs"), ({"layer": 0}, "pairs"), (7, "pairs"),
])
def test_heads_that_cannot_be_meant(heads, words):
    with pytest.raises(InvalidArgument, match=words):
        heads_to_mask(heads, anatomy_of(build("gpt2")))


def test_heads_can_be_named_in_many_ways():
    anatomy = anatomy_of(build("gpt2"))
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[0, 1] = mask[2, 3] = True
    for heads in (mask, mask.numpy(), mask.tolist(), [(0, 1), (2, 3)], {(0, 1), (2, 3)}, torch.tensor([[0, 1], [2, 3]]), ((0, 1), (2, 3))):
        assert heads_to_mask(heads, anatomy).equal(mask)
    for nothing in ([], (), set(), torch.zeros(0, 2)):
        assert not heads_to_mask(nothing, anatomy).any()
