"""What holds for all tests."""
import torch


def pytest_configure(config):
    torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other
