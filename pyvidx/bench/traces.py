"""python -m pyvidx.bench.traces LIBRARY < what is asked > traces: what the launches of bench cases do, without a GPU.

A case is set up with the kernels of the CPU. Then, in a process of its own, the library of the emulator takes their
place, which lists launches with their grids and parameters and runs but the smallest of them, and those that prepare
tables for others; blocks of all are then run here, by their SASS.
"""

import contextlib
import ctypes
import dataclasses
import importlib
import inspect
import json
import os
import sys
import time
import warnings

import torch

from pyvidx.bench import cubin, execution, model
from pyvidx.bench.cases import Asked
from pyvidx.bench.execution import Launch

SMALL = 1 << 10  # threads of a launch that is run
PREPARE = "prepare"  # in the name of kernels that are run as well: the others' loops depend on what they write


def made(asked: Asked):
    """The bench.harness.Case, on the CPU."""
    module = importlib.import_module(f"bench.{asked.module}")
    for name, value in asked.constants.items():
        setattr(module, name, value)
    function = getattr(module, asked.function)
    arguments = {**asked.arguments, "device": "cpu"}
    if "dtype" in arguments:
        arguments["dtype"] = getattr(torch, arguments["dtype"])
    unknown = {*arguments} - {*inspect.signature(function).parameters}
    if unknown:
        raise ValueError(f"predict: {asked.module}.{asked.function} does not take {', '.join(sorted(unknown))}")
    torch.manual_seed(0)
    return function(**arguments)


def each_launch(library: str, run, gpu: model.Gpu, seen, *, small: int = SMALL) -> None:
    """Call seen(launch) at each launch of one call, on a pretended GPU of this kind. Those of more threads than `small`
    are not run."""
    of_block = gpu.shared_kb * 1024 - gpu.shared_reserved
    told = {"DRY": small, "SMS": gpu.sms, "SMEM": of_block, "CAPABILITY": gpu.arch}
    told |= {"RUN": PREPARE} if small else {}
    os.environ.update({f"PYVIDX_EMU_{name}": str(value) for name, value in told.items()})
    errors = []

    @ctypes.CFUNCTYPE(None, ctypes.c_char_p)
    def watch(line):
        try:
            seen(launch_of(line.decode()))
        except Exception as error:  # it cannot pass through the library
            errors.append(error)

    emulator = ctypes.CDLL(library)
    emulator.cuemu_watch(watch)
    try:
        run()
    finally:
        emulator.cuemu_watch(None)
    if errors:
        raise errors[0]


def launch_of(line: str) -> Launch:
    """What the emulator says of a launch."""
    _, grid, block, shared, symbol, parameters = line.split("\t")
    three = [tuple(int(x) for x in text.split()[1:]) for text in (grid, block)]
    return Launch(symbol, *three, int(shared.split()[1]), bytes.fromhex(parameters))


def trace(library: str, case, archs: list[int], samples: int) -> dict:
    """For each architecture, its launches with what they do, on its first GPU."""
    found = {str(arch): [] for arch in archs}

    def seen(launch: Launch, gpu: model.Gpu) -> None:
        code = cubin.compiled(launch.kernel, gpu.arch)
        counts = execution.run(execution.Program(code.kernel, gpu.arch), launch, gpu.latency, samples)
        found[str(gpu.arch)].append({
            "kernel": launch.kernel, "blocks": launch.blocks, "threads": launch.threads, "registers": code.registers,
            "shared": code.shared + launch.shared, "spills": code.spills, **dataclasses.asdict(counts),
            "pipes": dict(counts.pipes),
        })  # fmt: skip

    for arch in archs:
        gpu = model.gpus([arch])[0]
        each_launch(library, case.run, gpu, lambda launch, gpu=gpu: seen(launch, gpu))
    return {"op": case.op, "shape": case.shape, "dtype": str(case.dtype).removeprefix("torch."), "bytes": case.bytes,
            "flops": case.flops, "archs": found}  # fmt: skip


def in_child(task) -> dict:
    """Its result, from a process that has all that this one has."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            result = {"result": task()}
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        with os.fdopen(writing, "w") as file:
            json.dump(result, file)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else {"error": "the process died"}


def main() -> None:
    library, given = sys.argv[1], json.load(sys.stdin)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results = sys.stdout
    for asked in given["cases"]:
        start = time.perf_counter()
        with torch.no_grad(), contextlib.redirect_stdout(sys.stderr):
            case = made(Asked(**asked))

            def task(case=case):
                torch.ops.load_library(library)
                return trace(library, case, given["archs"], given["samples"])

            found = in_child(task)
        found["seconds"] = time.perf_counter() - start
        print(json.dumps(found), file=results, flush=True)


if __name__ == "__main__":
    main()
