"""`text_dataloader`: every token once, padding that counts nowhere, an order that depends on the seed alone, and clear errors."""
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from neural_plasticity.data import load_embedded_model, pack_blocks, text_dataloader, token_stream
from neural_plasticity.errors import InvalidArgument, PlasticityError, WrongType

TEXTS = ["Peace.", "War and famine!", "", " \n", "The state of the Union is strong."]


@pytest.fixture(scope="module")
def pair():
    return load_embedded_model("gpt2")


def unpacked(blocks):
    "The tokens that blocks hold, without padding."
    return [token for block in blocks for token in block["input_ids"][block["attention_mask"] == 1].tolist()]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=2, max_size=60), st.integers(2, 9))
def test_nothing_is_lost_but_a_rest_of_one(tokens, block_size):
    blocks = pack_blocks(torch.tensor(tokens), block_size, padding=7)
    whole = tokens[:-1] if len(tokens) % block_size == 1 else tokens
    assert unpacked(blocks) == whole
    assert len(blocks) == -(-len(whole) // block_size)
    for block in blocks:
        real = block["attention_mask"] == 1
        assert all(column.shape == (block_size,) for column in block.values())
        assert (block["labels"][real] == block["input_ids"][real]).all() and (block["labels"][~real] == -100).all()
        assert (block["input_ids"][~real] == 7).all() and real.sum() >= 2
        assert real.tolist() == sorted(real.tolist(), reverse=True)  # padding stands on the right


def test_texts_are_joined_by_the_end_of_text_token(pair):
    _, tokenizer = pair
    stream = token_stream(TEXTS, tokenizer)
    assert tokenizer.decode(stream) == "Peace.<|endoftext|>War and famine!<|endoftext|>The state of the Union is strong.<|endoftext|>"
    blocks = [block for batch in text_dataloader(TEXTS, tokenizer, block_size=5, batch_size=2) for block in zip(*batch.values())]
    found = [token for ids, mask, _ in blocks for token in ids[mask == 1].tolist()]
    assert found == stream.tolist()[: len(found)] and len(stream) - len(found) <= 1


def test_padding_changes_no_loss(pair):
    model, tokenizer = pair
    stream = token_stream(TEXTS, tokenizer)
    padded = next(iter(text_dataloader(TEXTS, tokenizer, block_size=len(stream) + 9, batch_size=1)))
    assert padded["attention_mask"].sum() == len(stream)
    with torch.no_grad():
        plain = model(input_ids=stream[None], labels=stream[None]).loss
        assert torch.allclose(model(**padded).loss, plain, atol=1e-5)


def first_tokens(loader):
    return [row[:2].tolist() for batch in loader for row in batch["input_ids"]]


def test_shuffling_is_reproducible_and_private(pair):
    _, tokenizer = pair
    texts = [f"Address number {number} of the President." for number in range(40)]
    states = torch.random.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    passes = [[first_tokens(loader) for _ in range(3)] for loader in (text_dataloader(texts, tokenizer, 8, 4, shuffle=True, seed=seed) for seed in (3, 3, 4))]
    assert passes[0] == passes[1] != passes[2]
    assert passes[0][0] != passes[0][1] and sorted(passes[0][0]) == sorted(passes[0][1]) == sorted(passes[0][2])
    in_order = text_dataloader(texts, tokenizer, 8, 4)
    assert first_tokens(in_order) == first_tokens(in_order) and sorted(first_tokens(in_order)) == sorted(passes[0][0])
    assert torch.random.get_rng_state().equal(states[0])
    assert np.random.get_state()[1].tolist() == states[1] and random.getstate() == states[2]


def test_sizes_of_batches(pair):
    _, tokenizer = pair
    loader = text_dataloader(["word " * 100], tokenizer, block_size=16, batch_size=3)
    sizes = [tuple(batch["labels"].shape) for batch in loader]
    count = -(-len(token_stream(["word " * 100], tokenizer)) // 16)
    assert sizes == [(3, 16)] * (count // 3) + ([(count % 3, 16)] if count % 3 else [])
    assert isinstance(loader, DataLoader) and loader.pin_memory == torch.cuda.is_available()


@pytest.mark.parametrize(
    "texts, options, kind, words",
    [
        ([], {}, InvalidArgument, "none at all"),
        (["", "  "], {}, InvalidArgument, "2 texts were given, all blank"),
        ("a text", {}, WrongType, r"text_dataloader\(\[text\], tokenizer\)"),
        (["a", None], {}, WrongType, r"texts\[1\] is a NoneType"),
        ([b"a"], {}, WrongType, r"texts\[0\] is a bytes"),
        (["a"], {"block_size": 1}, InvalidArgument, "block_size is 1; it must be at least 2"),
        (["a"], {"block_size": 513}, InvalidArgument, "at most 512 tokens"),
        (["a"], {"block_size": 8.0}, WrongType, "whole number"),
        (["a"], {"block_size": True}, WrongType, "whole number"),
        (["a"], {"batch_size": 0}, InvalidArgument, "at least 1"),
        (["a"], {"batch_size": "8"}, WrongType, "batch_size is '8'"),
        (["a"], {"seed": -1}, InvalidArgument, "seed is -1"),
    ],
)
def test_errors(pair, texts, options, kind, words):
    with pytest.raises(kind, match=words) as caught:
        text_dataloader(texts, pair[1], **options)
    assert isinstance(caught.value, PlasticityError)


def test_a_tokenizer_without_end_of_text():
    _, tokenizer = load_embedded_model("gpt2")
    tokenizer.eos_token = None
    with pytest.raises(InvalidArgument, match="tokenizer.eos_token ="):
        text_dataloader(["a"], tokenizer)
