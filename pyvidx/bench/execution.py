"""Runs a few blocks of a launch on its SASS: how many instructions each pipe gets, which memory is touched, how long a
block takes that has the GPU for itself. Control flow and addresses come from the launch's own parameters and memory.
"""

import os
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from pyvidx.bench import semantics
from pyvidx.bench.sass import Instruction, Kernel, target
from pyvidx.bench.semantics import U32, U64, Unknown

PARAMETERS = {70: 0x160, 75: 0x160, 80: 0x160, 86: 0x160, 89: 0x160, 90: 0x210}  # where in constant bank 0 they start
SHARED = 1 << 18
FULL = np.ones(32, bool)
LIMIT = 2_000_000  # instructions of a warp: more is a loop that does not end


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


def pipe(instruction: Instruction) -> str:
    """Which part of a multiprocessor executes it."""
    name, opcode = instruction.name, instruction.opcode
    if name == "HMMA":
        return "tensor tf32" if "TF32" in opcode else "tensor half"
    if name in ("DADD", "DMUL", "DFMA", "DSETP", "DMMA", "DMNMX"):
        return "double"
    if name in ("MUFU", "I2F", "F2I", "F2F", "FRND", "POPC", "FLO", "BREV", "UFLO", "UPOPC") or name.startswith("I2F."):
        return "special"
    if name[0] == "U" and name != "UNKNOWN":
        return "uniform"
    if name in ("HADD2", "HMUL2", "HFMA2", "HSET2", "HSETP2", "HMNMX2"):
        return "half"
    if name in ("FADD", "FMUL", "FFMA"):
        return "float"
    if name == "IMAD":
        return "imad"
    if name in ("LDG", "LD", "STG", "ST", "LDS", "STS", "LDSM", "LDGSTS", "SHFL", "LDL", "STL", "ATOM", "ATOMG", "RED",
                "PREFETCH", "CCTL"):  # fmt: skip
        return "memory"
    if name in ("BRA", "EXIT", "CALL", "RET", "BSSY", "BSYNC", "BREAK", "BAR", "NOP", "WARPSYNC", "YIELD", "BMOV",
                "DEPBAR", "LDGDEPBAR", "S2R", "S2UR", "CS2R", "BPT", "LDC", "VOTE"):  # fmt: skip
        return "control"
    return "integer"


PRODUCTS = {"884": 256, "1684": 512, "1688": 1024, "16816": 2048}  # multiply-adds of one HMMA, by its shape


def weight(instruction: Instruction) -> int:
    """How much of its pipe it takes: multiply-adds on tensor cores, passes of 128 bytes in memory, else 1."""
    if instruction.name == "HMMA":
        return next(PRODUCTS[word] for word in instruction.opcode.split(".") if word in PRODUCTS)
    if instruction.name in ("LDG", "LD", "STG", "ST", "LDS", "STS", "LDGSTS"):
        return max(1, _width(instruction.opcode) // 4)
    return 4 if instruction.name == "LDSM" and instruction.opcode.endswith(".4") else 1


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


def _width(opcode: str) -> int:
    """Bytes of one lane's access."""
    for text, size in ((".128", 16), (".64", 8), (".U8", 1), (".S8", 1), (".U16", 2), (".S16", 2)):
        if text in opcode.replace(".E.", ".E."):
            return size
    return 4


class Program:
    """A kernel, its instructions made executable."""

    def __init__(self, kernel: Kernel, arch: int):
        self.arch, self.kernel = arch, kernel
        self.steps = [self._step(i, instruction) for i, instruction in enumerate(kernel.instructions)]
        if arch not in PARAMETERS:
            raise ValueError(f"predict: arch must be one of {', '.join(map(str, PARAMETERS))}, got {arch}")

    def _step(self, at: int, instruction: Instruction):
        name, o = instruction.name, instruction.operands
        guard = None if instruction.guard in ("", "PT", "UPT") else semantics.predicate(instruction.guard)
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
                wishes = [semantics.predicate(x) for x in o if semantics.is_predicate(x)]
                act = (to, wishes)
                if "DIV" in instruction.opcode or "CONV" in instruction.opcode:
                    kind = "NOP" if "DIV" in instruction.opcode else name
            elif name in ("BSSY", "BSYNC"):
                act = o[0]
            elif name == "BREAK":
                wishes = [semantics.predicate(x) for x in o if semantics.is_predicate(x)]
                act = (o[-1], wishes)
            elif name == "BMOV":
                act = (o[0], o[1], semantics.integer(o[1]) if o[1][0] == "R" else None,
                       semantics.writer(o[0]) if o[0][0] == "R" else None, "CLEAR" in instruction.opcode)  # fmt: skip
            elif name in ("LDG", "LD", "LDS", "LDL"):
                if o[0] in ("PT",) or semantics.is_predicate(o[0]):
                    o = o[1:]
                act = (semantics.address(o[1], ".E" in instruction.opcode), o[0], _width(instruction.opcode), name)
                kind = "LOAD"
            elif name in ("STG", "ST", "STS", "STL"):
                act = (semantics.address(o[0], ".E" in instruction.opcode), o[1], _width(instruction.opcode), name)
                kind = "STORE"
            elif name == "LDGSTS":
                act = (semantics.address(o[0], False), semantics.address(o[1], True), _width(instruction.opcode))
            elif name in ("RET", "EXIT", "BPT", "BAR", "KILL", "DEPBAR", "LDGDEPBAR"):
                act = None
            elif name in ("ATOM", "ATOMG", "ATOMS", "RED", "BRX", "JMX", "JMP", "SUST", "TEX", "UTMALDG", "SYNCS"):
                raise Unknown(instruction.opcode)
            else:
                act, kind = semantics.build(instruction.opcode, o), "PLAIN"
        except (Unknown, IndexError, ValueError, StopIteration) as error:
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
        self.banks = {0: bank}
        gx, gy, _ = launch.grid
        self.index = (index % gx, index // gx % gy, index // gx // gy)
        self.sectors: set[int] = set()
        self.counts = Counts()
        self.warps = [Warp(self, w) for w in range((launch.threads + 31) // 32)]

    def constant(self, bank: int, at: int, size: int) -> np.ndarray:
        data = self.banks.get(bank)
        if data is None or at + size > len(data):
            return np.zeros(size, np.uint8)
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


class Warp:
    """32 lanes. Those at one instruction go on together; of several such groups the one furthest behind goes first, and
    BSYNC holds what has arrived until the rest has."""

    def __init__(self, block: Block, number: int):
        self.block = block
        self.file = {"R": np.zeros((257, 32), U32), "UR": np.zeros((257, 1), U32), "P": np.zeros((8, 32), bool),
                     "UP": np.zeros((8, 1), bool)}  # fmt: skip
        self.file["P"][7] = True
        self.file["UP"][7] = True
        thread = number * 32 + np.arange(32)
        bx, by, bz = block.launch.block
        self.alive = thread < bx * by * bz
        ids = [thread % bx, thread // bx % by, thread // bx // by]
        self.special = (
            [x.astype(U32) for x in ids] + [np.full(1, x, U32) for x in block.index] + [np.arange(32, dtype=U32)]
        )
        self.groups: dict[int, np.ndarray] = {0: self.alive.copy()}
        self.barriers: dict[str, np.ndarray] = {}
        self.waiting: dict[str, tuple[int, np.ndarray]] = {}
        self.calls: list[list[int]] = [[] for _ in range(32)]
        self.time = 0.0
        self.free = [0.0] * 6  # when each scoreboard is
        self.far = [False] * 6  # was it a load from beyond L1 that set it?
        self.copies: list[float] = []  # cp.async groups that are under way
        self.copying = 0.0
        self.rounds = self.issued = 0
        self.done = False

    def run(self) -> None:
        """Until a barrier of the block, or the end."""
        steps, counts = self.block.program.steps, self.block.counts
        while self.groups:
            pc = min(self.groups)
            mask = self.groups.pop(pc)
            while True:
                kind, act, guard, instruction, used, much = steps[pc]
                self._issue(instruction)
                counts.instructions += 1
                counts.pipes[used] += much
                self.issued += 1
                if self.issued > LIMIT:
                    raise RuntimeError(f"predict: {self.block.program.kernel.name} does not end")
                active = mask if guard is None else mask & guard(self)
                result = time = 0.0
                if kind == "PLAIN":
                    if act is not None and (guard is None or active.any()):
                        act(self, active)
                    time = self._variable(instruction)
                elif kind in ("LOAD", "STORE", "LDGSTS"):
                    if active.any():
                        try:
                            time = self._memory(kind, act, active)
                        except LookupError as error:
                            where = f"{instruction.address:#x} {instruction.opcode} {', '.join(instruction.operands)}"
                            raise RuntimeError(
                                f"predict: {self.block.program.kernel.name} at {where}: {error}"
                            ) from None
                elif kind not in ("NOP",):
                    result = self._control(kind, act, mask, active, pc, instruction)
                self._busy(instruction, time)
                if result is True:  # the group is placed elsewhere
                    break
                pc += 1
                if self.groups:
                    self._place(pc, mask)
                    break
            if not self.groups:
                self._release()
            if self.block_waits():
                return
        self.done = not self.waiting

    def block_waits(self) -> bool:
        """Have all lanes that are left come to a barrier of the block?"""
        at = self.waiting.get("BAR")
        if at is None or self.groups or len(self.waiting) > 1:
            return False
        self.waiting.clear()
        self._place(at[0], at[1])
        return True

    # ---- time ----

    def _issue(self, instruction: Instruction) -> None:
        now = self.time
        for i in instruction.waits:
            if self.free[i] > now:
                if self.far[i] and self.free[i] - now > self.block.latency["global"] / 2:
                    self.rounds += 1
                now = self.free[i]
        self.time = now + max(1, instruction.stall)

    def _variable(self, instruction: Instruction) -> float:
        return self.block.latency.get(instruction.name, self.block.latency["special"])

    def _busy(self, instruction: Instruction, latency: float) -> None:
        start = self.time - max(1, instruction.stall)
        if instruction.sets is not None:
            self.free[instruction.sets] = max(self.free[instruction.sets], start + latency)
            self.far[instruction.sets] = latency >= self.block.latency["global"]
        if instruction.sets_when_read is not None:
            at = start + min(latency, self.block.latency["operands"]) if latency else start
            self.free[instruction.sets_when_read] = max(self.free[instruction.sets_when_read], at)
            self.far[instruction.sets_when_read] = False

    # ---- memory ----

    def _memory(self, kind: str, act, mask: np.ndarray) -> float:
        block = self.block
        if kind == "LDGSTS":
            to, source, width = act
            data = self._global(source(self), width, mask)
            self._put(to(self), data, width, mask)
            self.copying = max(self.copying, self.time + block.latency["global"])
            return block.latency["operands"]
        where, register, width, name = act
        addresses = where(self)
        shared = name in ("LDS", "STS")
        if name in ("LDL", "STL"):
            return block.latency["l1"]
        if kind == "LOAD":
            before = block.counts.read
            if shared:
                at = (addresses & U64(0xFFFFFF)).astype(np.int64)[:, None] + np.arange(width)
                data = block.shared[np.where(mask[:, None], at, 0) % SHARED]
            else:
                data = self._global(addresses, width, mask)
            self._fill(register, data, width, mask, signed=False)
            if shared:
                return block.latency["shared"]
            return block.latency["global"] if block.counts.read > before else block.latency["l1"]
        if shared:
            self._put(addresses, self._registers(register, width), width, mask)
        else:
            block.counts.written += 32 * len(np.unique(addresses[mask] >> U64(5)))
            block.memory.write(addresses[mask], self._registers(register, width)[mask])
        return block.latency["operands"]

    def _global(self, addresses: np.ndarray, width: int, mask: np.ndarray) -> np.ndarray:
        used = addresses[mask]
        fresh = {*np.unique(used >> U64(5)).tolist()} - self.block.sectors
        self.block.sectors |= fresh
        self.block.counts.read += 32 * len(fresh)
        low, high = int(used.min()), int(used.max()) + width
        out = np.zeros((32, width), np.uint8)
        if high - low <= 1 << 16:
            data = self.block.memory.read(low, high - low)
            out[mask] = data[(used - U64(low)).astype(np.int64)[:, None] + np.arange(width)]
        else:
            for lane in np.flatnonzero(mask):
                out[lane] = self.block.memory.read(int(addresses[lane]), width)
        return out

    def _fill(self, register: str, data: np.ndarray, width: int, mask: np.ndarray, signed: bool) -> None:
        if register == "RZ":
            return
        first = int(register[1:].split(".")[0])
        if width < 4:
            data = np.concatenate([data, np.zeros((32, 4 - width), np.uint8)], 1)
        words = np.ascontiguousarray(data).view(U32)
        for i in range(words.shape[1]):
            np.copyto(self.file["R"][first + i], words[:, i], where=mask)

    def _registers(self, register: str, width: int) -> np.ndarray:
        if register == "RZ":
            return np.zeros((32, width), np.uint8)
        first = int(register[1:].split(".")[0])
        words = np.stack([self.file["R"][first + i] for i in range(max(1, width // 4))], 1)
        return np.ascontiguousarray(words).view(np.uint8)[:, :width]

    def _put(self, addresses: np.ndarray, data: np.ndarray, width: int, mask: np.ndarray) -> None:
        at = (addresses & U64(0xFFFFFF)).astype(np.int64)[:, None] + np.arange(width)
        self.block.shared[at[mask] % SHARED] = data[mask]

    # ---- control ----

    def _place(self, pc: int, mask: np.ndarray) -> None:
        if mask.any():
            self.groups[pc] = self.groups[pc] | mask if pc in self.groups else mask.copy()

    def _control(self, kind: str, act, mask, active, pc: int, instruction: Instruction) -> bool:
        """True where the group does not just go on."""
        if kind in ("BRA", "CALL"):
            to, wishes = act
            taken = active
            for p in wishes:
                taken = taken & p(self)
            if not taken.any():
                return False
            if kind == "CALL":
                for lane in np.flatnonzero(taken):
                    self.calls[lane].append(pc + 1)
            self._place(to, taken)
            self._place(pc + 1, mask & ~taken)
            return True
        if kind == "RET":
            for lane in np.flatnonzero(active):
                one = np.zeros(32, bool)
                one[lane] = True
                self._place(self.calls[lane].pop(), one)
            self._place(pc + 1, mask & ~active)
            return True
        if kind in ("EXIT", "KILL"):
            self.alive &= ~active
            self._place(pc + 1, mask & ~active)
            self._release()
            return True
        if kind == "BSSY":
            self.barriers[act] = mask.copy()
            return False
        if kind == "BREAK":
            name, wishes = act
            leaving = active
            for p in wishes:
                leaving = leaving & p(self)
            self.barriers[name] = self.barriers.get(name, FULL) & ~leaving
            self._release()
            return False
        if kind == "BMOV":
            self._bmov(act, active)
            return False
        if kind in ("BSYNC", "BAR"):
            name = act if kind == "BSYNC" else "BAR"
            if not active.any():
                return False
            there = self.waiting.get(name)
            self.waiting[name] = (pc + 1, active if there is None else there[1] | active)
            self._place(pc + 1, mask & ~active)
            self._release()
            return True
        if kind == "LDGDEPBAR":
            self.copies.append(self.copying)
            return False
        if kind == "DEPBAR":
            allowed = next((int(x, 16) for x in instruction.operands if x.startswith("0x")), 0)
            while len(self.copies) > allowed:
                arrived = self.copies.pop(0)
                if arrived > self.time:
                    self.rounds += arrived - self.time > self.block.latency["global"] / 2
                    self.time = arrived
            return False
        raise RuntimeError(
            f"predict: {self.block.program.kernel.name} traps ({instruction.opcode}): an index out of range"
        )

    def _release(self) -> None:
        for name, (pc, mask) in list(self.waiting.items()):
            if name == "BAR":
                continue
            missing = self.barriers.get(name, mask) & self.alive & ~mask
            if not missing.any():
                del self.waiting[name]
                self._place(pc, mask & self.alive)

    def _bmov(self, act, mask) -> None:
        to, source, read, write, clear = act
        if write is not None:
            held = self.barriers.get(source, np.zeros(32, bool))
            write(self, mask, np.packbits(held, bitorder="little").view(U32).copy())
            if clear:
                self.barriers[source] = np.zeros(32, bool)
        elif read is not None:
            bits = np.broadcast_to(read(self), 32)[mask][:1]
            self.barriers[to] = np.unpackbits(bits.view(np.uint8), bitorder="little").astype(bool)


def sampled(blocks: int, samples: int) -> list[int]:
    """Blocks from the middle of as many equal parts of the grid."""
    return (
        sorted({(2 * i + 1) * blocks // (2 * samples) for i in range(samples)})
        if blocks > samples
        else [*range(blocks)]
    )


def run(program: Program, launch: Launch, latency: dict[str, float], samples: int = 3) -> Counts:
    """The mean of some blocks; cycles and rounds are the largest."""
    memory, all_counts = Memory(), []
    try:
        with np.errstate(all="ignore"):
            for index in sampled(launch.blocks, samples):
                all_counts.append(Block(program, launch, index, memory, latency).run())
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
