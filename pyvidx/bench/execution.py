"""Runs a few blocks of a launch on its SASS: how many instructions each pipe gets, which memory is touched, how long a
block takes that has the GPU for itself. Control flow and addresses come from the launch's own parameters and memory.
"""

import os
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from pyvidx.bench import operands, semantics
from pyvidx.bench.operands import U32, Unknown
from pyvidx.bench.sass import Instruction, Kernel, target
from pyvidx.bench.warp import SHARED, Warp

PARAMETERS = {70: 0x160, 75: 0x160, 80: 0x160, 86: 0x160, 89: 0x160, 90: 0x210}  # where in constant bank 0 they start


@dataclass
class Launch:
    """One kernel launch as the emulator lists it. parameters: their bytes, as the kernel finds them."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    parameters: bytes

    @property
    def blocks(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def threads(self) -> int:
        return self.block[0] * self.block[1] * self.block[2]


@dataclass
class Counts:
    """What one block does, or the mean of several.

    instructions: those that its warps issue. pipes: what of them goes to which pipe, in the unit of weight(). read,
    written: bytes of global memory asked for in whole sectors of 32, a sector that the block has read before not
    counted again. cycles: of the block alone. rounds: how often its slowest warp waits for memory.
    """

    instructions: float = 0
    pipes: Counter = field(default_factory=Counter)
    read: float = 0
    written: float = 0
    cycles: float = 0
    rounds: float = 0


PIPES = {
    "double": "DADD DMUL DFMA DSETP", "special": "MUFU I2F F2I F2F REDUX", "half": "HADD2 HFMA2",
    "float": "FADD FMUL FFMA", "imad": "IMAD IDP", "memory": "LDG LD STG ST LDS STS SHFL LDL STL CCTL",
    "control": "BRA EXIT CALL RET BSSY BSYNC BREAK BAR NOP WARPSYNC YIELD BMOV S2R S2UR CS2R BPT LDC VOTE VOTEU",
}  # fmt: skip
PIPE_OF = {name: pipe for pipe, names in PIPES.items() for name in names.split()}
PRODUCTS = {"884": 256, "1684": 512, "1688": 1024, "16816": 2048}  # multiply-adds of one HMMA, by its shape


def pipe(instruction: Instruction) -> str:
    """Which part of a multiprocessor executes it."""
    name = instruction.name
    if name == "HMMA":
        return "tensor tf32" if "TF32" in instruction.opcode else "tensor half"
    return PIPE_OF.get(name) or ("uniform" if name[0] == "U" else "integer")


def weight(instruction: Instruction) -> int:
    """How much of its pipe it takes: multiply-adds on tensor cores, passes of 128 bytes in memory, else 1."""
    if instruction.name == "HMMA":
        return next(PRODUCTS[word] for word in instruction.opcode.split(".") if word in PRODUCTS)
    return max(1, _width(instruction.opcode) // 4) if instruction.name in SPACES else 1


class Memory:
    """This process's own memory, where the launches' tensors are."""

    def __init__(self):
        self.file = os.open("/proc/self/mem", os.O_RDONLY)

    def close(self) -> None:
        os.close(self.file)

    def read(self, start: int, size: int) -> np.ndarray:
        try:
            data = os.pread(self.file, size, start) if 0 < start < 1 << 47 else b""
        except OSError:
            data = b""
        if len(data) < size:
            raise LookupError(f"{size} bytes at {start:#x} are read, where there is no memory")
        return np.frombuffer(data, np.uint8)

    def write(self, addresses: np.ndarray, data: np.ndarray) -> None:
        """Nothing is written: the tensors belong to the process."""


SPACES = {"LDG": "global", "LD": "global", "STG": "global", "ST": "global", "LDS": "shared", "STS": "shared",
          "LDL": "local", "STL": "local"}  # fmt: skip


def _width(opcode: str) -> int:
    """Bytes of one lane's access."""
    sizes = {"128": 16, "64": 8, "U8": 1, "S8": 1, "U16": 2, "S16": 2}
    return next((sizes[word] for word in opcode.split(".") if word in sizes), 4)


ENOUGH = 200_000  # instructions of warps, after which no further block of a launch is run


class Program:
    """A kernel, its instructions made executable."""

    def __init__(self, kernel: Kernel, arch: int):
        self.arch, self.kernel = arch, kernel
        if arch not in PARAMETERS:
            raise ValueError(f"predict: arch must be one of {', '.join(map(str, PARAMETERS))}, got {arch}")
        self.steps = [self._step(instruction) for instruction in kernel.instructions]

    def _step(self, instruction: Instruction):
        """What Warp.run takes: kind, what that kind needs, guard, instruction, pipe, weight."""
        name, o = instruction.name, instruction.operands
        guard = None if instruction.guard in ("", "PT", "UPT") else operands.predicate(instruction.guard)
        never = instruction.guard in ("!PT", "!UPT")
        kind, act = name, None
        try:
            if never:
                kind = "NOP"
            elif name in ("BRA", "CALL"):
                label = next((target(x) for x in o if target(x)), None)
                to = self.kernel.labels.get(label) if label else None
                if to is None:
                    raise Unknown(f"{instruction.opcode} {', '.join(o)}")
                wishes = [operands.predicate(x) for x in o if operands.is_predicate(x)]
                act = (to, wishes)
                if ".DIV" in instruction.opcode:  # to a way around for lanes that have parted, with the same result
                    kind = "NOP"
            elif name in ("BSSY", "BSYNC"):
                act = o[0]
            elif name == "BREAK":
                wishes = [operands.predicate(x) for x in o if operands.is_predicate(x)]
                act = (o[-1], wishes)
            elif name == "BMOV":
                act = (o[0], o[1], operands.integer(o[1]) if o[1][0] == "R" else None,
                       operands.writer(o[0]) if o[0][0] == "R" else None, "CLEAR" in instruction.opcode)  # fmt: skip
            elif name in SPACES:
                places = o[1:] if operands.is_predicate(o[0]) else o
                places = [places[1], places[0]] if name[:2] == "LD" else places
                wide, signed = ".E" in instruction.opcode, ".S8" in instruction.opcode or ".S16" in instruction.opcode
                act = (operands.address(places[0], wide), places[1], _width(instruction.opcode), signed, SPACES[name])
                kind = "LOAD" if name[:2] == "LD" else "STORE"
            elif name not in ("RET", "EXIT", "BPT", "BAR"):
                act, kind = semantics.build(instruction.opcode, o), "PLAIN"
        except (LookupError, ValueError, StopIteration) as error:
            raise Unknown(
                f"predict: {instruction.opcode} {', '.join(o)} of sm_{self.arch} in {self.kernel.name} is nothing that "
                f"pyvidx/bench/semantics.py knows ({error}); add it there"
            ) from error
        return kind, act, guard, instruction, pipe(instruction), weight(instruction)


class Block:
    """One block: its shared and constant memory, and what it has read."""

    def __init__(self, program: Program, launch: Launch, index: int, memory: Memory, latency: dict[str, float]):
        self.program, self.launch, self.memory, self.latency = program, launch, memory, latency
        self.shared = np.zeros(SHARED, np.uint8)
        base = PARAMETERS[program.arch]
        bank = np.zeros(max(0x1000, base + len(launch.parameters) + 64), np.uint8)
        bank[:12].view(U32)[:] = launch.block
        bank[12:24].view(U32)[:] = launch.grid
        bank[base : base + len(launch.parameters)] = np.frombuffer(launch.parameters, np.uint8)
        self.banks = {0: bank} | {i: np.frombuffer(data, np.uint8) for i, data in program.kernel.constants.items()}
        gx, gy, _ = launch.grid
        self.index = (index % gx, index // gx % gy, index // gx // gy)
        self.sectors: set[int] = set()
        self.counts = Counts()
        self.warps = [Warp(self, w) for w in range((launch.threads + 31) // 32)]

    def constant(self, bank: int, at: int, size: int) -> np.ndarray:
        data = self.banks.get(bank, b"")
        if not 0 <= at <= len(data) - size:
            raise LookupError(f"{size} bytes at {at:#x} of constant bank {bank} are read, where there is nothing")
        return data[at : at + size].copy()

    def run(self) -> Counts:
        """Warp by warp from barrier to barrier; at a barrier all have the time of the last."""
        alive = self.warps
        while alive:
            for warp in alive:
                warp.run()
            alive = [warp for warp in alive if not warp.done]
            last = max((warp.time for warp in alive), default=0)
            for warp in alive:
                warp.time = last
        self.counts.cycles = max(warp.time for warp in self.warps)
        self.counts.rounds = max(warp.rounds for warp in self.warps)
        return self.counts


def sampled(blocks: int, samples: int) -> list[int]:
    """Blocks from the middle of as many equal parts of the grid, from its middle outwards."""
    found = {(2 * i + 1) * blocks // (2 * samples) for i in range(samples)} if blocks > samples else range(blocks)
    return sorted(found, key=lambda block: abs(2 * block - blocks))


def run(program: Program, launch: Launch, latency: dict[str, float], samples: int = 3) -> Counts:
    """The mean of some blocks, of fewer where they are long; cycles and rounds are the largest."""
    memory, all_counts = Memory(), []
    try:
        with np.errstate(all="ignore"):
            for index in sampled(launch.blocks, samples):
                all_counts.append(Block(program, launch, index, memory, latency).run())
                if sum(c.instructions for c in all_counts) > ENOUGH:
                    break
    finally:
        memory.close()
    n = len(all_counts)
    pipes = Counter()
    for c in all_counts:
        pipes.update(c.pipes)
    return Counts(
        sum(c.instructions for c in all_counts) / n,
        Counter({k: v / n for k, v in pipes.items()}),
        sum(c.read for c in all_counts) / n,
        sum(c.written for c in all_counts) / n,
        max(c.cycles for c in all_counts),
        max(c.rounds for c in all_counts),
    )
