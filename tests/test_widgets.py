"""The explorer: every control changes mask, figure, numbers and text at once; the model stays as it is."""
import asyncio
import gc
import html
import json
import re
import subprocess
import sys
import weakref

import pytest
import torch
from house import NOTEBOOKS, page

pytest.importorskip("ipywidgets")

from neural_plasticity.probing import probe  # noqa: E402
from neural_plasticity.data import load_embedded_model, load_embedded_text, text_dataloader  # noqa: E402
from neural_plasticity.errors import InvalidArgument, PlasticityError, StorageError, WrongType  # noqa: E402
from neural_plasticity.evaluation import evaluate_model, generate_sample  # noqa: E402
from neural_plasticity.exploring import _averaged  # noqa: E402
from neural_plasticity.gates import dormant_heads, gate_heads, put_to_sleep, restore_heads, state_of  # noqa: E402
from neural_plasticity.importance import CRITERIA, criteria_within, criterion, measure_heads  # noqa: E402
from neural_plasticity.pruning import PruningStrategy, choose_heads  # noqa: E402
from neural_plasticity.panels import shown_token, strongest_links  # noqa: E402
from neural_plasticity.patterns import measure_attention  # noqa: E402
from neural_plasticity.storage import load_pruned  # noqa: E402
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


PARTS = ("formula", "problem", "key", "about", "attention", "table", "curve")


def shown(explorer):
    "Everything that is seen: the mask, the numbers, the text, each cell of the map, and the parts of the page."
    cells = [(button.style.button_color, button.description, button.tooltip, button.layout is explorer.grid.framed) for button in explorer.grid.buttons.values()]
    return explorer.mask.tolist(), cells, explorer.perplexity, explorer.sample, *(explorer._parts[name].value for name in PARTS)


def marks(explorer):
    return {head: button.description for head, button in explorer.grid.buttons.items() if button.description.strip()}


def test_a_move_changes_everything_that_is_shown(parts, maps):
    explorer = short(parts, scores=maps)
    assert int(explorer.mask.sum()) == 19  # floor(48 × 0.4)
    before = shown(explorer)
    explorer.level.value = 0.6
    after = shown(explorer)
    assert int(explorer.mask.sum()) == 28
    mask, cells, perplexity, sample, formula, problem, key, about, attention, table, curve = (old != new for old, new in zip(before, after))
    assert mask and cells and perplexity and table and not formula and not problem and not key
    explorer.strategy.value = "entropy"
    mask, cells, perplexity, sample, formula, problem, key, about, attention, table, curve = (old != new for old, new in zip(after, shown(explorer)))
    assert mask and cells and perplexity and formula and key and about and table and not problem
    assert set(marks(explorer)) == {tuple(head) for head in explorer.mask.nonzero().tolist()} and set(marks(explorer).values()) == {"×"}
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
        assert list(explorer.strategy.options)[: len(criteria_within(3))] == criteria_within(3) and criteria_within(3)[-1] == "first_heads"
        assert set(explorer.strategy.options) == set(CRITERIA) and {strategy.value for strategy in PruningStrategy} - set(explorer.strategy.options) == {"iterative"}
        assert set(CRITERIA) - set(explorer.maps) == {"leave_one_out", "learned_gates"}
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
        assert "dear" not in short(parts).maps and not measured
        explorer = short(parts, strategy="dear", level=0.2)
        assert measured == ["dear"] and list(explorer.maps) == [*criteria_within(3), "dear"]
        assert explorer.mask.flatten()[-7:].all() and int(explorer.mask.sum()) == 9
        later = short(parts, level=0.2)
        later.strategy.value = "dear"  # measured when it is chosen
        assert measured == ["dear", "dear"] and later.position.strategy == "dear" and later.mask.equal(explorer.mask) and later.scores.equal(explorer.scores)
        later.strategy.value, later.strategy.value = "taylor", "dear"
        assert measured == ["dear", "dear"]
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
    [alt] = re.findall(r'<img alt="([^"]*)"', explorer._static_html())
    layer, head = explorer.mask.nonzero()[0].tolist()
    assert f"layer {layer}: {head}" in alt
    assert 'aria-live="polite"' in explorer.children[-1].value and 'role="status"' in explorer._parts["status"].value
    assert re.search(r'<svg role="img" aria-label="Attention of head', explorer._parts["attention"].value)
    for control in controls(explorer):
        assert control.description or control.tooltip
    for (layer, head), button in explorer.grid.buttons.items():
        assert button.tooltip.startswith(f"layer {layer}, head {head}: {'dormant' if explorer.mask[layer, head] else 'active'}, taylor ")


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
    assert widget["application/vnd.jupyter.widget-view+json"]["model_id"] == explorer.widget.model_id and not widget["text/plain"]  # no words for a page that shows the other
    assert explorer.children[-1].value in static["text/html"] and "data:image/png" in static["text/html"]
    assert f"{explorer.perplexity:.2f}" in static["text/plain"]
    [name] = re.findall(r'^<div class="([^"]+)">', static["text/html"])
    assert f"<style>.{name} {{display: none}}</style>" in explorer._parts["key"].value  # where the widget lives, it stands alone


def test_importing_the_page_does_not_import_ipywidgets():
    code = "import sys, neural_plasticity.controls, neural_plasticity.widgets; sys.exit('ipywidgets' in sys.modules)"
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
    assert shown(explorer) == first


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


# ---- one head at a time


def controls(explorer):
    return [value for value in vars(explorer).values() if hasattr(value, "description")]


def snapshot(model):
    "Weights, buffers and hooks, to see that nothing was left."
    hooks = [(len(module._forward_pre_hooks), len(module._forward_hooks)) for module in model.modules()]
    return {name: value.clone() for name, value in (*model.state_dict().items(), *model.named_buffers())}, hooks, model.training


def same(before, after):
    return before[1:] == after[1:] and before[0].keys() == after[0].keys() and all(value.equal(after[0][name]) for name, value in before[0].items())


def test_a_click_looks_at_a_head_and_changes_nothing_else(parts, maps):
    explorer = short(parts, scores=maps)
    before = shown(explorer)
    explorer.grid.buttons[2, 5].click()
    after = shown(explorer)
    assert explorer.chosen == (2, 5) == (explorer.layer.value, explorer.head.value)
    assert [index for index, (old, new) in enumerate(zip(before, after)) if old != new] == [1, 7, 8]  # the frame in the map, and the head's own parts
    assert [head for head, button in explorer.grid.buttons.items() if button.layout is explorer.grid.framed] == [(2, 5)]
    assert "head (2, 5)" in after[7] and not explorer.history


def test_a_head_is_gated_and_revived_by_hand(parts, maps):
    model, _, _, validation = parts
    explorer = short(parts, scores=maps)
    asleep, awake = (tuple(heads.nonzero()[0].tolist()) for heads in (explorer.mask, ~explorer.mask))
    for head, closed, mark in ((asleep, False, "○"), (awake, True, "⊗")):
        explorer.grid.buttons[head].click()
        assert explorer.toggle_button.description == f"{'gate' if closed else 'revive'} head ({head[0]}, {head[1]})"
        explorer.toggle_button.click()
        assert bool(explorer.mask[head]) == closed and marks(explorer)[head] == mark
        with gate_heads(model, explorer.mask):
            assert explorer.perplexity == evaluate_model(model, validation[:1])["perplexity"]
    assert "2 by hand" in explorer.children[-1].value
    explorer.level.value = 0.6  # a hand outvotes the strategy wherever the level goes
    assert not explorer.mask[asleep] and explorer.mask[awake]
    explorer.grid.buttons[asleep].click()
    explorer.toggle_button.click()  # as the strategy says: no hand is needed for that
    assert explorer.mask[asleep] and marks(explorer)[asleep] == "×" and explorer.position.by_hand == {awake: True}


def test_every_step_can_be_undone(parts, maps):
    explorer = short(parts, scores=maps)
    assert explorer.undo_button.disabled
    seen = [(explorer.position, shown(explorer))]
    for step in (lambda: explorer.level.set_trait("value", 0.6), lambda: explorer.toggle_button.click(), lambda: explorer.strategy.set_trait("value", "gradient"),
                 lambda: explorer.toggle_button.click()):
        step()
        seen.append((explorer.position, shown(explorer)))
    for position, what in reversed(seen[:-1]):
        assert not explorer.undo_button.disabled
        explorer.undo_button.click()
        assert explorer.position == position and shown(explorer) == what
        assert (explorer.level.value, explorer.strategy.value) == (position.level, position.strategy)
    assert explorer.undo_button.disabled and explorer.undo() is None and not explorer.history


def test_the_keyboard_is_enough(parts, maps):
    "Whatever a click on the map does, two numbers do; the map is no stop on the way, or the last."
    explorer = short(parts, scores=maps)
    explorer.layer.value, explorer.head.value = 3, 7
    assert explorer.chosen == (3, 7) and "head (3, 7)" in explorer._parts["about"].value
    assert (explorer.layer.max, explorer.head.max) == (5, 7)
    buttons = list(explorer.grid.buttons.values())
    if "tabbable" in buttons[0].trait_names():
        assert all(button.tabbable is False for button in buttons) and all(getattr(control, "tabbable", None) is not False for control in controls(explorer))

    def stops(widget):
        return [stop for child in widget.children for stop in stops(child)] if hasattr(widget, "children") else [widget]

    order = [stop for stop in stops(explorer.widget) if stop in controls(explorer) or stop in buttons]
    assert order[: -len(buttons)] == controls(explorer) and len(controls(explorer)) == 15  # all controls come before the map


def test_a_head_that_does_not_exist_is_refused(maps):
    parts = pieces("llama")
    explorer = short(parts, scores=measure_heads(parts[0], parts[2], ["taylor"]))
    chosen = explorer.chosen
    with pytest.raises(InvalidArgument, match="head"):
        explorer.choose(0, 99)
    assert explorer.chosen == chosen


def test_what_a_head_looks_at_is_what_the_library_measures(parts, maps):
    model, tokenizer, *_ = parts
    explorer = short(parts, scores=maps)
    explorer.sentence.value = "The <i>sea</i> is calm and the sea is deep."
    ids = tokenizer(explorer.sentence.value, return_tensors="pt")["input_ids"]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        reference = model(ids, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    found, statistics, tokens = explorer.look(explorer.sentence.value)
    assert all(torch.allclose(found[layer], reference[layer][0], atol=1e-5) for layer in range(6)) and len(tokens) == ids.shape[1]
    measured = measure_attention(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    explorer.grid.buttons[1, 2].click()
    about, attention = explorer._parts["about"].value, explorer._parts["attention"].value
    assert f"{float(measured['entropy'][1, 2]):.2f} nats" in about and f"{float(measured['distance'][1, 2]):.2f} tokens" in about
    layer_map = found[1][2]
    for query, key in strongest_links(layer_map):
        tip = f"<title>“{html.escape(shown_token(tokens[query]))}” looks at “{html.escape(shown_token(tokens[key]))}”: {layer_map[query, key]:.1%}</title>"
        assert tip in attention
    assert "“<" not in attention and "“&lt;" in attention
    with pytest.raises(InvalidArgument, match="two or more"):
        explorer.sentence.value = "a"
    assert explorer.reads.startswith("The <i>") and 'role="alert"' in explorer._parts["problem"].value


def test_closed_without_apply_nothing_is_left(parts, maps):
    model = parts[0]
    before, random_state = snapshot(model), torch.get_rng_state()
    explorer = short(parts, scores=maps)
    explorer.toggle_button.click()
    explorer.level.value = 0.7
    explorer.read_button.click()
    explorer.undo_button.click()
    explorer.close()
    assert state_of(model) is None and same(before, snapshot(model)) and torch.get_rng_state().equal(random_state)


# ---- apply and save


def test_apply_leaves_what_is_shown_and_undo_takes_it_back():
    parts = pieces()
    model = parts[0]
    before = snapshot(model)
    explorer = short(parts, scores={"taylor": torch.arange(48.0).view(6, 8)}, level=0.2)
    explorer.apply_button.click()
    asleep = [tuple(head) for head in explorer.mask.nonzero().tolist()]
    assert dormant_heads(model) == asleep and len(asleep) == 9 and "9 heads" in explorer._parts["status"].value
    perplexity = explorer.perplexity
    assert evaluate_model(model, explorer.batches)["perplexity"] == perplexity
    explorer.toggle(*asleep[0])  # the answers do not depend on what is applied
    assert "Only shown" in explorer._parts["status"].value and dormant_heads(model) == asleep
    explorer.undo_button.click()
    assert explorer.perplexity == perplexity
    explorer.level.value = 0
    explorer.apply_button.click()
    assert not dormant_heads(model) and state_of(model) is None and same(before, snapshot(model))


@pytest.mark.parametrize("zeroed", (False, True))
def test_heads_that_slept_before_can_be_revived_and_put_back(zeroed, tmp_path):
    parts = pieces()
    model = parts[0]
    put_to_sleep(model, [(0, 0), (2, 3)], zero_weights=zeroed)
    before = snapshot(model)
    explorer = short(parts, scores={"taylor": torch.arange(48.0).view(6, 8)}, level=0)
    assert explorer.grid.buttons[0, 0].description == "×" and not explorer.mask.any()
    explorer.toggle(0, 0)
    assert "1 woken" in explorer.children[-1].value and dormant_heads(model) == [(0, 0), (2, 3)] and same(before, snapshot(model))
    saved = load_pruned(explorer.save(tmp_path / "model"))
    assert dormant_heads(saved) == [(2, 3)] and same(before, snapshot(model))
    explorer.apply()
    assert dormant_heads(model) == [(2, 3)] and evaluate_model(model, explorer.batches)["perplexity"] == pytest.approx(explorer.perplexity, rel=1e-6)
    assert evaluate_model(saved, explorer.batches)["perplexity"] == pytest.approx(explorer.perplexity, rel=1e-6)
    explorer.undo()
    explorer.apply()
    assert dormant_heads(model) == [(0, 0), (2, 3)] and same(before, snapshot(model))


def test_saving_writes_what_is_shown_and_leaves_the_model_alone(parts, maps, tmp_path):
    model = parts[0]
    before, explorer = snapshot(model), short(parts, scores=maps)
    explorer.folder.value = str(tmp_path / "pruned")
    explorer.save_button.click()
    assert "Saved in" in explorer._parts["status"].value and state_of(model) is None and same(before, snapshot(model))
    saved = load_pruned(tmp_path / "pruned")
    assert dormant_heads(saved) == [tuple(head) for head in explorer.mask.nonzero().tolist()]
    assert evaluate_model(saved, explorer.batches)["perplexity"] == explorer.perplexity
    explorer.level.value = 0.2
    explorer.save_button.click()  # an earlier save is replaced
    assert len(dormant_heads(load_pruned(tmp_path / "pruned"))) == 9


@pytest.mark.parametrize("folder, error", [("", "InvalidArgument"), ("foreign", "StorageError"), ("file", "StorageError")])
def test_what_cannot_be_saved_is_said_in_one_line(parts, maps, tmp_path, folder, error):
    (tmp_path / "foreign").mkdir()
    for name in ("foreign/letter.txt", "file"):
        (tmp_path / name).write_text("Dear reader")
    model = parts[0]
    before, explorer = snapshot(model), short(parts, scores=maps)
    explorer.folder.value = str(tmp_path / folder) if folder else "  "
    explorer.save_button.click()
    message = explorer._parts["problem"].value
    assert f"<b>{error}:</b>" in message and "\n" not in message and 'role="alert"' in message
    assert (tmp_path / "foreign" / "letter.txt").read_text() == (tmp_path / "file").read_text() == "Dear reader"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "foreign"] and state_of(model) is None and same(before, snapshot(model))
    with pytest.raises((InvalidArgument, StorageError)):  # in code it is raised
        explorer.save(explorer.folder.value)
    explorer.undo_button.click()
    assert explorer._parts["problem"].value == ""


def test_heads_that_are_warming_up_are_left_to_it(maps):
    from neural_plasticity.gates import revive_heads

    parts = pieces()
    put_to_sleep(parts[0], [(0, 0), (1, 1)])
    revive_heads(parts[0], [(0, 0)], warmup_steps=4)
    explorer = short(parts, scores=maps)
    with pytest.raises(InvalidArgument, match="advance_warmup"):
        explorer.apply()
    assert float(state_of(parts[0]).gates[0, 0]) == 0.25


# ---- long work


def test_all_the_text_is_read_where_no_notebook_listens(parts, maps):
    model, _, _, validation = parts
    explorer, shares = short(parts, scores=maps), []
    explorer.progress.observe(lambda change: shares.append(change.new), "value")
    explorer.read_button.click()
    assert shares == [0.5, 1.0] and explorer.work is None and explorer.cancel_button.disabled and explorer.progress.layout.display == "none"
    table = explorer.children[-1].value
    assert f"{evaluate_model(model, validation)['perplexity']:.2f}" in table and "perplexity (248 tokens)" in table
    with gate_heads(model, explorer.mask):
        assert f"<b>{evaluate_model(model, validation)['perplexity']:.2f}</b>" in table
    measured = measure_attention(model, validation)
    for name, values in explorer.statistics.items():
        torch.testing.assert_close(values, measured[name])
    assert "all the text" in explorer._parts["about"].value
    explorer.level.value = 0.6
    assert "perplexity (248 tokens)" not in explorer.children[-1].value  # that position has not been read


def test_cancelled_work_leaves_no_trace(parts, maps):
    explorer = short(parts, scores=maps)
    before, model = shown(explorer), snapshot(parts[0])
    explorer.progress.observe(lambda change: explorer.cancel_button.click(), "value")
    explorer.read_button.click()
    assert explorer.work is None and not explorer.whole and explorer.statistics is None and shown(explorer) == before and same(model, snapshot(parts[0]))
    assert "Cancelled" in explorer._parts["status"].value and explorer.cancel_button.disabled and not explorer.read_button.disabled


@pytest.mark.parametrize("cancel", (False, True))
def test_a_notebook_goes_on_while_all_the_text_is_read(parts, maps, cancel):
    "Between two batches the page's messages are heard, and the model has no gate closed."
    explorer = short(parts, scores=maps)

    async def notebook():
        explorer.read_button.click()
        assert explorer.work is not None and explorer.progress.layout.display is None and explorer.read_button.disabled
        while explorer.work is not None:
            await asyncio.sleep(0)
            assert "plasticity_open" not in parts[0].__dict__
            if cancel and explorer.progress.value == 0.5:
                explorer.cancel_button.click()

    asyncio.run(notebook())
    assert bool(explorer.whole) != cancel and explorer.progress.layout.display == "none"


def test_an_error_in_long_work_is_shown(parts, maps):
    explorer = short(parts, scores=maps)
    explorer.all_batches = [{"input_ids": torch.ones(1, 4, dtype=torch.long)}]
    explorer.read_button.click()
    assert "<b>InvalidArgument:</b>" in explorer._parts["problem"].value and explorer.work is None and not explorer.whole


# ---- measured on demand


def test_what_is_measured_on_demand_is_what_measuring_says(parts, maps):
    few = {"taylor": maps["taylor"]}
    before, explorer, random_state = snapshot(parts[0]), short(parts, scores=few), torch.get_rng_state()
    explorer.strategy.value = "fisher"
    torch.testing.assert_close(explorer.scores, maps["fisher"], equal_nan=True)
    assert explorer.position.strategy == "fisher" and explorer.work is None and list(few) == ["taylor"]
    assert same(before, snapshot(parts[0])) and torch.get_rng_state().equal(random_state)
    explorer.undo_button.click()
    assert explorer.strategy.value == "taylor" == explorer.position.strategy


@pytest.mark.parametrize("passes", (0, 1, 3))
def test_a_measurement_can_be_cancelled(parts, maps, passes):
    "The list goes back to the strategy that is shown; nothing is left on the model; no thread stays."
    import threading

    explorer, threads = short(parts, scores={"taylor": maps["taylor"]}), threading.active_count()
    before, model = shown(explorer), snapshot(parts[0])

    async def notebook():
        explorer.strategy.value = "leave_one_out"
        assert explorer.work is not None and explorer.progress.description == "measuring" and explorer.recover_button.disabled
        while f"{passes} forward passes" not in explorer._parts["status"].value:
            await asyncio.sleep(0.01)
        explorer.cancel_button.click()
        await asyncio.sleep(0.05)

    asyncio.run(notebook())
    assert explorer.strategy.value == "taylor" and "leave_one_out" not in explorer.maps and shown(explorer) == before
    assert same(model, snapshot(parts[0])) and threading.active_count() == threads


def test_one_long_work_at_a_time(parts, maps):
    explorer = short(parts, scores={"taylor": maps["taylor"]})

    async def notebook():
        explorer.read_button.click()
        with pytest.raises(InvalidArgument, match="reading is under way"):
            explorer.strategy.value = "leave_one_out"
        assert explorer.strategy.value == "taylor" and "reading is under way" in explorer._parts["problem"].value
        explorer.cancel_button.click()

    asyncio.run(notebook())
    assert explorer.work is None


# ---- recovery


@pytest.fixture(scope="module")
def train(parts):
    return [batch for batch, _ in zip(text_dataloader(load_embedded_text("train")[:2], parts[1], block_size=32, batch_size=4), range(6))]


def trainable(parts, maps, train, **options):
    return short(parts, scores=maps, train=train, steps=4, learning_rate=1e-3, **options)


def test_without_text_to_train_on_the_button_says_what_to_give(parts, maps):
    explorer = short(parts, scores=maps)
    assert explorer.recover_button.disabled and explorer.steps.disabled and "train=" in explorer.recover_button.tooltip
    with pytest.raises(InvalidArgument, match="train=batches"):
        explorer.recover()
    explorer.level.value = 0.6
    assert explorer.recover_button.disabled


@pytest.mark.parametrize("options, error, words", [
    (dict(steps=0), InvalidArgument, "1 or more"),
    (dict(learning_rate=0), InvalidArgument, "above 0"),
    (dict(train=iter([])), WrongType, "once"),
])
def test_what_cannot_be_trained_with_is_named(parts, maps, options, error, words):
    with pytest.raises(error, match=words):
        short(parts, scores=maps, **options)


def test_the_validation_text_is_not_trained_on(parts, maps):
    with pytest.raises(InvalidArgument, match="says nothing"):
        short(parts, scores=maps, train=parts[3])


def test_a_recovery_is_the_training_of_the_library_and_touches_only_a_copy(parts, maps, train):
    import copy

    from neural_plasticity.training import train_with_plasticity

    explorer = trainable(parts, maps, train)
    twin = copy.deepcopy(parts[0])
    put_to_sleep(twin, explorer.dormant)
    history = train_with_plasticity(twin, train, explorer.batches, [], 1e-3, 4, 1, progress=False)
    before, random_state, pruned = snapshot(parts[0]), torch.get_rng_state(), explorer.perplexity
    explorer.recover_button.click()  # no notebook listens: it runs to its end
    assert explorer._parts["problem"].value == "" and explorer.work is None and explorer.trial is None
    found = explorer.position.recovery
    assert found.history["perplexity"] == history["perplexity"] and found.history["train_loss"][1:] == history["train_loss"][1:]
    assert all(value.equal(dict(found.model.named_parameters())[name]) for name, value in twin.named_parameters())
    assert explorer.recovered_perplexity == history["perplexity"][-1] < pruned == explorer.perplexity
    assert same(before, snapshot(parts[0])) and torch.get_rng_state().equal(random_state)
    table = explorer.children[-1].value
    assert all(f"{value:.2f}" in table for value in (explorer.dense_perplexity, pruned, explorer.recovered_perplexity)) and "recovered in 4 steps" in table
    assert "<polyline" in explorer._parts["curve"].value and "Recovered" in explorer._parts["status"].value


def test_undo_takes_a_recovery_back_and_a_move_leaves_it_behind(parts, maps, train):
    explorer = trainable(parts, maps, train)
    before = shown(explorer)
    explorer.recover()
    recovered = shown(explorer)
    explorer.level.value = 0.2
    assert explorer.position.recovery is None and explorer.recovered_perplexity is None and "recovered" not in explorer.children[-1].value
    explorer.undo_button.click()
    assert shown(explorer) == recovered != before
    explorer.undo_button.click()
    assert shown(explorer) == before and explorer._parts["curve"].value == "" and all(key[-1] is None for key in explorer._answers)


@pytest.mark.parametrize("passes", (0, 1, 2, 5))
def test_a_recovery_can_be_cancelled_at_any_pass(parts, maps, train, passes):
    import threading

    explorer, threads = trainable(parts, maps, train), threading.active_count()
    before, model, random_state = shown(explorer), snapshot(parts[0]), torch.get_rng_state()

    async def notebook():
        explorer.recover_button.click()
        assert explorer.recover_button.disabled and explorer.progress.layout.display is None
        while f"{passes} of 9 forward passes" not in explorer._parts["status"].value:
            await asyncio.sleep(0.005)
        explorer.cancel_button.click()
        await asyncio.sleep(0.05)

    asyncio.run(notebook())
    assert "Cancelled" in explorer._parts["status"].value and explorer.trial is None and not explorer.history
    assert shown(explorer) == before and same(model, snapshot(parts[0])) and torch.get_rng_state().equal(random_state) and threading.active_count() == threads


def test_the_page_goes_on_while_a_model_recovers(parts, maps, train):
    "The curve grows, the slider answers, random numbers are drawn elsewhere; the recovery is the same, and is shown where it belongs."
    alone = trainable(parts, maps, train)
    alone.recover()
    explorer, curves = trainable(parts, maps, train), set()
    pruned = explorer.dormant.clone()

    async def notebook():
        explorer.recover_button.click()
        while explorer.work is not None:
            await asyncio.sleep(0.005)
            torch.rand(3)
            curves.add(explorer._parts["curve"].value)
            if len(curves) == 3:
                explorer.level.value = 0.6

    asyncio.run(notebook())
    assert len(curves) >= 4 and explorer.position.recovery.history == alone.position.recovery.history
    assert explorer.dormant.equal(pruned) and explorer.level.value == 0.4
    explorer.undo_button.click()
    assert explorer.position.level == 0.6 and explorer.recovered_perplexity is None


@pytest.mark.parametrize("zeroed", (False, True))
def test_apply_gives_the_model_the_weights_and_takes_them_back(maps, train, tmp_path, zeroed):
    parts = pieces()
    model = parts[0]
    put_to_sleep(model, [(0, 0), (2, 3)], zero_weights=zeroed)
    before, explorer = snapshot(model), trainable(parts, maps, train)
    explorer.recover_button.click()
    explorer.folder.value = str(tmp_path / "recovered")
    explorer.save_button.click()
    assert same(before, snapshot(model)) and "Only shown" not in explorer._parts["problem"].value
    explorer.apply_button.click()
    recovered = evaluate_model(model, explorer.batches)["perplexity"]
    assert recovered == explorer.recovered_perplexity and dormant_heads(model) == [tuple(head) for head in explorer.dormant.nonzero().tolist()]
    saved = load_pruned(tmp_path / "recovered")
    assert evaluate_model(saved, explorer.batches)["perplexity"] == recovered and dormant_heads(saved) == dormant_heads(model)
    pruned = explorer.perplexity
    explorer.undo_button.click()  # the answers are still about the model as it was
    assert explorer.perplexity == pruned and "takes back" in explorer._parts["status"].value
    explorer.level.value = 0
    assert explorer.perplexity == explorer.dense_perplexity
    explorer.apply_button.click()
    assert same(before, snapshot(model)) and dormant_heads(model) == [(0, 0), (2, 3)] and "2 heads" in explorer._parts["status"].value
    restore_heads(model)
    assert state_of(model) is None and all(value.equal(load_embedded_model("gpt2")[0].state_dict()[name]) for name, value in model.state_dict().items())


def test_a_recovered_model_reads_all_the_text_and_can_be_trained_on(parts, maps, train):
    explorer = trainable(parts, maps, train)
    explorer.recover()
    first = explorer.position.recovery
    explorer.read_button.click()
    with gate_heads(first.model, explorer.dormant):
        assert f"<b>{evaluate_model(first.model, parts[3])['perplexity']:.2f}</b>" in explorer.children[-1].value
    explorer.recover()
    assert explorer.position.recovery is not first and explorer.position.recovery.history["perplexity"][0] == first.history["perplexity"][-1]


def test_a_training_that_diverges_is_shown_and_leaves_no_trace(parts, maps, train):
    explorer = short(parts, scores=maps, train=train, steps=8, learning_rate=1e12)
    before, model = shown(explorer), snapshot(parts[0])
    explorer.recover_button.click()
    assert "<b>InvalidArgument:</b>" in explorer._parts["problem"].value and explorer.position.recovery is None
    explorer._parts["problem"].value = ""
    assert shown(explorer) == before and same(model, snapshot(parts[0])) and explorer.work is None


# ---- large models


def test_270_heads_share_their_styles():
    "A map of 30 × 9 heads adds 270 buttons to the page, and not 270 layouts and styles."
    from neural_plasticity.controls import HeadGrid

    clicked, exists = [], torch.ones(30, 9, dtype=torch.bool)
    exists[4, 7:] = False
    grid = HeadGrid(exists, lambda *head: clicked.append(head))
    scores = torch.arange(270.0).view(30, 9).masked_fill(~exists, torch.nan)
    kinds = dict.fromkeys(grid.buttons, "active")
    assert grid.show(scores, kinds, (0, 0), "taylor") == (0, 269) and len(grid.buttons) == 268
    assert len({button.layout.model_id for button in grid.buttons.values()} | {button.style.model_id for button in grid.buttons.values()}) == 2 + 16
    changed = []
    for button in grid.buttons.values():
        button.observe(changed.append)
    grid.show(scores, kinds | {(3, 3): "dormant"}, (0, 0), "taylor")
    assert {change.owner for change in changed} == {grid.buttons[3, 3]}
    grid.buttons[29, 8].click()
    assert clicked == [(29, 8)]


def test_beyond_what_a_page_can_carry_a_picture_stands_there(parts, maps, monkeypatch):
    import neural_plasticity.widgets

    monkeypatch.setattr(neural_plasticity.widgets, "LARGEST", 40)
    explorer = short(parts, scores=maps)
    assert explorer.grid is None and "<img alt=" in explorer._parts["picture"].value
    before = explorer._parts["picture"].value
    explorer.layer.value, explorer.head.value = 1, 1
    explorer.toggle_button.click()
    assert explorer.chosen == (1, 1) and explorer._parts["picture"].value != before


def test_widgets_may_be_heard_in_a_thread_of_their_own(parts, maps):
    "JupyterLab 4 on ipykernel 7 hears a click in another thread while a piece of work is under way."
    import threading

    explorer, clicks = short(parts, scores=maps), []
    before = shown(explorer)

    def during(*_):  # in the middle of a forward pass
        if not clicks:
            clicks.extend([threading.Thread(target=explorer.cancel_button.click), threading.Thread(target=explorer.level.set_trait, args=("value", 0.6))])
            for click in clicks:
                click.start()
            clicks[0].join(0.2)
            assert clicks[0].is_alive()  # it waits for the piece

    handle = parts[0].register_forward_pre_hook(during)
    try:
        async def notebook():
            explorer.read_button.click()
            while explorer.work is not None or any(click.is_alive() for click in clicks):
                await asyncio.sleep(0.01)

        asyncio.run(notebook())
    finally:
        handle.remove()
    assert not explorer.whole and explorer.position.level == 0.6 and int(explorer.mask.sum()) == 28 and explorer._parts["problem"].value == ""
    explorer.undo()
    assert shown(explorer) == before


def test_a_move_during_an_answer_is_not_taken_back(parts, maps):
    "Pressing an arrow four times: the later values are there before the first is answered."
    import threading

    explorer, later = short(parts, scores=maps), []

    def during(*_):
        if not later:
            later.append(threading.Thread(target=explorer.level.set_trait, args=("value", 0.6)))
            later[0].start()
            later[0].join(0.2)

    handle = parts[0].register_forward_pre_hook(during)
    try:
        explorer.level.value = 0.45
        later[0].join()
    finally:
        handle.remove()
    assert explorer.level.value == 0.6 == explorer.position.level and int(explorer.mask.sum()) == 28


def test_an_interrupted_apply_loses_no_weights(maps, train, monkeypatch):
    parts = pieces()
    explorer = trainable(parts, maps, train)
    before = snapshot(parts[0])
    explorer.recover(2)

    def half(model, other):
        next(model.parameters()).data.zero_()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("neural_plasticity.exploring.become", half)
        with pytest.raises(KeyboardInterrupt):
            explorer.apply()
    explorer.undo()
    explorer.apply()
    restore_heads(parts[0])
    assert same(before, snapshot(parts[0]))
    explorer.close()


def test_closed_it_is_forgotten(maps):
    "ipywidgets keeps what is open for ever, and the buttons know the explorer, which knows the model."
    model, tokenizer, selection, validation = pieces()
    explorer = explore(model, tokenizer, selection, validation, scores=maps, tokens=128, new_tokens=2)
    known = [weakref.ref(explorer), weakref.ref(model)]
    explorer.close()
    del explorer, model
    gc.collect()
    assert [thing() for thing in known] == [None, None]


def test_batches_without_labels_or_length_are_read_with_the_others(parts, maps):
    model, tokenizer, selection, validation = parts
    empty = {**validation[0], "labels": torch.full_like(validation[0]["labels"], -100)}

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([*validation, empty])

    explorer = explore(model, tokenizer, selection, torch.utils.data.DataLoader(Stream(), batch_size=None), scores=maps, tokens=128, new_tokens=2)
    explorer.read_everything()
    assert explorer.on_all_the_text(explorer.asleep)[0] == pytest.approx(evaluate_model(model, validation)["perplexity"])
    explorer.close()


def test_a_batch_with_nothing_to_measure_counts_for_nothing():
    maps = [torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, float("nan")]])]
    assert _averaged([1, 2], maps).tolist() == [[3.0, 2.0]]
