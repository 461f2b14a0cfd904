"""What is left makes up for what is gone, as far as least squares can."""
import gc
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models import RANDOM, TRAINED, batches, build, cuttable, fingerprint, logits, padded, same_weights, weights

from neural_plasticity.compensation import DenseInputs, compensate_heads
from neural_plasticity.errors import InvalidArgument, UnsupportedModel
from neural_plasticity.examples import example_inputs
from neural_plasticity.gates import dormant_heads, gate_heads, put_to_sleep, restore_heads, revive_heads, state_of
from neural_plasticity.least_squares import InputSums
from neural_plasticity.probing import anatomy_of
from neural_plasticity.pruning import choose_heads
from neural_plasticity.surgery import remove_heads
from neural_plasticity.zoo_models import small_model

HEADS = [(1, 0), (1, 2)]


def inputs_of(model, layer, batch, **context):
    "The output projection's input [tokens, C] of one layer, seen from outside."
    seen = []
    projection = model.get_submodule(anatomy_of(model).sites[layer].projection)
    handle = projection.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].detach()))
    logits(model, batch)
    handle.remove()
    kept = batch["attention_mask"].bool() if "attention_mask" in batch else ...
    return seen[0][kept].flatten(0, -2).double()


@pytest.mark.parametrize("padding", (False, True))
@pytest.mark.parametrize("name", RANDOM)
def test_it_is_the_ridge_solution(name, padding):
    "One layer against a plain augmented least-squares problem in float64; padded positions must not count."
    if padding and name == "vit":
        pytest.skip("pictures have no padding")
    model, ridge = build(name), 1e-2
    batch = {key: value for key, value in (padded(model, (9, 5, 7, 8)) if padding else batches(model, 1, 4)[0]).items() if key != "labels"}
    site = anatomy_of(model).sites[1]
    linear = model.get_submodule(site.projection)
    transposed = type(linear).__name__ != "Conv1D"
    dense = (linear.weight.T if transposed else linear.weight).detach().double().clone()
    x = inputs_of(model, 1, batch)
    kept = ~site.columns[[0, 2]].any(0)
    target, seen = x @ dense, x[:, kept]
    if linear.bias is not None:
        target, shift, seen, mean = target - target.mean(0), target.mean(0), seen - seen.mean(0), seen.mean(0)
    penalty = ridge * seen.pow(2).mean(0).mean()
    left = torch.cat([seen, (penalty * len(seen)).sqrt() * torch.eye(int(kept.sum()), dtype=torch.float64)])
    right = torch.cat([target, (penalty * len(seen)).sqrt() * dense[kept]])
    expected = torch.linalg.lstsq(left, right).solution
    compensate_heads(model, [batch], HEADS, ridge=ridge)
    found = (linear.weight.T if transposed else linear.weight).detach().double()
    torch.testing.assert_close(found[kept], expected, atol=1e-5, rtol=1e-4)
    assert found[~kept].equal(dense[~kept])
    if linear.bias is not None:
        torch.testing.assert_close(linear.bias.detach().double(), build(name).get_submodule(site.projection).bias.double() + shift - mean @ expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", (*RANDOM, *TRAINED))
def test_the_output_comes_closer(name):
    model = build(name)
    data = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches(model, 4, 8, 16)]
    dense = torch.cat([logits(model, batch) for batch in data])
    with gate_heads(model, cuttable(name)):
        gated = torch.cat([logits(model, batch) for batch in data])
    report = compensate_heads(model, data, cuttable(name))
    compensated = torch.cat([logits(model, batch) for batch in data])
    assert (compensated - dense).pow(2).mean() < 0.9 * (gated - dense).pow(2).mean()
    assert set(report.undone) == {layer for layer, _ in cuttable(name)} and all(0 < share <= 1 for share in report.undone.values())


def test_reviving_some_solves_anew_for_the_rest():
    one, other = build("gpt2"), build("gpt2")
    compensate_heads(one, batches(one), [(1, 0), (1, 2)])
    revive_heads(one, [(1, 0)])
    compensate_heads(other, batches(other), [(1, 2)])
    assert dormant_heads(one) == [(1, 2)]
    name = anatomy_of(one).sites[1].projection + ".weight"
    dense = build("gpt2").get_parameter(name)
    a, b = ((model.get_parameter(name) - dense).detach() for model in (one, other))
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)  # the layer's inputs are the same, for nothing changed below it
    assert a.abs().max() > 1e-3


def test_compensated_heads_can_be_removed():
    model = build("llama-grouped")
    compensate_heads(model, batches(model), cuttable("llama-grouped"))
    expected = logits(model)
    remove_heads(model, cuttable("llama-grouped"))
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("data, words", [([], "dataloader is empty"), ([(1, 2)], "batches must be dicts")])
def test_bad_batches_put_nothing_to_sleep(data, words):
    model = build("gpt2")
    anatomy_of(model)
    before, values = fingerprint(model), weights(model)
    with pytest.raises((InvalidArgument, TypeError), match=words):
        compensate_heads(model, data, HEADS)
    assert fingerprint(model) == before and same_weights(model, values)


@pytest.mark.parametrize("error", (RuntimeError, KeyboardInterrupt))
def test_an_error_in_the_middle_leaves_nothing(monkeypatch, error):
    import neural_plasticity.compensation as compensation

    model = build("gpt2")
    values, real, calls = weights(model), compensation._statistics, []

    def struck(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return real(*arguments)

    monkeypatch.setattr(compensation, "_statistics", struck)
    with pytest.raises(error):
        compensate_heads(model, batches(model), [(0, 0), (1, 1), (2, 2)])
    assert dormant_heads(model) == []
    assert same_weights(model, values) and state_of(model) is None


def test_what_cannot_be_made_up_for():
    model = build("gpt2")
    with pytest.raises(InvalidArgument, match="no head is dormant"):
        compensate_heads(model, batches(model))
    with pytest.raises(InvalidArgument, match="ridge"):
        compensate_heads(model, batches(model), HEADS, ridge=0)
    broken = build("gpt2")
    broken.transformer.wte.weight.data[3] = float("nan")
    with pytest.raises(InvalidArgument, match="NaN or infinite"):
        compensate_heads(broken, [{"input_ids": torch.tensor([[3, 4, 5]])}], HEADS)
    put_to_sleep(model, HEADS)
    assert compensate_heads(model, batches(model)).tokens == 36  # two batches of 2 × 9 tokens


def ridge_solution(x_pruned, x_dense, dense, bias, ridge=1e-3):
    "The same by an augmented least-squares problem on the tokens themselves, all columns taking part."
    target, seen = x_dense @ dense, x_pruned
    if bias:
        target, seen = target - target.mean(0), seen - seen.mean(0)
    weight = (ridge * seen.pow(2).mean() * len(seen)).sqrt() * torch.eye(seen.shape[1], dtype=torch.float64)
    return torch.linalg.lstsq(torch.cat([seen, weight]), torch.cat([target, weight @ dense])).solution


def test_where_heads_are_mixed_all_columns_take_part():
    model = small_model("causal-lm", "bitnet")
    site, batch = anatomy_of(model).sites[1], {"input_ids": torch.randint(1, 40, (8, 16), generator=torch.Generator().manual_seed(0))}
    assert site.gate == "attention"
    linear = model.get_submodule(site.projection)
    dense, x_dense = linear.weight.detach().T.double().clone(), inputs_of(model, 1, batch)
    with gate_heads(model, [(1, 0)]):
        x_pruned = inputs_of(model, 1, batch)
    values = weights(model)
    compensate_heads(model, [batch], [(1, 0)])
    torch.testing.assert_close(linear.weight.detach().T.double(), ridge_solution(x_pruned, x_dense, dense, linear.bias is not None), atol=1e-5, rtol=1e-4)
    put_to_sleep(model, [(1, 1)])  # its inputs are others now: what was solved for (1, 0) alone holds no more
    assert linear.weight.detach().T.double().equal(dense)
    restore_heads(model)
    assert same_weights(model, values)


def test_a_decoder_goes_by_its_own_padding():
    model = small_model("seq2seq", "bart")
    batch = {key: value for key, value in example_inputs(model, batch_size=4, length=9).items() if key != "labels"}
    batch["decoder_input_ids"] = batch.get("decoder_input_ids", batch["input_ids"])
    shape = batch["decoder_input_ids"].shape
    batch["attention_mask"] = torch.ones(batch["input_ids"].shape, dtype=torch.long)
    batch["decoder_attention_mask"] = (torch.arange(shape[1])[None] < torch.tensor([9, 5, 4, 7])[:, None]).long().expand(shape)
    sites = anatomy_of(model).sites
    decoder = {id(module) for module in model.get_decoder().modules()}
    inside = [site.index for site in sites if id(model.get_submodule(site.projection)) in decoder]
    assert compensate_heads(model, [batch], [(inside[0], 0)]).tokens == 9 + 5 + 4 + 7
    restore_heads(model)
    assert compensate_heads(model, [batch], [(0, 0)]).tokens == 4 * 9


@pytest.mark.parametrize("task, kind", [("causal-lm", "diffllama"), ("masked-lm", "albert"), ("seq2seq", "t5"), ("seq2seq", "fsmt"), ("image-classification", "swin"), ("speech", "wavlm"), ("speech", "whisper")])
def test_all_kinds_of_sites(task, kind):
    "Pairs of heads, a layer that runs several times, relative positions, sequence first, windows in the batch, sound, encoder and decoder."
    model = small_model(task, kind)
    values, example = weights(model), example_inputs(model, batch_size=4)
    sites = [site for site in anatomy_of(model).sites if site.num_heads > 1]
    heads = [(site.index, head) for site in sites[::max(1, len(sites) // 3)] for head in (site.units[0] if len(site.units) > 1 else (0,))]
    report = compensate_heads(model, [example], heads)
    assert all(0 < share <= 1 + 1e-9 for share in report.undone.values()) and all(1 <= number < 1e12 for number in report.condition.values())
    restore_heads(model)
    assert same_weights(model, values)


def test_only_one_batch_of_inputs_is_held(monkeypatch):
    model, alive, held = build("gpt2"), [], []
    real = InputSums.add

    def add(self, pruned, dense):
        gc.collect()
        held.append(sum(one() is not None for one in alive))
        alive.extend([weakref.ref(pruned), weakref.ref(dense)])
        real(self, pruned, dense)

    monkeypatch.setattr(InputSums, "add", add)
    compensate_heads(model, batches(model, 6), HEADS, max_bytes=0)
    assert len(held) == 6 and max(held) <= 2  # the last batch's, of which the frames that ran it may still hold a name


def test_dense_inputs_are_kept_within_their_limit_and_change_nothing():
    reference, data = build("gpt2"), batches(build("gpt2"), 3)
    compensate_heads(reference, data, HEADS)
    for limit, bytes_ in ((0, 0), (18 * 32 * 4 * 4, 18 * 32 * 4 * 4), (10**9, 3 * 3 * 18 * 32 * 4)):  # 18 tokens × 32 columns × 4 bytes, layer by layer and batch by batch
        model = build("gpt2")
        inputs = DenseInputs(model, data, max_bytes=limit)
        for head in HEADS:
            compensate_heads(model, inputs, [head])
        assert inputs.bytes == bytes_
        torch.testing.assert_close(logits(model), logits(reference), atol=1e-5, rtol=1e-5)
    with pytest.raises(InvalidArgument, match="another model"):
        compensate_heads(reference, inputs)
    with pytest.raises(InvalidArgument, match="max_bytes"):
        DenseInputs(model, data, max_bytes=-1)


def test_a_system_without_a_solution_to_rely_on_changes_nothing():
    model = build("gpt2")
    put_to_sleep(model, [(0, 1)])
    compensate_heads(model, batches(model))
    before, values = logits(model), weights(model)
    with pytest.raises(InvalidArgument, match="larger ridge"):
        compensate_heads(model, batches(model, 1, 1, 4), [(1, 0)], ridge=1e-18)  # 4 tokens, 24 columns
    assert dormant_heads(model) == [(0, 1)] and same_weights(model, values) and logits(model).equal(before)


def test_projections_that_others_use_are_refused_before_anything_changes():
    for name, words in (("squeezebert", "also serves layers"), ("zamba", "shares its weight")):
        model = small_model("masked-lm" if name == "squeezebert" else "causal-lm", name)
        anatomy_of(model)
        before = fingerprint(model)
        with pytest.raises(UnsupportedModel, match=words):
            compensate_heads(model, [example_inputs(model)], [(0, 0)])
        assert fingerprint(model) == before


def _one_of_two(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = build("gpt2")
    data = batches(model, 5)  # an odd number: one process has a batch that does not count
    mask = choose_heads(model, data, 0.4, rounds=3)
    report = compensate_heads(model, data, mask)
    torch.save((mask, report, model.state_dict()), f"{folder}/{rank}.pt")
    other = build("gpt2")
    name = anatomy_of(other).sites[1].projection
    mesh = dist.init_device_mesh("cpu", (2,))
    other.get_submodule(name).weight = torch.nn.Parameter(dist.tensor.distribute_tensor(other.get_submodule(name).weight.data, mesh))
    with pytest.raises(UnsupportedModel, match="before sharding"):
        compensate_heads(other, data, [(1, 0)])
    dist.destroy_process_group()


def test_two_processes_solve_what_one_does(tmp_path):
    mp.spawn(_one_of_two, (str(tmp_path),), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    model = build("gpt2")
    data = batches(model, 5)
    mask = choose_heads(model, data, 0.4, rounds=3)
    report = compensate_heads(model, data, mask)
    for their_mask, their_report, their_weights in found:
        assert their_mask.equal(mask) and their_report.tokens == report.tokens
        assert all(torch.allclose(their_weights[name], value, atol=1e-6) for name, value in model.state_dict().items())
    assert all(found[0][2][name].equal(value) for name, value in found[1][2].items())  # each other's to the last bit
