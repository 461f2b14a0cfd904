"""Do two processes choose, train and end as one; what do two GPUs gain; what does the callback cost?

    CUDA_VISIBLE_DEVICES=0 python benchmarks/processes.py one.json
    torchrun --nproc_per_node 2 benchmarks/processes.py two.json            # one process a GPU (NCCL), or two on a CPU (gloo)
    torchrun --nproc_per_node 2 benchmarks/processes.py sharded.json --sharded   # FSDP2

Run with one process first, then with two; the page nbs/howto/several_gpus.ipynb puts the files side by side.
"""
import argparse
import os
import statistics
import tempfile
import time

import torch
from common import clocked
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from neural_plasticity.compensation import compensate_heads
from neural_plasticity.data import load_embedded_model, load_embedded_text, text_dataloader
from neural_plasticity.durable import write_json
from neural_plasticity.gates import dormant_heads, put_to_sleep
from neural_plasticity.importance import measure_heads
from neural_plasticity.optimizer import HeadwiseUpdates
from neural_plasticity.probing import anatomy_of
from neural_plasticity.pruning import choose_heads
from neural_plasticity.schedule import PlasticitySchedule
from neural_plasticity.together import processes
from neural_plasticity.trainer import PlasticityCallback
from neural_plasticity.training import train_with_plasticity

SCHEDULE = PlasticitySchedule(regrow_every=10, fraction=0.4, stop_after=1.0, confidence=0.0, warmup_steps=4, num_batches=4, verify_batches=2, cooldown=0, swap=True)


def started() -> torch.device:
    "The device of this process; a process group, if there are several."
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group("nccl" if cuda else "gloo")
    return device


def agreement(device) -> dict:
    "Choose, compensate and train the embedded model for 40 steps of 16 samples; two processes take 8 each."
    model, tokenizer = load_embedded_model("gpt2")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # two processes would drop other things than one
    model.to(device)
    batches = lambda split, size, count: [batch for batch, _ in zip(text_dataloader(load_embedded_text(split), tokenizer, batch_size=size), range(count))]  # noqa: E731
    selection, size = batches("selection", 8, 8), processes()[1]
    mask = choose_heads(model, selection, 0.4, "iterative")
    put_to_sleep(model, mask)
    compensate_heads(model, selection)
    events: list = []
    history = train_with_plasticity(model, batches("train", 16 // size, 40 * size), selection, (), 3e-4, 40, eval_interval=40, progress=False,
                                    schedule=SCHEDULE, regrow_dataloader=batches("train", 8, 6), events=events)
    return {"chosen": mask.nonzero().tolist(), "dormant": dormant_heads(model), "changes": len(events), "loss": history["eval_loss"]}


def medium(device) -> tuple[GPT2LMHeadModel, int, int]:
    "GPT-2 medium's shape with random weights, length of a sequence, size of the vocabulary; much smaller on a CPU."
    torch.manual_seed(0)
    shape = dict(n_layer=24, n_embd=1024, n_head=16) if device.type == "cuda" else dict(n_layer=2, n_embd=64, n_head=4)
    length, vocabulary = (1024, 50257) if device.type == "cuda" else (32, 100)
    with device:
        return GPT2LMHeadModel(GPT2Config(**shape, vocab_size=vocabulary, n_positions=length, bos_token_id=None, eos_token_id=None)), length, vocabulary


class Clock(TrainerCallback):
    "Seconds of every step."

    def __init__(self):
        self.times: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        "Median of a step, the first five left out."
        return statistics.median(b - a for a, b in zip(self.times[5:], self.times[6:]))


def step_seconds(device, callback: PlasticityCallback | None, dormant: float, sharded: bool, steps: int = 25) -> tuple[float, bool]:
    "A training step of GPT-2 medium's shape, random weights, bf16, 4 × 1,024 tokens a process; and whether dormant heads stayed where they were."
    model, length, vocabulary = medium(device)
    anatomy = anatomy_of(model)
    if dormant:
        put_to_sleep(model, [head for number, head in enumerate(anatomy.heads) if number % round(1 / dormant) == 0])
    ids = torch.randint(vocabulary, (4 * steps * 2, length), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    clock, sharding = Clock(), {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["GPT2Block"]}} if sharded else {}
    site = anatomy.sites[1]
    whole = lambda: (lambda weight: weight.full_tensor() if hasattr(weight, "full_tensor") else weight)(model.get_submodule(site.projection).weight).detach().float()  # noqa: E731
    before = whole()[: site.head_dim].clone()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, max_steps=steps, per_device_train_batch_size=4, bf16=device.type == "cuda", report_to="none", disable_tqdm=True, logging_strategy="no",
                                      save_strategy="no", use_cpu=device.type == "cpu", weight_decay=0.1, **sharding)
        Trainer(model, arguments, train_dataset=rows, callbacks=[clock] if callback is None else [callback, clock]).train()
    still = bool(torch.equal(whole()[: site.head_dim].to(before.device), before)) if dormant else True
    return clock.seconds, still


def measuring_seconds(device) -> float:
    "One taylor measurement over 8 batches of 4 × 1,024 tokens, GPT-2 medium's shape, bf16 by autocast, all heads at once."
    model, length, vocabulary = medium(device)
    ids = torch.randint(vocabulary, (8, 4, length), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": rows, "labels": rows} for rows in ids]
    found = []
    for _ in range(4):
        begin = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            measure_heads(model, batches)
        found.append(time.perf_counter() - begin)
    return statistics.median(found[1:])


def overhead(device, steps: int = 25) -> dict:
    """What the callback costs in steps in which nothing happens: the seconds inside it and its hooks, where no tensor is touched. Whole runs with and without it
    would have to be many to tell a fraction of a percent from the scatter of steps."""
    places = [(PlasticityCallback, "on_optimizer_step"), (PlasticityCallback, "on_step_end"), (HeadwiseUpdates, "_before_step"), (HeadwiseUpdates, "_after_step")]
    with clocked(places, []) as spent:
        seconds, _ = step_seconds(device, PlasticityCallback(PlasticitySchedule(regrow_every=10**6), [None]), 0.0, sharded=False, steps=steps)
    each = sum(sorted(spent)[:-8]) / steps  # the first calls prepare
    return {"step_with_callback": seconds, "callback_seconds": each, "overhead": each / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--sharded", action="store_true", help="FSDP2 instead of a replica in each process")
    arguments = parser.parse_args()
    device = started()
    found: dict = {"processes": processes()[1], "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "sharded": arguments.sharded}
    if arguments.sharded:
        found["step_dormant"], found["dormant_still"] = step_seconds(device, PlasticityCallback(), 0.25, sharded=True)
    else:
        found["agreement"] = agreement(device)
        if processes()[1] == 1:
            found |= overhead(device)
        found["step_dormant"], found["dormant_still"] = step_seconds(device, PlasticityCallback(), 0.25, sharded=False)
        found["measuring_8_batches"] = measuring_seconds(device)
    if processes()[0] == 0:
        print(found)
        write_json(arguments.out, found)
    if processes()[1] > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
