"""Figures: every container of numbers gives the same picture, marks sit where the heads are, nothing leaks, bad input is named."""
import copy
import io
import math
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axis import Axis
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from neural_plasticity import visualization as v
from neural_plasticity.drawing import BLUE, CARD, GREEN, INK, MISSING, MUTED, ORANGE, PINK
from neural_plasticity.errors import InvalidArgument, PlasticityError, WrongType

SHAPES = [(6, 8), (12, 12), (30, 9), (1, 12), (1, 1)]
HISTORY = {"step": [0, 10, 20], "train_loss": [3.0, 2.5, float("nan")], "eval_loss": [3.1, None, 2.9],
           "perplexity": [22.2, None, 18.2], "learning_rate": [1e-4, 5e-5, 0.0], "active_heads": [40, 40, 42],
           "pruned_heads": [8, 8, 6], "revived_heads": [[], [], [(0, 1), (2, 3)]]}
EVENTS = [{"step": 0, "phase": "measure"}, {"step": 0, "phase": "prune", "pruned_heads": [[0, 1], [0, 2], [0, 3]]},
          {"step": 10, "phase": "recover"}, {"step": 10, "phase": "regrow", "revived_heads": [(0, 2)]}]


def random_map(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def attention(batch, heads, length):
    return random_map(batch, heads, length, length).tril().div(random_map(batch, heads, length, length).tril().sum(-1, True))


ALL = {
    "scores": lambda **kw: v.visualize_head_scores(random_map(6, 8), random_map(6, 8) < 0.2, **kw),
    "entropy": lambda **kw: v.visualize_head_entropy(random_map(2, 6, 8), **kw),
    "gradients": lambda **kw: v.visualize_head_gradients(random_map(6, 8), [(0, 1), (5, 7)], [(5, 7)], **kw),
    "decisions": lambda **kw: v.visualize_pruning_decisions(random_map(6, 8), random_map(6, 8) < 0.2, **kw),
    "metrics": lambda **kw: v.visualize_training_metrics(HISTORY, **kw),
    "attention": lambda **kw: v.visualize_attention_patterns((attention(2, 6, 9),) * 3, layer_idx=2, tokens="a $ b $ c d e f g".split(), **kw),
    "timeline": lambda **kw: v.visualize_cycle_timeline(EVENTS, 2, 8, **kw),
}
each_figure = pytest.mark.parametrize("make", ALL.values(), ids=ALL)


def pixels(figure):
    return imread(io.BytesIO(figure._repr_png_()[0]))


def colors(figure):
    "The score map as it was handed to the colours."
    return np.ma.filled(figure.axes[0].collections[0].get_array().astype(float), np.nan)


def marked(figure, kind):
    "The (layer, head) pairs that wear a mark."
    return sorted((int(y), int(x)) for c in figure.axes[0].collections if c.get_gid() == kind for x, y in c.get_offsets())


def title(figure):
    return next(t.get_text() for t in figure.texts if t.get_gid() == "title")


# ---- what every figure does

@each_figure
def test_title_size_and_saved_file(make, tmp_path):
    path = tmp_path / "new" / "folder" / "figure.png"
    figure = make(title="A title of my own", figsize=(7, 5), save_path=str(path))
    assert isinstance(figure, Figure) and title(figure) == "A title of my own"
    assert imread(path).shape == (1000, 1400, 4)  # 5 × 7 inches at 200 dots an inch
    data, size = figure._repr_png_()  # twice the size it asks to be shown at
    assert size == {"width": 700, "height": 500} and imread(io.BytesIO(data)).shape == (1000, 1400, 4)


@each_figure
def test_rounded_opaque_card(make):
    image = pixels(make())
    assert image[0, 0, 3] == 0  # the corner lets the page through
    assert to_hex(image[12, image.shape[1] // 2]) == CARD and (image[30:-30, 30:-30, 3] == 1).all()


@each_figure
def test_user_style_neither_used_nor_changed(make):
    plain = pixels(make())
    with matplotlib.rc_context({"text.color": "white", "axes.labelcolor": "white", "xtick.color": "white", "ytick.color": "white",
                                "xtick.labelcolor": "white", "ytick.labelcolor": "white", "axes.facecolor": "black", "figure.facecolor": "black", "axes.grid": True,
                                "axes.edgecolor": "red", "savefig.facecolor": "black", "savefig.bbox": "tight", "savefig.transparent": True, "image.cmap": "gray", "xtick.top": True}):
        before = dict(matplotlib.rcParams)
        figure = make()
        styled = pixels(figure)
        assert dict(matplotlib.rcParams) == before
    inks = {to_hex(t.get_color()) for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()}
    assert inks <= {INK, MUTED, BLUE, ORANGE, GREEN, PINK}
    assert np.abs(plain - styled).max() < 1e-6


LONG = "A title that says a great many things about every head of this model, and then some more"
MANY = [{"step": 1000 * i, "phase": ("measure", "prune", "recover")[min(i // 40, 2)],
         "pruned_heads": [(i % 6, i % 8)] if 40 <= i < 60 else None} for i in range(120)]
CYCLES = [{"step": step, "phase": phase} for step in range(0, 60, 10) for phase in ("measure", "prune", "compensate", "recover")]
SIZED = {f"{name} {size}": (lambda draw=draw, size=size: draw(random_map(*size), size)) for size in SHAPES for name, draw in {
    "gradients": lambda m, size: v.visualize_head_gradients(m * 1e-5, (m < 0.2).nonzero(), (m < 0.05).nonzero(), title=LONG),
    "decisions": lambda m, size: v.visualize_pruning_decisions(m, m < 0.2, title=LONG),
    "timeline": lambda m, size: v.visualize_cycle_timeline([{"step": 0}, {"step": 1, "pruned_heads": (m < 0.3).nonzero()}], *size, title=LONG),
}.items()} | {
    "many records": lambda: v.visualize_cycle_timeline(MANY, 6, 8), "many phases": lambda: v.visualize_cycle_timeline(CYCLES, 6, 8),
    "many maps": lambda: v.visualize_attention_patterns(attention(1, 12, 128), num_heads=12),
    "many tokens": lambda: v.visualize_attention_patterns(attention(1, 1, 60), tokens=[f"token{i}" for i in range(60)]),
    "one point": lambda: v.visualize_training_metrics({key: values[:1] for key, values in HISTORY.items()}),
}


@pytest.mark.parametrize("make", [*ALL.values(), *SIZED.values()], ids=[*ALL, *SIZED])
def test_no_text_overlaps_another_or_leaves_the_card(make):
    figure = make()
    figure.canvas.draw()
    unseen = {label for axis in figure.findobj(Axis) for tick in axis.get_major_ticks() for label in (tick.label1, tick.label2)
              if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())}
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and t not in unseen]
    boxes = [(t.get_text(), t.get_window_extent()) for t in texts]
    width, height = figure.canvas.get_width_height()
    for text, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, f"{text!r} leaves the card"
    for i, (a, first) in enumerate(boxes):
        for b, second in boxes[i + 1:]:
            overlap = (min(first.x1, second.x1) - max(first.x0, second.x0), min(first.y1, second.y1) - max(first.y0, second.y0))
            assert min(overlap) <= 2, f"{a!r} and {b!r} overlap by {overlap} pixels"


def test_pyplot_is_never_imported():
    code = ("import sys, torch; import neural_plasticity.visualization as v; assert 'matplotlib' not in sys.modules;"
            "v.visualize_head_scores(torch.rand(2, 3))._repr_png_(); assert 'matplotlib.pyplot' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_threads_copies_and_pickles_draw_the_same():
    make = ALL["gradients"]
    expected = pixels(make())
    with ThreadPoolExecutor(4) as pool:
        images = list(pool.map(lambda _: pixels(make()), range(8)))
    figure = make()
    for image in images + [pixels(copy.deepcopy(figure)), pixels(pickle.loads(pickle.dumps(figure)))]:
        assert np.array_equal(image, expected)


def test_a_copy_shows_itself_and_not_the_original():
    figure = ALL["scores"]()
    other = copy.deepcopy(figure)
    other.axes[0].clear()
    assert not np.array_equal(pixels(figure), pixels(other))


# ---- score maps

CONTAINERS = {
    "tensor": lambda m: m, "gradient": lambda m: m.clone().requires_grad_(), "bfloat16": lambda m: m.bfloat16(),
    "float64 array": lambda m: m.double().numpy(), "lists": lambda m: m.tolist(), "list of tensors": list,
    "list of arrays": lambda m: [row.numpy() for row in m], "dict": lambda m: {i: row for i, row in enumerate(m)},
    "unordered dict": lambda m: {i: m[i].tolist() for i in reversed(range(len(m)))},
    "batch": lambda m: torch.stack([m - 0.1, m + 0.1]), "batch as lists": lambda m: torch.stack([m, m]).tolist(),
    "dict of batches": lambda m: {i: torch.stack([row, row]) for i, row in enumerate(m)}, "not contiguous": lambda m: m.T.contiguous().T,
}


@pytest.mark.parametrize("wrap", CONTAINERS.values(), ids=CONTAINERS)
@pytest.mark.parametrize("draw", [v.visualize_head_scores, v.visualize_head_entropy, v.visualize_head_gradients])
def test_same_picture_from_every_container(draw, wrap):
    scores = random_map(4, 5) * 0.75 + 0.125
    assert np.allclose(colors(draw(wrap(scores))), scores.numpy(), atol=2**-8)  # bfloat16 keeps 8 bits


@pytest.mark.parametrize("shape", SHAPES)
def test_marks_sit_on_their_heads(shape):
    scores = random_map(*shape)
    mask = scores <= scores.median()
    figure = v.visualize_head_scores(scores, mask)
    assert marked(figure, "pruned") == [tuple(p) for p in mask.nonzero().tolist()] and marked(figure, "revived") == []
    assert figure.axes[0].get_legend().get_texts()[0].get_text() == f"pruned {int(mask.sum())}"
    assert pixels(figure).shape[2] == 4


def test_a_revived_head_wears_the_ring_only():
    figure = v.visualize_head_gradients(random_map(3, 4), pruned_heads=[(0, 0), (1, 1), (1, 1)], revived_heads=torch.tensor([[1, 1], [2, 3]]))
    assert marked(figure, "pruned") == [(0, 0)] and marked(figure, "revived") == [(1, 1), (2, 3)]


def test_layer_zero_on_top_head_zero_left():
    ax = v.visualize_head_scores(random_map(3, 4)).axes[0]
    assert ax.get_ylim() == (2.5, -0.5) and ax.get_xlim() == (-0.5, 3.5)


@pytest.mark.parametrize("uneven", [[[0.1, 0.2, 0.3], [0.4]], {0: [0.1, 0.2, 0.3], 1: [0.4]}, [[0.1, 0.2, 0.3], [0.4, math.nan, math.nan]]])
def test_missing_heads_are_grey(uneven):
    figure = v.visualize_head_scores(uneven)
    figure.canvas.draw()
    faces = [to_hex(c) for c in figure.axes[0].collections[0].get_facecolor()]
    assert faces[4:] == [MISSING, MISSING] and MISSING not in faces[:4]


def test_layers_left_out_of_a_dict_are_grey_rows():
    assert np.isnan(colors(v.visualize_head_scores({2: [0.1, 0.2]}))).tolist() == [[True] * 2, [True] * 2, [False] * 2]


def test_batch_mean_leaves_missing_scores_out():
    batch = torch.tensor([[[1.0, math.nan]], [[3.0, math.nan]]])
    assert np.array_equal(colors(v.visualize_head_scores(batch)), [[2.0, math.nan]], equal_nan=True)


@pytest.mark.parametrize("scores", [torch.zeros(3, 4), torch.full((3, 4), -2.5), torch.full((3, 4), math.nan), torch.full((1, 1), 1e-12)])
def test_constant_and_empty_maps_draw(scores):
    image = pixels(v.visualize_head_scores(scores))
    assert len(np.unique(image.reshape(-1, 4), axis=0)) > 10


def test_entropy_colours_span_what_entropy_can_be():
    half = torch.full((2, 3), 0.5)
    assert v.visualize_head_entropy(half).axes[0].collections[0].get_clim() == (0, 1)
    nats = v.visualize_head_entropy(half * 6, normalize=False)
    assert nats.axes[0].collections[0].get_clim() == (0, 3) and "nats" in nats.axes[1].get_xlabel()


def test_pruned_count_of_each_layer():
    scores = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, math.nan]])
    figure = v.visualize_pruning_decisions(scores, [[True, False, False], [True, True, False]])
    assert [t.get_text() for t in figure.axes[1].texts[:2]] == ["1/3", "2/2"]
    nothing = v.visualize_pruning_decisions(scores, torch.zeros(2, 3, dtype=torch.bool))
    assert marked(nothing, "pruned") == [] and nothing.axes[1].texts[0].get_text() == "0/3"


@pytest.mark.parametrize("scores, error", [
    (torch.rand(2, 2, 2, 2), InvalidArgument), (torch.empty(0, 4), InvalidArgument), ([], InvalidArgument), ({}, InvalidArgument),
    (torch.tensor([[1.0, math.inf]]), InvalidArgument), ([[[1.0, 2.0]], [[1.0]]], InvalidArgument), ({"a": [1.0]}, InvalidArgument),
    ({-1: [1.0]}, InvalidArgument), ("scores", WrongType), (None, WrongType), ([["a"]], WrongType), (torch.ones(2, 2) * 1j, WrongType)])
@pytest.mark.parametrize("draw", [v.visualize_head_scores, v.visualize_head_entropy, v.visualize_head_gradients,
                                  lambda scores: v.visualize_pruning_decisions(scores, torch.ones(2, 2))])
def test_bad_scores_are_named(draw, scores, error):
    with pytest.raises(error, match="scores|entropy_values|grad_norm_values"):
        draw(scores)


@pytest.mark.parametrize("options, error, words", [
    ({"mask": torch.zeros(8, 6)}, InvalidArgument, r"mask has the shape \[8, 6\], the scores have \[6, 8\]"),
    ({"mask": random_map(6, 8)}, InvalidArgument, "True and False"),
    ({"pruned_heads": [(6, 0)]}, InvalidArgument, r"\(6, 0\).*6 layers × 8 heads"),
    ({"revived_heads": [(0, -1)]}, InvalidArgument, "revived_heads"),
    ({"pruned_heads": [0, 1]}, WrongType, "pairs"), ({"pruned_heads": 3}, WrongType, "pairs"),
    ({"pruned_heads": [(0.5, 1)]}, WrongType, "integers"), ({"pruned_heads": random_map(6, 2) > 0.5}, WrongType, "pairs"),
    ({"figsize": (4,)}, WrongType, "inches"), ({"figsize": "big"}, WrongType, "inches"), ({"figsize": (-1, 3)}, InvalidArgument, "inches"),
    ({"figsize": (math.nan, 3)}, InvalidArgument, "inches"), ({"save_path": "figure.doc"}, InvalidArgument, "png"),
    ({"colormap": "rainbows"}, InvalidArgument, "viridis")])
def test_bad_options_are_named(options, error, words):
    with pytest.raises(error, match=words):
        v.visualize_head_scores(random_map(6, 8), **options)


@pytest.mark.parametrize("values", [torch.full((2, 2), 1.2), torch.full((2, 2), -0.3)])
def test_entropy_that_cannot_be_is_refused(values):
    with pytest.raises(InvalidArgument, match="normalize=False|negative"):
        v.visualize_head_entropy(values)


# ---- training

def lines(figure):
    return {line.get_gid(): (list(line.get_xdata()), list(line.get_ydata())) for ax in figure.axes for line in ax.lines}


def test_history_is_drawn_where_it_was_measured():
    drawn = lines(v.visualize_training_metrics(HISTORY))
    assert drawn["train_loss"] == ([0, 10], [3.0, 2.5]) and drawn["eval_loss"] == ([0, 20], [3.1, 2.9])
    assert drawn["revived_heads"] == ([0, 10, 20], [0, 0, 2]) and drawn["pruned_heads"][1] == [8, 8, 6]
    assert len(drawn) == 7


def test_panels_only_for_what_was_recorded():
    figure = v.visualize_training_metrics({"step": [5], "eval_loss": [2.0], "perplexity": [None], "epoch": ["ignored"]})
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["loss (nats per token)"]


def test_history_of_tensors_and_arrays():
    drawn = lines(v.visualize_training_metrics({"step": np.arange(2), "train_loss": torch.tensor([2.0, 1.0]).bfloat16()}))
    assert drawn["train_loss"] == ([0, 1], [2, 1])


@pytest.mark.parametrize("history, error, words", [
    ({}, InvalidArgument, "step"), ({"train_loss": [1.0]}, InvalidArgument, "step"), ({"step": []}, InvalidArgument, "empty"),
    ({"step": [], "train_loss": []}, InvalidArgument, "empty"), ({"step": [0, 1], "train_loss": [1.0]}, InvalidArgument, "differ in length"),
    ({"step": [1, 0], "train_loss": [1.0, 1.0]}, InvalidArgument, "never go down"), ({"step": [None], "train_loss": [1.0]}, InvalidArgument, "step"),
    ({"step": [0], "train_loss": ["x"]}, WrongType, "train_loss"), ({"step": [0], "train_loss": 1.0}, WrongType, "train_loss"),
    ([{"step": 0}], WrongType, "dict"), (None, WrongType, "dict")])
def test_bad_history_is_named(history, error, words):
    with pytest.raises(error, match=words):
        v.visualize_training_metrics(history)


# ---- attention patterns

def shown(figure):
    return {ax.get_title(loc="left"): np.asarray(ax.images[0].get_array()) for ax in figure.axes if ax.images}


@pytest.mark.parametrize("pick, heads", [(lambda m: (m, m), 4), (lambda m: [m], 4), (lambda m: m, 4), (lambda m: m[0], 4),
                                         (lambda m: m[0, 0], 1), (lambda m: m.numpy(), 4), (lambda m: m.tolist(), 4),
                                         (lambda m: m[0, 0].tolist(), 1), (lambda m: torch.stack([m, m]), 4)])
def test_attention_in_every_form(pick, heads):
    maps = attention(2, 6, 5)
    panels = shown(v.visualize_attention_patterns(pick(maps)))
    assert list(panels) == [f"head {h}" for h in range(heads)]
    assert all(np.allclose(panels[f"head {h}"], maps[0, h]) for h in range(heads))


def test_attention_picks_layer_heads_and_sample():
    maps = [attention(2, 6, 5) * (layer + 1) for layer in range(3)]
    panels = shown(v.visualize_attention_patterns(maps, layer_idx=1, head_idx=[5, 2], sample_idx=1))
    assert list(panels) == ["head 5", "head 2"] and np.allclose(panels["head 2"], maps[1][1, 2])
    assert list(shown(v.visualize_attention_patterns(maps, head_idx=3))) == ["head 3"]
    assert len(shown(v.visualize_attention_patterns(maps, num_heads=50))) == 6


def test_attention_panels_share_their_colours():
    figure = v.visualize_attention_patterns(attention(1, 4, 5))
    assert len({ax.images[0].get_clim() for ax in figure.axes if ax.images}) == 1


def test_tokens_are_no_formulas_and_long_ones_are_cut():
    tokens = ["$x", "y$", "Ġthe", "\n", "incomprehensibilities"]
    figure = v.visualize_attention_patterns(attention(1, 1, 5), tokens=tokens)
    labels = figure.axes[0].get_yticklabels()
    assert [t.get_text() for t in labels][:4] == ["$x", "y$", "·the", "⏎"] and len(labels[4].get_text()) <= 12
    assert not any(t.get_parse_math() for t in labels)


@pytest.mark.parametrize("options, error, words", [
    ({"attention_maps": ()}, InvalidArgument, "eager"), ({"layer_idx": 2}, InvalidArgument, "layer_idx is 2"), ({"layer_idx": -1}, InvalidArgument, "layer_idx"),
    ({"layer_idx": "1"}, WrongType, "layer_idx"), ({"head_idx": 6}, InvalidArgument, "head_idx is 6"), ({"head_idx": []}, InvalidArgument, "head_idx"),
    ({"num_heads": 0}, InvalidArgument, "num_heads"), ({"sample_idx": 2}, InvalidArgument, "sample_idx"),
    ({"tokens": ["a"]}, InvalidArgument, "tokens"), ({"attention_maps": (None,)}, WrongType, r"attention_maps\[0\]"),
    ({"attention_maps": torch.rand(5)}, InvalidArgument, "shape"), ({"attention_maps": 3}, WrongType, "attention_maps"),
    ({"attention_maps": torch.rand(5, 5), "layer_idx": 1}, InvalidArgument, "layer_idx")])
def test_bad_attention_is_named(options, error, words):
    with pytest.raises(error, match=words):
        v.visualize_attention_patterns(**{"attention_maps": (attention(2, 6, 5),) * 2, **options})


# ---- the cycle's timeline

def states(figure):
    return colors(figure).astype(int).tolist()


def test_timeline_tells_every_heads_life():
    active, dormant, pruned, revived = range(4)
    figure = v.visualize_cycle_timeline(EVENTS, num_layers=1, num_heads=4)
    assert states(figure) == [[active] * 4, [active, pruned, dormant, dormant], [active, pruned, dormant, revived],
                              [active, pruned, dormant, dormant]]
    assert marked(figure, "pruned") == [(1, 1), (2, 1), (3, 1)] and marked(figure, "revived") == [(2, 3)]
    assert [t.get_text() for t in figure.axes[1].texts][::-1] == ["4", "1", "2"]  # active heads, where their number changes


def test_timeline_rows_of_uneven_and_large_models():
    exists = torch.ones(2, 4, dtype=torch.bool)
    exists[1, 2:] = False
    assert len(states(v.visualize_cycle_timeline(EVENTS, 2, 4, exists=exists))) == 6
    large = v.visualize_cycle_timeline(EVENTS, 30, 9)
    assert len(states(large)) == 3 and "267 heads active throughout" in large.legends[0].get_texts()[-1].get_text()
    assert len(states(v.visualize_cycle_timeline(EVENTS, 30, 9, only_changed=False))) == 270
    assert len(states(v.visualize_cycle_timeline([{"step": 0}], 12, 12))) == 144  # nothing changed: all are shown


def test_a_head_may_be_pruned_again_after_its_revival():
    again = EVENTS + [{"step": 20, "pruned_heads": [(0, 2)]}]
    assert states(v.visualize_cycle_timeline(again, 1, 4))[2] == [0, 2, 1, 3, 2]


@pytest.mark.parametrize("events, error, words", [
    ([], InvalidArgument, "at least one"), ([{"phase": "prune"}], InvalidArgument, "step"), (["prune"], InvalidArgument, "record"),
    ([{"step": 1}, {"step": 0}], InvalidArgument, "order"), ([{"step": "1"}], WrongType, "number"), (None, WrongType, "records"),
    ([{"step": 0, "pruned_heads": [(0, 4)]}], InvalidArgument, "1 layers × 4 heads"),
    ([{"step": 0, "pruned_heads": [(0, 1), (0, 1)]}], InvalidArgument, "not active"),
    ([{"step": 0, "revived_heads": [(0, 1)]}], InvalidArgument, "not dormant"),
    ([{"step": 0, "pruned_heads": [(0, 1)], "revived_heads": [(0, 1)]}], InvalidArgument, "not dormant"),
    ([{"step": 0, "pruned_heads": 3}], WrongType, "pairs")])
def test_bad_events_are_named(events, error, words):
    with pytest.raises(error, match=words):
        v.visualize_cycle_timeline(events, num_layers=1, num_heads=4)


def test_bad_model_sizes_are_named():
    for options in ({"num_layers": 0, "num_heads": 4}, {"num_layers": 1, "num_heads": 4, "exists": torch.ones(4, 1)},
                    {"num_layers": 1, "num_heads": 4, "exists": torch.tensor([[1, 0, 1, 1]])}):
        with pytest.raises(PlasticityError, match="num_layers|exists"):
            v.visualize_cycle_timeline(EVENTS, **options)
