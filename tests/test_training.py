"""Training keeps its promises: dormant heads do not move, runs repeat, checkpoints remember, nothing global changes."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from models import batches, build, slices, steps
from torch.optim import SGD, Adam, AdamW, RMSprop
from transformers import Trainer, TrainingArguments

from neural_plasticity.compensation import compensate_heads
from neural_plasticity.errors import EnvironmentProblem, InvalidArgument
from neural_plasticity.gates import dormant_heads, put_to_sleep, restore_heads, revive_heads, state_of
from neural_plasticity.optimizer import get_plasticity_optimizer, headwise_updates
from neural_plasticity.probing import anatomy_of
from neural_plasticity.regrowth import PlasticitySchedule
from neural_plasticity.trainer import STATE_FILE, PlasticityCallback, PlasticityTrainer
from neural_plasticity.training import HISTORY_KEYS, recovery_rate, run_plasticity_loop, train_with_plasticity

FAMILIES = ("gpt2", "llama-grouped", "bert", "vit")
SIBLINGS = [(1, 0), (1, 1)]  # a whole key/value group of llama-grouped
OPTIMIZERS = {
    "adamw": lambda p: AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw-foreach": lambda p: AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda p: AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "adam": lambda p: Adam(p, lr=1e-2),
    "sgd-momentum": lambda p: SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "rmsprop": lambda p: RMSprop(p, lr=1e-3),
}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", ["gpt2", "llama-grouped"])
def test_dormant_slices_do_not_move_in_100_steps(name, kind):
    model = build(name).train()
    data, optimizer = batches(model), OPTIMIZERS[kind](model.parameters())
    updates = headwise_updates(optimizer, model)
    steps(model, optimizer, 3, data)  # momentum before they go to sleep
    put_to_sleep(model, SIBLINGS)
    before, awake = slices(model, SIBLINGS), slices(model, [(0, 2)])
    if name == "llama-grouped":
        assert {key.split(".")[-2] for key, _ in before} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    steps(model, optimizer, 100, data)
    assert same(slices(model, SIBLINGS), before) and not same(slices(model, [(0, 2)]), awake)
    updates.remove()
    steps(model, optimizer, 1, data)
    assert not same(slices(model, SIBLINGS), before) or kind in ("adam", "rmsprop")  # without decay, momentum alone may have died


@pytest.mark.parametrize("kind", ["adamw", "adamw-foreach", "adamw-fused", "sgd-momentum"])
@pytest.mark.parametrize("name", FAMILIES)
def test_multiplier_is_exact_for_one_step(name, kind):
    results = []
    for multiplier in (1.0, 3.0):
        model = build(name)
        start = slices(model, [(2, 1)])
        optimizer = OPTIMIZERS[kind](model.parameters())
        headwise_updates(optimizer, model, [(2, 1)], multiplier)
        steps(model, optimizer, 1, batches(model))
        results.append({key: value - start[key] for key, value in slices(model, [(2, 1)]).items()})
    for key in results[0]:
        assert torch.allclose(results[1][key], 3 * results[0][key], rtol=1e-4, atol=1e-7), key


def test_shared_rows_go_on_training_for_a_living_sibling():
    model = build("llama-grouped").train()
    optimizer, _ = get_plasticity_optimizer(model, [(1, 0)], learning_rate=1e-2)
    put_to_sleep(model, [(1, 0)])  # its sibling (1, 1) lives
    keys = model.model.layers[1].self_attn.k_proj.weight
    before = keys.detach().clone()
    steps(model, optimizer, 2, batches(model))
    assert not torch.equal(keys[:8], before[:8])


def test_revived_head_moves_and_its_first_update_is_bounded():
    model = build("gpt2").train()
    rate, multiplier = 1e-3, 3.0
    optimizer, _ = get_plasticity_optimizer(model, [(1, 0)], learning_rate=rate, pruned_head_lr_multiplier=multiplier)
    put_to_sleep(model, [(1, 0)])
    steps(model, optimizer, 20, batches(model))
    revive_heads(model, [(1, 0)])
    before = slices(model, [(1, 0)])
    steps(model, optimizer, 1, batches(model))
    moved = max(float((value - before[key]).abs().max()) for key, value in slices(model, [(1, 0)]).items())
    # Adam after t steps with zero gradients: m/√v = (1-β1)/(1-β1^t) · √((1-β2^t)/(1-β2)), at most 1/√(1-β2)·(1-β1) ≈ 3.2; t = 21 here
    t, ratio = 21, (1 - 0.9) / (1 - 0.9**21) * math.sqrt((1 - 0.999**21) / (1 - 0.999))
    assert 0 < moved <= multiplier * rate * (ratio + 0.01 * 1.5) * 1.01, (t, moved)


def test_trainer_with_the_callback_alone():
    model = build("gpt2")
    put_to_sleep(model, SIBLINGS)
    before = slices(model, SIBLINGS)
    rows = [{key: value[0] for key, value in batch.items()} for batch in batches(model, count=6, batch=1)]
    with_callback(model, rows, None).train()
    assert same(slices(model, SIBLINGS), before)


def with_callback(model, rows, folder, callback=None, **options):
    arguments = TrainingArguments(output_dir=str(folder or "unused"), max_steps=options.pop("max_steps", 6), per_device_train_batch_size=2, report_to="none", use_cpu=True,
                                  disable_tqdm=True, save_strategy=options.pop("save_strategy", "no"), learning_rate=1e-3, logging_strategy="no", **options)
    return Trainer(model, arguments, train_dataset=rows, callbacks=[callback or PlasticityCallback()])


def test_data_parallel_is_refused():
    model = build("gpt2")
    rows = [{key: value[0] for key, value in batch.items()} for batch in batches(model, count=6, batch=1)]
    trainer = with_callback(model, rows, None)
    trainer.args._n_gpu = 2  # as Trainer finds it in one process with two GPUs
    with pytest.raises(EnvironmentProblem, match="DataParallel.*torchrun"):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)


def schedule_for(model):
    return PlasticityCallback(PlasticitySchedule(regrow_every=2, fraction=0.5, stop_after=1.0, confidence=0.0, warmup_steps=3, num_batches=2), batches(model))


def test_resumed_equals_uninterrupted(tmp_path):
    rows = None
    finals = []
    for part in ("whole", "resumed"):
        model = build("gpt2")
        rows = rows or [{key: value[0] for key, value in batch.items()} for batch in batches(model, count=12, batch=1)]
        heads = [(0, 1), (1, 0), (1, 2), (2, 3)]
        put_to_sleep(model, heads)
        if part == "whole":
            with_callback(model, rows, tmp_path / "a", schedule_for(model), save_strategy="steps", save_steps=3).train()
        else:
            assert (tmp_path / "a" / "checkpoint-3" / STATE_FILE).is_file()
            with_callback(model, rows, tmp_path / "a", schedule_for(model), save_strategy="no").train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
        finals.append((dormant_heads(model), {key: value.clone() for key, value in model.state_dict().items()}, dict(state_of(model).warmup) if state_of(model) else {}))
    assert finals[0][0] == finals[1][0] != heads and finals[0][2] == finals[1][2]
    assert all(torch.equal(value, finals[1][1][key]) for key, value in finals[0][1].items())


def test_resuming_without_the_gates_raises(tmp_path):
    model = build("gpt2")
    rows = [{key: value[0] for key, value in batch.items()} for batch in batches(model, count=8, batch=1)]
    with_callback(model, rows, tmp_path, save_strategy="steps", save_steps=3).train()
    (tmp_path / "checkpoint-3" / STATE_FILE).unlink()
    with pytest.raises(EnvironmentProblem, match="does not say which heads were dormant"):
        with_callback(model, rows, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


LOADERS = {
    "list": lambda data: data,
    "tuple": lambda data: tuple(data),
    "dataloader": lambda data: torch.utils.data.DataLoader(data, batch_size=None),
    "endless": lambda data: itertools.cycle(data),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_ready_loaders_of_any_kind(kind):
    model = build("gpt2")
    data = batches(model)
    history = train_with_plasticity(model, LOADERS[kind](data), data, [(0, 1)], learning_rate=1e-3, training_steps=5, eval_interval=2, progress=False)
    assert history["step"] == [0, 2, 4, 5] and set(history) == set(HISTORY_KEYS)
    assert {len(values) for values in history.values()} == {4}
    assert history["perplexity"][-1] < history["perplexity"][0] and math.isnan(history["train_loss"][0]) and not math.isnan(history["train_loss"][-1])
    assert not model.training


def loop(model, **options):
    data = batches(model, count=3)
    return run_plasticity_loop(model, data, data, pruning_level=0.5, learning_rate=1e-3, training_steps=4, eval_interval=2, progress=False, **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loop_for_every_family(name):
    results = loop(build(name), strategy="taylor", control=True)
    for key in ("baseline_metrics", "pruned_metrics", "final_metrics", "training_metrics", "pruned_heads", "revived_heads", "grad_norm_values", "entropy_values",
                "pruning_mask", "strategy", "pruning_level", "perplexity_improvement", "recovery_rate", "control_metrics"):
        assert key in results
    assert len(results["pruned_heads"]) == 6 and results["control_metrics"]["perplexity"] > 0


@pytest.mark.parametrize("strategy", ["gradient", "entropy", "combined", "random", "taylor", "magnitude", "iterative"])
def test_same_seed_same_masks_and_metrics(strategy):
    runs = [loop(build("gpt2").train(), strategy=strategy, seed=3) for _ in range(2)]
    assert torch.equal(runs[0]["pruning_mask"], runs[1]["pruning_mask"]) and runs[0]["final_metrics"] == runs[1]["final_metrics"]
    assert {key: str(value) for key, value in runs[0]["training_metrics"].items()} == {key: str(value) for key, value in runs[1]["training_metrics"].items()}


def test_global_random_state_is_left_alone():
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    expected = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    loop(build("gpt2"), strategy="iterative", control=True)
    PlasticityTrainer(build("gpt2"), train_dataloader=batches(build("gpt2")), max_steps=1)
    assert random.getstate() == expected[0] and np.random.get_state()[1].tolist() == expected[1] and torch.equal(torch.get_rng_state(), expected[2])


def test_removal_before_recovery():
    model = build("gpt2")
    size = sum(p.numel() for p in model.parameters())
    results = loop(model, strategy="taylor", mode="remove")
    assert sum(p.numel() for p in model.parameters()) < size and dormant_heads(model) == [] and len(results["pruned_heads"]) == 6


def test_restore_after_training_keeps_what_was_learnt():
    """Columns that stayed awake keep the training's change; the compensation alone is taken back."""
    model = build("gpt2")
    data = batches(model)
    put_to_sleep(model, SIBLINGS, zero_weights=True)
    original = build("gpt2").transformer.h[1].attn.c_proj.weight.detach()
    compensate_heads(model, data)
    compensated = model.transformer.h[1].attn.c_proj.weight.detach().clone()
    train_with_plasticity(model, data, data, (), learning_rate=1e-3, training_steps=3, progress=False)
    learnt = model.transformer.h[1].attn.c_proj.weight.detach() - compensated
    restore_heads(model)
    weight = model.transformer.h[1].attn.c_proj.weight.detach()
    assert torch.equal(weight[:16], original[:16])  # heads 0 and 1 slept
    assert learnt[16:].abs().max() > 0 and torch.allclose(weight[16:], original[16:] + learnt[16:], atol=1e-6)


def test_recovery_rate():
    assert recovery_rate(10.0, 20.0, 12.0) == 0.8
    assert recovery_rate(10.0, 10.0, 9.0) is None and recovery_rate(10.0, 9.5, 9.0) is None


def test_a_callback_can_stop_and_sees_every_evaluation():
    model, seen = build("gpt2"), []
    train_with_plasticity(model, batches(model), batches(model), (), training_steps=10, eval_interval=2, progress=False,
                          callback=lambda step, metrics: seen.append((step, metrics["perplexity"])) or step < 4)
    assert [step for step, _ in seen] == [0, 2, 4]


@pytest.mark.parametrize("options, words", [
    (dict(training_steps=0), "training_steps=0"),
    (dict(eval_interval=-1), "eval_interval=-1"),
    (dict(learning_rate=0.0), "learning_rate"),
])
def test_bad_numbers(options, words):
    model = build("gpt2")
    with pytest.raises(InvalidArgument, match=words):
        train_with_plasticity(model, batches(model), batches(model), (), **options)


def test_bad_loaders():
    model = build("gpt2")
    with pytest.raises(InvalidArgument, match="empty"):
        train_with_plasticity(model, [], batches(model), ())
    with pytest.raises(InvalidArgument, match="empty"):
        train_with_plasticity(model, batches(model), [], ())
    with pytest.raises(InvalidArgument, match="dataloader"):
        PlasticityCallback(PlasticitySchedule())
