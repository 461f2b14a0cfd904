"""The seeds' tensor-handling test: creating attention tensors, their entropy, their figures, and safe display."""
import math
import warnings

import matplotlib.image
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from neural_plasticity import tensors
from neural_plasticity.entropy import calculate_head_entropy
from neural_plasticity.errors import EnvironmentProblem, InvalidArgument, WrongType
from neural_plasticity.tensors import safe_matmul, safe_tensor_to_numpy
from neural_plasticity.visualization import visualize_attention_patterns

WAYS = [False, True]  # the ordinary product, and the careful one of Apple Silicon's CPU


def attention(way, batch=2, heads=3, tokens=6, dim=4, dtype=torch.float32):
    "A causal attention map [B,H,T,T], made with the product under test."
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, batch, heads, tokens, dim, generator=generator, dtype=dtype)
    scores = safe_matmul(query, key.mT, careful=way) / math.sqrt(dim)
    return scores.masked_fill(torch.ones(tokens, tokens, dtype=torch.bool).triu(1), -math.inf).softmax(-1)


# attention tensor creation


@pytest.mark.parametrize("way", WAYS)
def test_attention_rows_are_distributions(way):
    maps = attention(way)
    assert maps.shape == (2, 3, 6, 6)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 3, 6))
    assert not maps.triu(1).any()


def test_both_ways_make_the_same_attention():
    torch.testing.assert_close(attention(True), attention(False))


SHAPES = [((4,), (4,)), ((4,), (4, 3)), ((2, 4), (4,)), ((2, 4), (4, 3)), ((5, 2, 4), (4, 3)), ((4,), (5, 4, 3)), ((5, 2, 4), (4,)),
          ((6, 1, 2, 4), (5, 4, 3)), ((2, 0), (0, 3)), ((0, 4), (4, 3))]  # fmt: skip


@pytest.mark.parametrize("left, right", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.complex64])
def test_careful_product_equals_the_ordinary_one(left, right, dtype):
    torch.manual_seed(0)
    make = (lambda shape: torch.randint(-9, 9, shape)) if dtype == torch.int64 else lambda shape: torch.randn(shape, dtype=dtype)
    a, b = make(left), make(right)
    product = safe_matmul(a, b, careful=True)
    assert product.dtype == dtype
    torch.testing.assert_close(product, torch.matmul(a, b))


@pytest.mark.parametrize("left, right", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gradients_are_the_ordinary_ones_both_ways(left, right, dtype):
    torch.manual_seed(0)
    a, b = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in (left, right))
    grads = [torch.autograd.grad(safe_matmul(a, b, careful=way).abs().square().sum(), (a, b)) for way in WAYS]
    for ordinary, careful in zip(*grads):
        torch.testing.assert_close(careful, ordinary)


def test_a_gradient_for_one_operand_only():
    a, b = torch.randn(2, 3), torch.randn(3, 4, requires_grad=True)
    safe_matmul(a, b, careful=True).sum().backward()
    torch.testing.assert_close(b.grad, a.sum(0)[:, None].expand(3, 4))
    assert a.grad is None and not safe_matmul(a, a.T, careful=True).requires_grad


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 3), max_size=2), st.integers(0, 5), st.integers(0, 5), st.integers(0, 5))
def test_every_step_computes_the_same_product(batch, rows, inner, columns):
    a, b = torch.randn(*batch, rows, inner), torch.randn(inner, columns)
    for name, step in tensors._CAREFUL_STEPS.items():
        if name == "plain Python" and 0 in (rows, inner, columns):
            continue  # empty matrices are NumPy's
        torch.testing.assert_close(step(a, b), a @ b, msg=name)


def fail(a, b):
    raise MemoryError("no room")


def test_steps_are_tried_in_the_seeds_order_and_a_fallback_is_told(monkeypatch):
    a, b, big = torch.randn(3, 4), torch.randn(4, 2), torch.randn(65, 65)
    assert list(tensors._CAREFUL_STEPS) == ["NumPy", "plain Python", "single-threaded torch"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no warning while the first step works
        safe_matmul(a, b, careful=True)
    monkeypatch.setitem(tensors._CAREFUL_STEPS, "NumPy", fail)
    with pytest.warns(RuntimeWarning, match="used plain Python.*NumPy: MemoryError: no room"):
        torch.testing.assert_close(safe_matmul(a, b, careful=True), a @ b)
    with pytest.warns(RuntimeWarning, match="used single-threaded torch.*too many for plain Python"):
        torch.testing.assert_close(safe_matmul(big, big, careful=True), big @ big)
    monkeypatch.setitem(tensors._CAREFUL_STEPS, "plain Python", fail)
    monkeypatch.setitem(tensors._CAREFUL_STEPS, "single-threaded torch", fail)
    with pytest.raises(EnvironmentProblem, match=r"\(3, 4\) and \(4, 2\) failed in every way: NumPy.*plain Python.*single-threaded torch"):
        safe_matmul(a, b, careful=True)


def test_single_threaded_step_puts_the_threads_back(monkeypatch):
    found, seen = torch.get_num_threads(), []
    monkeypatch.setattr(torch, "matmul", lambda a, b: seen.append(torch.get_num_threads()) or fail(a, b))
    with pytest.raises(MemoryError):
        tensors._single_threaded_product(torch.ones(2, 2), torch.ones(2, 2))
    assert seen == [1] and torch.get_num_threads() == found


def test_the_machine_decides_which_way(monkeypatch):
    ways = []
    monkeypatch.setattr(tensors, "_careful_product", lambda a, b: ways.append("careful") or a @ b)
    for apple in (False, True):
        monkeypatch.setattr(tensors, "detect_apple_silicon", lambda: apple)
        safe_matmul(torch.ones(2, 2), torch.ones(2, 2))
        safe_matmul(torch.ones(2, 2, device="meta"), torch.ones(2, 2, device="meta"))  # not on the CPU: always ordinary
        assert ways == ["careful"] * apple


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "a, b, kind, words",
    [
        (np.ones((2, 2)), torch.ones(2, 2), WrongType, "a is ndarray"),
        (torch.ones(2, 2), [[1.0]], WrongType, "b is list"),
        (torch.tensor(1.0), torch.ones(2), InvalidArgument, "a is a single number"),
        (torch.ones(2, 3), torch.ones(2, 3), InvalidArgument, r"\(2, 3\) and \(2, 3\) cannot be multiplied"),
        (torch.ones(2), torch.ones(3), InvalidArgument, "cannot be multiplied"),
        (torch.ones(2, 2, 3), torch.ones(3, 3, 2), InvalidArgument, "cannot be multiplied"),
        (torch.ones(2, 2), torch.ones(2, 2).double(), InvalidArgument, "torch.float32 on cpu, b is torch.float64"),
        (torch.ones(2, 2), torch.ones(2, 2, device="meta"), InvalidArgument, "on meta"),
        (torch.ones(2, 2).bool(), torch.ones(2, 2).bool(), InvalidArgument, "boolean"),
    ],
)
def test_operands_that_do_not_fit_read_the_same_both_ways(a, b, kind, words, way):
    with pytest.raises(kind, match=words):
        safe_matmul(a, b, careful=way)


# entropy calculation


@pytest.mark.parametrize("way", WAYS)
def test_entropy_of_maps_agrees_with_its_definition(way):
    maps = attention(way, dtype=torch.float64)
    rows = -torch.special.xlogy(maps, maps).sum(-1)[..., 1:]  # the first row sees one key only
    visible = torch.arange(2, 7, dtype=torch.float64).log()
    close = dict(check_dtype=False, atol=1e-5, rtol=0)
    torch.testing.assert_close(calculate_head_entropy(maps, normalize=False), rows.mean((0, 2)), **close)
    torch.testing.assert_close(calculate_head_entropy(maps), (rows / visible).mean((0, 2)), **close)


def test_entropy_of_layers_is_one_row_a_layer():
    uniform = torch.ones(6, 6).tril() / torch.arange(1, 7)[:, None]
    focused = torch.eye(6)
    maps = torch.stack([uniform, focused])[None]  # [B=1,H=2,T,T]
    entropy = calculate_head_entropy([maps, maps.flip(1)])
    torch.testing.assert_close(entropy, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))


# visualisation


def hard_to_draw():
    maps = attention(False)
    return {
        "plain": maps,
        "wants gradients": maps.clone().requires_grad_(),
        "bfloat16": maps.bfloat16(),
        "not contiguous": maps.mT.contiguous().mT,
        "array": maps.numpy(),
        "several layers": (maps, maps),
    }


@pytest.mark.parametrize("kind", hard_to_draw())
def test_attention_maps_are_drawn(kind, tmp_path):
    figure = visualize_attention_patterns(hard_to_draw()[kind], layer_idx=0, num_heads=2, title="Two heads", save_path=tmp_path / "maps.png")
    assert isinstance(figure, Figure)
    drawn = [image.get_array() for axes in figure.axes for image in axes.get_images()]
    expected = safe_tensor_to_numpy(attention(False)[0])
    assert any(np.allclose(np.ma.filled(image, 0), expected[0], atol=0.01) for image in drawn if image.shape == (6, 6))
    assert matplotlib.image.imread(tmp_path / "maps.png").std() > 0


# safe display


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool, torch.complex64],
)
def test_every_dtype_leaves_torch_exactly(dtype):
    x = torch.tensor([[0, 1, 2], [3, 4, 5]], dtype=torch.float32).to(dtype)
    array = safe_tensor_to_numpy(x.T)
    assert array.flags["C_CONTIGUOUS"] and array.flags["OWNDATA"]
    assert array.tolist() == [[0, 3], [1, 4], [2, 5]] if dtype != torch.bool else [[False, True], [True, True], [True, True]]
    if dtype in (torch.bfloat16, torch.float8_e4m3fn):
        assert array.dtype == np.float32


def test_conjugate_negative_and_sparse_views_leave_torch():
    z = torch.tensor([[1 + 2j, 3 - 1j]])
    assert safe_tensor_to_numpy(z.conj()).tolist() == [[1 - 2j, 3 + 1j]]
    assert safe_tensor_to_numpy(z.conj().imag).tolist() == [[-2.0, 1.0]]
    assert safe_tensor_to_numpy(torch.eye(2).to_sparse().requires_grad_()).tolist() == [[1, 0], [0, 1]]


def test_the_array_is_its_own():
    x, array = torch.zeros(3), np.zeros(3)
    for source in (x, array):
        safe_tensor_to_numpy(source)[:] = 7
        assert not source.any()


def test_lists_numbers_and_arrays_are_taken_too():
    assert safe_tensor_to_numpy([torch.ones(2, requires_grad=True), [0.0, 2.0], np.zeros(2)]).tolist() == [[1, 1], [0, 2], [0, 0]]
    assert safe_tensor_to_numpy(2.5) == 2.5 and safe_tensor_to_numpy([]).shape == (0,)


@pytest.mark.parametrize("x, kind", [(None, WrongType), ("one", WrongType), ({"a": 1}, WrongType), ([None], WrongType),
                                     ([[1, 2], [3]], InvalidArgument), (torch.ones(2, device="meta"), InvalidArgument)])  # fmt: skip
def test_what_holds_no_numbers_is_refused(x, kind):
    with pytest.raises(kind):
        safe_tensor_to_numpy(x)


@pytest.mark.parametrize("way", WAYS)
def test_a_tensor_from_a_training_step_can_be_shown(way):
    figure = Figure(figsize=(2, 2))
    weights = torch.randn(4, 4, requires_grad=True)
    figure.add_subplot().imshow(safe_tensor_to_numpy(safe_matmul(weights, weights.mT, careful=way)))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    assert np.asarray(canvas.buffer_rgba()).std() > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_tensors_leave_torch_and_multiply_there():
    x = torch.randn(3, 4, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    assert safe_tensor_to_numpy(x).tolist() == x.float().tolist()
    assert safe_matmul(x, x.mT, careful=True).device.type == "cuda"
