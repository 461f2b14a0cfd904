"""What the kernel must get right, in Triton's interpreter; tests/test_attention_kernel.py runs this in a process of its own."""
import pytest
import torch
from hypothesis import given, settings
from test_entropy import random_qk
from test_streaming import ALL, assert_same, problems, reference

from neural_plasticity.attention_kernel import kernel_statistics, why_not_kernel
from neural_plasticity.row_blocks import state_problem
from neural_plasticity.streaming import attention_statistics, statistics_path

SMALL = (16, 16, 4, 2)  # blocks so small that tiny problems have several


@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_the_kernel_equals_the_definitions(problem):
    query, key, arguments = problem
    stated = state_problem(query, key, **arguments)
    assert why_not_kernel(stated) is None
    assert_same(kernel_statistics(stated, ALL, shape=SMALL), reference(query, key, **arguments))


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 33, 100])
def test_lengths_about_the_edges_of_blocks(length):
    query, key = random_qk(length, T=length, D=16)
    for arguments in (dict(is_causal=True), {}, dict(is_causal=True, window=5), dict(window=20), dict(is_causal=True, window=40)):
        assert_same(kernel_statistics(state_problem(query, key, **arguments), ALL, shape=(32, 16, 4, 2)), reference(query, key, **arguments))


def test_tensors_as_transformers_lays_them_out():
    query, key = random_qk(1, T=20, D=16)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key)]
    wide = [x.repeat_interleave(2, -1)[..., ::2] for x in (query, key)]  # the last dimension in steps of two
    for given_ in (strided, wide):
        assert_same(kernel_statistics(state_problem(*given_, is_causal=True), ALL), reference(query, key, is_causal=True))


@pytest.mark.parametrize("name", ALL)
def test_one_statistic_alone(name):
    query, key = random_qk(2)
    found = attention_statistics(query, key, name, is_causal=True)
    assert list(found) == [name] and statistics_path(query, key, name) == "kernel"
    assert_same(found, reference(query, key, is_causal=True))


def test_what_it_does_not_do():
    query, key = random_qk(3, D=300)
    assert "up to 256" in why_not_kernel(state_problem(query, key))
    assert "float64" in why_not_kernel(state_problem(query[..., :8].double(), key[..., :8].double()))


def test_inputs_that_are_not_finite_are_told_by_the_entropy():
    query, key = random_qk(4)
    query[0, 1, 3, 0] = torch.nan
    entropy = kernel_statistics(state_problem(query, key), ("entropy",))["entropy"]
    assert entropy.isinf().nonzero().tolist() == [[0, 1, 3]] and not entropy.isnan().any()
