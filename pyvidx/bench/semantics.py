"""What SASS instructions compute, for the 32 lanes of a warp at once: as much of it as decides where a kernel goes and
which memory it touches. Integers, predicates and conversions are exact; sums of 16-bit pairs and matrix
products are left out (their results keep what was in the registers)."""

import re
from collections.abc import Callable

import numpy as np

U32, U64, I32, I64, F32, F64 = np.uint32, np.uint64, np.int32, np.int64, np.float32, np.float64
LOW, SHIFT = U64(0xFFFFFFFF), U64(32)
OPAQUE = {"HMMA", "HADD2", "HMUL2", "HFMA2", "HSET2", "HSETP2", "HMNMX2", "LDSM", "MOVM", "MATCH", "REDUX", "B2R",
          "R2B", "LEPC"}  # fmt: skip
NOTHING = {"NOP", "YIELD", "NANOSLEEP", "MEMBAR", "ERRBAR", "CCTL", "CCTLL", "WARPSYNC", "PREFETCH", "FENCE", "DEPBAR",
           "LDGDEPBAR", "ARRIVES", "UCGABAR_ARV", "ACQBULK", "CGAERRBAR",
           "ENDCOLLECTIVE"}  # fmt: skip
_REGISTER = re.compile(r"^([-~!]?)(\|?)(U?R)(\d+|Z)\|?((?:\.\w+)*)$")
_PREDICATE = re.compile(r"^(!?)(U?P)(\d|T)$")
_CONSTANT = re.compile(r"^([-~]?)(\|?)c\[(0x\w+)\]\[(?:(U?R)(\d+|Z)\+?)?(?:(-?0x\w+))?\]\|?$")
_ADDRESS = re.compile(r"^(?:desc\[\w+\])?\[(.*)\]$")
_PART = re.compile(r"^(U?R)(\d+|Z)((?:\.\w+)*)$")
_FLOATS = {"+INF": np.inf, "-INF": -np.inf, "INF": np.inf, "+QNAN": np.nan, "QNAN": np.nan, "-QNAN": np.nan,
           "+SNAN": np.nan}  # fmt: skip
COMPARE = {"LT": np.less, "LE": np.less_equal, "GT": np.greater, "GE": np.greater_equal, "EQ": np.equal,
           "NE": np.not_equal}  # fmt: skip
JOIN = {"AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor}
SPECIAL = {
    "SR_TID.X": 0,
    "SR_TID.Y": 1,
    "SR_TID.Z": 2,
    "SR_CTAID.X": 3,
    "SR_CTAID.Y": 4,
    "SR_CTAID.Z": 5,
    "SR_LANEID": 6,
}


class Unknown(ValueError):
    """An instruction that the interpreter does not know."""


# ---- operands ----


def _index(text: str) -> int:
    return 255 if text == "Z" else int(text)


def integer(text: str, wide: bool = False) -> Callable:
    """A function of the warp: the operand's 32 (wide: 64) bits, of all lanes or, from what is uniform, of one."""
    if found := _REGISTER.match(text):
        sign, absolute, file, index, more = found.groups()
        file, index = file, _index(index)
        if wide or ".64" in more:
            bits = lambda w: w.file[file][index].astype(U64) | w.file[file][index + (index != 255)].astype(U64) << SHIFT  # noqa: E731
            negative = lambda x: U64(0) - x  # noqa: E731
        else:
            bits = lambda w: w.file[file][index]  # noqa: E731
            negative = lambda x: U32(0) - x  # noqa: E731
        if absolute:
            whole = bits
            bits = lambda w: np.abs(whole(w).view(I32)).view(U32)  # noqa: E731
        if sign == "-":
            return lambda w: negative(bits(w))
        return (lambda w: ~bits(w)) if sign in ("~", "!") else bits
    if found := _CONSTANT.match(text):
        sign, _, bank, file, index, offset = found.groups()
        size, offset, bank = (8 if wide else 4), int(offset or "0", 16), int(bank, 16)
        kind = U64 if wide else U32

        def constant(w):
            at = offset
            if file:
                at = (w.file[file][_index(index)].astype(I64) + offset).max()
            value = w.block.constant(bank, int(at), size).view(kind)
            return kind(0) - value if sign == "-" else ~value if sign == "~" else value

        return constant
    try:
        value = int(text, 0)
    except ValueError:
        raise Unknown(f"operand {text}") from None
    fixed = np.array([value & (0xFFFFFFFFFFFFFFFF if wide else 0xFFFFFFFF)], U64 if wide else U32)
    return lambda w: fixed


def real(text: str) -> Callable:
    """The same as float32."""
    if found := _REGISTER.match(text):
        sign, absolute, file, index, more = found.groups()
        index = _index(index)
        if ".H0" in more or ".H1" in more:
            shift = U32(16 if ".H1" in more else 0)
            plain = lambda w: (w.file[file][index] >> shift).astype(np.uint16).view(np.float16).astype(F32)  # noqa: E731
        else:
            plain = lambda w: w.file[file][index].view(F32)  # noqa: E731
        sized = (lambda w: np.abs(plain(w))) if absolute else plain
        return (lambda w: -sized(w)) if sign == "-" else sized
    if _CONSTANT.match(text):
        absolute, sign = "|" in text, text[0] == "-"
        bits = integer(text.lstrip("-").replace("|", ""))

        def constant(w):
            value = bits(w).view(F32)
            value = np.abs(value) if absolute else value
            return -value if sign else value

        return constant
    fixed = np.array([_FLOATS[text] if text in _FLOATS else float(text)], F32)
    return lambda w: fixed


def double(text: str) -> Callable:
    """The same as float64, from two registers."""
    if (text[0] in "-|" or text[0].isalpha()) and (_REGISTER.match(text) or _CONSTANT.match(text)):
        bits, absolute, negative = integer(text.lstrip("-").replace("|", ""), wide=True), "|" in text, text[0] == "-"

        def value(w):
            x = bits(w).view(F64)
            x = np.abs(x) if absolute else x
            return -x if negative else x

        return value
    fixed = np.array([_FLOATS[text] if text in _FLOATS else float(text)], F64)
    return lambda w: fixed


def predicate(text: str) -> Callable:
    found = _PREDICATE.match(text)
    if not found:
        raise Unknown(f"predicate {text}")
    no, file, index = found[1], found[2], 7 if found[3] == "T" else int(found[3])
    return (lambda w: ~w.file[file][index]) if no else (lambda w: w.file[file][index])


def is_predicate(text: str) -> bool:
    return _PREDICATE.match(text) is not None


def writer(text: str, wide: bool = False) -> Callable:
    """A function of warp, mask and value."""
    found = _REGISTER.match(text)
    if not found:
        raise Unknown(f"target {text}")
    file, index = found[3], _index(found[4])
    if index == 255:
        return lambda w, m, value: None
    uniform = file == "UR"

    def one(w, m, value, at=index):
        if uniform:
            w.file[file][at][:] = value[:1] if value.shape[0] == 1 else value[m][:1]
        else:
            np.copyto(w.file[file][at], value, where=m)

    def two(w, m, value):
        one(w, m, (value & LOW).astype(U32))
        one(w, m, (value >> SHIFT).astype(U32), index + 1)

    return two if wide else one


def predicate_writer(text: str) -> Callable:
    found = _PREDICATE.match(text)
    if not found or found[3] == "T":
        return lambda w, m, value: None
    file, index = found[2], int(found[3])
    if file == "UP":
        return lambda w, m, value: w.file[file][index].__setitem__(slice(None), value[:1])
    return lambda w, m, value: np.copyto(w.file[file][index], value, where=m)


def address(text: str, wide: bool) -> Callable:
    """[R4.64+UR6+0x10] and the like: a function of the warp, 64 bits for each lane.

    Args:
        wide: registers hold 64-bit addresses (of global memory), the even one and the next.
    """
    inner = _ADDRESS.match(text)
    if not inner:
        raise Unknown(f"address {text}")
    parts = []
    for part in inner[1].replace("+-", "+ -").split("+"):
        part = part.strip()
        register = _PART.match(part)
        if register:
            file, index, more = register.groups()
            scale = U64(int(re.search(r"\.X(\d+)", more)[1]) if ".X" in more else 1)
            get = integer(file + index, wide=wide and ".U32" not in more)
            parts.append(lambda w, get=get, scale=scale: get(w).astype(U64) * scale)
        else:
            fixed = np.array([(int(part, 16) if part else 0) & 0xFFFFFFFFFFFFFFFF], U64)
            parts.append(lambda w, fixed=fixed: fixed)

    def total(w):
        value = parts[0](w)
        for part in parts[1:]:
            value = value + part(w)
        return np.broadcast_to(value, 32)

    return total


# ---- instructions ----


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
        return _half_constant(operands)
    if name == "HADD2" and "F32" in more:
        return _floats(operands, np.add)
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


def _fsetp(more, o, read=real):
    compare = COMPARE.get(more[0].removesuffix("U"))
    nan_is_true = more[0].endswith("U")
    outs = [predicate_writer(p) for p in o[:2]]
    a, b, joined = read(o[2]), read(o[3]), predicate(o[4])
    join = JOIN[next((x for x in more if x in JOIN), "AND")]

    def test(w, m):
        x, y = a(w), b(w)
        nan = np.isnan(x) | np.isnan(y)
        value = ~nan if more[0] == "NUM" else nan if more[0] == "NAN" else compare(x, y)
        if nan_is_true:
            value = value | nan
        elif compare is not None:
            value = value & ~nan
        outs[0](w, m, join(value, joined(w)))
        outs[1](w, m, join(~value, joined(w)))

    return test


def _fsel(more, o):
    write, a, b, p = writer(o[0]), real(o[1]), real(o[2]), predicate(o[3])
    return lambda w, m: write(w, m, np.where(p(w), a(w), b(w)).astype(F32).view(U32))


def _minimum(more, o):
    floating = not o or "_f" in more
    read = real if floating else integer
    write, a, b, p = writer(o[0]), read(o[1]), read(o[2]), predicate(o[3])
    signed = "U32" not in more

    def least(w, m):
        x, y = a(w), b(w)
        if not floating and signed:
            x, y = x.view(I32), y.view(I32)
        value = np.where(p(w), np.minimum(x, y), np.maximum(x, y))
        write(w, m, value.view(U32))

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


def _floats(o, function):
    write, sources = writer(o[0]), [real(x) for x in o[1:] if not is_predicate(x)]

    def run(w, m):
        value = np.asarray(function(*(s(w) for s in sources)), F32)
        write(w, m, value.view(U32))

    return run


def _doubles(o, function):
    write, sources = writer(o[0], wide=True), [double(x) for x in o[1:] if not is_predicate(x)]
    return lambda w, m: write(w, m, np.asarray(function(*(s(w) for s in sources)), F64).view(U64))


def _double_minimum(more, o):
    p = predicate(o[3])
    write, a, b = writer(o[0], wide=True), double(o[1]), double(o[2])
    return lambda w, m: write(w, m, np.where(p(w), np.minimum(a(w), b(w)), np.maximum(a(w), b(w))).view(U64))


def _half_constant(o):
    """-RZ * RZ + two halves: how a constant is put where the other pipes are busy."""
    if not (o[1].endswith("RZ") and o[2].endswith("RZ")) or len(o) < 5:
        return None
    try:
        high, low = (np.float16(_FLOATS.get(x) if x in _FLOATS else float(x)) for x in o[3:5])
    except ValueError:
        return None
    value = np.array([int(high.view(np.uint16)) << 16 | int(low.view(np.uint16))], U32)
    write = writer(o[0])
    return lambda w, m: write(w, m, value)


def _mufu(more, o):
    functions = {"RCP": lambda x: 1 / x, "RSQ": lambda x: 1 / np.sqrt(x), "EX2": np.exp2, "LG2": np.log2,
                 "SQRT": np.sqrt, "SIN": np.sin, "COS": np.cos, "TANH": np.tanh}  # fmt: skip
    if more[0] in functions:
        return _floats(o, functions[more[0]])
    function = functions[more[0].removesuffix("64H")]  # of a double's high word, into that of another
    write, read = writer(o[0]), integer(o[1])

    def high(w, m):
        x = (read(w).astype(U64) << SHIFT).view(F64)
        write(w, m, (np.asarray(function(x), F64).view(U64) >> SHIFT).astype(U32))

    return high


def _i2f(more, o):
    if any(x in more for x in ("U8", "S8")):
        return _i2f_byte(more, o)
    wide, to_double = any(x in more for x in ("U64", "S64")), "F64" in more
    unsigned = any(x.startswith("U") and x != "U" for x in more)
    write, read = writer(o[0], wide=to_double), integer(o[1], wide)

    def convert(w, m):
        x = read(w)
        x = x if unsigned else x.view(I64 if wide else I32)
        if to_double:
            write(w, m, x.astype(F64).view(U64))
            return
        value = x.astype(F32)
        if "RP" in more:
            value = np.where(value.astype(F64) < x.astype(F64), np.nextafter(value, F32(np.inf)), value)
        if "F16" in more:
            write(w, m, value.astype(np.float16).view(np.uint16).astype(U32))
        else:
            write(w, m, value.astype(F32).view(U32))

    return convert


def _i2f_byte(more, o):
    text, _, part = o[1].partition(".B")
    write, read, shift = writer(o[0]), integer(text), U32(8 * int(part[:1] or 0))
    return lambda w, m: write(w, m, (read(w) >> shift & U32(255)).astype(F32).view(U32))


ROUNDINGS = {"TRUNC": np.trunc, "FLOOR": np.floor, "CEIL": np.ceil}


def _f2i(more, o):
    function = next((ROUNDINGS[x] for x in more if x in ROUNDINGS), np.rint)
    wide = any(x in more for x in ("U64", "S64"))
    unsigned = "U32" in more or "U64" in more
    write, read = writer(o[0], wide), (double if "F64" in more else real)(o[1])
    bits = 64 if wide else 32
    low, high = (0, 2**bits - 1) if unsigned else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    def convert(w, m):
        x = np.nan_to_num(function(read(w)).astype(F64), nan=0.0, posinf=high, neginf=low)
        whole = np.array([min(max(int(v), low), high) & (1 << bits) - 1 for v in x.tolist()], U64)
        write(w, m, whole if wide else whole.astype(U32))

    return convert


def _frnd(more, o):
    function = next((ROUNDINGS[x] for x in more if x in ROUNDINGS), np.rint)
    return (_doubles if "F64" in more else _floats)(o, function)


def _f2f(more, o):
    if more[:2] == ["F64", "F32"]:
        write, read = writer(o[0], wide=True), real(o[1])
        return lambda w, m: write(w, m, read(w).astype(F64).view(U64))
    if more[:2] == ["F32", "F64"]:
        write, read = writer(o[0]), double(o[1])
        return lambda w, m: write(w, m, read(w).astype(F32).view(U32))
    if more[:2] == ["F16", "F32"]:
        write, read = writer(o[0]), real(o[1])
        return lambda w, m: write(w, m, read(w).astype(np.float16).view(np.uint16).astype(U32))
    if "F64" in more or "F16" in more:
        raise Unknown("F2F." + ".".join(more))
    return _floats(o, lambda x: x)


def _f2fp(more, o):
    write, read = writer(o[0]), [real(x) for x in o[1:3]]
    half = "BF16" not in more

    def bits(x):
        if half:
            return x.astype(np.float16).view(np.uint16).astype(U32)
        return (x.astype(F32).view(U32) + U32(0x8000)) >> U32(16)

    return lambda w, m: write(w, m, bits(read[0](w)) << U32(16) | bits(read[1](w)))


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


def _fchk(more, o):
    out = predicate_writer(o[0])  # numbers so small or large that a division needs its slow path
    return lambda w, m: out(w, m, np.zeros(1, bool))


TABLE = {
    "MOV": _mov, "UMOV": _mov, "IMAD": _imad, "IADD3": _iadd3, "VIADD": _iadd3, "IADD": _iadd3, "LEA": _lea,
    "LOP3": _lop3, "PLOP3": _plop3, "SHF": _shf, "SEL": _sel, "ISETP": _isetp, "FSETP": _fsetp, "FSEL": _fsel,
    "IMNMX": _minimum, "VIMNMX": _minimum, "VIADDMNMX": _added_minimum,
    "FMNMX": lambda more, o: _minimum([*more, "_f"], o),
    "FADD": lambda more, o: _floats(o, np.add), "FMUL": lambda more, o: _floats(o, np.multiply),
    "FFMA": lambda more, o: _floats(o, lambda a, b, c: a * b + c), "MUFU": _mufu, "I2F": _i2f, "I2FP": _i2f,
    "F2I": _f2i, "F2F": _f2f, "F2FP": _f2fp, "PRMT": _prmt, "IABS": _abs, "POPC": _popc, "FLO": _flo, "BREV": _brev,
    "SGXT": _sgxt,
    "BMSK": _bmsk, "S2R": _special, "S2UR": _special, "CS2R": _cs2r, "R2UR": _r2ur, "LDC": _ldc, "ULDC": _ldc,
    "FRND": _frnd,
    "DADD": lambda more, o: _doubles(o, np.add), "DMUL": lambda more, o: _doubles(o, np.multiply),
    "DFMA": lambda more, o: _doubles(o, lambda a, b, c: a * b + c), "DMNMX": _double_minimum,
    "DSETP": lambda more, o: _fsetp(more, o, double), "VOTE": _vote, "VOTEU": _vote, "SHFL": _shfl, "P2R": _p2r, "R2P": _r2p, "FCHK": _fchk,
}  # fmt: skip
