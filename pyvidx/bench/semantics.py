"""What SASS instructions compute, for the 32 lanes of a warp at once: as much of it as decides where a kernel goes and
which memory it touches. Integers, predicates and conversions are exact; sums of 16-bit pairs, and
matrix products of sm_70, are left out (their results keep what was in the registers)."""

from collections.abc import Callable

import numpy as np

from pyvidx.bench import floating, integers, tensor_cores
from pyvidx.bench.operands import (
    U32,
    U64,
    Unknown,
    integer,
    is_predicate,
    predicate,
    predicate_writer,
    writer,
)  # fmt: skip

OPAQUE = {"HMMA", "HADD2", "HFMA2"}
NOTHING = {"NOP", "YIELD", "CCTL", "WARPSYNC", "ENDCOLLECTIVE"}
SPECIAL = ("SR_TID.X", "SR_TID.Y", "SR_TID.Z", "SR_CTAID.X", "SR_CTAID.Y", "SR_CTAID.Z")


def build(opcode: str, operands: list[str]) -> Callable | None:
    """A function of warp and mask that does the instruction; None where it does nothing here.

    Raises:
        Unknown: there is no such instruction here.
    """
    words = opcode.split(".")
    name, more = words[0], words[1:]
    if name in NOTHING:
        return None
    if name == "HFMA2":
        return floating.half_constant(operands)
    if name == "HADD2" and "F32" in more:
        return floating.floats(operands, np.add)
    if name == "HMMA":
        return tensor_cores.product(more, operands)
    if name in OPAQUE:
        return None
    made = TABLE.get(name) or (TABLE.get(name[1:]) if name[0] == "U" else None)
    if made is None:
        raise Unknown(opcode)
    return made(more, operands)


def is_opaque(opcode: str, operands: list[str]) -> bool:
    """Is it one whose results are left out?"""
    return opcode.split(".")[0] in OPAQUE and build(opcode, operands) is None


def _special(more, o):
    write, source = writer(o[0]), o[1]
    if source == "SR_CgaCtaId":  # of a block in its cluster; ours are alone
        zero = np.zeros(1, U32)
        return lambda w, m: write(w, m, zero)
    column = SPECIAL.index(source)
    return lambda w, m: write(w, m, w.special[column])


def _cs2r(more, o):
    write, zero = writer(o[0], wide="32" not in more), np.zeros(1, U32 if "32" in more else U64)
    return lambda w, m: write(w, m, zero)


def _r2ur(more, o):
    o = [x for x in o if not is_predicate(x)]
    write, read = writer(o[0]), integer(o[1])
    return lambda w, m: write(w, m, np.broadcast_to(read(w), 32)[m][:1])


def _ldc(more, o):
    write, read = writer(o[0], wide="64" in more), integer(o[1], wide="64" in more)
    if "U8" in more:
        return lambda w, m: write(w, m, read(w) & U32(255))
    if more not in ([], ["64"]):
        raise Unknown("LDC." + ".".join(more))
    return lambda w, m: write(w, m, read(w))


def _vote(more, o):
    register = None if is_predicate(o[0]) else writer(o[0])
    rest = o if register is None else o[1:]
    out, source = predicate_writer(rest[0]), predicate(rest[1] if len(rest) > 1 else rest[0])

    def vote(w, m):
        value = np.broadcast_to(source(w), 32) & m
        if register:
            register(w, m, np.array([int(np.packbits(value, bitorder="little").view(U32)[0])], U32))
        true = value.any() if "ANY" in more else value[m].all() if "ALL" in more else len({*value[m]}) == 1
        out(w, m, np.array([bool(true)]))

    return vote


def _shfl(more, o):
    out, write, read, by, limit = predicate_writer(o[0]), writer(o[1]), integer(o[2]), integer(o[3]), integer(o[4])
    kind, lane = more[0], np.arange(32)

    def shuffle(w, m):
        b, c = by(w).astype(int) & 31, limit(w).astype(int)
        bound, segment = c & 31, c >> 8 & 31
        top = (lane & segment) | (bound & ~segment)
        if kind == "IDX":
            source = (b & ~segment) | (lane & segment)
            ok = source <= top
        elif kind == "UP":
            source = lane - b
            ok = source >= top
        else:
            source = lane + b if kind == "DOWN" else lane ^ b
            ok = source <= top
        source = np.where(ok, source, lane)
        write(w, m, np.broadcast_to(read(w), 32)[source])
        out(w, m, np.broadcast_to(ok, 32))

    return shuffle


def _redux(more, o):
    """Over the lanes of a warp; to a uniform register."""
    kind = next((x for x in more if x in ("MAX", "MIN")), None)
    if kind is None or "S32" in more:
        raise Unknown("REDUX." + ".".join(more))
    write, read, best = writer(o[0]), integer(o[1]), np.max if kind == "MAX" else np.min
    return lambda w, m: write(w, m, np.array([best(np.broadcast_to(read(w), 32)[m])], U32))


def _p2r(more, o):
    """Predicates (PR, or UPR of what is uniform) of a mask, as bits beside those that a register has elsewhere."""
    file, write, before, mask = o[1].removesuffix("R"), writer(o[0]), integer(o[2]), int(o[3], 16)

    def pack(w, m):
        bits = sum((w.file[file][i] & bool(mask >> i & 1)).astype(U32) << U32(i) for i in range(7))
        write(w, m, (before(w) & ~U32(mask)) | bits)

    return pack


TABLE = floating.TABLE | integers.TABLE | {
    "S2R": _special, "S2UR": _special, "CS2R": _cs2r, "R2UR": _r2ur, "LDC": _ldc, "ULDC": _ldc, "VOTE": _vote,
    "VOTEU": _vote, "SHFL": _shfl, "REDUX": _redux, "P2R": _p2r, "UP2UR": _p2r,
}  # fmt: skip
