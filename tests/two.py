"""A function in two processes, joined by gloo as torchrun would join them."""

import os
import socket
from pathlib import Path

import torch

from pyvidx.train import ranks


def two_processes(function, *args):
    """Call function(Ranks, *args) in both; it and its arguments are pickled."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_process, (port, function, args), nprocs=2)


def _process(rank, port, function, args):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with ranks("cpu") as both:
        function(both, *args)
    threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    assert not [name for name in threads if "gloo" in name], "the group outlives its end, and may abort the exit"
