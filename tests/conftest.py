"""Markers, and what is left out unless it is asked for with -m."""
import pytest
import torch

LEFT_OUT = {"slow": "takes longer than a few seconds", "gpu": "needs a CUDA device", "browser": "needs a browser"}


def pytest_configure(config):
    torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other
    for name, why in LEFT_OUT.items():
        config.addinivalue_line("markers", f"{name}: {why}; left out unless asked for (-m {name})")


def pytest_collection_modifyitems(config, items):
    if config.getoption("-m") or any("::" in argument for argument in config.args):
        return  # asked for by marker or by name
    for item in items:
        for name, why in LEFT_OUT.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=f"{why}; run with -m {name}"))
