"""What SASS instructions on integers and predicates compute."""

from collections.abc import Callable

import numpy as np

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


def _split_targets(operands: list[str]) -> tuple[str, list[str], list[str]]:
    """The target register, predicates written beside it, and the sources."""
    rest = list(operands[1:])
    extra = []
    while rest and is_predicate(rest[0]) and not rest[0].startswith("!"):
        extra.append(rest.pop(0))
    return operands[0], extra, rest


def mov(more, o):
    write, read = writer(o[0], ".64" in "." + ".".join(more)), integer(o[1], "64" in more)
    return lambda w, m: write(w, m, read(w))


def imad(more, o):
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


def iadd3(more, o):
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


def lea(more, o):
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


def lop3(more, o):
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


def plop3(more, o):
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


def shf(more, o):
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


def sel(more, o):
    write, a, b, p = writer(o[0]), integer(o[1]), integer(o[2]), predicate(o[3])
    return lambda w, m: write(w, m, np.where(p(w), a(w), b(w)))


def isetp(more, o):
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


def minimum(more, o):
    write, a, b, p = writer(o[0]), integer(o[1]), integer(o[2]), predicate(o[3])
    kind = U32 if "U32" in more else I32

    def least(w, m):
        x, y = a(w).view(kind), b(w).view(kind)
        least = np.where(p(w), np.minimum(x, y), np.maximum(x, y))
        write(w, m, (np.maximum(least, 0) if "RELU" in more else least).view(U32))

    return least


def added_minimum(more, o):
    """The smaller (with !PT the larger) of a + b and c."""
    write, a, b, c, p = writer(o[0]), *(integer(x) for x in o[1:4]), predicate(o[4])
    signed = "U32" not in more

    def least(w, m):
        x, y = a(w) + b(w), c(w)
        if signed:
            x, y = x.view(I32), y.view(I32)
        write(w, m, np.where(p(w), np.minimum(x, y), np.maximum(x, y)).view(U32))

    return least


def prmt(more, o):
    if more:  # modes that read the selector otherwise
        raise Unknown("PRMT." + ".".join(more))
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


def dot(more, o):
    """c + the products of four bytes of a by four of b (4A), or of two halves of a by the low or high two bytes of b
    (2A.LO, 2A.HI); of each whether it is signed."""
    write, a, b, c = writer(o[0]), *(integer(x) for x in o[1:4])
    halves, kinds = more[0] == "2A", [x for x in more if x[0] in "US" and x[1:].isdigit()]
    if len(kinds) != 2 or (more[0], halves) not in (("4A", False), ("2A", True)):
        raise Unknown("IDP." + ".".join(more))

    def parts(x, kind):
        return np.broadcast_to(x, 32).copy().view(f"{'iu'[kind[0] == 'U']}{int(kind[1:]) // 8}").reshape(32, -1)

    def dot(w, m):
        x, y = parts(a(w), kinds[0]), parts(b(w), kinds[1])
        if halves:
            y = y[:, 2:] if "HI" in more else y[:, :2]
        write(w, m, (c(w).astype(I64) + (x.astype(I64) * y).sum(1)).astype(U32))

    return dot


def packed(more, o):
    """a and b, held to what a byte has, as the second and first byte below the low half of c."""
    if more != ["U8", "S32", "SAT"]:
        raise Unknown("I2IP." + ".".join(more))
    write, a, b, c = writer(o[0]), *(integer(x) for x in o[1:4])

    def pack(w, m):
        high, low = (np.clip(x(w).view(I32), 0, 255).astype(U32) for x in (a, b))
        write(w, m, c(w) << U32(16) | high << U32(8) | low)

    return pack


def absolute(more, o):
    write, read = writer(o[0]), integer(o[1])
    return lambda w, m: write(w, m, np.abs(read(w).view(I32)).view(U32))


TABLE = {
    "MOV": mov, "IMAD": imad, "IADD3": iadd3, "VIADD": iadd3, "LEA": lea, "LOP3": lop3, "PLOP3": plop3, "SHF": shf,
    "SEL": sel, "ISETP": isetp, "IMNMX": minimum, "VIMNMX": minimum, "VIADDMNMX": added_minimum, "PRMT": prmt,
    "IABS": absolute, "IDP": dot, "I2IP": packed,
}  # fmt: skip
