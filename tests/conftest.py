import zlib

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--sample", type=int, metavar="N", help="at most N cases of every parametrized test")


# These build in a folder of the project, so that only one process at a time may run what builds in one folder.
BUILDERS = {
    "test_cmake.py": "cmake",
    "test_cuda_check.py": "cuda_check",
    "test_cuda_emu.py": "emu",
    "test_cuda_link.py": "native",
    "test_hf_kernel.py": "native",
    "test_no_sync.py": "no_gpu",
    "test_predict.py": "emu",
    "test_wheel.py": "native",
}


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.path.name in BUILDERS:
            item.add_marker(pytest.mark.xdist_group(BUILDERS[item.path.name]))
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
