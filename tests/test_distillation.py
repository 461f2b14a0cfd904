"""The unpruned model teaches: as the same weights where only an adapter is trained, else as a copy. Gates and adapters get along."""

import pytest
import torch
from models import batches, build
from peft import LoraConfig, get_peft_model

from neural_plasticity.compensation import compensate_heads
from neural_plasticity.distillation import Teacher, distillation_loss, unpruned
from neural_plasticity.errors import InvalidArgument
from neural_plasticity.gates import dormant_heads, gate_heads, put_to_sleep, restore_heads, revive_heads
from neural_plasticity.surgery import remove_heads
from neural_plasticity.trainer import PlasticityTrainer
from neural_plasticity.training import run_plasticity_loop

HEADS = [(0, 1), (1, 0), (1, 2), (2, 3)]
TARGETS = {"gpt2": ["c_attn", "c_proj"], "llama-grouped": ["q_proj", "v_proj", "o_proj"]}


def logits(model, data):
    with torch.no_grad():
        return model(**data[0]).logits


def with_lora(model, name):
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS[name], init_lora_weights=False))  # B is not zero, so that the adapter says something


@pytest.mark.parametrize("name", TARGETS)
def test_an_adapter_around_a_gated_projection_is_gated_too(name):
    model, data = build(name), batches(build(name))
    put_to_sleep(model, HEADS)
    before = with_lora(model, name)
    after = with_lora(build(name), name)
    put_to_sleep(after, HEADS)
    with gate_heads(before, [(0, 0)]), gate_heads(after, [(0, 0)]):
        assert torch.equal(logits(before, data), logits(after, data))
    assert torch.equal(logits(before, data), logits(after, data)) and dormant_heads(before) == HEADS
    everything = with_lora(build(name), name)
    restore_heads(before)
    assert torch.equal(logits(before, data), logits(everything, data))


@pytest.mark.parametrize("name", TARGETS)
def test_with_an_adapter_the_teacher_is_the_same_weights(name):
    data = batches(build(name))
    dense = logits(build(name), data)
    model = build(name)
    compensate_heads(model, data, HEADS)
    adapted = with_lora(model, name)
    teacher = Teacher(adapted)
    assert teacher.shared and teacher.model is adapted
    pruned = logits(adapted, data)
    assert torch.allclose(teacher(data[0]), dense, atol=1e-6) and torch.equal(logits(adapted, data), pruned)
    PlasticityTrainer(adapted, train_dataloader=data, learning_rate=1e-2, max_steps=5, distill="self").train()
    assert torch.allclose(Teacher(adapted)(data[0]), dense, atol=1e-6)  # the base never moved
    assert not torch.equal(logits(adapted, data), pruned)


def test_without_an_adapter_the_teacher_is_a_copy_that_does_not_learn():
    model, data = build("gpt2"), batches(build("gpt2"))
    dense = logits(model, data)
    compensate_heads(model, data, HEADS)
    trainer = PlasticityTrainer(model, train_dataloader=data, learning_rate=1e-2, max_steps=5, distill="self")
    assert not trainer.teacher.shared
    trainer.train()
    assert torch.allclose(trainer.teacher(data[0]), dense, atol=1e-6)


@pytest.mark.parametrize("name", TARGETS)
def test_dormant_slices_of_an_adapter_do_not_move(name):
    model, data = with_lora(build(name), name), batches(build(name))
    heads = [(1, 0), (1, 1)]  # a whole group
    trainer = PlasticityTrainer(model, train_dataloader=data, learning_rate=1e-2, max_steps=3)
    trainer.train()  # so that there is momentum
    put_to_sleep(model, heads)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    PlasticityTrainer(model, train_dataloader=data, learning_rate=1e-2, max_steps=20).train()
    after = model.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved and all("lora_" in key for key in moved)
    projection = next(key for key in before if ".1." in key and TARGETS[name][-1] in key and "attn" in key and "lora_A" in key)
    assert torch.equal(before[projection][:, :16], after[projection][:, :16]) and not torch.equal(before[projection][:, 16:], after[projection][:, 16:])
    first = next(key for key in before if ".1." in key and TARGETS[name][0] in key and "attn" in key and "lora_B" in key)
    assert torch.equal(before[first][:16], after[first][:16]) and not torch.equal(before[first][16:], after[first][16:])
    revive_heads(model, heads)
    PlasticityTrainer(model, train_dataloader=data, learning_rate=1e-2, max_steps=2).train()
    assert not torch.equal(before[first][:16], model.state_dict()[first][:16])


def test_distillation_pulls_towards_the_unpruned_model():
    data, distances = batches(build("gpt2-trained"), count=4), {}
    with torch.no_grad():
        wanted = build("gpt2-trained")(**data[0]).logits
    for distill in (None, "self"):
        model = build("gpt2-trained")
        put_to_sleep(model, [(layer, head) for layer in range(6) for head in range(0, 8, 2)])
        PlasticityTrainer(model, train_dataloader=data, learning_rate=3e-4, max_steps=12, distill=distill, distill_weight=1.0).train()
        counted = data[0]["labels"] != -100
        distances[distill] = float(distillation_loss(logits(model, data), wanted, counted) / counted.sum())
    assert distances["self"] < distances[None]


def test_a_model_that_was_cut_needs_a_teacher():
    model, data = build("gpt2"), batches(build("gpt2"))
    remove_heads(model, HEADS)
    with pytest.raises(InvalidArgument, match="teacher="):
        PlasticityTrainer(model, train_dataloader=data, distill="self")
    trainer = PlasticityTrainer(model, train_dataloader=data, max_steps=2, distill="self", teacher=build("gpt2"))
    trainer.train()
    results = run_plasticity_loop(build("gpt2"), data, data, 0.3, mode="remove", training_steps=3, eval_interval=3, distill="self", progress=False)
    assert results["final_metrics"]["perplexity"] > 0


def test_accumulated_steps_distil_as_one_large_step():
    finals = []
    for batch, accumulation in ((4, 1), (2, 2)):
        model, data = build("gpt2"), batches(build("gpt2"), count=4)
        put_to_sleep(model, HEADS)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        rows = [{key: value[row] for key, value in each.items()} for each in data for row in range(len(each["labels"]))][:8]
        from transformers import TrainingArguments

        arguments = TrainingArguments("unused", max_steps=2, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, learning_rate=1e-3, use_cpu=True,
                                      report_to="none", disable_tqdm=True, save_strategy="no", logging_strategy="no")
        PlasticityTrainer(model, arguments, train_dataset=rows, distill="self").train()
        finals.append(logits(model, data))
    assert torch.allclose(*finals, atol=1e-4)


@pytest.mark.parametrize("options, words", [({"distill": "other"}, "'self'"), ({"teacher": "x"}, "distill is None"), ({"distill": "self", "distill_weight": 2}, r"\[0, 1\]"),
                                            ({"distill": "self", "temperature": 0}, "above 0")])
def test_bad_options(options, words):
    with pytest.raises(InvalidArgument, match=words):
        PlasticityTrainer(build("gpt2"), train_dataloader=batches(build("gpt2")), **options)


def test_unpruned_leaves_everything_as_it_was():
    model, data = build("llama-grouped").train(), batches(build("llama-grouped"))
    compensate_heads(model, data, HEADS)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="oops"), unpruned(model):
        assert not model.training and not torch.equal(model.state_dict()["model.layers.1.self_attn.o_proj.weight"], before["model.layers.1.self_attn.o_proj.weight"])
        raise RuntimeError("oops")
    assert model.training and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
