"""Every criterion against a slow computation of its own, its standard errors, criteria from outside the package, and two processes that measure as one."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import HEADS, LAYERS, batches, build, fingerprint, padded, same_weights, weights
from torch.utils.flop_counter import FlopCounterMode
from transformers import BitNetConfig, BitNetForCausalLM

import neural_plasticity.leave_one_out as leave_one_out
from neural_plasticity.errors import InvalidArgument, UnsupportedModel, WrongType
from neural_plasticity.gates import gate_heads, put_to_sleep
from neural_plasticity.importance import CRITERIA, collect_quantities, criteria_within, criterion, measure_entropy, measure_heads
from neural_plasticity.probing import anatomy_of
from neural_plasticity.running import sample_losses

NAMES = ("gpt2", "llama-grouped", "bert")
COLUMNS = ("magnitude", "gradient", "combined", "activation_norm", "brain_surgeon", "brain_surgeon_gradient")


def singles(data, trim=True):
    "Every sample as a batch of one, padding on its right cut off."
    for batch in data:
        for row in range(len(batch["labels"])):
            length = int(batch["attention_mask"][row].sum()) if trim and "attention_mask" in batch else None
            yield {key: value[row : row + 1, :length] for key, value in batch.items()}


def uneven(model):
    return [padded(model, (9, 4, 6)), padded(model, (3, 9), seed=2)]


def slopes_and_labels(model, data):
    "∂L/∂g of the model's own loss, sample by sample, [N,L,H], and how many labels each loss is the mean of."
    slopes, labels = [], []
    for one in singles(data):
        gates = torch.ones(LAYERS, HEADS, requires_grad=True)
        with gate_heads(model, gates):
            slopes.append(torch.autograd.grad(model(**one).loss, gates)[0])
        shifted = type(model).__name__ != "BertForMaskedLM"
        labels.append(float((one["labels"] != -100).sum()) - shifted)
    return torch.stack(slopes), torch.tensor(labels)[:, None, None]


def seen_by_projections(model, one):
    "What goes into every output projection, what comes out, and the gradient of the summed token losses there; for one sample, [T,C] and [T,out], by layer."
    inputs, outputs = [], []
    projections = [model.get_submodule(site.projection) for site in anatomy_of(model).sites]
    handles = [projection.register_forward_hook(lambda _, args, output: inputs.append(args[0][0].detach()) or outputs.append(output)) for projection in projections]
    loss = model(**one).loss
    for handle in handles:
        handle.remove()
    labels = float((one["labels"] != -100).sum()) - (type(model).__name__ != "BertForMaskedLM")
    return inputs, [gradient[0] for gradient in torch.autograd.grad(loss * labels, outputs)]


def column_weight(model, site):
    linear = model.get_submodule(site.projection)
    return (linear.weight if type(linear).__name__ == "Conv1D" else linear.weight.T).detach().double()


def agree(scores, name, expected, rtol=1e-3, atol=1e-6):
    "Score and standard error are those of the per-sample values."
    torch.testing.assert_close(scores[name].double(), expected.double().mean(0), rtol=rtol, atol=atol)
    torch.testing.assert_close(scores.stderr[name].double(), expected.double().std(0) / len(expected) ** 0.5, rtol=10 * rtol, atol=atol)


@pytest.mark.parametrize("name", NAMES)
def test_fisher_and_both_kin_of_taylor_equal_a_loop(name):
    model = build(name)
    slopes, labels = slopes_and_labels(model, uneven(model))
    scores = measure_heads(model, uneven(model), ("fisher", "taylor_per_layer", "signed_taylor"))
    agree(scores, "signed_taylor", -slopes)
    variance = slopes.var(0)  # unbiased
    curvature = labels * (slopes - slopes.mean(0)) ** 2 * len(slopes) / (len(slopes) - 1)
    agree(scores, "fisher", -slopes + curvature / 2)
    same_length = batches(model, 3)
    slopes, labels = slopes_and_labels(model, same_length)
    closed_form = -slopes.mean(0) + labels[0] / 2 * slopes.var(0)
    torch.testing.assert_close(measure_heads(model, same_length, "fisher")["fisher"], closed_form, rtol=1e-3, atol=1e-5)
    assert variance.min() > 0
    absolute = slopes_and_labels(model, uneven(model))[0].abs()
    agree(scores, "taylor_per_layer", absolute / absolute.mean(0).pow(2).sum(1).sqrt()[:, None])
    torch.testing.assert_close(scores["taylor_per_layer"].norm(dim=1), torch.ones(LAYERS))


def test_fisher_of_a_single_sample_has_no_curvature():
    model = build("gpt2")
    [one] = batches(model, 1, batch=1)
    slopes, _ = slopes_and_labels(model, [one])
    scores = measure_heads(model, [one], "fisher")
    torch.testing.assert_close(scores["fisher"], -slopes[0], rtol=1e-4, atol=1e-6)
    assert scores.stderr["fisher"].isnan().all()


@pytest.mark.parametrize("name", NAMES)
def test_activation_norm_is_the_norm_of_what_a_head_adds(name):
    model = build(name)
    expected = []
    for one in singles(uneven(model)):
        inputs, _ = seen_by_projections(model, one)
        expected.append(torch.stack([torch.stack([(rows[:, own].double() @ column_weight(model, site)[own]).norm(dim=1).mean() for own in site.columns])
                                     for rows, site in zip(inputs, anatomy_of(model).sites)]))
    agree(measure_heads(model, uneven(model), "activation_norm"), "activation_norm", torch.stack(expected))


@pytest.mark.parametrize("together", (None, 1, 5))
@pytest.mark.parametrize("name", NAMES)
def test_leave_one_out_equals_closing_one_head_after_the_other(name, together, monkeypatch):
    if together:
        monkeypatch.setattr(leave_one_out, "heads_at_once", lambda *_: together)
    model = build(name)
    put_to_sleep(model, [(1, 2)], zero_weights=True)
    expected = []
    for one in singles(uneven(model)):
        with torch.no_grad():
            dense, rises = model(**one).loss, torch.zeros(LAYERS, HEADS)
            for layer in range(LAYERS):
                for head in range(HEADS):
                    with gate_heads(model, [(layer, head)]):
                        rises[layer, head] = model(**one).loss - dense
        expected.append(rises)
    scores = measure_heads(model, uneven(model), "leave_one_out")
    agree(scores, "leave_one_out", torch.stack(expected), atol=3e-6)
    assert scores["leave_one_out"][1, 2] == 0


def surgeon_by_refitting(model, data):
    "For every sample, layer and head: the squared output error, and its size in the gradients' metric, after a ridge regression of the head on all others."
    seen = [seen_by_projections(model, one) for one in singles(data)]
    plain, metric = torch.zeros(2, len(seen), LAYERS, HEADS, dtype=torch.float64)
    for site in anatomy_of(model).sites:
        rows = torch.cat([inputs[site.index] for inputs, _ in seen]).double()
        deltas = torch.cat([gradients[site.index] for _, gradients in seen]).double()
        if model.get_submodule(site.projection).bias is not None:
            rows = rows - rows.mean(0)
        curvature, weight = deltas.T @ deltas / len(deltas), column_weight(model, site)
        ridge = 1e-3 * rows.pow(2).mean()
        for head, own in enumerate(site.columns):
            others = rows[:, ~own]
            stacked = torch.cat([others, (ridge * len(rows)).sqrt() * torch.eye(others.shape[1], dtype=torch.float64)])
            fit = torch.linalg.lstsq(stacked, torch.cat([rows[:, own], torch.zeros(others.shape[1], int(own.sum()), dtype=torch.float64)])).solution
            error = (rows[:, own] - others @ fit) @ weight[own]
            lengths = [len(inputs[site.index]) for inputs, _ in seen]
            plain[:, site.index, head] = torch.stack([part.mean() for part in error.pow(2).sum(1).split(lengths)])
            metric[:, site.index, head] = torch.stack([part.mean() for part in (0.5 * (error @ curvature) * error).sum(1).split(lengths)])
    return plain, metric


@pytest.mark.parametrize("name", NAMES)
def test_brain_surgeon_is_what_refitting_the_others_leaves(name):
    model = build(name)
    plain, metric = surgeon_by_refitting(model, uneven(model))
    scores = measure_heads(model, uneven(model), ("brain_surgeon", "brain_surgeon_gradient"))
    agree(scores, "brain_surgeon", plain)
    agree(scores, "brain_surgeon_gradient", metric)
    torch.testing.assert_close(measure_heads(model, uneven(model), "brain_surgeon")["brain_surgeon"], scores["brain_surgeon"])


def test_brain_surgeon_of_dormant_heads_is_zero_and_the_others_cannot_lean_on_them():
    model = build("gpt2")
    before = measure_heads(model, batches(model, 4), "brain_surgeon")["brain_surgeon"]
    put_to_sleep(model, [(0, 0), (0, 1)])
    after = measure_heads(model, batches(model, 4), "brain_surgeon")["brain_surgeon"]
    assert after[0, 0] == after[0, 1] == 0 and (after[0, 2:] > before[0, 2:]).all()


def test_learned_gates_keep_the_heads_that_do_something():
    model, alive = build("gpt2"), [(0, 1), (1, 2), (2, 0), (2, 3)]
    for site in anatomy_of(model).sites:
        for head, own in enumerate(site.columns):
            if (site.index, head) not in alive:
                model.get_submodule(site.projection).weight.data[own] = 0
            else:
                model.get_submodule(site.projection).weight.data[own] *= 4
    data = batches(model, 2, batch=4, length=12)
    with torch.no_grad():
        for batch in data:
            predicted = model(input_ids=batch["input_ids"]).logits.argmax(-1)
            batch["labels"] = torch.cat([torch.full_like(predicted[:, :1], -100), predicted[:, :-1]], 1)  # what the whole model says
    scores = measure_heads(model, data, "learned_gates")
    best = scores["learned_gates"].flatten().argsort(descending=True)[:4].tolist()
    assert sorted(divmod(index, HEADS) for index in best) == alive
    assert scores.samples == 4 and scores.stderr["learned_gates"].isfinite().all()  # four folds
    assert measure_heads(model, data, "learned_gates")["learned_gates"].equal(scores["learned_gates"])


def test_learned_gates_leave_dormant_heads_alone():
    model = build("llama")
    put_to_sleep(model, [(0, 3), (2, 1)])
    scores = measure_heads(model, batches(model), "learned_gates")["learned_gates"]
    assert scores[0, 3] == scores[2, 1] == 0 and (scores > 0).sum() == LAYERS * HEADS - 2


def test_the_jackknife_of_combined():
    model, data = build("gpt2"), batches(build("gpt2"), 4)
    without = torch.stack([measure_heads(model, data[:index] + data[index + 1 :], "combined")["combined"] for index in range(4)])
    expected = (3 / 4 * (without - without.mean(0)).pow(2).sum(0)).sqrt()
    torch.testing.assert_close(measure_heads(model, data, "combined").stderr["combined"], expected, rtol=1e-3, atol=1e-6)


def test_all_criteria_on_a_trained_model_with_grouped_heads():
    model = build("llama-trained").train()
    data = [{key: value[:, :16] for key, value in batch.items()} for batch in batches(model, 2, 2)]
    before, values, state = fingerprint(model), weights(model), torch.get_rng_state()
    with torch.no_grad():  # whoever calls
        scores = measure_heads(model, data, tuple(CRITERIA))
    assert all(scores[name].shape == (6, 8) and scores[name].isfinite().all() for name in CRITERIA)
    assert [name for name in CRITERIA if scores.stderr[name].isnan().any()] == ["magnitude", "random"]
    assert fingerprint(model) == before and same_weights(model, values) and torch.get_rng_state().equal(state) and model.training


def test_where_heads_have_no_columns():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BitNetForCausalLM(BitNetConfig(vocab_size=53, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                               bos_token_id=None, eos_token_id=None, pad_token_id=None)).eval()
    for name in COLUMNS:
        with pytest.raises(UnsupportedModel, match="layer 0.*'taylor'"):
            measure_heads(model, batches(model), name)
    others = [name for name in CRITERIA if name not in COLUMNS]
    scores = measure_heads(model, batches(model), others)
    assert all(scores[name].isfinite().all() for name in others) and "leave_one_out" in others


# --- cost ---
@pytest.mark.parametrize("name", ("gpt2", "llama-grouped"))
def test_costs_are_what_they_say(name):
    "Matrix products, counted. A training step is three forward passes. The counter cannot follow gradients to outputs, and learned gates would take long here."
    model, data = build(name), batches(build(name), 2, batch=4)
    measure_heads(model, data)  # some things are found out once for each model

    def products(work):
        with FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops()

    with torch.no_grad():
        forward = products(lambda: [sample_losses(model, batch) for batch in data])
    training = products(lambda: [model(**batch).loss.backward() for batch in data]) / forward
    assert 2.8 < training < 3.1
    costs = {known: products(lambda: measure_heads(model, data, known)) / forward for known in set(CRITERIA) - {"brain_surgeon_gradient", "learned_gates"}}
    for known in ("taylor", "taylor_per_layer", "fisher", "brain_surgeon"):
        assert costs[known] < CRITERIA[known].cost + 0.6, (known, costs)  # Gram matrices and residuals are small beside wide models; here nothing is wide
    assert costs["taylor"] < 2.02 and costs["entropy"] < 1.5 and costs["magnitude"] == costs["random"] == 0
    assert abs(costs["leave_one_out"] - (1 + LAYERS * HEADS)) < 0.1
    shared = products(lambda: measure_heads(model, data, ("taylor", "fisher", "taylor_per_layer", "entropy"))) / forward
    assert shared < costs["taylor"] + 0.5


def test_what_a_slider_can_afford():
    assert set(criteria_within(3)) == set(CRITERIA) - {"leave_one_out", "learned_gates"} and set(criteria_within(0)) == {"magnitude", "random"}


# --- from outside ---
@pytest.fixture
def outside():
    before = set(CRITERIA)
    yield
    for name in set(CRITERIA) - before:
        del CRITERIA[name]


def test_a_criterion_from_outside_that_runs_the_model(outside):
    @criterion("half_closed", needs="batches", formula="rise of the loss when all heads are half closed", source="nobody", cost=2)
    def half_closed(found):
        def rise(batch):
            losses = []
            for factor in (0.5, 1.0):
                with gate_heads(found.model, factor * found.gates):
                    losses.append(sample_losses(found.model, batch)[0])
            return (losses[0] - losses[1])[:, None, None].expand(-1, *found.exists.shape)

        return found.one_more_pass(rise)

    model, data = build("gpt2"), batches(build("gpt2"), 2, 3)
    scores = measure_heads(model, iter(data), ("taylor", "half_closed"))  # an iterator can be read once
    with gate_heads(model, torch.full((LAYERS, HEADS), 0.5)), torch.no_grad():
        halved = torch.cat([sample_losses(model, batch)[0] for batch in data])
    with torch.no_grad():
        expected = halved - torch.cat([sample_losses(model, batch)[0] for batch in data])
    agree(scores, "half_closed", expected[:, None, None].expand(-1, LAYERS, HEADS))
    assert CRITERIA["half_closed"].cost == 2 and scores.samples == 6


def test_what_a_criterion_may_return(outside):
    criterion("pair")(lambda found: (torch.ones(found.exists.shape), torch.zeros(found.exists.shape)))
    criterion("too_small")(lambda found: torch.ones(2))
    criterion("nothing")(lambda found: None)
    model = build("gpt2")
    assert measure_heads(model, batches(model), "pair").stderr["pair"].eq(0).all()
    for name, words in (("too_small", r"\(2,\).*\(3, 4\)"), ("nothing", "NoneType")):
        with pytest.raises(WrongType, match=words):
            measure_heads(model, batches(model), name)
    with pytest.raises(InvalidArgument, match="already"):
        criterion("pair")(str)
    assert criterion("pair")(CRITERIA["pair"].function)  # the same function again, as in a notebook cell that is run twice
    with pytest.raises(InvalidArgument, match="gate_gradients, "):
        criterion("mine", needs=("gate_gradients", "magic"))


# --- several processes ---
_WORK = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from models import build, padded
from neural_plasticity.importance import CRITERIA, measure_entropy, measure_heads
rank, folder = int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
model = build("gpt2")
data = [padded(model, (9, 4, 6)), padded(model, (3, 9), seed=2), padded(model, (5, 5, 8, 2), seed=3)]
scores = measure_heads(model, data, tuple(CRITERIA))
torch.save((dict(scores), scores.stderr, measure_entropy(model, data)), f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def test_two_processes_measure_as_one(tmp_path):
    runs = [subprocess.Popen([sys.executable, "-c", _WORK, str(Path(__file__).parent), str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True) for rank in (0, 1)]
    for run in runs:
        _, trouble = run.communicate(timeout=300)
        assert run.returncode == 0, trouble[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    model = build("gpt2")
    data = [*uneven(model), padded(model, (5, 5, 8, 2), seed=3)]
    scores = measure_heads(model, data, tuple(CRITERIA))
    one = dict(scores), scores.stderr, measure_entropy(model, data)
    for name in one[0]:
        for kind in (0, 1):  # scores, standard errors
            assert torch.equal(first[kind][name].nan_to_num(), second[kind][name].nan_to_num()), name  # the same bits: the same heads are chosen
            torch.testing.assert_close(first[kind][name], one[kind][name], rtol=1e-5, atol=1e-7, equal_nan=True)
    assert torch.equal(first[2], second[2]) and torch.equal(first[2], one[2])
