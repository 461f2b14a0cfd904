"""Two processes measure, choose and train as one; sharded weights (FSDP2) are measured, gated and trained, or refused in words."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from models import batches, build

from neural_plasticity.compensation import compensate_heads
from neural_plasticity.errors import NotRemovable, UnsupportedModel
from neural_plasticity.gates import dormant_heads, gate_heads, put_to_sleep
from neural_plasticity.importance import measure_entropy, measure_heads
from neural_plasticity.optimizer import headwise_updates
from neural_plasticity.probing import anatomy_of
from neural_plasticity.pruning import choose_heads
from neural_plasticity.regrowth import PlasticityMemory, plasticity_step, regrowth_scores
from neural_plasticity.schedule import PlasticitySchedule
from neural_plasticity.surgery import remove_heads
from neural_plasticity.training import train_with_plasticity

HEADS = [(0, 1), (1, 0), (1, 2), (2, 3)]
SCHEDULE = PlasticitySchedule(regrow_every=2, fraction=0.5, stop_after=1.0, confidence=0.0, warmup_steps=2, num_batches=3, verify_batches=0, cooldown=0, swap=True)


def _entry(rank, work, size, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    torch.save(work(), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # a thread of gloo can outlive the groups of a device mesh, and then the interpreter's end aborts the process


def in_two_processes(work, folder):
    "What a function returns in each of two processes."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(exist_ok=True)
    torch.multiprocessing.spawn(_entry, (work, 2, port, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def measured():
    model = build("gpt2")
    data = batches(model, count=5)  # an odd number: one process has one batch more
    scores = measure_heads(model, data, ("taylor", "entropy", "gradient"))
    found = {name: scores[name] for name in scores} | {"stderr": scores.stderr["taylor"], "only_entropy": measure_entropy(model, data)}
    found["mask"] = choose_heads(model, data, 0.4, "iterative")
    compensate_heads(model, data, HEADS)
    return found | {"regrowth": regrowth_scores(model, data).as_subclass(torch.Tensor), "weight": model.transformer.h[1].attn.c_proj.weight.detach().clone()}


def test_two_processes_measure_and_choose_as_one(tmp_path):
    one, (first, second) = measured(), in_two_processes(measured, tmp_path)
    for name, value in one.items():
        assert torch.equal(first[name].nan_to_num(), second[name].nan_to_num()), name
        exact = name not in ("weight", "regrowth", "mask")
        assert torch.equal(first[name].nan_to_num(), value.nan_to_num()) if exact else torch.allclose(first[name].nan_to_num().float(), value.nan_to_num().float(), atol=1e-5), name


def trained():
    model = build("gpt2").train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # two processes drop other things than one
    data = batches(model, count=12, batch=2)
    if not dist.is_initialized():  # what two processes see in a step
        data = [{key: torch.cat([a[key], b[key]]) for key in a} for a, b in zip(data[::2], data[1::2])]
    selection = batches(build("gpt2"), count=4)
    put_to_sleep(model, HEADS)
    events = []
    history = train_with_plasticity(model, data, selection, (), 1e-3, 6, eval_interval=3, progress=False, schedule=SCHEDULE, regrow_dataloader=selection, events=events)
    return {"loss": torch.tensor(history["eval_loss"][-1]), "dormant": torch.tensor(dormant_heads(model)), "changes": torch.tensor(len(events))}


def test_two_processes_train_as_one(tmp_path):
    one, (first, second) = trained(), in_two_processes(trained, tmp_path)
    assert one["changes"] > 0 and first["changes"] == second["changes"] == one["changes"]
    assert torch.equal(first["dormant"], one["dormant"]) and torch.equal(second["dormant"], one["dormant"])
    assert first["loss"] == second["loss"] and abs(first["loss"] / one["loss"] - 1) < 1e-3


def refusal(kind, work):
    try:
        work()
    except kind as error:
        return str(error)
    return ""


def sharded_or_not():
    "Five steps with two dormant heads, one of them revived on the way; in two processes with sharded weights."
    model = build("llama-grouped")
    data = batches(model, count=4)
    anatomy_of(model)
    refusals = ""
    if dist.is_initialized():
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        refusals = "|".join((refusal(UnsupportedModel, lambda: compensate_heads(model, data, HEADS)), refusal(NotRemovable, lambda: remove_heads(model, HEADS)),
                             refusal(UnsupportedModel, lambda: put_to_sleep(model, HEADS, zero_weights=True)), refusal(UnsupportedModel, lambda: measure_heads(model, data, ("gradient",)))))
    with gate_heads(model, [(0, 0)]):
        gated = model(**data[0]).logits.detach()
    taylor = measure_heads(model, data)["taylor"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    headwise_updates(optimizer, model, [(0, 0)], 3.0)
    put_to_sleep(model, [(1, 0), (1, 1), (2, 2)])
    projection = model.get_submodule(anatomy_of(model).sites[2].projection)
    whole = lambda weight: (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).detach().clone()  # noqa: E731
    before = whole(projection.weight)
    memory, changes = PlasticityMemory(), 0
    for step in range(1, 6):
        optimizer.zero_grad()
        model(**data[step % 4]).loss.backward()
        optimizer.step()
        if step == 4:
            still = torch.equal(whole(projection.weight)[:, 16:24], before[:, 16:24])  # head (2, 2)
        changes += bool(plasticity_step(model, data, SCHEDULE, step, 5, memory)) if step >= 4 else 0
    return {"gated": gated, "taylor": taylor, "still": torch.tensor(still), "final": whole(projection.weight), "dormant": torch.tensor(dormant_heads(model)),
            "changes": torch.tensor(changes), "refusals": torch.tensor(list(refusals.encode()))}


@pytest.mark.filterwarnings("ignore:.*")
def test_sharded_weights(tmp_path):
    one, (first, second) = sharded_or_not(), in_two_processes(sharded_or_not, tmp_path)
    for name in ("gated", "taylor", "final"):
        assert torch.allclose(first[name], one[name], atol=1e-5), name
    assert first["still"] and one["still"] and first["changes"] == one["changes"] > 0
    assert torch.equal(first["dormant"], one["dormant"]) and torch.equal(second["dormant"], one["dormant"])
    refusals = bytes(first["refusals"].tolist()).decode().split("|")
    assert len(refusals) == 4 and all("shard" in words for words in refusals), refusals
