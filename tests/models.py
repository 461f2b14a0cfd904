"""Small models of four families, inputs for them, and a way to say that a model was left as it was."""
import copy
import itertools
from functools import cache

import torch
from transformers import (AutoModelForCausalLM, BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, ViTConfig,
                          ViTForImageClassification)

from neural_plasticity.anatomy import exclusive_slices
from neural_plasticity.data import embedded_folder
from neural_plasticity.probing import anatomy_of

VOCABULARY, LAYERS, HEADS = 53, 3, 4
_PLAIN = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=HEADS, initializer_range=0.2)
_BUILDERS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=LAYERS, n_head=HEADS, initializer_range=0.2,
                                               bos_token_id=None, eos_token_id=None, pad_token_id=0)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=HEADS, bos_token_id=None, eos_token_id=None, pad_token_id=0, **_PLAIN)),
    "llama-grouped": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, bos_token_id=None, eos_token_id=None, pad_token_id=0, **_PLAIN)),
    "bert": lambda: BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=64, pad_token_id=0, **_PLAIN)),
    "vit": lambda: ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=5, **_PLAIN)),
}
RANDOM = tuple(_BUILDERS)
TRAINED = ("gpt2-trained", "llama-trained")
CAUSAL = ("gpt2", "llama", "llama-grouped", *TRAINED)


@cache
def _prototype(name):
    if name in TRAINED:
        return AutoModelForCausalLM.from_pretrained(embedded_folder() / name.removesuffix("-trained")).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _BUILDERS[name]().eval()
        for parameter in model.parameters():  # biases and norms start at 0 and 1, where mistakes could hide
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def build(name):
    "A fresh copy of a small model in evaluation mode, the same weights every time."
    return copy.deepcopy(_prototype(name))


def cuttable(name):
    "Heads that can be removed together: uneven from layer to layer, even within groups of heads that share a key/value head."
    return {"llama-grouped": [(0, 0), (0, 1), (1, 0), (1, 3)],
            "llama-trained": [(0, 0), (0, 1), (0, 2), (0, 3), (2, 1), (2, 6), (5, 0), (5, 3), (5, 4), (5, 5)],
            "gpt2-trained": [(0, 1), (0, 2), (0, 7), (2, 3), (5, 0), (5, 4), (5, 6)]}.get(name, [(0, 1), (0, 2), (0, 3), (2, 0)])


def inputs(model, batch=2, length=9, seed=1):
    "Something the model can read, without labels."
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator).to(model.dtype)}
    return {"input_ids": torch.randint(1, model.config.vocab_size, (batch, length), generator=generator)}


def padded(model, lengths=(9, 4, 6), side="right", seed=1):
    "Token ids of unequal lengths with their attention mask and labels, -100 where there is padding."
    longest = max(lengths)
    batch = inputs(model, len(lengths), longest, seed)
    position = torch.arange(longest)
    real = torch.stack([position < n if side == "right" else position >= longest - n for n in lengths])
    ids = batch["input_ids"].masked_fill(~real, 0)
    return {"input_ids": ids, "attention_mask": real.long(), "labels": ids.masked_fill(~real, -100)}


def batches(model, count=2, batch=2, length=9):
    "Batches with labels."
    made = [inputs(model, batch, length, seed) for seed in range(count)]
    if model.main_input_name == "pixel_values":
        return [{**one, "labels": torch.arange(batch) % 5} for one in made]
    return [{**one, "labels": one["input_ids"].clone()} for one in made]


@torch.no_grad()
def logits(model, batch=None):
    return model(**(inputs(model) if batch is None else batch)).logits


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same_weights(model, expected):
    found = model.state_dict()
    return found.keys() == expected.keys() and all(value.dtype == expected[name].dtype and value.equal(expected[name]) for name, value in found.items())


def fingerprint(model):
    "Everything about a model that a verb might leave changed, weights aside: hooks, modes, flags, attributes, buffers, config."
    modules = {}
    for name, module in model.named_modules():
        hooks = {key: list(value.values()) for key, value in vars(module).items() if "_hooks" in key and value}
        plain = {key: value for key, value in vars(module).items() if isinstance(value, (int, float, str, bool, type(None), tuple))}
        modules[name] = (type(module), hooks, plain, sorted(vars(module)), sorted(module._buffers), sorted(module._non_persistent_buffers_set))
    flags = {name: (parameter.requires_grad, parameter.grad is None) for name, parameter in model.named_parameters()}
    return modules, flags, model.config.to_dict(), model.config._attn_implementation


def slices(model, heads):
    "The weights that are these heads' alone, copied."
    parameters = dict(model.named_parameters())
    return {(name, dim): parameters[name].detach().index_select(dim, index).clone() for name, dim, index in exclusive_slices(anatomy_of(model), heads)}


def steps(model, optimizer, count, data):
    "Plain training, as somebody's own loop does it."
    for _, batch in zip(range(count), itertools.cycle(data)):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
