"""An input can be made for models of every kind, and the zoo's small models are what they say."""
import random
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PatchTSTConfig, PatchTSTModel

from neural_plasticity.errors import InvalidArgument, UnsupportedModel
from neural_plasticity.examples import example_inputs
from neural_plasticity.zoo_models import SIZES, TASKS, UNBUILDABLE, entries, small_config, small_model

ZOO = [("causal-lm", name) for name in ("gpt2", "llama", "bloom", "deepseek_v3", "gpt_oss", "gemma3_text", "mamba")]
ZOO += [("masked-lm", "bert"), ("seq2seq", "t5"), ("seq2seq", "bart"), ("image-classification", "vit"), ("image-classification", "swin"),
        ("speech", "whisper"), ("speech", "speech_to_text"), ("speech", "wav2vec2"), ("speech", "moonshine")]
everything = pytest.mark.parametrize("task, model_type", ZOO, ids=[model_type for _, model_type in ZOO])


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@everything
@torch.no_grad()
def test_the_example_runs(task, model_type):
    model = small_model(task, model_type)
    one, two = (model(**example_inputs(model, batch_size=rows)).logits for rows in (1, 2))
    assert one.isfinite().all() and one.std() > 0
    assert two.shape == (2, *one.shape[1:]) and not torch.equal(two[0], two[1])


@everything
def test_the_example_is_always_the_same_and_in_the_models_dtype(task, model_type):
    model = small_model(task, model_type)
    example = example_inputs(model)
    assert equal(example, example_inputs(model))
    assert {value.dtype for value in example.values()} <= {torch.float32, torch.int64}
    assert {value.dtype for value in example_inputs(model.bfloat16()).values()} <= {torch.bfloat16, torch.int64}
    assert {value.device.type for value in example_inputs(model.to("meta")).values()} == {"meta"}


@pytest.mark.parametrize("task, model_type", [("seq2seq", "bart"), ("speech", "wav2vec2")])
def test_global_randomness_is_left_alone(task, model_type):
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state()
    model = small_model(task, model_type)
    example_inputs(model)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state()
    assert before[:2] == after[:2] and torch.equal(before[2], after[2])


def test_sizes_asked_for_are_given():
    bart = example_inputs(small_model("seq2seq", "bart"), batch_size=3, length=5)
    assert {name: value.shape for name, value in bart.items()} == {"input_ids": (3, 5), "decoder_input_ids": (3, 7)}
    wav2vec2 = small_model("speech", "wav2vec2")
    with torch.no_grad():
        assert wav2vec2(**example_inputs(wav2vec2, length=11)).logits.shape[:2] == (1, 11)


def test_tokens_with_a_meaning_are_not_in_it():
    model = small_model("causal-lm", "gemma3")
    meaning = {value for name, value in vars(model.config).items() if name.endswith(("_token_id", "_token_index"))}
    assert meaning and not meaning & set(example_inputs(model, length=500)["input_ids"].flatten().tolist())


def test_a_tiny_vocabulary_does():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=2, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1))
    assert set(example_inputs(model, length=100)["input_ids"].flatten().tolist()) == {0, 1}


def test_wrapped_models_are_looked_into():
    model = small_model("seq2seq", "t5")
    assert equal(example_inputs(torch.compile(model)), example_inputs(model))
    assert equal(example_inputs(nn.parallel.DataParallel(model)), example_inputs(model))
    with pytest.raises(UnsupportedModel, match="its forward takes input"):
        example_inputs(nn.Sequential(model))


@pytest.mark.parametrize("model", [nn.Linear(3, 3), PatchTSTModel(PatchTSTConfig(d_model=8, num_attention_heads=2, num_hidden_layers=1, ffn_dim=8))], ids=["no transformers model", "time series"])
def test_what_cannot_be_guessed_is_said(model):
    with pytest.raises(UnsupportedModel, match=r"example=\{"):
        example_inputs(model)


@everything
def test_small_models_hide_nothing(task, model_type):
    model = small_model(task, model_type)
    assert not model.training and {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert sum(parameter.numel() for parameter in model.parameters()) < 300_000
    fresh = [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.numel() > 1 and parameter.std() == 0]
    assert not fresh, "weights as they are initialised, all equal"
    assert equal(model.state_dict(), small_model(task, model_type).state_dict())
    assert not equal(model.state_dict(), small_model(task, model_type, seed=1).state_dict())


@pytest.mark.parametrize("model_type, heads, groups", [("gpt2", 6, None), ("llama", 6, 2), ("gemma3_text", 6, 2), ("gpt_oss", 6, 2), ("deepseek_v3", 6, 6)])
def test_small_models_have_heads_and_groups(model_type, heads, groups):
    config = small_config("causal-lm", model_type)
    assert (config.num_attention_heads, getattr(config, "num_key_value_heads", None), config.num_hidden_layers) == (heads, groups, 3)


@pytest.mark.parametrize("model_type, kinds", [("gemma3_text", {"sliding_attention", "full_attention"}), ("qwen3_next", {"linear_attention", "full_attention"})])
def test_each_kind_of_layer_stays(model_type, kinds):
    layers = small_config("causal-lm", model_type).layer_types
    assert set(layers) == kinds and sum(kind != "linear_attention" for kind in layers) >= 2


def test_a_window_cuts_something_off_the_example():
    model = small_model("causal-lm", "gemma3_text")
    assert model.config.sliding_window < example_inputs(model)["input_ids"].shape[1]


@pytest.mark.skipif(find_spec("timm") is not None, reason="timm is there, so nothing is missing")
def test_a_missing_package_is_named():
    with pytest.raises(UnsupportedModel, match="needs the package timm"):
        small_model("image-classification", "timm_wrapper")


def test_what_cannot_be_built_says_why():
    with pytest.raises(UnsupportedModel, match="CUDA kernel"):
        small_model("masked-lm", "mra")
    for attempt in (lambda: small_model("causal-lm", "nobody"), lambda: small_config("causal-lm", "vit"), lambda: entries("chess")):
        with pytest.raises(InvalidArgument):
            attempt()


def test_the_table_of_sizes_names_types_that_exist():
    known = {model_type for task in TASKS for model_type in entries(task)}
    strangers = set(SIZES) | set(UNBUILDABLE)
    assert len(strangers & known) > 0.5 * len(strangers)  # an older transformers knows fewer
