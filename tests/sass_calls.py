"""python -m tests.sass_calls LIBRARY ARCH DTYPE [name ...]: the ops' kernels as machine code, run without a GPU.

Every op of tests/op_calls.py is called twice with the emulator's library in place of the kernels. The first time g++'s
code of a kernel runs. The second time its SASS does: NVRTC compiles it for ARCH, and pyvidx.bench.execution runs all
blocks on the tensors themselves. One line of JSON for each op: how far the results are from each other, or what in the
SASS the interpreter leaves out.
"""

import json
import os
import sys

import numpy as np
import torch

from pyvidx.bench import cubin, execution, model, semantics, traces
from tests.op_calls import op_calls


class Tensors(execution.Memory):
    """This process's memory, read and written."""

    def __init__(self):
        self.file = os.open("/proc/self/mem", os.O_RDWR)

    def write(self, addresses: np.ndarray, data: np.ndarray) -> None:
        for address, row in zip(addresses.tolist(), data):
            assert os.pwrite(self.file, row.tobytes(), address) == len(row)


class LeftOut(Exception):
    """The kernel has instructions of which the interpreter knows the cost alone."""


def as_sass(launch: execution.Launch, gpu: model.Gpu, memory: Tensors) -> None:
    code = cubin.compiled(launch.kernel, gpu.arch)
    names = {i.opcode for i in code.kernel.instructions if semantics.is_opaque(i.opcode, i.operands)}
    if names:
        raise LeftOut(" ".join(sorted({name.split(".")[0] for name in names})))
    program = execution.Program(code.kernel, gpu.arch)
    with np.errstate(all="ignore"):
        for index in range(launch.blocks):
            execution.Block(program, launch, index, memory, gpu.latency).run()


def distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference over the largest value; of whole numbers, how many differ."""
    if not wanted.is_floating_point():
        return float((got != wanted).sum())
    got, wanted = got.double(), wanted.double()
    same = (got == wanted) | (got.isnan() & wanted.isnan())
    apart = torch.where(same, 0.0, (got - wanted).abs()).nan_to_num(torch.inf)
    return float(apart.max() / wanted.abs().max().clamp_min(1e-30))


def compared(library: str, call, gpu: model.Gpu, memory: Tensors) -> dict:
    inputs = [[t.detach().clone().requires_grad_(t.requires_grad) for t in call.inputs] for _ in range(2)]
    wanted, got, kernels = call.run(*inputs[0]), [], []

    def seen(launch):
        kernels.append(launch.kernel)
        as_sass(launch, gpu, memory)

    try:
        traces.each_launch(library, lambda: got.extend(call.run(*inputs[1])), gpu, seen, small=0)
    except LeftOut as left:
        return {"left out": str(left)}
    finally:
        os.environ.pop("PYVIDX_EMU_DRY")
    return {"apart": max(map(distance, got, wanted)), "results": len(wanted), "kernels": kernels}


def main() -> None:
    library, arch, dtype, *names = sys.argv[1:]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    gpu, memory = model.gpus([int(arch)])[0], Tensors()
    for name, call in op_calls("cpu", getattr(torch, dtype)).items():
        if not names or name in names:
            print(json.dumps({"op": name, **compared(library, call, gpu, memory)}), flush=True)


if __name__ == "__main__":
    main()
