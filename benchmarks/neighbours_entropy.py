"""Attention entropy of every head, as people get it today and by `measure_entropy`: the first part of neighbours.py, which says what is measured."""
import importlib
import importlib.metadata
import io
import math
import resource
import statistics
import sys
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
import transformers
from common import free, seconds_of, short, wait_for
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from neural_plasticity import load_embedded_model, measure_entropy

HOST_LIMIT = 8 * 2**30  # bytes of attention maps that are still carried from a GPU to the processor's memory


@dataclass(frozen=True)
class Size:
    "The shape of a LLaMA-like model. The vocabulary is small, so that logits do not drown what attention costs."
    name: str
    d_model: int
    layers: int
    heads: int
    key_value_heads: int
    mlp: int
    vocabulary: int = 1024


def known_version(package):
    "The installed version, or None."
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def importable(module):
    "Whether a neighbour is there with all that it imports."
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def one_line(error):
    "An exception as its type and first two lines."
    return f"{type(error).__name__}: {' '.join(line.strip() for line in str(error).strip().splitlines()[:2])}"[:300]


@contextmanager
def silence():
    "Neighbours print, warn and show progress bars."
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def llama(size, attention):
    "A LLaMA-like model whose attention is neither uniform nor one-hot."
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        hidden_size=size.d_model, num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.key_value_heads,
        intermediate_size=size.mlp, vocab_size=size.vocabulary, max_position_embeddings=65536, initializer_range=1.4 * size.d_model**-0.5,
        attn_implementation=attention, use_cache=False)).eval()


def model_for(what, attention, device, dtype):
    "The model of an entropy case: built from a size, or embedded."
    if isinstance(what, str):
        model, _ = load_embedded_model(what.removeprefix("embedded "))
        model.set_attn_implementation(attention)
        model.config.use_cache = False
    else:
        with torch.device(device):
            model = llama(what, attention)
    return model.to(device, dtype).requires_grad_(False)


def tokens_for(model, count, samples=1):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (samples, count), generator=generator).to(next(model.parameters()).device)


def usual_entropy(attention):
    "What is written everywhere, in the dtype of the map: [B,H,T,T] → [H], the mean over rows that see more than one key."
    rows = -(attention * torch.log(attention + 1e-9)).sum(-1)
    return rows[..., 1:].float().mean((0, 2)).cpu()


def attention_modules(model):
    "The modules that compute attention, in forward order; in eager they return (output, map)."
    return [module for name, module in model.named_modules() if name.endswith((".attn", ".self_attn"))]


@contextmanager
def seeing_maps(model, look):
    "Call `look(layer, map)` after every attention of an eager model."
    hooks = [module.register_forward_hook(lambda module, args, output, layer=layer: look(layer, output[1])) for layer, module in enumerate(attention_modules(model))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def forward(model, ids):
    "No entropy: what a plain forward pass takes."
    model(ids)


def library(model, ids):
    return measure_entropy(model, [{"input_ids": ids}], normalize=False)


def maps(model, ids):
    "Eager attention, all maps, then the formula."
    return torch.stack([usual_entropy(found) for found in model(ids, output_attentions=True).attentions])


def hooks(model, ids):
    "With care: a hook a layer, the formula in float32, and the map is forgotten before the next layer makes one."
    found = {}

    def look(layer, attention):
        found[layer] = torch.special.entr(attention.float()).sum(-1)[..., 1:].mean((0, 2)).cpu()

    with seeing_maps(model, look):
        model(ids)
    return torch.stack([found[layer] for layer in sorted(found)])


def bertviz(model, ids):
    "The maps as BertViz wants them, on the processor and in one tensor; no entropy, and nothing drawn."
    from bertviz.util import format_attention

    format_attention(tuple(found.cpu() for found in model(ids, output_attentions=True).attentions))


def bertviz_by_hand(model, ids):
    torch.stack([found.cpu().squeeze(0) for found in model(ids, output_attentions=True).attentions])


def lens(bridge, ids):
    "TransformerLens: every layer's pattern out of a cache, then the formula."
    _, cache = bridge.run_with_cache(ids, names_filter=lambda name: name.endswith("hook_pattern"))
    return torch.stack([usual_entropy(cache[name]) for name in cache.keys()])


def lens_by_hand(model, ids):
    cache = {}
    with seeing_maps(model, cache.__setitem__):
        model(ids)
    return torch.stack([usual_entropy(cache[layer]) for layer in sorted(cache)])


def bridged(model):
    "The model in TransformerLens' bridge, which wraps it in place. Without a tokenizer it would ask the hub for one."
    from transformer_lens.model_bridge import TransformerBridge

    name = "gpt2" if model.config.model_type == "gpt2" else "llama"
    with silence():
        bridge = TransformerBridge.boot_transformers(name, hf_model=model, tokenizer=load_embedded_model(name)[1], device=model.device, dtype=model.dtype)
    return bridge


def variants():
    "{name: (function, attention implementation, how it is done)}; what is not installed is done by hand."
    viz = (bertviz, "BertViz") if importable("bertviz") else (bertviz_by_hand, "by hand; BertViz is not installed")
    tl = (lens, "TransformerLens") if importable("transformer_lens.model_bridge") else (lens_by_hand, "by hand; TransformerLens is not installed")
    return {"forward": (forward, "sdpa", "plain forward pass"), "library": (library, "sdpa", "measure_entropy"),
            "maps": (maps, "eager", "output_attentions=True"), "hooks": (hooks, "eager", "a hook a layer, float32"),
            "bertviz": (viz[0], "eager", viz[1]), "transformer-lens": (tl[0], "eager", tl[1])}


def subjects(what, device, dtype, names):
    "{variant: what it is called with}: one SDPA model, one eager model, and TransformerLens' own, since it changes the model it wraps."
    shared, found = {}, {}
    for name in names:
        function, attention, _ = variants()[name]
        if function is lens:
            found[name] = bridged(model_for(what, attention, device, dtype))
        else:
            found[name] = shared[attention] = shared.get(attention) or model_for(what, attention, device, dtype)
    return found


def exact_rows(query, key, scale):
    "Causal attention entropy [B,H,T] in float64, from queries and keys as they are, some rows at a time."
    query, key = query.double(), key.double().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    found, position = [], torch.arange(key.shape[2], device=key.device)
    for start in range(0, query.shape[2], 256):
        logits = query[:, :, start : start + 256] @ key.mT * scale
        later = position > torch.arange(start, start + logits.shape[2], device=key.device)[:, None]
        found.append(torch.special.entr(logits.masked_fill(later, -math.inf).softmax(-1)).sum(-1))
    return torch.cat(found, -1)


def reference(model, ids, attention):
    "[L,H] in float64, from the queries and keys of this model's own forward pass in this attention implementation."
    eager = sys.modules[type(model).__module__].eager_attention_forward
    found = []

    def recording(module, query, key, value, mask, scaling=None, **kwargs):
        found.append(exact_rows(query, key, query.shape[-1] ** -0.5 if scaling is None else scaling)[..., 1:].mean((0, 2)).cpu())
        return (sdpa_attention_forward if attention == "sdpa" else eager)(module, query, key, value, mask, scaling=scaling, **kwargs)

    name = f"{attention}_recorded"
    AttentionInterface.register(name, recording)
    transformers.AttentionMaskInterface.register(name, transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[attention])
    model.set_attn_implementation(name)
    model(ids)
    model.set_attn_implementation(attention)
    return torch.stack(found)


def map_bytes(model, tokens):
    "What all attention maps of a sequence hold."
    return model.config.num_hidden_layers * model.config.num_attention_heads * tokens**2 * next(model.parameters()).dtype.itemsize


def first_calls(calls_of, device, host_bytes):
    "Warm up: what each variant returns, which did not fit, and on a GPU the peak bytes beyond what was there."
    returned, outcomes, peaks = {}, {}, {}
    for name, call in calls_of.items():
        free(device)
        if device.type == "cuda" and name == "bertviz" and host_bytes > HOST_LIMIT:
            outcomes[name] = f"not tried: {host_bytes / 2**30:.0f} GiB of maps would go to the processor's memory"
            continue
        try:
            call()  # libraries set themselves up in first calls
            if device.type == "cuda":
                wait_for(device)
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            returned[name] = call()
            if device.type == "cuda":
                wait_for(device)
                peaks[name] = torch.cuda.max_memory_allocated() - before
            outcomes[name] = "ran"
        except torch.OutOfMemoryError:
            outcomes[name] = "out of memory"
    return returned, outcomes, peaks


@torch.no_grad()
def entropy_rows(what, lengths, device, dtype, rounds):
    "All rows of a model: a row a variant and length."
    models, rows = subjects(what, device, dtype, variants()), []
    for tokens in lengths:
        ids = tokens_for(models["forward"], tokens)
        calls_of = {name: partial(function, models[name], ids) for name, (function, _, _) in variants().items()}
        returned, outcomes, peaks = first_calls(calls_of, device, map_bytes(models["forward"], tokens))
        ran, seconds = list(returned), {name: [] for name in returned}
        for turn in range(rounds):
            for name in ran[turn % len(ran):] + ran[: turn % len(ran)]:
                seconds[name].append(seconds_of(calls_of[name], device))
        exact = {attention: reference(models[name], ids, attention) for name, attention in (("forward", "sdpa"), ("maps", "eager")) if outcomes[name] == "ran"}
        for name, (_, attention, how) in variants().items():
            row = {"part": "entropy", "model": what if isinstance(what, str) else what.name, "tokens": tokens, "variant": name, "how": how, "outcome": outcomes[name]}
            if name in returned:
                ratios = [mine / plain for mine, plain in zip(seconds[name], seconds["forward"])]
                lower, middle, upper = statistics.quantiles(ratios, n=4, method="inclusive")
                row |= {"seconds": short(statistics.median(seconds[name])), "ratio": short(middle), "ratio_quartiles": [short(lower), short(upper)]}
                if returned[name] is not None and attention in exact:
                    row["heads"] = returned[name].numel()
                    row["error"] = short((returned[name].double() - exact[attention]).abs().max().item())
            rows.append(row | ({"peak_bytes": peaks[name]} if name in peaks else {}))
    return rows


def resident_peak():
    "Bytes: the most that this process has held. On Linux not by `ru_maxrss`, which a process inherits from the one that started it."
    status = Path("/proc/self/status")
    if status.exists():
        return int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@torch.no_grad()
def memory_job(what, lengths, variant, dtype):
    "In a process of its own: peak bytes by length, beyond what the process held before the first call. Lengths ascend, so the mark of each is its own."
    subject = subjects(what, torch.device("cpu"), getattr(torch, dtype), [variant])[variant]
    function = variants()[variant][0]
    function(subject, torch.zeros(1, 8, dtype=torch.long))  # what libraries set up in a first call is not the variant's
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the mark that building left
    before, found = resident_peak(), {}
    for tokens in lengths:
        function(subject, torch.zeros(1, tokens, dtype=torch.long))
        found[tokens] = max(0, resident_peak() - before)
    return found
