"""What SASS instructions on float32 and float64 compute, and conversions between numbers. Sums of 16-bit pairs are left
out."""

import numpy as np

from pyvidx.bench.operands import (
    COMPARE,
    F32,
    F64,
    FLOATS,
    I32,
    I64,
    JOIN,
    SHIFT,
    U32,
    U64,
    Unknown,
    double,
    integer,
    is_predicate,
    predicate,
    predicate_writer,
    real,
    writer,
)  # fmt: skip


def fsetp(more, o, read=real):
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


def fsel(more, o):
    write, a, b, p = writer(o[0]), real(o[1]), real(o[2]), predicate(o[3])
    return lambda w, m: write(w, m, np.where(p(w), a(w), b(w)).astype(F32).view(U32))


def fmnmx(more, o):
    write, a, b, p = writer(o[0]), real(o[1]), real(o[2]), predicate(o[3])
    # Of a number and NaN the number, unless NaN is asked for.
    least, most = (np.minimum, np.maximum) if "NAN" in more else (np.fmin, np.fmax)
    return lambda w, m: write(w, m, np.where(p(w), least(a(w), b(w)), most(a(w), b(w))).view(U32))


def rounded(value: np.ndarray, exact: np.ndarray, more: list[str]) -> np.ndarray:
    """value, the float32 nearest to exact, or its neighbor on the side that is asked for; with SAT in [0, 1]."""
    near = value.astype(F64)
    up = ("RP" in more) | (("RZ" in more) & (exact < 0))
    down = ("RM" in more) | (("RZ" in more) & (exact > 0))
    value = np.where((near < exact) & up, np.nextafter(value, F32(np.inf)), value)
    value = np.where((near > exact) & down, np.nextafter(value, F32(-np.inf)), value)
    return np.fmin(np.fmax(value, F32(0)), F32(1)) if "SAT" in more else value


def arithmetic(more, o, function):
    write, sources = writer(o[0]), [real(x) for x in o[1:] if not is_predicate(x)]

    def run(w, m):
        exact = np.asarray(function(*(s(w).astype(F64) for s in sources)))
        write(w, m, rounded(exact.astype(F32), exact, more).astype(F32).view(U32))

    return run


def floats(o, function):
    write, sources = writer(o[0]), [real(x) for x in o[1:] if not is_predicate(x)]

    def run(w, m):
        value = np.asarray(function(*(s(w) for s in sources)), F32)
        write(w, m, value.view(U32))

    return run


def doubles(o, function):
    write, sources = writer(o[0], wide=True), [double(x) for x in o[1:] if not is_predicate(x)]
    return lambda w, m: write(w, m, np.asarray(function(*(s(w) for s in sources)), F64).view(U64))


def half_constant(o):
    """-RZ * RZ + two halves: how a constant is put where the other pipes are busy."""
    if not (o[1].endswith("RZ") and o[2].endswith("RZ")) or len(o) < 5:
        return None
    try:
        high, low = (np.float16(FLOATS[x] if x in FLOATS else float(x)) for x in o[3:5])
    except ValueError:
        return None
    value = np.array([int(high.view(np.uint16)) << 16 | int(low.view(np.uint16))], U32)
    write = writer(o[0])
    return lambda w, m: write(w, m, value)


def mufu(more, o):
    functions = {"RCP": lambda x: 1 / x, "RSQ": lambda x: 1 / np.sqrt(x), "EX2": np.exp2}
    if more[0] in functions:
        return floats(o, functions[more[0]])
    function = functions[more[0].removesuffix("64H")]  # of a double's high word, into that of another
    write, read = writer(o[0]), integer(o[1])

    def high(w, m):
        x = (read(w).astype(U64) << SHIFT).view(F64)
        write(w, m, (np.asarray(function(x), F64).view(U64) >> SHIFT).astype(U32))

    return high


def i2f(more, o):
    if any(x in more for x in ("U8", "S8", "U16", "S16", "F16")):
        raise Unknown("I2F." + ".".join(more))
    wide, to_double = any(x in more for x in ("U64", "S64")), "F64" in more
    unsigned = any(x.startswith("U") and x != "U" for x in more)
    write, read = writer(o[0], wide=to_double), integer(o[1], wide)

    def convert(w, m):
        x = read(w)
        x = x if unsigned else x.view(I64 if wide else I32)
        if to_double:
            write(w, m, x.astype(F64).view(U64))
            return
        write(w, m, rounded(x.astype(F32), x.astype(F64), more).astype(F32).view(U32))

    return convert


def f2i(more, o):
    if "TRUNC" not in more:
        raise Unknown("F2I." + ".".join(more))
    wide = any(x in more for x in ("U64", "S64"))
    unsigned = "U32" in more or "U64" in more
    write, read = writer(o[0], wide), (double if "F64" in more else real)(o[1])
    bits = 64 if wide else 32
    low, high = (0, 2**bits - 1) if unsigned else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    def convert(w, m):
        x = np.nan_to_num(np.trunc(read(w)).astype(F64), nan=0.0, posinf=high, neginf=low)
        whole = np.array([min(max(int(v), low), high) & (1 << bits) - 1 for v in x.tolist()], U64)
        write(w, m, whole if wide else whole.astype(U32))

    return convert


def f2f(more, o):
    target, source = more[:2]
    write, read = writer(o[0]), {"F64": double, "F32": real}[source](o[1])
    if target == "F32":
        return lambda w, m: write(w, m, read(w).astype(F32).view(U32))
    if target == "F16":
        return lambda w, m: write(w, m, read(w).astype(np.float16).view(np.uint16).astype(U32))
    raise Unknown("F2F." + ".".join(more))


def f2fp(more, o):
    if {"RZ", "RS"} & {*more}:
        raise Unknown("F2FP." + ".".join(more))
    write, read = writer(o[0]), [real(x) for x in o[1:3]]
    half, relu = "BF16" not in more, "RELU" in more

    def bits(x):
        x = np.where(x < 0, F32(0), x) if relu else x
        if half:
            return x.astype(np.float16).view(np.uint16).astype(U32)
        whole = x.astype(F32).view(U32)
        rounded = whole + U32(0x7FFF) + (whole >> U32(16) & U32(1))  # to the nearest, of two the even one
        return np.where(np.isnan(x), U32(0x7FFF), rounded >> U32(16))

    return lambda w, m: write(w, m, bits(read[0](w)) << U32(16) | bits(read[1](w)))


def fchk(more, o):
    out = predicate_writer(o[0])  # numbers so small or large that a division needs its slow path
    return lambda w, m: out(w, m, np.zeros(1, bool))


TABLE = {
    "FSETP": fsetp, "FSEL": fsel, "FMNMX": fmnmx, "FADD": lambda more, o: arithmetic(more, o, np.add),
    "FMUL": lambda more, o: arithmetic(more, o, np.multiply),
    "FFMA": lambda more, o: arithmetic(more, o, lambda a, b, c: a * b + c),
    "MUFU": mufu, "I2F": i2f, "I2FP": i2f, "F2I": f2i, "F2F": f2f, "F2FP": f2fp, "FCHK": fchk,
    "DADD": lambda more, o: doubles(o, np.add), "DMUL": lambda more, o: doubles(o, np.multiply),
    "DFMA": lambda more, o: doubles(o, lambda a, b, c: a * b + c),
    "DSETP": lambda more, o: fsetp(more, o, double),
}  # fmt: skip
