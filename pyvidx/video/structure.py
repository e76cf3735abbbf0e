"""Whether a file ends before what its container promises: a few bytes read, nothing decoded.

FFmpeg plays what is there and says no more than a line in its log, so the sizes that containers state are held against
the file here.
"""

from __future__ import annotations

import os
from typing import BinaryIO

_TAIL = 1 << 16


def cut(file: BinaryIO, family: str) -> str:
    """Why the file must have been longer, in words; "" if nothing says so.

    Args:
        file: at its start.
        family: the first of FFmpeg's names for the container.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    check = _CHECKS.get(family)
    return check(file, size) if check else ""


def _mov(file: BinaryIO, size: int) -> str:
    at = 0
    while at + 8 <= size:
        file.seek(at)
        head = file.read(16)
        length, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        elif length == 0:  # up to the end of the file
            return ""
        if length < 8 or not all(32 <= c < 127 or c == 0xA9 for c in kind):
            return f"no box starts at byte {at}"
        at += length
    return _beyond(at, size) if at > size else ""


def _matroska(file: BinaryIO, size: int) -> str:
    head = file.read(4096)
    at = head.find(b"\x18\x53\x80\x67")  # Segment
    if at < 0 or at + 12 > len(head):
        return ""
    first = head[at + 4]
    width = 9 - first.bit_length()
    if width > 8:
        return ""
    value = int.from_bytes(head[at + 4 : at + 4 + width], "big") & ((1 << 7 * width) - 1)
    if value == (1 << 7 * width) - 1:  # of unknown size, as in live streams
        return ""
    end = at + 4 + width + value
    return _beyond(end, size) if end > size else ""


def _riff(file: BinaryIO, size: int) -> str:
    at = 0
    while at + 8 <= size:
        file.seek(at)
        head = file.read(8)
        if head[:4] != b"RIFF":
            return ""
        at += 8 + int.from_bytes(head[4:], "little")
        at += at % 2
    return _beyond(at, size) if at > size + 1 else ""


def _mpegts(file: BinaryIO, size: int) -> str:
    head = file.read(1024)
    for step, first in ((188, 0), (192, 4), (204, 0)):
        if head[first::step][:5] == b"\x47" * 5:
            return f"its last packet has {size % step} of {step} bytes" if size % step else ""
    return ""


def _gif(file: BinaryIO, size: int) -> str:
    head = file.read(13)
    if len(head) < 13:
        return "its header is not whole"
    file.seek(_colors(head[10]), os.SEEK_CUR)
    while kind := file.read(1):
        if kind == b";":
            return ""
        if kind == b",":
            picture = file.read(9)
            file.seek(_colors(picture[-1] if picture else 0) + 1, os.SEEK_CUR)
        elif kind == b"!":
            file.read(1)
        else:
            return f"no block starts at byte {file.tell() - 1}"
        while length := file.read(1):
            if length == b"\0":
                break
            file.seek(length[0], os.SEEK_CUR)
    return "it does not end as a GIF does"


def _colors(flags: int) -> int:
    """Bytes of a color table."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _flv(file: BinaryIO, size: int) -> str:
    head = file.read(9)
    at = int.from_bytes(head[5:9], "big") + 4
    while at + 15 <= size:
        file.seek(at)
        tag = file.read(11)
        length = 11 + int.from_bytes(tag[1:4], "big")
        file.seek(at + length)
        if tag[0] & 0x1F not in (8, 9, 18) or int.from_bytes(file.read(4), "big") != length:
            return f"the tag at byte {at} is not whole"
        at += length + 4
    return "its last tag is not whole" if at != size else ""


def _asf(file: BinaryIO, size: int) -> str:
    head = file.read(_TAIL)
    at = head.find(bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365"))  # file properties
    if at < 0 or at + 92 > len(head):
        return ""
    broadcast = int.from_bytes(head[at + 88 : at + 92], "little") & 1
    length = int.from_bytes(head[at + 40 : at + 48], "little")
    return _beyond(length, size) if length > size and not broadcast else ""


def _beyond(end: int, size: int) -> str:
    return f"it should have {end} bytes and has {size}"


_CHECKS = {
    "mov": _mov,
    "matroska": _matroska,
    "avi": _riff,
    "mpegts": _mpegts,
    "gif": _gif,
    "flv": _flv,
    "asf": _asf,
}
