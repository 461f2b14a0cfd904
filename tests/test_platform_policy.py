"""Every rule of `platform_policy`, and that `setup()` applies what it says and nothing else."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neural_plasticity.environment import (
    THREAD_VARIABLES,
    detect_apple_silicon,
    detect_colab,
    detect_notebook,
    get_environment_info,
    platform_policy,
    setup,
)
from neural_plasticity.errors import InvalidArgument, WrongType

ROOT = Path(__file__).resolve().parents[1]
MAC = dict(system="Darwin", machine="arm64", mps_available=True)
LINUX = dict(system="Linux", machine="x86_64")
COLAB = dict(system="Linux", machine="x86_64", is_colab=True, in_notebook=True)

# facts -> place, device, threads, matplotlib backend, careful tensors
CASES = {
    "mac script": (MAC, "apple-silicon", "cpu", 1, "Agg", True),
    "mac notebook": (MAC | dict(in_notebook=True), "apple-silicon", "cpu", 1, None, True),
    "mac without metal": (MAC | dict(mps_available=False), "apple-silicon", "cpu", 1, "Agg", True),
    "mac, mps asked for": (MAC | dict(device="mps"), "apple-silicon", "mps", 1, "Agg", True),
    "mac, mps asked for in a notebook": (MAC | dict(device="mps", in_notebook=True), "apple-silicon", "mps", 1, None, True),
    "mac as colab's local runtime": (MAC | dict(is_colab=True, in_notebook=True), "apple-silicon", "cpu", 1, None, True),
    "intel mac": (dict(system="Darwin", machine="x86_64", mps_available=True), "plain", "cpu", None, None, False),
    "intel mac, mps asked for": (dict(system="Darwin", machine="x86_64", mps_available=True, device="mps"), "plain", "mps", None, None, False),
    "colab with gpu": (COLAB | dict(cuda_devices=1), "colab", "cuda", None, None, False),
    "colab without gpu": (COLAB, "colab", "cpu", None, None, False),
    "script on colab": (COLAB | dict(in_notebook=False, cuda_devices=1), "colab", "cuda", None, None, False),
    "colab gpu, cpu asked for": (COLAB | dict(cuda_devices=1, device="cpu"), "colab", "cpu", None, None, False),
    "linux": (LINUX, "plain", "cpu", None, None, False),
    "linux with gpus": (LINUX | dict(cuda_devices=4), "plain", "cuda", None, None, False),
    "linux, one gpu of four": (LINUX | dict(cuda_devices=4, device="cuda:3"), "plain", "cuda:3", None, None, False),
    "linux with gpu, cpu asked for": (LINUX | dict(cuda_devices=1, device="cpu"), "plain", "cpu", None, None, False),
    "linux on arm": (dict(system="Linux", machine="aarch64", cuda_devices=1), "plain", "cuda", None, None, False),
    "windows": (dict(system="Windows", machine="AMD64", cuda_devices=True), "plain", "cuda", None, None, False),
    "windows on arm": (dict(system="Windows", machine="ARM64"), "plain", "cpu", None, None, False),
}


@pytest.mark.parametrize("case", CASES)
def test_rules(case):
    facts, place, device, threads, backend, careful = CASES[case]
    policy = platform_policy(**facts)
    assert (policy.place, policy.device, policy.threads) == (place, device, threads)
    assert (policy.matplotlib_backend, policy.careful_tensors) == (backend, careful)
    assert policy.child_environment == (tuple((name, "1") for name in THREAD_VARIABLES) if threads else ())
    assert policy.reason == ("as requested" if facts.get("device") else policy.reason)


@given(
    st.sampled_from(["Linux", "Darwin", "Windows", "FreeBSD", ""]),
    st.sampled_from(["x86_64", "arm64", "aarch64", "AMD64", ""]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 8),
    st.booleans(),
)
def test_left_to_itself_it_chooses_only_what_is_there(system, machine, is_colab, in_notebook, cuda_devices, mps_available):
    facts = dict(is_colab=is_colab, in_notebook=in_notebook, cuda_devices=cuda_devices, mps_available=mps_available)
    policy = platform_policy(system, machine, **facts)
    apple = detect_apple_silicon(system, machine)
    assert policy.device == ("cuda" if cuda_devices and not apple else "cpu")
    assert apple == (policy.threads == 1) == policy.careful_tensors == bool(policy.child_environment)
    assert policy == platform_policy(system, machine, **facts, device="auto")
    assert platform_policy(system, machine, **facts, device=torch.device("cpu")).device == "cpu"


@pytest.mark.parametrize(
    "facts, kind, words",
    [
        (LINUX | dict(device="cuda"), InvalidArgument, "no CUDA GPU"),
        (MAC | dict(device="cuda"), InvalidArgument, "no CUDA GPU"),
        (LINUX | dict(device="cuda:2", cuda_devices=2), InvalidArgument, "last of the 2 GPUs here is 'cuda:1'"),
        (LINUX | dict(device="mps"), InvalidArgument, "no Metal device"),
        (LINUX | dict(device="gpu"), InvalidArgument, "allowed are 'cpu'"),
        (LINUX | dict(device="cuda:-1", cuda_devices=1), InvalidArgument, "allowed are 'cpu'"),
        (LINUX | dict(device=0, cuda_devices=1), WrongType, "give a name"),
        (LINUX | dict(device=["cpu"]), WrongType, "give a name"),
    ],
)
def test_a_device_that_is_not_there_is_an_error(facts, kind, words):
    with pytest.raises(kind, match=words):
        platform_policy(**facts)


def shell(module):
    return type("Shell", (), {"__module__": module})()


@pytest.mark.parametrize(
    "facts, expected",
    [
        (dict(shell=shell("google.colab._shell")), True),
        (dict(shell=type("Mine", (type(shell("google.colab._shell")),), {"__module__": "mine"})()), True),
        (dict(shell=shell("google.colaboratory")), False),
        (dict(shell=shell("ipykernel.zmqshell")), False),
        (dict(modules=["google.colab"]), True),
        (dict(modules=["google", "google.cloud"]), False),
        (dict(environ={"COLAB_RELEASE_TAG": "release-colab"}), True),
        (dict(environ={"COLAB_GPU": "1"}), False),
        (dict(environ={"COLAB_RELEASE_TAG": "release-colab", "KAGGLE_KERNEL_RUN_TYPE": "Interactive"}), False),
        (dict(modules=["google.colab"], environ={"KAGGLE_KERNEL_RUN_TYPE": "Batch"}), False),
    ],
)
def test_colab_is_told_by_what_can_be_trusted(facts, expected):
    assert detect_colab(**(dict(shell=shell("builtins"), modules=[], environ={}) | facts)) is expected


def test_notebook_is_told_by_its_kernel():
    assert detect_notebook(type("Shell", (), {"kernel": "one"})()) and not detect_notebook(shell("IPython.terminal"))


def test_environment_info_agrees_with_torch():
    info = get_environment_info()
    assert info["pytorch_version"] == torch.__version__ and info["threads"] == torch.get_num_threads()
    assert info["has_gpu"] == torch.cuda.is_available() and info["python_version"] in sys.version
    assert torch.zeros(1, device=info["device"]).device.type == info["device"].split(":")[0]


def run(code):
    "Run code in a process of its own, which setup() may change as it likes."
    environ = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "svg"}
    for name in THREAD_VARIABLES:
        environ.pop(name, None)
    result = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


APPLE_SETUP = """
import os
from unittest import mock
import torch
torch.set_num_threads(2)
with mock.patch("platform.system", lambda: "Darwin"), mock.patch("platform.machine", lambda: "arm64"):
    from neural_plasticity.environment import THREAD_VARIABLES, IS_APPLE_SILICON, setup
    assert IS_APPLE_SILICON
    before = dict(os.environ)
    info = setup()
assert info["is_apple_silicon"] and info["device"] == "cpu" and info["threads"] == 1 == torch.get_num_threads()
changed = {name: value for name, value in os.environ.items() if before.get(name) != value}
changed.pop("KMP_DUPLICATE_LIB_OK", None)  # the import of threadpoolctl sets this one
assert changed == {name: "1" for name in THREAD_VARIABLES}
import matplotlib
assert matplotlib.get_backend().lower() == "agg"
"""


def test_setup_on_apple_silicon_takes_one_thread_and_agg():
    printed = run(APPLE_SETUP)
    assert "Apple Silicon" in printed and "1 (set" in printed and "Agg" in printed


PLAIN_SETUP = """
import os, random, sys
import numpy, torch
from neural_plasticity.environment import setup
torch.set_num_threads(2)
environ, states = dict(os.environ), (random.getstate(), str(numpy.random.get_state()), torch.get_rng_state())
info = setup(device="cpu", verbose=False)
assert torch.get_num_threads() == 2 and dict(os.environ) == environ and info["seed"] is None
assert random.getstate() == states[0] and str(numpy.random.get_state()) == states[1] and torch.equal(torch.get_rng_state(), states[2])
assert "matplotlib" not in sys.modules and "datasets" not in sys.modules
setup(device="cpu", seed=7, verbose=False)
first = random.random(), numpy.random.rand(), torch.rand(1).item()
setup(device="cpu", seed=7, verbose=False)
assert first == (random.random(), numpy.random.rand(), torch.rand(1).item())
print("done")
"""


@pytest.mark.skipif(detect_apple_silicon(), reason="on this chip setup() has something to change")
def test_setup_elsewhere_changes_nothing_but_what_it_is_asked_for():
    assert run(PLAIN_SETUP) == "done\n"  # and prints nothing when verbose=False


@pytest.mark.parametrize("seed, kind", [(-1, InvalidArgument), (2**32, InvalidArgument), (1.5, WrongType), ("7", WrongType), (True, WrongType)])
def test_setup_refuses_a_seed_that_numpy_would_not_take(seed, kind):
    with pytest.raises(kind, match="seed is"):
        setup(seed=seed, verbose=False)
