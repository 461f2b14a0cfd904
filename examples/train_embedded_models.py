"""Train the two embedded language models, a GPT-2 and a LLaMA with grouped key/value heads, on public-domain text.

Sources
    State of the Union addresses 1790-2021 (works of the US government), Austen's six novels and Moby-Dick: all in the
    public domain. `prepare_embedded_texts.py` beside this file says where they come from and writes the plain text
    files that this script reads. No pretrained weights, no other data and no network are used.

How to run (one GPU, a few minutes; needs torch, transformers 5, tokenizers, numpy, safetensors)
    python examples/train_embedded_models.py --data corpus --out trained
    cp -r trained/gpt2 trained/llama trained/training.json neural_plasticity/embedded/
    python examples/train_embedded_models.py --data corpus --out trial --steps 3 --batch 2 --jobs 1
The last line is a trial, for a CPU too: does it run? It judges a few tokens only, so its figures mean nothing.

What happens
    1. A byte-level BPE tokenizer of 4,096 tokens is trained on the training texts and shared by both models.
    2. For each architecture every recipe below is trained with AdamW on random windows, under a cosine with warm-up.
       After each epoch the model is judged on `dev`, texts that are neither trained on nor reported;
       its best state is kept, and so is, of all recipes, the one best on `dev`.
    3. The two winners are saved as float16 with "dtype": "float32" in config.json, so that they load as float32, loaded again,
       and measured on `validation`, `selection` and `shift_validation`, which played no part until then.
    `training.json` records everything: seed, recipes, steps, losses, hashes. The same seed gives the same batches; the last
    digits depend on the GPU.

Licence note
    The texts are in the public domain; the weights were made by this project from them alone and carry the project's licence.
"""
import argparse
import copy
import hashlib
import json
import math
import multiprocessing
import platform
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

SEPARATOR = "\n\f\n"  # between two texts of one file
END = "<|endoftext|>"  # token 0: before, between and after texts; padding too
TRAIN = ("train", "shift_train", "moby_dick")
REPORTED = ("validation", "selection", "shift_validation")
VOCABULARY, CONTEXT = 4096, 512
REPORTED_CONTEXTS = (128, 256, 512)


@dataclass(frozen=True)
class Recipe:
    "What differs between two trainings of one architecture."

    dropout: float  # on the embedding, on attention probabilities, and on what attention and MLP add to the residual
    epochs: int  # one epoch sees as many tokens as the training texts have
    learning_rate: float  # the peak


@dataclass(frozen=True)
class Job:
    "One training."

    architecture: str
    recipe: Recipe
    seed: int
    batch: int  # windows a step
    steps: int | None  # instead of the recipe's epochs, for a trial
    seconds: float  # the cosine reaches zero at the latest after this long
    work: str  # folder with the token files; the result goes there too

    @property
    def name(self):
        return f"{self.architecture}-d{self.recipe.dropout:g}-e{self.recipe.epochs}-lr{self.recipe.learning_rate:g}"


RECIPES = {
    "gpt2": (Recipe(0.2, 24, 4e-3), Recipe(0.1, 30, 4e-3), Recipe(0.05, 30, 4e-3), Recipe(0.1, 30, 8e-3)),
    "llama": (Recipe(0.1, 12, 2e-3), Recipe(0.2, 24, 2e-3), Recipe(0.2, 24, 4e-3)),
}
WARMUP_STEPS, WEIGHT_DECAY, BETAS, CLIP = 200, 0.1, (0.9, 0.95), 1.0


def read_texts(folder, split):
    "The texts of one split, a list of str."
    return (folder / f"{split}.txt").read_bytes().decode("utf-8").split(SEPARATOR)


def train_tokenizer(texts):
    "A byte-level BPE tokenizer as GPT-2 has one, smaller; any text goes in and comes back unchanged."
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def encode(tokenizer, texts):
    "One stream of token ids, `END` before each text and after the last."
    end = [tokenizer.eos_token_id]
    parts = [end + tokenizer.backend_tokenizer.encode(text).ids for text in texts]
    return np.concatenate([np.asarray(part, dtype=np.uint16) for part in [*parts, end]])


def make_config(architecture, dropout=0.0):
    "Six layers of eight heads of 32, about six million parameters, embeddings tied."
    common = dict(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, pad_token_id=0, tie_word_embeddings=True)
    if architecture == "gpt2":
        drops = dict(resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout)
        # the function that GPT-2 has always had, in one kernel; the shipped weights were trained with its slower twin, gelu_new
        return GPT2Config(n_positions=CONTEXT, n_embd=256, n_layer=6, n_head=8, activation_function="gelu_pytorch_tanh", **drops, **common)
    return LlamaConfig(
        max_position_embeddings=CONTEXT,
        hidden_size=256,
        intermediate_size=832,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        attention_dropout=dropout,
        **common,
    )


def add_residual_dropout(model, dropout):
    "LLaMA has dropout on attention probabilities only; drop in training where GPT-2 does. Returns the hooks."

    def drop(module, _, output):
        return F.dropout(output, dropout, module.training)

    names = ("embed_tokens", "o_proj", "down_proj")
    return [part.register_forward_hook(drop) for name, part in model.named_modules() if name.endswith(names)]


def make_optimizer(model, device, learning_rate):
    "AdamW; weights decay, biases and norms do not."
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, fused=device == "cuda")


def half_precision(device):
    "bfloat16 arithmetic on a GPU, float32 elsewhere."
    return torch.autocast("cuda", dtype=torch.bfloat16) if device == "cuda" else nullcontext()


def windows(stream, count, generator):
    "`count` random windows of the stream: inputs and the tokens that follow them, both `[count, CONTEXT]`."
    starts = torch.randint(len(stream) - CONTEXT, (count, 1), generator=generator, device=stream.device)
    chosen = stream[starts + torch.arange(CONTEXT + 1, device=stream.device)].long()
    return chosen[:, :-1], chosen[:, 1:]


@torch.no_grad()
def total_loss(model, stream, context, batch=32, limit=None):
    """Nats over the stream, and how many tokens they cover: every token but the first is predicted exactly once.

    Blocks do not overlap: the i-th token of a block is predicted from the i tokens before it in the block and the last one of
    the block before, so from 1 to `context` tokens.
    """
    stream = stream[: None if limit is None else limit + 1]
    full = (len(stream) - 1) // context * context
    inputs, targets = stream[:full].view(-1, context), stream[1 : full + 1].view(-1, context)
    pieces = [*zip(inputs.split(batch), targets.split(batch)), (stream[None, full:-1], stream[None, full + 1 :])]
    was_training, nats = model.training, 0.0
    model.eval()
    for x, y in pieces:
        if y.numel():
            logits = model(x.long(), use_cache=False).logits.float()
            nats += F.cross_entropy(logits.flatten(0, 1), y.flatten().long(), reduction="sum").item()
    model.train(was_training)
    return nats, len(stream) - 1


def load_stream(work, name, device):
    return torch.from_numpy(np.load(Path(work) / f"{name}.npy").astype(np.int32)).to(device)


def train(job):
    "Train one model, save its best state under `job.work`, and return what happened."
    torch.manual_seed(job.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens, dev = load_stream(job.work, "training", device), load_stream(job.work, "dev", device)
    model = AutoModelForCausalLM.from_config(make_config(job.architecture, job.recipe.dropout)).to(device).train()
    hooks = add_residual_dropout(model, job.recipe.dropout) if job.architecture == "llama" else []
    optimizer = make_optimizer(model, device, job.recipe.learning_rate)
    generator = torch.Generator(device).manual_seed(job.seed)
    epoch = max(1, len(tokens) // (job.batch * CONTEXT))  # steps
    steps = job.steps or epoch * job.recipe.epochs
    limit = 4 * CONTEXT if job.steps else None  # a trial judges on a few tokens only
    best, best_state, curve, started = math.inf, None, [], time.monotonic()
    done, running = 0, torch.zeros((), device=device)
    while done < steps:
        elapsed = time.monotonic() - started
        if elapsed > job.seconds:
            break
        progress = max(done / steps, elapsed / job.seconds)
        rate = job.recipe.learning_rate * min((done + 1) / WARMUP_STEPS, 0.5 + 0.5 * math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate
        x, y = windows(tokens, job.batch, generator)
        with half_precision(device):
            logits = model(x, use_cache=False).logits
            loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running += loss.detach()
        done += 1
        if done % epoch == 0 or done == steps:
            with half_precision(device):
                nats, count = total_loss(model, dev, CONTEXT, limit=limit)
            curve.append({"step": done, "train_loss": running.item() / ((done - 1) % epoch + 1), "dev_loss": nats / count})
            running.zero_()
            print(f"{job.name:28} {time.monotonic() - started:5.0f} s  {curve[-1]}", flush=True)
            if nats / count < best:
                best, best_state = nats / count, copy.deepcopy(model.state_dict())
            elif best < nats / count - 0.05:
                break  # it has left its best well behind: what follows only overfits
    if best_state is None:
        raise SystemExit(f"{job.name}: not one epoch in {job.seconds:.0f} s; give more time or another --batch")
    for hook in hooks:
        hook.remove()
    model.load_state_dict(best_state)
    save_model(model, Path(job.work) / job.name)
    facts = dict(steps=done, planned_steps=steps, steps_per_epoch=epoch, seconds=round(time.monotonic() - started, 1))
    return {"job": job.name, "recipe": asdict(job.recipe), **facts, "dev_loss": best, "curve": curve}


def save_model(model, folder):
    """Weights as float16, and a config with which they load as float32.

    The saved config carries GPT-2's usual dropout of 0.1 (LLaMA's: none), whatever the recipe was.
    """
    architecture = model.config.model_type
    model.half().save_pretrained(folder)
    model.float()
    usual = make_config(architecture, 0.1 if architecture == "gpt2" else 0.0)
    usual.architectures, usual.dtype = model.config.architectures, torch.float32
    usual.save_pretrained(folder)


def describe(folder, streams, sizes, device):
    "Load a saved model as a user does and measure it."
    model = AutoModelForCausalLM.from_pretrained(folder).to(device)
    if {p.dtype for p in model.parameters()} != {torch.float32}:
        raise SystemExit(f"{folder} loads as {model.dtype}, not as float32")
    report = {"parameters": sum(p.numel() for p in model.parameters()), "sha256": sha256(folder / "model.safetensors")}
    for split, stream in streams.items():
        for context in REPORTED_CONTEXTS:
            nats, count = total_loss(model, stream, context)
            report.setdefault(split, {})[f"context_{context}"] = {
                "loss": nats / count,
                "perplexity": math.exp(nats / count),
                "bits_per_byte": nats / math.log(2) / sizes[split],
                "tokens": count,
            }
    return report


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def prepare(args, work):
    "Train the tokenizer and write the token streams to `work`; returns the tokenizer and what the report says of the data."
    texts = {split: read_texts(args.data, split) for split in (*TRAIN, "dev", *REPORTED)}
    tokenizer = train_tokenizer(text for split in TRAIN for text in texts[split])
    streams = {split: encode(tokenizer, texts[split]) for split in ("dev", *REPORTED)}
    streams["training"] = encode(tokenizer, [text for split in TRAIN for text in texts[split]])
    for name, stream in streams.items():
        np.save(work / f"{name}.npy", stream)
    sizes = {split: sum(len(text.encode()) for text in texts[split]) for split in texts}
    data = {split: {"bytes": sizes[split], "sha256": sha256(args.data / f"{split}.txt")} for split in texts}
    return tokenizer, sizes, {"splits": data, "tokens": {name: len(stream) for name, stream in streams.items()}}


def train_all(jobs, at_once):
    "Results of all jobs. A model this small leaves most of a GPU idle, so several are trained at once."
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(at_once, len(jobs)), mp_context=context) as pool:
        return [future.result() for future in as_completed([pool.submit(train, job) for job in jobs])]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of prepare_embedded_texts.py's --corpus")
    parser.add_argument("--out", type=Path, required=True, help="folder for gpt2/, llama/ and training.json")
    parser.add_argument("--architectures", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32, help=f"windows of {CONTEXT} tokens a step")
    parser.add_argument("--steps", type=int, help="train this many steps only: a trial")
    parser.add_argument("--jobs", type=int, default=6, help="trainings at a time")
    parser.add_argument("--minutes", type=float, default=6.0, help="the longest that one training may take")
    args = parser.parse_args()

    started = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tokenizer, sizes, data = prepare(args, work)
        print(f"{data['tokens']} tokens, prepared in {time.monotonic() - started:.0f} s, training on {device}", flush=True)
        rest = (args.seed, args.batch, args.steps, 60 * args.minutes, folder)
        jobs = [Job(architecture, recipe, *rest) for architecture in args.architectures for recipe in RECIPES[architecture][: 1 if args.steps else None]]
        results = train_all(jobs, args.jobs)
        judged = 4 * CONTEXT if args.steps else None
        streams = {split: load_stream(work, split, device)[:judged] for split in REPORTED}
        report = {
            "seed": args.seed,
            "batch_tokens": args.batch * CONTEXT,
            "optimizer": dict(name="AdamW", betas=BETAS, weight_decay=WEIGHT_DECAY, clip=CLIP, warmup_steps=WARMUP_STEPS),
            "data": data,
            "versions": dict(python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__),
            "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        }
        tried = {name: sorted((r for r in results if r["job"].startswith(name)), key=lambda r: r["dev_loss"]) for name in args.architectures}
        for name, (winner, *_) in tried.items():  # all are saved before anything is measured
            shutil.copytree(work / winner["job"], args.out / name, dirs_exist_ok=True)
            tokenizer.save_pretrained(args.out / name)
        for name, (winner, *others) in tried.items():
            others = [{key: r[key] for key in ("recipe", "steps", "planned_steps", "dev_loss")} for r in others]
            report[name] = describe(args.out / name, streams, sizes, device) | {"training": winner, "also_tried": others}
            for split in REPORTED:
                print(name, split, report[name][split], flush=True)
    report["seconds"] = round(time.monotonic() - started, 1)
    (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {args.out} in {report['seconds']} s")


if __name__ == "__main__":
    main()
