"""Samplers that do to a decoding process what native decoders do. In a module, for the process must import them."""

import os
import signal
import time
import warnings

import torch

from pyvidx.video.sampling import uniform


class Unpicklable(RuntimeError):
    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")


def abort(*_):
    os.write(2, b"terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc\n")
    os.abort()


def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def leave(*_):
    os._exit(3)


def hang(*_):
    time.sleep(600)


def greedy(*_):
    return torch.zeros(1 << 32, dtype=torch.uint8)


def hoard(*_):
    bytearray(1 << 32)


def warn(*arguments):
    warnings.warn("the file is odd", stacklevel=1)
    return uniform(*arguments)


def unpicklable(*_):
    raise Unpicklable("this", "that")


def abort_if_long(num_frames, *rest):
    """The death of some files only: those of 60 frames."""
    return abort() if num_frames == 60 else uniform(num_frames, *rest)


def hang_if_long(num_frames, *rest):
    return hang() if num_frames == 60 else uniform(num_frames, *rest)


def process_id(*_):
    """Says which process it runs in, by its error."""
    raise ValueError(os.getpid())
