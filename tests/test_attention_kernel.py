"""The kernel gives what the definitions give, also where there is no GPU: Triton's interpreter runs it here; on a GPU, test_streaming.py -m gpu does."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is there for Linux only")
def test_in_the_interpreter():
    cases = Path(__file__).with_name("kernel_cases.py")
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}  # read when Triton is imported, hence a process of its own
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(cases)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cases.parents[1])
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert int(re.search(r"(\d+) passed", ran.stdout)[1]) >= 17
