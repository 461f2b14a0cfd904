"""What a model shares with others: its wrapper, its parts, its weights, and folders that two write to."""
import os
import threading

import pytest
import torch
from models import batches, build
from torch import nn

import neural_plasticity as npl
from neural_plasticity.config import ExperimentConfig
from neural_plasticity.durable import write_whole
from neural_plasticity.errors import InvalidArgument, UnsupportedModel
from neural_plasticity.gates import gate_heads
from neural_plasticity.run_folder import RunFolder
from neural_plasticity.storage import load_pruned, save_pruned


def test_a_wrapper_is_the_model_that_it_wraps(tmp_path):
    model = build("gpt2")
    npl.apply_pruning_mask(nn.DataParallel(model), [(0, 0)], mode="gate")
    assert npl.dormant_heads(model) == [(0, 0)] == npl.dormant_heads(load_pruned(save_pruned(model, tmp_path / "saved")))


def test_what_was_done_to_a_part_is_not_saved_with_the_whole(tmp_path):
    model = build("gpt2")
    npl.remove_heads(model.transformer, [(0, 0)])
    with pytest.raises(UnsupportedModel, match="through transformer, a part of this GPT2LMHeadModel"):
        save_pruned(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_inside_a_context_nothing_is_saved(tmp_path):
    model = build("gpt2")
    with gate_heads(model, [(0, 0)]), pytest.raises(InvalidArgument, match="leave it first"):
        save_pruned(model, tmp_path / "saved")


def test_columns_that_two_layers_share_are_not_zeroed():
    model = build("gpt2")
    first, second = (block.attn.c_proj for block in model.transformer.h[:2])
    second.weight = first.weight
    with pytest.raises(UnsupportedModel, match=r"h.0.attn.c_proj.weight is also transformer.h.1.attn.c_proj.weight.*mode='gate'"):
        npl.apply_pruning_mask(model, [(0, 0)], mode="zero_weights")
    assert npl.dormant_heads(model) == []


@pytest.mark.parametrize("strategy", ["iterative", "taylor", "random"])
@pytest.mark.parametrize("by", ["head", "group"])
def test_heads_are_chosen_beside_a_layer_without_any(strategy, by):
    model = build("gpt2")
    heads = npl.probe(model).exists.shape[1]
    npl.remove_heads(model, [(0, head) for head in range(heads)])
    mask = npl.choose_heads(model, batches(model), 0.5, strategy, by=by)
    assert not mask[0].any() and mask.any()


def test_a_batch_that_the_model_cannot_take_leaves_no_head_asleep():
    model = build("gpt2")
    with pytest.raises(IndexError):
        npl.compensate_heads(model, [{"input_ids": torch.full((1, 4), 10**6)}], mask=[(0, 0)])
    assert npl.dormant_heads(model) == []


def test_threads_that_write_one_file_each_write_it_whole(tmp_path):
    "The same name at the same time: the last one wins, and nobody sees a part."
    problems = []

    def write(contents):
        for _ in range(50):
            try:
                write_whole(tmp_path / "file", contents)
            except Exception as problem:
                problems.append(problem)

    threads = [threading.Thread(target=write, args=(letter * size,)) for letter, size in (("a", 10_000), ("b", 20_000))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems and (tmp_path / "file").read_text() in ("a" * 10_000, "b" * 20_000) and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_could_not_be_taken_up_is_free_again(tmp_path):
    config = ExperimentConfig(device="cpu")
    with RunFolder(tmp_path, config) as run:
        run.record("baseline", perplexity=1.0)
        child = os.fork()
        if child == 0:  # has the descriptor of the lock, and lives on
            threading.Event().wait(20)
            os._exit(0)

    def interrupted(line):
        raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt), RunFolder(tmp_path, config, interrupted):
            pass
        with RunFolder(tmp_path, config):
            pass
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
