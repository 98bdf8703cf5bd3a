import torch


def pytest_configure(config):
    torch.set_num_threads(1)  # workers of pytest-xdist share the cores
