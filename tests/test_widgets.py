"""The explorer: every control changes mask, figure, numbers and text at once; the model stays as it is."""
import gc
import json
import re
import subprocess
import sys

import pytest
import torch
from house import NOTEBOOKS, page

pytest.importorskip("ipywidgets")

from neural_plasticity.probing import probe  # noqa: E402
from neural_plasticity.data import load_embedded_model, load_embedded_text, text_dataloader  # noqa: E402
from neural_plasticity.errors import InvalidArgument, PlasticityError, WrongType  # noqa: E402
from neural_plasticity.evaluation import evaluate_model, generate_sample  # noqa: E402
from neural_plasticity.gates import dormant_heads, gate_heads, put_to_sleep, state_of  # noqa: E402
from neural_plasticity.importance import CRITERIA, criteria_within, criterion, measure_heads  # noqa: E402
from neural_plasticity.pruning import PruningStrategy, choose_heads  # noqa: E402
from neural_plasticity.widgets import explore, highest_level, small_slice  # noqa: E402

PROMPT = "The people of this country"


def pieces(name="gpt2"):
    model, tokenizer = load_embedded_model(name)
    blocks = [text_dataloader(load_embedded_text(split)[:1], tokenizer, block_size=32, batch_size=4) for split in ("selection", "validation")]
    return model, tokenizer, *([batch for batch, _ in zip(loader, range(2))] for loader in blocks)


@pytest.fixture(scope="module")
def parts():
    return pieces()


@pytest.fixture(scope="module")
def maps(parts):
    return measure_heads(parts[0], parts[2], criteria_within(3))


def short(parts, **options):
    return explore(*parts, prompt=PROMPT, tokens=128, new_tokens=8, **options)


def shown(explorer):
    return explorer.mask.tolist(), explorer.figure, explorer.perplexity, explorer.sample, *(child.value for child in explorer.children[1:])


def test_a_move_changes_everything_that_is_shown(parts, maps):
    explorer = short(parts, scores=maps)
    assert int(explorer.mask.sum()) == 19  # floor(48 × 0.4)
    before = shown(explorer)
    explorer.level.value = 0.6
    after = shown(explorer)
    assert int(explorer.mask.sum()) == 28
    mask, figure, perplexity, sample, formula, problem, picture, table = (old != new for old, new in zip(before, after))
    assert mask and figure and perplexity and picture and table and not formula and not problem
    explorer.strategy.value = "entropy"
    mask, figure, perplexity, sample, formula, problem, picture, table = (old != new for old, new in zip(after, shown(explorer)))
    assert mask and figure and perplexity and formula and picture and table and not problem
    assert explorer.scores is maps["entropy"]


def test_what_is_shown_is_what_the_library_says(parts, maps):
    model, tokenizer, selection, validation = parts
    explorer = short(parts, scores=maps, level=0.5, strategy="gradient")
    assert explorer.mask.equal(choose_heads(model, selection, 0.5, "gradient"))
    with gate_heads(model, explorer.mask):
        assert explorer.perplexity == evaluate_model(model, validation[:1])["perplexity"]
        assert explorer.sample == generate_sample(model, tokenizer, PROMPT, 8)
    assert explorer.dense_perplexity == evaluate_model(model, validation[:1])["perplexity"]
    assert explorer.dense_sample == generate_sample(model, tokenizer, PROMPT, 8)
    table = explorer.children[-1].value
    assert f"{explorer.perplexity:.2f}" in table and f"{explorer.dense_perplexity:.2f}" in table and "24 of 48 heads (50%)" in table


def test_without_pruning_nothing_changes(parts, maps):
    explorer = short(parts, scores=maps, level=0)
    assert not explorer.mask.any() and explorer.perplexity == explorer.dense_perplexity and explorer.sample == explorer.dense_sample
    assert "unchanged" in explorer.children[-1].value


def test_the_model_and_global_randomness_stay_as_they_are(parts, maps):
    model = parts[0]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    random_state = torch.get_rng_state()
    explorer = short(parts)
    explorer.level.value, explorer.strategy.value = 0.8, "random"
    assert torch.get_rng_state().equal(random_state) and not model.training and state_of(model) is None
    assert all(value.equal(weights[name]) for name, value in model.state_dict().items())
    assert hooks == [len(module._forward_pre_hooks) for module in model.modules()]


def test_every_strategy_that_a_slider_can_afford_is_offered(parts):
    @criterion("first_heads", formula="the index of the head")
    def _first_heads(found):
        return torch.arange(found.exists.numel(), dtype=torch.float32).view(found.exists.shape)

    try:
        explorer = short(parts)
        assert list(explorer.strategy.options) == criteria_within(3) and criteria_within(3)[-1] == "first_heads"
        assert {strategy.value for strategy in PruningStrategy} - set(explorer.strategy.options) == {"iterative", "leave_one_out", "learned_gates"}
        explorer.strategy.value = "first_heads"
        assert explorer.mask.flatten()[:7].all() and not explorer.mask[3:].any()  # the lowest first, one head a layer stays
        assert "the index of the head" in explorer.children[1].value
    finally:
        del CRITERIA["first_heads"]


def test_a_criterion_that_costs_more_is_measured_where_it_is_asked_for(parts):
    measured = []

    @criterion("dear", needs="batches", formula="the index of the head")
    def _dear(found):
        measured.append("dear")
        return -torch.arange(found.exists.numel(), dtype=torch.float32).view(found.exists.shape)

    try:
        assert "dear" not in short(parts).strategy.options and not measured
        explorer = short(parts, strategy="dear", level=0.2)
        assert measured == ["dear"] and list(explorer.strategy.options) == [*criteria_within(3), "dear"]
        assert explorer.mask.flatten()[-7:].all() and int(explorer.mask.sum()) == 9
    finally:
        del CRITERIA["dear"]


def test_the_slider_ends_where_a_layer_would_be_left_without_heads(parts, maps):
    explorer = short(parts, scores=maps)
    assert explorer.level.max == 0.85  # 48 heads, 6 of which stay
    explorer.level.value = 5
    assert explorer.level.value == 0.85 and explorer.mask.sum(1).max() == 7
    assert highest_level(torch.ones(12, 12, dtype=torch.bool)) == 0.9
    assert highest_level(torch.ones(4, 1, dtype=torch.bool)) == 0.2  # of 4 heads that is none yet
    assert highest_level(torch.ones(2, 4, dtype=torch.bool), [(0, 0), (0, 1), (1, 0), (1, 1)]) == 0.35  # 2 of 8 heads are spare


def test_heads_that_are_dormant_are_neither_chosen_nor_counted():
    parts = pieces("llama")
    put_to_sleep(parts[0], [(0, 0), (2, 3)])
    explorer = short(parts, level=0.25)
    assert int(explorer.mask.sum()) == int(probe(parts[0]).exists.sum()) // 4
    assert not explorer.mask[0, 0] and not explorer.mask[2, 3] and dormant_heads(parts[0]) == [(0, 0), (2, 3)]


def test_a_slice_has_as_many_tokens_as_it_should(parts):
    model, _, _, validation = parts
    assert [len(batch["labels"]) for batch in small_slice(validation, model, 130)] == [4, 1]
    assert sum(batch["labels"].numel() for batch in small_slice(validation, model, 10**6)) == 256  # all there is
    with pytest.raises(InvalidArgument, match="2 or more"):
        small_slice(validation, model, 0)


@pytest.mark.parametrize("options, error, words", [
    (dict(level=40), InvalidArgument, r"so 40 % is level=0\.4"),
    (dict(level=0.9), InvalidArgument, r"from 0 to 0\.85"),
    (dict(level="abc"), InvalidArgument, "fraction"),
    (dict(strategy="foo"), InvalidArgument, "unknown strategy 'foo'; there are .*taylor"),
    (dict(strategy="iterative"), InvalidArgument, "rounds"),
    (dict(prompt=3), WrongType, "prompt is a int"),
    (dict(new_tokens=0), InvalidArgument, "at least one new token"),
])
def test_mistakes_are_named(parts, maps, options, error, words):
    with pytest.raises(error, match=words):
        explore(*parts, scores=maps, **options)


def test_an_error_on_the_way_is_shown_and_raised(parts, maps):
    broken = dict(maps) | {"broken": torch.full((6, 8), torch.nan)}
    explorer = short(parts, scores=broken)
    with pytest.raises(PlasticityError, match="NaN"):
        explorer.strategy.value = "broken"
    assert 'role="alert"' in explorer.children[2].value and "NaN" in explorer.children[2].value
    explorer.strategy.value = "taylor"
    assert explorer.children[2].value == ""


def test_everything_has_a_name_for_those_who_cannot_see_it(parts, maps):
    explorer = short(parts, scores=maps)
    assert explorer.level.description == "prune level" and explorer.strategy.description == "strategy"
    [alt] = re.findall(r'<img alt="([^"]*)"', explorer.children[3].value)
    layer, head = explorer.mask.nonzero()[0].tolist()
    assert f"layer {layer}: {head}" in alt
    assert 'aria-live="polite"' in explorer.children[-1].value


def test_text_of_the_model_is_no_html(parts, maps):
    explorer = explore(*parts, prompt="<b>x</b> & y", scores=maps, tokens=64, new_tokens=2)
    assert "&lt;b&gt;x&lt;/b&gt; &amp; y" in explorer.children[-1].value and "<b>x</b>" not in explorer.children[-1].value


def test_a_page_without_widgets_shows_the_same(parts, maps, monkeypatch):
    import IPython.display

    outputs = []
    monkeypatch.setattr(IPython.display, "display", lambda thing, **options: outputs.append(thing))
    explorer = short(parts, scores=maps)
    explorer._ipython_display_()
    static, widget = outputs
    assert widget is explorer.widget
    assert explorer.children[-1].value in static["text/html"] and "data:image/png" in static["text/html"]
    assert f"{explorer.perplexity:.2f}" in static["text/plain"]
    [name] = re.findall(r'^<div class="([^"]+)">', static["text/html"])
    assert f"<style>.{name} {{display: none}}</style>" in explorer.children[3].value  # where the widget lives, it stands alone


def test_importing_the_page_does_not_import_ipywidgets():
    code = "import sys, neural_plasticity.widgets; sys.exit('ipywidgets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("path", NOTEBOOKS, ids=page)
def test_committed_notebooks_hold_no_widget_state(path):
    "It is large, differs in every run, and would stand before the static output on the site."
    assert "widgets" not in json.loads(path.read_text(encoding="utf-8"))["metadata"]


def test_where_the_controls_have_been_nothing_is_computed_again(parts, maps):
    explorer, passes = short(parts, scores=maps), []
    handle = parts[0].register_forward_pre_hook(lambda *_: passes.append(1))
    first = shown(explorer)
    explorer.level.value = 0.6
    assert len(passes) == 1 + 8  # one batch, and as many tokens as the sample has
    passes.clear()
    explorer.level.value = 0.4
    explorer.level.value = 0.0
    handle.remove()
    assert not passes and explorer.perplexity == explorer.dense_perplexity
    explorer.level.value = 0.4
    assert [value for value in shown(explorer) if isinstance(value, (float, list, str))] == [value for value in first if isinstance(value, (float, list, str))]


@pytest.mark.parametrize("enabled", (True, False))
def test_garbage_is_collected_between_the_answers_and_not_during_one(parts, maps, enabled):
    broken, was = dict(maps) | {"broken": torch.full((6, 8), torch.nan)}, gc.isenabled()
    explorer, during = short(parts, scores=broken), []
    handle = parts[0].register_forward_pre_hook(lambda *_: during.append(gc.isenabled()))
    try:
        gc.enable() if enabled else gc.disable()
        explorer.level.value = 0.6
        assert during and not any(during) and gc.isenabled() == enabled
        with pytest.raises(PlasticityError):
            explorer.strategy.value = "broken"
        assert gc.isenabled() == enabled
    finally:
        handle.remove()
        gc.enable() if was else gc.disable()
