"""What SASS instructions compute, for the 32 lanes of a warp at once: as much of it as decides where a kernel goes and
which memory it touches. Integers, predicates and conversions are exact; sums of 16-bit pairs and matrix
products are left out (their results keep what was in the registers)."""

import re
from collections.abc import Callable

import numpy as np

from pyvidx.bench import floating
from pyvidx.bench.operands import (
    COMPARE,
    I32,
    I64,
    JOIN,
    LOW,
    SHIFT,
    U32,
    U64,
    Unknown,
    integer,
    is_predicate,
    predicate,
    predicate_writer,
    writer,
)  # fmt: skip

OPAQUE = {"HMMA", "HADD2", "HMUL2", "HFMA2", "HSET2", "HSETP2", "HMNMX2", "LDSM", "MOVM", "MATCH", "REDUX", "B2R",
          "R2B", "LEPC"}  # fmt: skip
NOTHING = {"NOP", "YIELD", "NANOSLEEP", "MEMBAR", "ERRBAR", "CCTL", "CCTLL", "WARPSYNC", "PREFETCH", "FENCE", "DEPBAR",
           "LDGDEPBAR", "ARRIVES", "UCGABAR_ARV", "ACQBULK", "CGAERRBAR",
           "ENDCOLLECTIVE"}  # fmt: skip
SPECIAL = {
    "SR_TID.X": 0,
    "SR_TID.Y": 1,
    "SR_TID.Z": 2,
    "SR_CTAID.X": 3,
    "SR_CTAID.Y": 4,
    "SR_CTAID.Z": 5,
    "SR_LANEID": 6,
}


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
    if name in OPAQUE:
        return None
    made = TABLE.get(name) or (TABLE.get(name[1:]) if name[0] == "U" else None)
    if made is None:
        raise Unknown(opcode)
    return made(more, operands)


def _split_targets(operands: list[str]) -> tuple[str, list[str], list[str]]:
    """The target register, predicates written beside it, and the sources."""
    rest = list(operands[1:])
    extra = []
    while rest and is_predicate(rest[0]) and not rest[0].startswith("!"):
        extra.append(rest.pop(0))
    return operands[0], extra, rest


def _mov(more, o):
    write, read = writer(o[0], ".64" in "." + ".".join(more)), integer(o[1], "64" in more)
    return lambda w, m: write(w, m, read(w))


def _imad(more, o):
    target, carries, rest = _split_targets(o)
    unsigned = "U32" in more
    if "WIDE" in more or "HI" in more:
        a, b, c = integer(rest[0]), integer(rest[1]), integer(rest[2], wide=True)
        write = writer(target, wide="WIDE" in more)
        kind = U32 if unsigned else I32
        carry = [predicate(p) for p in rest[3:4]]

        def wide(w, m):
            x = a(w).view(kind).astype(U64 if unsigned else I64) * b(w).view(kind).astype(U64 if unsigned else I64)
            product = x.view(U64)
            total = product + c(w)
            for p in carries:
                predicate_writer(p)(w, m, total < product)
            for p in carry:
                total = total + p(w).astype(U64)
            write(w, m, total if "WIDE" in more else (total >> SHIFT).astype(U32))

        return wide
    a, b, c = (integer(x) for x in rest[:3])
    write, carry = writer(target), [predicate(p) for p in rest[3:4] if "X" in more]

    def plain(w, m):
        total = a(w) * b(w) + c(w)
        for p in carry:
            total = total + p(w).astype(U32)
        write(w, m, total)

    return plain


def _term(text: str, extended: bool) -> Callable:
    """One of the numbers that are added, in 64 bits with the carry that its minus brings."""
    if text.startswith("-") and not text.startswith("-0x") and not extended:
        inner = integer(text[1:])
        return lambda w: (~inner(w)).astype(U64) + U64(1)
    if text.startswith("-0x"):
        value = np.array([int(text, 16) & 0xFFFFFFFF], U64)
        return lambda w: value
    plain = integer(text)
    return lambda w: plain(w).astype(U64)


def _iadd3(more, o):
    target, carries, rest = _split_targets(o)
    extended = "X" in more
    terms = [_term(t, extended) for t in rest if not is_predicate(t)]
    ins = [predicate(p) for p in rest if is_predicate(p)] if extended else []
    write, outs = writer(target), [predicate_writer(p) for p in carries]

    def add(w, m):
        total = terms[0](w)
        for t in terms[1:]:
            total = total + t(w)
        for p in ins:
            total = total + p(w).astype(U64)
        write(w, m, (total & LOW).astype(U32))
        over = total >> SHIFT
        for i, out in enumerate(outs):
            out(w, m, over > U64(i))

    return add


def _lea(more, o):
    target, carries, rest = _split_targets(o)
    write, outs = writer(target), [predicate_writer(p) for p in carries]
    ins = [predicate(p) for p in rest if is_predicate(p)] if "X" in more else []
    numbers = [x for x in rest if not is_predicate(x)]
    a, b = integer(numbers[0]), _term(numbers[1], False)
    shift = U64(int(numbers[-1], 0))
    high = integer(numbers[2]) if "HI" in more and len(numbers) == 4 else None
    signed = "SX32" in more

    def lea(w, m):
        x = a(w)
        if signed:
            shifted = (x.view(I32).astype(I64) << I64(shift)).view(U64) >> SHIFT
        elif high is not None or "HI" in more:
            x = x.astype(U64) | (high(w).astype(U64) << SHIFT if high is not None else U64(0))
            shifted = (x << shift) >> SHIFT
        else:
            shifted = x.astype(U64) << shift & LOW
        total = (shifted & LOW) + b(w)
        for p in ins:
            total = total + p(w).astype(U64)
        write(w, m, (total & LOW).astype(U32))
        for i, out in enumerate(outs):
            out(w, m, total >> SHIFT > U64(i))

    return lea


def _lut(a, b, c, table: int):
    result = a & U32(0)
    for i in range(8):
        if table >> i & 1:
            result = result | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
    return result


def _lop3(more, o):
    o = list(o)
    out = predicate_writer(o.pop(0)) if is_predicate(o[0]) else None
    write = writer(o[0])
    a, b, c = (integer(x) for x in o[1:4])
    table = int(o[4], 16)

    def lop(w, m):
        value = _lut(a(w), b(w), c(w), table)
        write(w, m, value)
        if out:
            out(w, m, value != 0)

    return lop


def _plop3(more, o):
    outs = [predicate_writer(p) for p in o[:2]]
    a, b, c = (predicate(p) for p in o[2:5])
    tables = [int(t, 16) for t in o[5:7]]

    def plop(w, m):
        x = [p(w) for p in (a, b, c)]
        index = x[0] * 4 + x[1] * 2 + x[2] * 1
        values = [(t >> index & 1).astype(bool) for t in tables]
        for out, value in zip(outs, values):
            out(w, m, value)

    return plop


def _shf(more, o):
    write, low, high = writer(o[0]), integer(o[1]), integer(o[3])
    by = integer(o[2])
    left, signed, upper = more[0] == "L", "S32" in more or "S64" in more, "HI" in more
    wrap = U64(63 if "U64" in more or "S64" in more else 31) if "W" in more else None

    def shift(w, m):
        s = by(w).astype(U64)
        s = s & wrap if wrap is not None else np.minimum(s, U64(63))
        v = low(w).astype(U64) | high(w).astype(U64) << SHIFT
        if left:
            v = v << s
        elif signed:
            v = (v.view(I64) >> s.view(I64)).view(U64)
        else:
            v = v >> s
        write(w, m, ((v >> SHIFT) if upper else v & LOW).astype(U32))

    return shift


def _sel(more, o):
    write, a, b, p = writer(o[0]), integer(o[1]), integer(o[2]), predicate(o[3])
    return lambda w, m: write(w, m, np.where(p(w), a(w), b(w)))


def _isetp(more, o):
    compare, signed = COMPARE.get(more[0]), "U32" not in more
    outs = [predicate_writer(p) for p in o[:2]]
    a, b, joined = integer(o[2]), integer(o[3]), predicate(o[4])
    join = JOIN[next(x for x in more if x in JOIN)]
    low = predicate(o[5]) if "EX" in more and len(o) > 5 else None
    always = {"T": True, "F": False}.get(more[0])

    def test(w, m):
        x, y = (v.view(I32) if signed else v for v in (a(w), b(w)))
        if always is not None:
            value = np.array([always])
        elif low is None:
            value = compare(x, y)
        elif more[0] == "EQ":
            value = (x == y) & low(w)
        elif more[0] == "NE":
            value = (x != y) | low(w)
        else:
            value = (x > y if more[0][0] == "G" else x < y) | ((x == y) & low(w))
        with_it = joined(w)
        outs[0](w, m, join(value, with_it))
        outs[1](w, m, join(~value, with_it))

    return test


def _minimum(more, o):
    write, a, b, p = writer(o[0]), integer(o[1]), integer(o[2]), predicate(o[3])
    kind = U32 if "U32" in more else I32

    def least(w, m):
        x, y = a(w).view(kind), b(w).view(kind)
        write(w, m, np.where(p(w), np.minimum(x, y), np.maximum(x, y)).view(U32))

    return least


def _added_minimum(more, o):
    """The smaller (with !PT the larger) of a + b and c."""
    write, a, b, c, p = writer(o[0]), *(integer(x) for x in o[1:4]), predicate(o[4])
    signed = "U32" not in more

    def least(w, m):
        x, y = a(w) + b(w), c(w)
        if signed:
            x, y = x.view(I32), y.view(I32)
        write(w, m, np.where(p(w), np.minimum(x, y), np.maximum(x, y)).view(U32))

    return least


def _prmt(more, o):
    write, a, selector, b = writer(o[0]), integer(o[1]), integer(o[2]), integer(o[3])

    def permute(w, m):
        both, s = a(w).astype(U64) | b(w).astype(U64) << SHIFT, selector(w).astype(U64)
        value = both & U64(0)
        for i in range(4):
            nibble = s >> U64(4 * i) & U64(15)
            byte = both >> (nibble & U64(7)) * U64(8) & U64(255)
            byte = np.where(nibble & U64(8), (byte >> U64(7)) * U64(255), byte)
            value = value | byte << U64(8 * i)
        write(w, m, value.astype(U32))

    return permute


def _abs(more, o):
    write, read = writer(o[0]), integer(o[1])
    return lambda w, m: write(w, m, np.abs(read(w).view(I32)).view(U32))


def _popc(more, o):
    write, read = writer(o[0]), integer(o[1])

    def count(w, m):
        x = read(w)
        write(w, m, sum((x >> U32(i) & U32(1)) for i in range(32)).astype(U32))

    return count


def _flo(more, o):
    write, read = writer(o[0]), integer(o[1])

    def leading(w, m):
        x = read(w)
        found = np.floor(np.log2(np.maximum(x, 1).astype(np.float64))).astype(U32)
        found = U32(31) - found if "SH" in more else found
        write(w, m, np.where(x == 0, U32(0xFFFFFFFF), found))

    return leading


def _brev(more, o):
    write, read = writer(o[0]), integer(o[1])
    return lambda w, m: write(w, m, sum((read(w) >> U32(i) & U32(1)) << U32(31 - i) for i in range(32)).astype(U32))


def _sgxt(more, o):
    write, read, bits = writer(o[0]), integer(o[1]), integer(o[2])

    def extend(w, m):
        shift = U32(32) - np.minimum(bits(w), U32(32))
        x = read(w) << shift
        write(w, m, x >> shift if "U32" in more else (x.view(I32) >> shift.view(I32)).view(U32))

    return extend


def _bmsk(more, o):
    write, at, size = writer(o[0]), integer(o[1]), integer(o[2])

    def mask(w, m):
        bits = (U64(1) << np.minimum(size(w), U32(32)).astype(U64)) - U64(1) << np.minimum(at(w), U32(32)).astype(U64)
        write(w, m, (bits & LOW).astype(U32))

    return mask


def _special(more, o):
    write, source = writer(o[0]), o[1]
    if source in SPECIAL:
        column = SPECIAL[source]
        return lambda w, m: write(w, m, w.special[column])
    if source.startswith("SR_") and source.endswith("MASK"):
        lane = np.arange(32, dtype=U64)
        one = U64(1) << lane
        masks = {"SR_EQMASK": one, "SR_LTMASK": one - U64(1), "SR_LEMASK": one * U64(2) - U64(1)}
        masks |= {"SR_GTMASK": ~masks["SR_LEMASK"], "SR_GEMASK": ~masks["SR_LTMASK"]}
        value = (masks[source] & LOW).astype(U32)
        return lambda w, m: write(w, m, value)
    zero = np.zeros(1, U32)
    return lambda w, m: write(w, m, zero)


def _cs2r(more, o):
    write, zero = writer(o[0], wide="32" not in more), np.zeros(1, U32 if "32" in more else U64)
    return lambda w, m: write(w, m, zero)


def _r2ur(more, o):
    o = [x for x in o if not is_predicate(x)]
    write, read = writer(o[0]), integer(o[1])
    return lambda w, m: write(w, m, np.broadcast_to(read(w), 32)[m][:1])


def _ldc(more, o):
    size = 2 if "64" in more else 1
    write, read = writer(o[0], wide=size == 2), integer(o[1], wide=size == 2)
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
            source, ok = (b & ~segment) | (lane & segment), None
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


def _byte(more) -> int:
    """Where the byte of P2R.B1 and the like begins."""
    return next((8 * int(x[1]) for x in more if re.fullmatch("B[0-3]", x)), 0)


def _p2r(more, o):
    write, before, mask, shift = writer(o[0]), integer(o[2]), int(o[3], 16), _byte(more)

    def pack(w, m):
        bits = sum((w.file["P"][i] & bool(mask >> i & 1)).astype(U32) << U32(i + shift) for i in range(7))
        write(w, m, (before(w) & ~U32(mask << shift)) | bits)

    return pack


def _r2p(more, o):
    read, mask, shift = integer(o[1].split(".B")[0]), int(o[2], 16), _byte(o[1].split(".")[1:])

    def unpack(w, m):
        for i in range(7):
            if mask >> i & 1:
                np.copyto(w.file["P"][i], (read(w) >> U32(i + shift) & U32(1)).astype(bool), where=m)

    return unpack


TABLE = floating.TABLE | {
    "MOV": _mov, "IMAD": _imad, "IADD3": _iadd3, "VIADD": _iadd3, "LEA": _lea, "LOP3": _lop3, "PLOP3": _plop3,
    "SHF": _shf, "SEL": _sel, "ISETP": _isetp, "IMNMX": _minimum, "VIMNMX": _minimum, "VIADDMNMX": _added_minimum,
    "PRMT": _prmt, "IABS": _abs, "POPC": _popc, "FLO": _flo, "BREV": _brev, "SGXT": _sgxt, "BMSK": _bmsk,
    "S2R": _special, "S2UR": _special, "CS2R": _cs2r, "R2UR": _r2ur, "LDC": _ldc, "ULDC": _ldc, "VOTE": _vote,
    "VOTEU": _vote, "SHFL": _shfl, "P2R": _p2r, "R2P": _r2p,
}  # fmt: skip
