"""Score maps are what their formulas say: per-sample gate gradients against a loop and against finite differences, entropy against eager maps."""
import pytest
import torch
import torch.nn.functional as F
from models import HEADS, LAYERS, RANDOM, batches, build, inputs, padded, weights

from neural_plasticity.errors import UnsupportedModel
from neural_plasticity.gates import gate_heads, put_to_sleep
from neural_plasticity.importance import CRITERIA, analyze_attention_patterns, calculate_head_gradients, criterion, measure_entropy, measure_heads
from neural_plasticity.probing import anatomy_of

TEXT = ("gpt2", "llama", "llama-grouped", "bert")


def one_by_one(batch, trim):
    "Each sample of a batch as a batch of one, without its padding if that can be cut off."
    for row in range(len(batch["labels"])):
        one = {key: value[row:row + 1] for key, value in batch.items()}
        yield {key: value[:, : int(one["attention_mask"].sum())] for key, value in one.items()} if trim else one


def gate_gradient(model, one):
    "[L,H]: ∂loss/∂gate of the model's own loss."
    gates = torch.ones(LAYERS, HEADS, dtype=model.dtype, requires_grad=True)
    with gate_heads(model, gates):
        loss = model(**one).loss
    return torch.autograd.grad(loss, gates)[0]


@pytest.mark.parametrize("side", ("right", "left", None))
@pytest.mark.parametrize("name", RANDOM)
def test_taylor_equals_a_loop_over_samples(name, side):
    model = build(name)
    if side and name == "vit":
        pytest.skip("pictures have no padding")
    data = [padded(model, (9, 4, 6), side), padded(model, (3, 9), side, seed=2)] if side else batches(model, batch=3)
    rows = [gate_gradient(model, one).abs() for batch in data for one in one_by_one(batch, trim=side == "right")]
    expected = torch.stack(rows)
    scores = measure_heads(model, data, ("taylor",))
    torch.testing.assert_close(scores["taylor"], expected.mean(0), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(scores.stderr["taylor"], expected.std(0) / len(expected) ** 0.5, atol=1e-6, rtol=1e-3)
    assert scores.samples == len(expected)


def loss_in_double(model, batch):
    "A causal model's own loss is computed in float32, too coarse for a difference quotient."
    labels, logits = batch["labels"], model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    if model.config.model_type in ("gpt2", "llama"):
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))


@pytest.mark.parametrize("name", RANDOM)
def test_taylor_equals_finite_differences_of_the_gate(name):
    model = build(name).double()
    [batch] = batches(model, 1, batch=1)
    step, expected = 1e-2, torch.zeros(LAYERS, HEADS, dtype=torch.float64)  # not smaller: LLaMA's norm computes in float32 whatever it is given
    for layer in range(LAYERS):
        for head in range(HEADS):
            losses = {}
            for steps in (-2, -1, 1, 2):
                gates = torch.ones(LAYERS, HEADS, dtype=torch.float64)
                gates[layer, head] += steps * step
                with gate_heads(model, gates), torch.no_grad():
                    losses[steps] = loss_in_double(model, batch)
            expected[layer, head] = ((8 * (losses[1] - losses[-1]) - (losses[2] - losses[-2])) / (12 * step)).abs()  # error of order step⁴
    torch.testing.assert_close(measure_heads(model, [batch])["taylor"].double(), expected, atol=3e-5, rtol=1e-3)


@pytest.mark.parametrize("name", RANDOM)
def test_dormant_heads_score_zero(name):
    model = build(name)
    put_to_sleep(model, [(0, 1), (2, 3)], zero_weights=True)
    scores = measure_heads(model, batches(model))["taylor"]
    assert scores[0, 1] == scores[2, 3] == 0 and (scores > 0).sum() == LAYERS * HEADS - 2


@pytest.mark.parametrize("name", RANDOM)
def test_gradient_norms_equal_autograd(name):
    model = build(name)
    expected = []
    for batch in batches(model):
        model.zero_grad()
        model(**batch).loss.backward()
        rows = []
        for site in anatomy_of(model).sites:
            projection = model.get_submodule(site.projection)
            gradient = projection.weight.grad if type(projection).__name__ == "Conv1D" else projection.weight.grad.T
            rows.append([gradient[columns].norm() for columns in site.columns])
        expected.append(torch.tensor(rows))
    model.zero_grad()
    torch.testing.assert_close(calculate_head_gradients(model, batches(model)), torch.stack(expected).mean(0), atol=1e-7, rtol=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())


# --- 5: streaming entropy against attention maps ---
def entropies_from_maps(model, batch, normalize):
    "[B,L,H] in float64 from eager attention maps, row by row."
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**{key: value for key, value in batch.items() if key != "labels"}, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    causal = type(model).__name__.endswith("CausalLM") or "LMHead" in type(model).__name__
    samples = []
    for row in range(len(maps[0])):
        real = batch["attention_mask"][row].bool() if "attention_mask" in batch else torch.ones(maps[0].shape[-1], dtype=torch.bool)
        layers = []
        for attention in maps:
            heads = []
            for head in attention[row].double():
                values = []
                for query in real.nonzero().flatten().tolist():
                    seen = real & (torch.arange(len(real)) <= query) if causal else real
                    p = head[query][seen]
                    if len(p) > 1:
                        values.append(-(p * p.clamp(min=1e-300).log()).sum() / (torch.tensor(len(p)).double().log() if normalize else 1))
                heads.append(torch.stack(values).mean())
            layers.append(torch.stack(heads))
        samples.append(torch.stack(layers))
    return torch.stack(samples)


@pytest.mark.parametrize("attention", ("sdpa", "eager"))
@pytest.mark.parametrize("normalize", (True, False))
@pytest.mark.parametrize("side", (None, "right", "left"))
@pytest.mark.parametrize("name", RANDOM)
def test_entropy_equals_that_of_the_maps(name, side, normalize, attention):
    model = build(name)
    if side and name == "vit":
        pytest.skip("pictures have no padding")
    batch = padded(model, side=side) if side else inputs(model)
    expected = entropies_from_maps(model, batch, normalize)
    model.set_attn_implementation(attention)
    torch.testing.assert_close(measure_entropy(model, [batch], normalize=normalize).double(), expected.mean(0), atol=1e-4, rtol=0)
    if normalize and name != "vit":
        found = analyze_attention_patterns(model, batch["input_ids"], batch.get("attention_mask"))
        torch.testing.assert_close(found["entropy_values"].double(), expected, atol=1e-4, rtol=0)
        if side is None:
            scores = measure_heads(model, [{**batch, "labels": batch["input_ids"]}], ("entropy",))
            torch.testing.assert_close(scores["entropy"].double(), -expected.mean(0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", ("right", "left"))
@pytest.mark.parametrize("name", TEXT)
def test_analyze_gives_the_eager_maps(name, side):
    model, batch = build(name), padded(build(name), side=side)
    found = analyze_attention_patterns(model, batch["input_ids"], batch["attention_mask"])["attention_tensors"]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(batch["input_ids"], attention_mask=batch["attention_mask"], output_attentions=True).attentions
    real = batch["attention_mask"].bool()
    for a, b in zip(found, maps):
        torch.testing.assert_close(a.transpose(1, 2)[real], b.transpose(1, 2)[real], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", RANDOM)
def test_all_criteria_at_once_equal_each_alone(name):
    model, data = build(name), batches(build(name))
    together = measure_heads(model, data, tuple(CRITERIA))
    for one in CRITERIA:
        torch.testing.assert_close(together[one], measure_heads(model, data, one)[one], atol=1e-6, rtol=1e-4)
        assert together[one].isfinite().all()


def test_a_new_criterion_is_one_function():
    @criterion("squared", needs="gate_gradients")
    def squared(found):
        return found.per_sample("gate_gradients").pow(2)

    try:
        model = build("gpt2")
        scores = measure_heads(model, batches(model, 3, 1), ("squared", "taylor"))
        variance = scores.stderr["taylor"] ** 2 * 3 * 2 / 3  # mean of squares = square of mean + biased variance
        torch.testing.assert_close(scores["squared"], scores["taylor"] ** 2 + variance, atol=1e-7, rtol=1e-3)
    finally:
        del CRITERIA["squared"]


def test_frozen_half_precision_and_training_models_can_be_measured():
    model = build("gpt2").to(torch.bfloat16).train().requires_grad_(False)
    before = weights(model)
    scores = measure_heads(model, batches(model), ("taylor", "gradient"))
    reference = measure_heads(build("gpt2"), batches(model), ("taylor", "gradient"))
    for name in scores:
        assert torch.corrcoef(torch.stack([scores[name].flatten(), reference[name].flatten()]))[0, 1] > 0.98
    assert model.training and not any(p.requires_grad for p in model.parameters())
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())


def test_measuring_under_inference_mode():
    model = build("gpt2")
    data = batches(model, 2)
    expected = measure_heads(model, data, ("taylor", "entropy"))
    with torch.inference_mode():
        found = measure_heads(model, data, ("taylor", "entropy"))
        made_there = build("gpt2").__class__(model.config)
        with pytest.raises(UnsupportedModel, match="made under torch.inference_mode"):
            measure_heads(made_there, data)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
