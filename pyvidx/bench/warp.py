"""A warp that runs SASS: where its lanes are, when it may issue the next instruction, and what it reads and writes."""

import numpy as np

from pyvidx.bench.operands import U32, U64
from pyvidx.bench.sass import Instruction

SHARED, LOCAL = 1 << 18, 1 << 14  # bytes that addresses reach, of a block and of a lane
FULL = np.ones(32, bool)
LIMIT = 2_000_000  # instructions: more is a loop that does not end


class Warp:
    """32 lanes. Those at one instruction go on together; of several such groups the one furthest behind goes first, and
    BSYNC holds what has arrived until the rest has."""

    def __init__(self, block, number: int):
        self.block = block
        self.file = {"R": np.zeros((257, 32), U32), "UR": np.zeros((257, 1), U32), "P": np.zeros((8, 32), bool),
                     "UP": np.zeros((8, 1), bool)}  # fmt: skip
        self.file["P"][7] = True
        self.file["UP"][7] = True
        thread = number * 32 + np.arange(32)
        bx, by, bz = block.launch.block
        self.alive = thread < bx * by * bz
        ids = [thread % bx, thread // bx % by, thread // bx // by]
        self.special = [x.astype(U32) for x in ids] + [np.full(1, x, U32) for x in block.index]
        self.active = self.alive  # by the instruction that is being done
        self.groups: dict[int, np.ndarray] = {0: self.alive.copy()}
        self.barriers: dict[str, np.ndarray] = {}
        self.waiting: dict[str, tuple[int, np.ndarray]] = {}
        self.calls: list[list[int]] = [[] for _ in range(32)]
        self.time = 0.0
        self.free = [0.0] * 6  # when each scoreboard is
        self.far = [False] * 6  # was it a load from beyond L1 that set it?
        self.rounds = self.issued = 0
        self.local: np.ndarray | None = None
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
                active = self.active = mask if guard is None else mask & guard(self)
                placed, time = False, 0.0
                try:
                    if kind == "PLAIN":
                        if act is not None and (guard is None or active.any()):
                            act(self, active)
                        time = self.block.latency["special"]
                    elif kind in ("LOAD", "STORE"):
                        if active.any():
                            time = self._memory(kind, act, active)
                    elif kind != "NOP":
                        placed = self._control(kind, act, mask, active, pc, instruction)
                except LookupError as error:
                    where = f"{instruction.address:#x} {instruction.opcode} {', '.join(instruction.operands)}"
                    raise RuntimeError(f"predict: {self.block.program.kernel.name} at {where}: {error}") from None
                self._busy(instruction, time)
                if placed:
                    break
                pc += 1
                if self.groups:
                    self._place(pc, mask)
                    break
            if not self.groups:
                self._release()
            if self.block_waits():
                return
        if self.waiting:
            name = self.block.program.kernel.name
            raise RuntimeError(f"predict: {name}: lanes wait for each other at {', '.join(self.waiting)}")
        self.done = True

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

    def _busy(self, instruction: Instruction, latency: float) -> None:
        start = self.time - max(1, instruction.stall)
        if instruction.sets is not None:
            self._set(instruction.sets, start + latency, latency >= self.block.latency["global"])
        if instruction.sets_when_read is not None:
            self._set(instruction.sets_when_read, start + min(latency, self.block.latency["operands"]), False)

    def _set(self, scoreboard: int, free: float, far: bool) -> None:
        """It is busy until its last user has done."""
        if free >= self.free[scoreboard]:
            self.free[scoreboard], self.far[scoreboard] = free, far

    # ---- memory ----

    def _memory(self, kind: str, act, mask: np.ndarray) -> float:
        block = self.block
        where, register, width, signed, space = act
        addresses = where(self)
        if kind == "LOAD":
            before = block.counts.read
            if space == "global":
                data = self._global(addresses, width, mask)
            else:
                data = self._near(space)[self._places(addresses, width, mask, space)]
            self._fill(register, data, width, mask, signed)
            fresh = block.counts.read > before
            return block.latency["global" if fresh else "shared" if space == "shared" else "l1"]
        data = self._registers(register, width)
        if space == "global":
            block.counts.written += 32 * len(np.unique(addresses[mask] >> U64(5)))
            block.memory.write(addresses[mask], data[mask])
        else:
            self._put(space, addresses, data, width, mask)
        return block.latency["operands"]

    def _near(self, space: str) -> np.ndarray:
        """The bytes of shared memory, or of all lanes' local memory."""
        if space == "shared":
            return self.block.shared
        if self.local is None:
            self.local = np.zeros(32 * LOCAL, np.uint8)
        return self.local

    def _places(self, addresses: np.ndarray, width: int, mask: np.ndarray, space: str) -> np.ndarray:
        """[32, width], where the bytes of each lane are."""
        size = SHARED if space == "shared" else LOCAL
        at = np.where(mask[:, None], (addresses % U64(size)).astype(np.int64)[:, None] + np.arange(width), 0)
        return at if space == "shared" else at + LOCAL * np.arange(32)[:, None]

    def _put(self, space: str, addresses: np.ndarray, data: np.ndarray, width: int, mask: np.ndarray) -> None:
        self._near(space)[self._places(addresses, width, mask, space)[mask]] = data[mask]

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
            high = np.where(data[:, -1:] > 127, 255, 0) if signed else np.zeros((32, 1))
            data = np.concatenate([data, np.repeat(high.astype(np.uint8), 4 - width, 1)], 1)
        words = np.ascontiguousarray(data).view(U32)
        for i in range(words.shape[1]):
            np.copyto(self.file["R"][first + i], words[:, i], where=mask)

    def _registers(self, register: str, width: int) -> np.ndarray:
        if register == "RZ":
            return np.zeros((32, width), np.uint8)
        first = int(register[1:].split(".")[0])
        words = np.stack([self.file["R"][first + i] for i in range(max(1, width // 4))], 1)
        return np.ascontiguousarray(words).view(np.uint8)[:, :width]

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
        if kind == "EXIT":
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
