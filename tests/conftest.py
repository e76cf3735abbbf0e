import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread_and_a_seed():
    """One thread: with a busy second core every parallel region costs milliseconds."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
