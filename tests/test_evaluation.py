"""Evaluation: the numbers are the ones computed by hand, and the model is left as it was, whatever happens."""
import math

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import (BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast,
                          T5Config, T5ForConditionalGeneration, ViTConfig, ViTForImageClassification)

from neural_plasticity.errors import InvalidArgument, UnsupportedModel, WrongType
from neural_plasticity.evaluation import (bits_per_byte, count_parameters, evaluate_model, generate_sample, measure_latency, model_cost,
                                          sample_losses, to_device)

VOCABULARY = 257  # the bytes and one token that ends a text


def gpt2(**changes):
    return GPT2LMHeadModel(GPT2Config(**{**dict(vocab_size=VOCABULARY, n_layer=2, n_head=4, n_embd=32, n_positions=64, bos_token_id=256,
                                                eos_token_id=256, initializer_range=0.3), **changes}))


def llama(key_value_heads=2):
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8,
                                        num_key_value_heads=key_value_heads, max_position_embeddings=64, bos_token_id=256, eos_token_id=256, initializer_range=0.3))


def bert():
    return BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                      max_position_embeddings=64, initializer_range=0.3))


def vit():
    return ViTForImageClassification(ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=8,
                                               patch_size=4, num_labels=5, initializer_range=0.3))


def t5():
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
                                               eos_token_id=256, pad_token_id=0, initializer_factor=1.0))


CAUSAL = {"gpt2": gpt2, "llama": llama}
TEXT = {**CAUSAL, "bert": bert, "t5": t5}


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def tokenizer():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate([*letters, "<|end|>"])}, merges=[]))
    bytewise.pre_tokenizer, bytewise.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<|end|>")


def text_batch(lengths, width=12, side="right"):
    ids = torch.randint(1, 256, (len(lengths), width))
    position = torch.arange(width)
    mask = torch.stack([position < n if side == "right" else position >= width - n for n in lengths]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def image_batch(size):
    return {"pixel_values": torch.randn(size, 3, 8, 8), "labels": torch.randint(0, 5, (size,))}


def by_hand(model, batch, shift):
    """Per-token losses [B,T] in float64 with a plain loop, and which of them count."""
    with torch.no_grad():
        logits = model.eval()(**batch).logits.double()
    labels, losses = batch["labels"], []
    for sample in range(len(labels)):
        kept = []
        for position in range(labels.shape[1]):
            source = position - 1 if shift else position
            if labels[sample, position] != -100 and source >= 0:
                kept.append(-logits[sample, source].log_softmax(-1)[labels[sample, position]].item())
        losses.append(kept)
    return losses


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("side", ["right", "left"])
def test_loss_is_the_mean_over_tokens_of_unequal_batches(name, side):
    model = TEXT[name]()
    batches = [text_batch([12, 3], side=side), text_batch([5], side=side), text_batch([12, 12, 2, 7], side=side)]
    losses = [loss for batch in batches for sample in by_hand(model, batch, shift=name in CAUSAL) for loss in sample]
    got = evaluate_model(model, batches)
    assert got["tokens"] == len(losses)
    assert got["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert got["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    unweighted = sum(model(**batch).loss.item() for batch in batches) / 3
    assert got["loss"] != pytest.approx(unweighted, rel=2e-5)  # a mean over batches would have said something else


def test_padding_changes_nothing():
    model = gpt2()
    short, padded = text_batch([7], width=7), text_batch([7], width=12)
    padded["input_ids"][:, :7] = short["input_ids"]
    padded["labels"][:, :7] = short["labels"]
    assert evaluate_model(model, [short])["loss"] == pytest.approx(evaluate_model(model, [padded])["loss"], rel=1e-6)


def test_image_classification():
    model, batches = vit(), [image_batch(3), image_batch(1)]
    with torch.no_grad():
        expected = torch.cat([F.cross_entropy(model.eval()(batch["pixel_values"]).logits, batch["labels"], reduction="none") for batch in batches])
    got = evaluate_model(model, batches)
    assert got["tokens"] == 4 and got["loss"] == pytest.approx(expected.mean().item(), rel=1e-5)


@pytest.mark.parametrize("name", TEXT)
def test_sample_losses_by_hand_and_differentiable(name):
    model, batch = TEXT[name](), text_batch([12, 3, 6])
    batch["labels"][0, 4] = -100
    expected = by_hand(model, batch, shift=name in CAUSAL)
    for _ in range(2):  # the first call and those that know the alignment already
        losses, tokens = sample_losses(model, batch)
        assert tokens.tolist() == [len(sample) for sample in expected]
        torch.testing.assert_close(losses.detach().double(), torch.tensor([sum(s) / len(s) for s in expected], dtype=torch.float64), rtol=1e-5, atol=1e-5)
        gradient, = torch.autograd.grad(losses[1], [model.get_input_embeddings().weight])
        assert gradient.abs().sum() > 0


def test_a_batch_of_nothing_but_padding_does_not_count():
    model = gpt2()
    full, empty = text_batch([12, 5]), text_batch([12])
    empty["labels"][:] = -100
    assert evaluate_model(model, [empty, full, empty]) == evaluate_model(model, [full])
    with pytest.raises(InvalidArgument, match="nothing to evaluate"):
        evaluate_model(model, [empty])


def test_max_eval_steps():
    model, batches = gpt2(), [text_batch([12]), text_batch([6]), text_batch([9])]
    assert evaluate_model(model, batches, max_eval_steps=2) == evaluate_model(model, batches[:2])
    assert evaluate_model(model, iter(batches), max_eval_steps=7)["tokens"] == 11 + 5 + 8
    for wrong in (0, -1, 1.5):
        with pytest.raises(InvalidArgument, match="at least 1"):
            evaluate_model(model, batches, max_eval_steps=wrong)


# --- the model is left as it was ---
def modes(model):
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("training", [True, False])
def test_every_modules_mode_is_restored(training, tokenizer):
    model = gpt2().train(training)
    model.transformer.h[0].eval()  # somebody froze a block's dropout
    before, weights = modes(model), {name: value.clone() for name, value in model.state_dict().items()}
    evaluate_model(model, [text_batch([12])])
    measure_latency(model, {"input_ids": torch.zeros(1, 4, dtype=torch.long)}, repeats=2)
    model_cost(model, 16)
    generate_sample(model, tokenizer, "abc", 3)
    bits_per_byte(model, ["abcdef"], tokenizer, block_size=4)
    assert modes(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_restored_after_an_exception(tokenizer):
    model = gpt2().train()
    config, before = model.generation_config, modes(model)

    def broken():
        yield text_batch([12])
        raise KeyError("the loader broke")
    with pytest.raises(KeyError, match="the loader broke"):
        evaluate_model(model, broken())
    with pytest.raises(IndexError):  # a token that the model does not have
        evaluate_model(model, [{"input_ids": torch.full((1, 4), 999), "labels": torch.full((1, 4), 9)}])
    model.transformer.h[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("inside")))
    for call in (lambda: measure_latency(model, text_batch([4])), lambda: model_cost(model, 8), lambda: generate_sample(model, tokenizer, "a", 2)):
        with pytest.raises(RuntimeError, match="inside"):
            call()
    assert modes(model) == before and model.generation_config is config


def test_global_random_state_is_untouched():
    model, samples = gpt2(), [{name: tensor[0] for name, tensor in text_batch([12]).items()} for _ in range(4)]
    state = torch.get_rng_state()
    first = evaluate_model(model, DataLoader(samples, batch_size=2, shuffle=True))
    model_cost(model, 16)
    assert torch.equal(torch.get_rng_state(), state)
    assert evaluate_model(model, DataLoader(samples, batch_size=2, shuffle=True)) == first


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_device_is_restored_and_batches_are_moved():
    model, batch = gpt2(), text_batch([12, 4])
    here = evaluate_model(model, [batch])
    there = evaluate_model(model, [batch], device="cuda")
    assert model.device.type == "cpu" and there["loss"] == pytest.approx(here["loss"], rel=1e-4)
    assert evaluate_model(model, [to_device(batch, "cuda")])["loss"] == pytest.approx(here["loss"], rel=1e-4)
    with pytest.raises(InvalidArgument):
        evaluate_model(model, [], device="cuda")
    assert model.device.type == "cpu"


def test_to_device_moves_tensors_and_keeps_the_rest():
    batch = {"input_ids": torch.zeros(2, 3), "names": ["a", "b"], "nothing": None}
    moved = to_device(batch, "meta")
    assert moved["input_ids"].device.type == "meta" and moved["names"] == ["a", "b"] and moved["nothing"] is None
    assert batch["input_ids"].device.type == "cpu"


# --- bad input ---
def test_bad_batches_and_models():
    model, batch = gpt2(), text_batch([12])
    with pytest.raises(InvalidArgument, match="empty"):
        evaluate_model(model, [])
    with pytest.raises(InvalidArgument, match="labels"):
        evaluate_model(model, [{"input_ids": batch["input_ids"]}])
    with pytest.raises(WrongType, match="dict"):
        evaluate_model(model, [(batch["input_ids"], batch["labels"])])
    evaluate_model(model, [batch])
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = math.nan
    with pytest.raises(InvalidArgument, match="nan"):
        evaluate_model(model, [batch])
    with pytest.raises((InvalidArgument, UnsupportedModel), match="nan"):  # also before the alignment is known
        evaluate_model(model.__class__(model.config).apply(lambda module: [p.data.fill_(math.nan) for p in module.parameters()] and None), [batch])


def test_a_hopeless_loss_is_infinite_perplexity_and_no_overflow():
    model = gpt2()
    with torch.no_grad():
        model.transformer.ln_f.weight *= 1e5
    got = evaluate_model(model, [text_batch([12])])
    assert got["loss"] > 1000 and got["perplexity"] == math.inf


# --- bits per byte ---
@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("block_size", [2, 5, 16, 64])
def test_bits_per_byte_by_hand(name, block_size, tokenizer):
    model, texts = CAUSAL[name](), ["Call me Ishmael.", "Größe → ∞", "x"]
    stream, wanted = [], []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        stream, wanted = stream + [256] + ids, wanted + [False] + [True] * len(ids)
    nats, model = 0.0, model.eval()
    for begin in range(0, len(stream) - 1, block_size - 1):  # each block alone and without padding
        block = torch.tensor([stream[begin:begin + block_size]])
        with torch.no_grad():
            log_p = model(block).logits.double().log_softmax(-1)[0]
        nats -= sum(log_p[i - 1, block[0, i]].item() for i in range(1, block.shape[1]) if wanted[begin + i])
    size = sum(len(text.encode()) for text in texts)
    got = bits_per_byte(model, texts, tokenizer, block_size=block_size, batch_size=3)
    assert got["tokens"] == sum(wanted) == got["bytes"] == size  # a token a byte
    assert got["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_uniform_prediction_costs_the_log_of_the_vocabulary(tokenizer):
    model = gpt2()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert bits_per_byte(model, "some text", tokenizer, 8)["bits_per_byte"] == pytest.approx(math.log2(VOCABULARY), rel=1e-6)


def test_bits_per_byte_without_a_start_token_leaves_out_the_first_token_only(tokenizer):
    tokenizer.eos_token = None
    model, text = gpt2(), "abcdefgh"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    got = bits_per_byte(model, text, tokenizer, 64)
    with torch.no_grad():
        loss = model.eval()(input_ids=ids, labels=ids).loss.item()
    assert got["tokens"] == 8 and got["loss"] == pytest.approx(loss, rel=1e-5) and got["bits_per_byte"] == pytest.approx(loss / math.log(2), rel=1e-5)


def test_bits_per_byte_refuses(tokenizer):
    with pytest.raises(UnsupportedModel, match="next token"):
        bits_per_byte(bert(), "a masked model sees the answer", tokenizer, 16)
    for texts in ([], [""], [1], ""):
        with pytest.raises(InvalidArgument, match="texts"):
            bits_per_byte(gpt2(), texts, tokenizer, 16)
    for block_size in (1, 65):
        with pytest.raises(InvalidArgument, match="64"):
            bits_per_byte(gpt2(), "text", tokenizer, block_size)


# --- samples ---
@pytest.mark.parametrize("name", CAUSAL)
def test_a_sample_is_greedy_whatever_the_model_is_set_to(name, tokenizer, caplog, recwarn):
    model = CAUSAL[name]().eval()
    ids = torch.tensor([tokenizer("Call me")["input_ids"]])
    for _ in range(8):  # the plain definition
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], -1)
        if ids[0, -1] == 256:
            break
    plain = tokenizer.decode(ids[0], skip_special_tokens=True)
    model.generation_config.update(do_sample=True, temperature=3.0, top_k=7, num_beams=3, repetition_penalty=2.0)
    own = model.generation_config.to_dict()
    samples = {generate_sample(model.train(), tokenizer, "Call me", 8) for _ in range(3)}
    assert samples == {plain} and plain.startswith("Call me")
    assert model.training and model.generation_config.to_dict() == own
    assert not [record for record in caplog.records if record.levelname == "WARNING"] and not len(recwarn)


def test_samples_at_the_edges(tokenizer):
    model = gpt2()
    assert isinstance(generate_sample(model, tokenizer, "", 3), str)  # starts from the end-of-text token
    assert generate_sample(t5(), tokenizer, "translate", 3) != "translate"
    with pytest.raises(InvalidArgument, match="shorten"):
        generate_sample(model, tokenizer, "x" * 60, 5)
    with pytest.raises(InvalidArgument, match="new token"):
        generate_sample(model, tokenizer, "x", 0)
    for cannot in (vit(), bert()):
        with pytest.raises(UnsupportedModel, match="cannot generate"):
            generate_sample(cannot, tokenizer, "x", 3)
    tokenizer.eos_token = None
    with pytest.raises(InvalidArgument, match="no start token"):
        generate_sample(model, tokenizer, "", 3)


# --- cost ---
def test_latency_counts_the_calls_it_promises():
    model, calls = gpt2(), []
    model.register_forward_hook(lambda *_: calls.append(model.training))
    timing = measure_latency(model.train(), text_batch([4]), repeats=5, warmup=3)
    assert calls == [False] * 8 and timing["repeats"] == 5 and timing["seconds"] > 0 and timing["spread"] >= 0
    with pytest.raises(InvalidArgument, match="two timings"):
        measure_latency(model, text_batch([4]), repeats=1)
    with pytest.raises(WrongType, match="dict"):
        measure_latency(model, torch.zeros(1, 4, dtype=torch.long))


def test_parameters_are_counted_once():
    model = gpt2()  # input and output embeddings are one tensor
    block = 4 * 32 * 32 + 4 * 32 + 2 * 4 * 32 * 32 + 5 * 32 + 4 * 32  # attention, MLP, two norms
    expected = 257 * 32 + 64 * 32 + 2 * block + 2 * 32
    model.transformer.wpe.weight.requires_grad_(False)
    assert count_parameters(model) == {"total": expected, "trainable": expected - 64 * 32, "bytes": 4 * expected}
    assert count_parameters(model.bfloat16())["bytes"] == 2 * expected


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_operations_by_hand(attention):
    model = gpt2()
    model.set_attn_implementation(attention)
    T = 24
    linear = 2 * T * (2 * 12 * 32 * 32 + 32 * VOCABULARY)  # twelve d×d matrices a layer, and the head
    square = 2 * 2 * (2 * T * T * 32)  # QKᵀ and PV, in two layers
    cost = model_cost(model, T)
    assert cost["flops"] == linear + square and cost["flops_per_token"] == (linear + square) / T
    assert cost["parameters"] == count_parameters(model)["total"]


def test_cache_is_measured():
    assert model_cost(gpt2(), 16)["cache_bytes_per_token"] == 2 * 2 * 32 * 4  # layers, keys and values, width, bytes
    assert model_cost(llama(8), 16)["cache_bytes_per_token"] == 2 * 2 * 32 * 4
    assert model_cost(llama(2), 16)["cache_bytes_per_token"] == 2 * 2 * 8 * 4
    assert model_cost(llama(2).bfloat16(), 16)["cache_bytes_per_token"] == 2 * 2 * 8 * 2
    assert model_cost(bert(), 16)["cache_bytes_per_token"] is None


def test_cost_of_images_and_of_examples():
    cost = model_cost(vit())
    assert cost["flops"] > 0 and cost["flops_per_token"] is None and cost["cache_bytes_per_token"] is None
    assert model_cost(vit(), batch={"pixel_values": torch.zeros(2, 3, 8, 8)})["flops"] == 2 * cost["flops"]
    with pytest.raises(InvalidArgument, match="64"):
        model_cost(gpt2(), 65)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alignment_of_models_that_know_nothing(dtype):
    """Both readings of the labels then give nearly log V, so the loss alone does not tell them apart."""
    for seed in range(30):
        torch.manual_seed(seed)
        model = BertForMaskedLM(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)).to(dtype)
        ids = torch.randint(0, 50, (4, 16))
        assert sample_losses(model, {"input_ids": ids, "labels": ids})[1].tolist() == [16] * 4
