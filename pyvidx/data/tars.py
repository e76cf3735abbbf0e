"""What a WebDataset shard holds, from its headers: nothing is unpacked, and nothing in it is trusted."""

import io
import os
import tarfile
from pathlib import Path

from pyvidx.data import tables
from pyvidx.video.find import SUFFIXES


class _Bounded(io.FileIO):
    """A file whose headers of headers, which may claim any length, are not read."""

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= 2 * tables.FIELD:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def members(path: Path, left_out: tables.LeftOut) -> dict[str, tuple[str, int, int]]:
    """KEY -> caption, offset and bytes of the video; offset -1 where there is none.

    Names are labels alone: no file is made after them. Links, devices and sparse files are no videos. Of a shard that
    is cut or damaged what comes before that is taken.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is no plain .tar.
    """
    found: dict[str, tuple[str, int, int]] = {}
    bad: dict[str, str] = {}
    key = None
    with _Bounded(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            tar = tarfile.open(fileobj=file, mode="r:")
        except (tarfile.TarError, ValueError, OverflowError) as error:
            raise ValueError(f"captions: {path} is not a plain .tar of videos and captions: {error}") from error
        try:
            for member in tar:
                if not member.isfile() or member.issparse():
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"{member.name} is cut off")
                folder, _, base = member.name.rpartition("/")
                stem, _, kind = base.partition(".")  # WebDataset's rule: the key ends at the first dot
                key = f"{folder}/{stem}".lstrip("/")
                text, offset, length = found.get(key, ("", -1, 0))
                if f".{kind.lower()}" in SUFFIXES:
                    offset, length = member.offset_data, member.size
                elif kind in ("txt", "json"):
                    try:
                        if member.size > tables.FIELD:
                            raise ValueError(f"its caption must have at most {tables.FIELD} bytes")
                        text = _caption(tar.extractfile(member).read(), kind, text)
                    except ValueError as error:
                        bad[key] = str(error)
                else:
                    continue
                found[key] = (text, offset, length)
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0") or tar.offset > size:
                raise tarfile.ReadError("a damaged header")  # which tarfile takes for the end
        except (tarfile.TarError, ValueError, OverflowError) as error:
            left_out.add(f"{path} is not a plain .tar of videos and captions from {key or 'its beginning'} on: {error}")
            if key in found and not (found[key][0] and found[key][1] >= 0):
                del found[key]  # the rest of it is behind the cut
    for key, why in bad.items():
        if key in found and not found[key][0]:
            left_out.add(f"{path}/{key}: {why}")
            del found[key]
    return found


def _caption(content: bytes, kind: str, before: str) -> str:
    """The text of KEY.txt, or of a KEY.json that has one; else what was known before."""
    text = tables.decode(content, f"its .{kind}")
    if kind == "txt":
        return text.strip()
    values = tables.parse_json(text)
    if not isinstance(values, dict):
        raise ValueError(f"its .json must be an object, got {type(values).__name__}")
    caption = values.get("caption", before)
    if not isinstance(caption, str) or tables.flaw(caption):
        raise ValueError(f"its caption must be a text, got {type(caption).__name__}")
    return caption
