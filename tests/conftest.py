import zlib

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--sample", type=int, metavar="N", help="at most N cases of every parametrized test")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--sample") is not None:
        _sample(items, config.getoption("--sample"))


def _sample(items, count):
    """Keep the cases whose names have the smallest checksums: always the same, from all over the parameters."""
    functions = {}
    for item in items:
        functions.setdefault((item.path, getattr(item, "originalname", item.name)), []).append(item)
    kept = {
        item
        for cases in functions.values()
        for item in sorted(cases, key=lambda item: zlib.crc32(item.name.encode()))[:count]
    }
    items[:] = [item for item in items if item in kept]


@pytest.fixture(autouse=True)
def one_thread_and_a_seed():
    """One thread: with a busy second core every parallel region costs milliseconds."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
