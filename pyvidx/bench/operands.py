"""Operands of SASS instructions: functions that read registers, constants, predicates and addresses of a warp, and such
that write them. A value has one number for each of the 32 lanes, or one for all where it is uniform."""

import re
from collections.abc import Callable

import numpy as np

U32, U64, I32, I64, F32, F64 = np.uint32, np.uint64, np.int32, np.int64, np.float32, np.float64
LOW, SHIFT = U64(0xFFFFFFFF), U64(32)
_REGISTER = re.compile(r"^([-~!]?)(\|?)(U?R)(\d+|Z)\|?((?:\.\w+)*)$")
_PREDICATE = re.compile(r"^(!?)(U?P)(\d|T)$")
_CONSTANT = re.compile(r"^([-~]?)(\|?)c\[(0x\w+)\]\[(?:(U?R)(\d+|Z)\+?)?(?:(-?0x\w+))?\]\|?$")
_ADDRESS = re.compile(r"^(?:desc\[\w+\])?\[(.*)\]$")
_PART = re.compile(r"^(U?R)(\d+|Z)((?:\.\w+)*)$")
FLOATS = {"+INF": np.inf, "-INF": -np.inf, "INF": np.inf, "+QNAN": np.nan, "QNAN": np.nan, "-QNAN": np.nan,
           "+SNAN": np.nan}  # fmt: skip


COMPARE = {"LT": np.less, "LE": np.less_equal, "GT": np.greater, "GE": np.greater_equal, "EQ": np.equal,
           "NE": np.not_equal}  # fmt: skip
JOIN = {"AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor}


class Unknown(ValueError):
    """An instruction that the interpreter does not know."""


def _index(text: str) -> int:
    return 255 if text == "Z" else int(text)


def integer(text: str, wide: bool = False) -> Callable:
    """A function of the warp: the operand's 32 (wide: 64) bits, of all lanes or, from what is uniform, of one."""
    if found := _REGISTER.match(text):
        sign, absolute, file, index, more = found.groups()
        index = _index(index)
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
            if file:
                at = np.broadcast_to(w.file[file][_index(index)].astype(I64) + offset, 32)
                value = np.zeros(32, kind)
                for one in np.unique(at[w.active]):
                    value[at == one] = w.block.constant(bank, int(one), size).view(kind)
            else:
                value = w.block.constant(bank, offset, size).view(kind)
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
    fixed = np.array([FLOATS[text] if text in FLOATS else float(text)], F32)
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
    fixed = np.array([FLOATS[text] if text in FLOATS else float(text)], F64)
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
    for part in inner[1].split("+"):
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
