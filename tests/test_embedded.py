"""The embedded models and texts are what `training.json`, the manifest and `PROVENANCE.md` say they are."""
import gzip
import hashlib
import json
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.activations import ACT2FN

import neural_plasticity.data as data
from neural_plasticity.data import EMBEDDED_MODELS, embedded_folder, embedded_manifest, load_embedded_model, load_embedded_text
from neural_plasticity.errors import InvalidArgument, StorageError

FOLDER = embedded_folder()
TRAINING = json.loads((FOLDER / "training.json").read_text(encoding="utf-8"))
MANIFEST = embedded_manifest()
NAMES = ("gpt2", "llama")


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("name", NAMES)
def test_plain_from_pretrained(name):
    model = AutoModelForCausalLM.from_pretrained(FOLDER / name)
    config = model.config
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert sum(parameter.numel() for parameter in model.parameters()) == TRAINING[name]["parameters"]
    assert (config.model_type, config.num_hidden_layers, config.num_attention_heads) == (name, 6, 8)
    assert getattr(config, "num_key_value_heads", 8) == {"gpt2": 8, "llama": 2}[name]
    assert len(AutoTokenizer.from_pretrained(FOLDER / name)) == config.vocab_size == 4096


@pytest.mark.parametrize("name", NAMES)
def test_the_loader_gives_the_same_weights(name):
    states = torch.random.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    model, tokenizer = load_embedded_model(name)
    assert torch.random.get_rng_state().equal(states[0])
    assert np.random.get_state()[1].tolist() == states[1] and random.getstate() == states[2]
    plain = AutoModelForCausalLM.from_pretrained(FOLDER / name)
    assert all(weight.equal(plain.state_dict()[key]) for key, weight in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert (tokenizer.model_max_length, tokenizer.pad_token_id, tokenizer.eos_token_id) == (512, 0, 0)


@pytest.mark.parametrize("name", NAMES)
def test_files_are_those_that_were_trained(name):
    assert sha256((FOLDER / name / "model.safetensors").read_bytes()) == TRAINING[name]["sha256"]
    assert not [path for path in FOLDER.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".py")]  # no pickle, no code
    assert sum(path.stat().st_size for path in (FOLDER / name).iterdir()) < 13e6


def test_one_tokenizer_for_both():
    first, second = ((FOLDER / name / "tokenizer.json").read_bytes() for name in NAMES)
    assert first == second


@pytest.mark.parametrize("text", ["The state of the Union", "  two  spaces\n\n\ttab", "naïve — “quotes” ∂x 日本語 😀", "\x00\x7f", ""])
def test_any_text_comes_back_from_the_tokenizer(text):
    _, tokenizer = load_embedded_model()
    assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("split", MANIFEST)
def test_manifest_and_files_agree(split):
    entry = MANIFEST[split]
    packed = (FOLDER / "text" / entry["file"]).read_bytes()
    text = gzip.decompress(packed)
    assert (sha256(packed), sha256(text), len(text)) == (entry["file_sha256"], entry["text_sha256"], entry["bytes"])
    texts = load_embedded_text(split)
    assert len(texts) == len(entry["texts"]) == len(set(entry["texts"]))
    assert all(len(text) > 300 and "\f" not in text for text in texts)


def test_the_splits_are_these_and_nothing_else_is_shipped():
    assert list(MANIFEST) == ["train", "validation", "selection", "shift_train", "shift_validation"]
    assert {path.name for path in (FOLDER / "text").iterdir()} == {"manifest.json"} | {entry["file"] for entry in MANIFEST.values()}


def test_splits_are_disjoint():
    names = [name for entry in MANIFEST.values() for name in entry["texts"]]
    assert len(names) == len(set(names))
    texts = [text for split in MANIFEST for text in load_embedded_text(split)]
    assert len(texts) == len(set(texts))


def long_lines(split):
    return {line.strip() for text in load_embedded_text(split) for line in text.splitlines() if len(line.strip()) > 200}


@pytest.mark.parametrize("seen, unseen", [("train", "validation"), ("train", "selection"), ("validation", "selection"), ("shift_train", "shift_validation")])
def test_no_paragraph_stands_in_two_splits(seen, unseen):
    assert not long_lines(seen) & long_lines(unseen)


def test_judged_splits_are_those_the_training_script_judged():
    for split in ("validation", "selection", "shift_validation"):
        assert MANIFEST[split]["text_sha256"] == TRAINING["data"]["splits"][split]["sha256"]


# Nats a token over the first 16,384 predictions of `validation`, context 128, as `total_loss` in examples/train_embedded_models.py
# counts them; float32 on a CPU, torch 2.13. The figure over all of it, which training.json holds, is checked by the slow test.
FIRST_PREDICTIONS = {"gpt2": 3.3128, "llama": 3.2249}


@torch.no_grad()
def loss_at_context(name, split, context, predictions=None):
    "Mean loss in nats by training.json's definition: every token but the first predicted once, from 1 to `context` tokens before it."
    model, tokenizer = load_embedded_model(name)
    end = [tokenizer.eos_token_id]
    pieces = tokenizer(load_embedded_text(split), add_special_tokens=False, verbose=False)["input_ids"]
    stream = torch.tensor([token for piece in pieces for token in end + piece] + end)
    stream = stream[: None if predictions is None else predictions + 1]
    starts = range(0, len(stream) - 1, context)
    total = 0.0
    for first in range(0, len(starts), 32):
        blocks = [stream[start : start + context + 1] for start in starts[first : first + 32]]
        for group in ([block for block in blocks if len(block) == context + 1], [block for block in blocks if len(block) <= context]):
            if group:
                rows = torch.stack(group)
                logits = model(rows[:, :-1], use_cache=False).logits
                total += F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
    return total / (len(stream) - 1), len(stream) - 1


@pytest.mark.parametrize("name", NAMES)
def test_first_predictions_on_validation(name):
    loss, count = loss_at_context(name, "validation", 128, predictions=16_384)
    assert count == 16_384
    assert loss == pytest.approx(FIRST_PREDICTIONS[name], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_perplexity_on_validation_is_the_published_one(name):
    published = TRAINING[name]["validation"]["context_128"]
    loss, count = loss_at_context(name, "validation", 128)
    assert count == published["tokens"]
    assert loss == pytest.approx(published["loss"], abs=1e-3)
    assert math.exp(loss) == pytest.approx(published["perplexity"], rel=1e-3)
    assert loss * count / math.log(2) / sum(len(text.encode()) for text in load_embedded_text("validation")) == pytest.approx(published["bits_per_byte"], rel=1e-3)


def test_unknown_names():
    with pytest.raises(InvalidArgument, match="'gpt2', 'llama'"):
        load_embedded_model("gpt3")
    with pytest.raises(InvalidArgument, match="'train', 'validation', 'selection', 'shift_train', 'shift_validation'"):
        load_embedded_text("test")
    with pytest.raises(InvalidArgument, match="'selection'"):
        load_embedded_text(["train"])
    assert EMBEDDED_MODELS == NAMES


@pytest.fixture
def copied(tmp_path, monkeypatch):
    "A package folder of which something can be damaged."
    (tmp_path / "text").mkdir()
    for name in ("manifest.json", "validation.txt.gz"):
        (tmp_path / "text" / name).write_bytes((FOLDER / "text" / name).read_bytes())
    monkeypatch.setattr(data, "embedded_folder", lambda: tmp_path)
    return tmp_path


def test_damaged_and_missing_files(copied):
    assert len(load_embedded_text("validation")) == 12
    path = copied / "text" / "validation.txt.gz"
    packed = bytearray(path.read_bytes())
    packed[len(packed) // 2] ^= 1
    for damaged in (bytes(packed), bytes(packed[:1000]), gzip.compress(b"another text"), b""):
        path.write_bytes(damaged)
        with pytest.raises(StorageError, match="validation.txt.gz is not the file that was shipped"):
            load_embedded_text("validation")
    path.unlink()
    with pytest.raises(StorageError, match="missing"):
        load_embedded_text("validation")
    with pytest.raises(StorageError, match="lacks config.json, model.safetensors, tokenizer.json"):
        load_embedded_model("gpt2")


def test_provenance_names_what_is_shipped():
    page = (FOLDER / "PROVENANCE.md").read_text(encoding="utf-8")
    for name in NAMES:
        assert TRAINING[name]["sha256"] in page and f"{TRAINING[name]['parameters']:,}" in page
        for split in ("validation", "selection", "shift_validation"):
            assert f"{TRAINING[name][split]['context_128']['perplexity']:.2f}" in page
            assert f"{TRAINING[name][split]['context_512']['bits_per_byte']:.3f}" in page
    for entry in MANIFEST.values():
        assert entry["text_sha256"] in page and f"{entry['bytes']:,}" in page


def test_the_fast_activation_is_the_one_it_was_trained_with():
    "`gelu_pytorch_tanh` in one kernel, `gelu_new` in eight steps: the same function up to float32's rounding, and the same model."
    config = AutoConfig.from_pretrained(FOLDER / "gpt2")
    assert config.activation_function == "gelu_pytorch_tanh"
    values = torch.linspace(-12, 12, 4801)
    torch.testing.assert_close(ACT2FN["gelu_pytorch_tanh"](values), ACT2FN["gelu_new"](values), atol=1e-6, rtol=1e-6)
    config.activation_function = "gelu_new"
    models = [AutoModelForCausalLM.from_pretrained(FOLDER / "gpt2", **options).eval() for options in ({}, {"config": config})]
    tokens = torch.randint(4096, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        fast, slow = (model(tokens).logits for model in models)
    torch.testing.assert_close(fast, slow, atol=1e-4, rtol=1e-5)
    assert not torch.equal(fast, slow)  # they are two ways to compute it
