"""What heads are worth, and how they are removed, by this library and its neighbours: the other parts of neighbours.py, which says what is measured."""
import copy
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from common import seconds_of, short
from neighbours_entropy import Size, bridged, known_version, llama, one_line, silence, tokens_for
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from neural_plasticity import gate_heads, load_embedded_model, load_pruned, measure_heads, remove_heads, save_pruned


def small_model(kind, width=64, layers=2, attention="eager", heads=8):
    "A model of a kind, with random weights."
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(n_embd=width, n_layer=layers, n_head=heads, vocab_size=256, n_positions=128, bos_token_id=0, eos_token_id=0)
        model = GPT2LMHeadModel._from_config(config, attn_implementation=attention)
    elif kind == "bert":
        config = BertConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=2 * width, vocab_size=256, max_position_embeddings=512)
        model = BertForMaskedLM._from_config(config, attn_implementation=attention)
    else:
        size = Size(kind, width, layers, heads, heads if kind == "llama" else heads // 4, 2 * width, vocabulary=256)
        model = llama(size, attention)
    model.config.use_cache = False
    return model.eval()


def projections(model):
    "Output projections [d, heads * size], in forward order."
    return [module for name, module in model.named_modules() if name.endswith(("o_proj", "attention.output.dense"))]


def gate_gradients(model):
    "|dloss/dgate| [L,H] out of the gradients of the output projections: a gate scales the head's columns."
    count = model.config.num_attention_heads
    return torch.stack([(layer.weight.grad * layer.weight).detach().float().unflatten(1, (count, -1)).sum((0, 2)).abs() for layer in projections(model)]).cpu()


def backward(model, batch):
    model.zero_grad(set_to_none=True)
    model(**batch).loss.backward()
    return gate_gradients(model)


def loop(model, batch):
    "Michel et al.: a full backward a sample, absolute values first."
    samples = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(len(batch["input_ids"]))]
    return sum(backward(model, sample) for sample in samples) / len(samples)


def taylor(model, batch):
    return measure_heads(model, [batch], ("taylor",))["taylor"]


def text_pruner(model, batch, batch_size):
    "TextPruner's importance; it takes the absolute value of a batch's mean."
    from textpruner import GeneralConfig, TransformerPruner

    model.zero_grad(set_to_none=True)
    with tempfile.TemporaryDirectory() as folder, silence():
        pruner = TransformerPruner(model, general_config=GeneralConfig(use_device=str(model.device), output_dir=folder))
        batches = [{name: value[i : i + batch_size] for name, value in batch.items()} for i in range(0, len(batch["input_ids"]), batch_size)]
        return pruner.get_importance_score(batches)[0].float().cpu()


def rank_agreement(scores, exact):
    "Spearman's correlation of two score maps."
    ranks = [torch.argsort(torch.argsort(values.flatten())).double() for values in (scores, exact)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def importance_rows(kind, width, layers, samples, tokens, device, dtype, rounds):
    model = small_model(kind, width, layers, "sdpa").to(device, dtype)
    ids = tokens_for(model, tokens, samples)
    batch = {"input_ids": ids, "labels": ids}
    calls_of = {"loop": partial(loop, model, batch), "batch": partial(backward, model, batch), "library": partial(taylor, model, batch),
                "textpruner": partial(text_pruner, model, batch, samples), "textpruner, batches of one": partial(text_pruner, model, batch, 1)}
    found, outcomes = {}, {}
    for name, call in calls_of.items():
        if name.startswith("textpruner") and not known_version("textpruner"):
            outcomes[name] = "not installed"
            continue
        try:
            found[name], outcomes[name] = call(), "ran"
        except Exception as error:  # a neighbour's own errors can be of any kind; each is reported by its name
            outcomes[name] = one_line(error)
    seconds, ran, rows = {name: [] for name in found}, list(found), []
    for turn in range(rounds):
        for name in ran[turn % len(ran):] + ran[: turn % len(ran)]:
            seconds[name].append(seconds_of(calls_of[name], device))
    for name in calls_of:
        row = {"part": "importance", "model": kind, "width": width, "layers": layers, "samples": samples, "tokens": tokens, "variant": name, "outcome": outcomes[name]}
        if name in found:
            scores, exact = (values / values.mean() for values in (found[name], found["loop"]))  # a common factor does not matter
            row |= {"seconds": short(statistics.median(seconds[name])), "ratio": short(statistics.median(a / b for a, b in zip(seconds[name], seconds["batch"]))),
                    "error": short(((scores - exact).abs().max() / exact.max()).item()), "rank": short(rank_agreement(scores, exact)), "heads": scores.numel()}
        rows.append(row)
    return rows


KINDS = ("gpt2", "bert", "llama", "llama, grouped")
MASKS = {  # heads of 8 that go, layer by layer; of grouped ones, 4 share a key/value head
    "half": [[0, 1, 4, 5], [2, 3, 6, 7]],  # as many in every layer and of every group; 4 are left, which divide the width
    "quarter": [[1, 5], [2, 6]],  # likewise; 6 are left, which do not
    "uneven": [[0, 1, 2, 3], []],  # a whole group of one layer
}


def as_mask(heads):
    mask = torch.zeros(len(heads), 8, dtype=torch.bool)
    for layer, gone in enumerate(heads):
        mask[layer, gone] = True
    return mask


def by_library(model, mask, ids):
    remove_heads(model, mask)


def by_transformers(model, mask, ids):
    model.base_model.prune_heads({layer: row.nonzero().flatten().tolist() for layer, row in enumerate(mask)})


def by_textpruner(model, mask, ids, keep_shape=False):
    from textpruner import GeneralConfig, TransformerPruner

    with tempfile.TemporaryDirectory() as folder, silence():
        pruner = TransformerPruner(model, general_config=GeneralConfig(use_device="cpu", output_dir=folder))
        pruner.prune_with_masks(head_mask=(~mask).float(), keep_shape=keep_shape, set_masks=True)


def torch_pruning_heads(model):
    "{attention module: the layers that make its queries, keys and values} and how many heads each of them has."
    attention, counts = {}, {}
    for module in model.modules():
        if hasattr(module, "query"):
            attention[module] = [module.query, module.key, module.value]
        elif hasattr(module, "q_proj"):
            attention[module] = [module.q_proj, module.k_proj, module.v_proj]
        elif hasattr(module, "c_attn"):
            attention[module] = [module.c_attn]
    for layers in attention.values():
        counts |= {layer: 8 if layer is layers[0] else getattr(model.config, "num_key_value_heads", 8) for layer in layers}
    return attention, counts


def by_torch_pruning(model, mask, ids):
    "As its own examples do it: heads by ratio and importance, nothing else, and the caller mends what the modules remember. The importance says which heads."
    import torch_pruning

    attention, counts = torch_pruning_heads(model)
    layer_of = {layers[0]: place for place, layers in enumerate(attention.values())}

    def importance(group):
        layers = [layer_of[dep.target.module] for dep, _ in group if dep.target.module in layer_of]
        count = len(group[0].idxs)
        return (~mask[layers[0]]).float().repeat_interleave(count // 8) if layers else torch.ones(count)

    with silence():
        pruner = torch_pruning.pruner.BasePruner(
            model, example_inputs=ids[:1], importance=importance, pruning_ratio=0.0, pruning_ratio_dict={layer: 0.5 for layer in counts},
            num_heads=counts, prune_num_heads=True, prune_head_dims=False, out_channel_groups={}, in_channel_groups={},
            head_pruning_ratio_dict={module: mask[place].float().mean().item() for place, module in enumerate(attention)},
            ignored_layers=[module for name, module in model.named_modules() if name in ("lm_head", "cls")])
        for group in pruner.step(interactive=True):
            group.prune()
    for module, layers in attention.items():
        left = counts[layers[0]]
        if hasattr(module, "query"):
            module.num_attention_heads, module.all_head_size = left, layers[0].out_features
        elif hasattr(module, "q_proj"):
            module.num_key_value_groups = layers[0].out_features // layers[1].out_features
    if len({counts[layers[0]] for layers in attention.values()}) == 1:  # for save_pretrained
        model.config.num_attention_heads = left
        if model.config.model_type == "llama":
            model.config.num_key_value_heads = layers[1].out_features // model.config.head_dim


WAYS = {  # {neighbour: {way: function}}
    "neural_plasticity": {"remove": by_library},
    "transformers": {"prune_heads": by_transformers, "head_mask": None},
    "torch-pruning": {"remove": by_torch_pruning},
    "textpruner": {"remove": by_textpruner, "zero": partial(by_textpruner, keep_shape=True)},
}


def saved_again(neighbour, model, ids, expected):
    "Do the logits come back from a folder? What the neighbour documents: `save_pruned` here, `save_pretrained` or a pickle of the whole model there."
    answers = {}
    ways = ("save_pruned",) if neighbour == "neural_plasticity" else ("save_pretrained", "pickle")
    for way in ways:
        try:
            with tempfile.TemporaryDirectory() as folder, silence():
                if way == "save_pruned":
                    save_pruned(model, folder)
                    again = load_pruned(folder)
                elif way == "save_pretrained":
                    model.save_pretrained(folder)
                    again = type(model).from_pretrained(folder)
                else:
                    torch.save(model, Path(folder) / "model.pt")
                    again = torch.load(Path(folder) / "model.pt", weights_only=False)
                off = (again.eval()(ids).logits - expected).abs().max().item()
            answers[way] = "exact" if off <= 1e-5 * expected.abs().max() else f"other logits, off by {off:.2g}"
        except Exception as error:  # as above
            answers[way] = one_line(error)
    return answers


@torch.no_grad()
def pruning_row(neighbour, way, kind, mask_name):
    "Prune one model in one way and compare with the gated one."
    row = {"part": "pruning", "neighbour": neighbour, "way": way, "model": kind, "mask": mask_name}
    model, mask = small_model(kind), as_mask(MASKS[mask_name])
    ids = tokens_for(model, 12, samples=2)
    dense, weights = model(ids).logits, sum(p.numel() for p in model.parameters())
    with gate_heads(model, mask):
        gated = model(ids).logits
    subject, scale, seconds = model, gated.abs().max().item(), []
    try:
        if way == "head_mask":
            logits = subject(ids, head_mask=(~mask).float()).logits
        else:
            for _ in range(3):
                subject = copy.deepcopy(model)
                begin = time.perf_counter()
                with torch.enable_grad():  # some trace the graph of a forward pass
                    WAYS[neighbour][way](subject, mask, ids)
                seconds.append(time.perf_counter() - begin)
            row["seconds"] = short(statistics.median(seconds))
            logits = subject(ids).logits
    except Exception as error:  # as above
        return row | {"outcome": "error", "message": one_line(error)}
    removed = weights - sum(p.numel() for p in subject.parameters())
    off, effect = ((logits - other).abs().max().item() / scale for other in (gated, dense))
    exact = off <= 1e-5
    outcome = ("exact" if exact else "other logits") if removed or exact else "nothing happened" if effect == 0 else "other logits"
    row |= {"outcome": outcome, "error": short(off), "weights_removed": removed, "weights": weights}
    return row | ({"saved": saved_again(neighbour, subject, ids, logits)} if removed else {})


def pruning_job(neighbour):
    "In a process of its own, since a neighbour may never come back: a line a row."
    for way in WAYS[neighbour]:
        for kind in KINDS:
            for mask in MASKS:
                print(json.dumps(pruning_row(neighbour, way, kind, mask)), flush=True)


def drawing_rows():
    "Do the drawing neighbours take the maps of a model of today, and how much HTML is a picture of 32 tokens?"
    model, _ = load_embedded_model("llama")
    model.set_attn_implementation("eager")
    ids, rows = tokens_for(model, 32), []
    with torch.no_grad():
        maps_of = model(ids, output_attentions=True).attentions
    words = [str(token) for token in ids[0].tolist()]

    def head_view():
        from bertviz import head_view

        return head_view(maps_of, words, html_action="return").data

    def patterns():
        from circuitsvis.attention import attention_patterns

        return str(attention_patterns(tokens=words, attention=maps_of[0][0]))

    def hook_points():
        return len(bridged(model).hook_dict)

    for neighbour, what, act in (("bertviz", "head_view", head_view), ("circuitsvis", "attention_patterns of one layer", patterns), ("transformer-lens", "hook points", hook_points)):
        row = {"part": "drawing", "neighbour": neighbour, "what": what, "outcome": "not installed"}
        if known_version(neighbour):
            try:
                with silence():
                    answer = act()
                row |= {"outcome": "ran"} | ({"hook_points": answer} if isinstance(answer, int) else {"html_bytes": len(answer)})
            except Exception as error:  # as above
                row["outcome"] = one_line(error)
        rows.append(row)
    return rows
