"""State dicts out of files, folders and wrappers: pickles, safetensors, shards, TorchScript, npz. No file's code is
run."""

import argparse
import json
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyvidx.tensor_files import opened
from pyvidx.weights.big_vision import as_transformers, is_big_vision
from pyvidx.weights.place import MissingWeights
from pyvidx.weights.torchscript import is_torchscript, read_torchscript

# Where training code puts the weights in what it saves; the first that is there is read.
ENTRIES = (
    "state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params",
    "ema", "model_ema", "ema_state_dict", "state_dict_ema", "ema_model", "student", "teacher",
)  # fmt: skip
NO_WEIGHTS = re.compile(r"optim|scaler|sched|hyper|config|callback|loop")
FILES = (
    "model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin",
)  # fmt: skip
SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".npz")
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.safetensors|\.bin)")
LARGEST_INDEX = 64 << 20  # bytes of an index of shards
# What a download may leave in place of weights, by its first bytes.
NOT_WEIGHTS = {
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file itself with git lfs pull",
    b"<": "a web page: the download failed",
    b"\x1f\x8b": "a compressed archive: unpack it first",
}

Source = str | Path | Mapping[str, Tensor] | nn.Module


def read(path: str | Path, *, entry: str | None = None) -> dict[str, Tensor]:
    """The tensors of a file or folder of weights; beside them step counters, options and the like are passed over.

    Understood: .safetensors; pickles (.pth, .pt, .bin, .ckpt), which are read with weights_only=True; TorchScript
    archives, whose tensors are read and whose code is not run; .npz of arrays; an index of shards
    (model.safetensors.index.json, pytorch_model.bin.index.json); a folder that holds one of these.

    Args:
        path: file or folder.
        entry: the entry around the weights that is wanted, e.g. "ema". Default the first there is of ENTRIES.

    Raises:
        FileNotFoundError: there is no such file, or a shard is missing.
        ValueError: it holds no state dict, is damaged, or holds more than tensors and plain values.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, entry)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: there is no file or folder {path}; nothing is downloaded")
    if path.name.endswith(".index.json"):
        return _read_index(path, entry)
    return _unwrapped(_content(path), path, entry)


def state_of(source: Source, *, entry: str | None = None) -> dict[str, Tensor]:
    """The state dict of a module, one out of its wrappers, or `read` from a file or folder.

    Raises:
        FileNotFoundError, ValueError: see `read`.
    """
    if isinstance(source, nn.Module):
        source = source.state_dict()
    if isinstance(source, Mapping):
        return _unwrapped(source, "the state dict", entry)
    return read(source, entry=entry)


@contextmanager
def naming(sources: Sequence[Any]) -> Iterator[None]:
    """A ValueError names the files it is about: those of sources, if it does not already name one."""
    try:
        yield
    except ValueError as error:
        paths = [str(source) for source in sources if isinstance(source, str | Path)]
        if not paths or any(path in str(error) for path in paths):
            raise
        kind = MissingWeights if isinstance(error, MissingWeights) else ValueError
        raise kind(f"{error}\nread from {', '.join(paths)}") from error


def _content(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            first = file.read(32)
    except OSError as error:
        raise ValueError(f"checkpoint: {path} cannot be read ({error})") from error
    if not first:
        raise ValueError(f"checkpoint: {path} is empty")
    if path.suffix == ".safetensors" or first[8:9] == b"{":
        with opened(path, "checkpoint") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    for start, what in NOT_WEIGHTS.items():
        if first.startswith(start):
            raise ValueError(f"checkpoint: {path} is {what}")
    if first.startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as archive:
                if sum(item.file_size for item in archive.infolist()) > path.stat().st_size:
                    raise ValueError(f"checkpoint: {path} is a compressed archive; unpack it first")
                if is_torchscript(archive):
                    return read_torchscript(archive, path)
                if all(name.endswith(".npy") for name in archive.namelist()):
                    return _arrays(path)
        except zipfile.BadZipFile as error:
            raise ValueError(f"checkpoint: {path} is damaged or truncated ({error})") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # training options; holding them runs nothing
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if found := _classes(path, error):
            raise ValueError(
                f"checkpoint: {path} holds objects of {', '.join(found)} beside its tensors; pickles are only read "
                "with weights_only=True, as others can run code. If you trust the file, write the state dict in "
                "torch.load(path, weights_only=False) with safetensors.torch.save_file, and give that"
            ) from error
        raise ValueError(
            f"checkpoint: {path} is not a pickle of plain tensors or is truncated; pickles are only read "
            f"with weights_only=True ({_line(error)})"
        ) from error


def _arrays(path: Path) -> dict[str, Tensor]:
    """The arrays of an .npz."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
        # JAX's bfloat16 is to numpy two bytes of no type.
        return {
            name: torch.from_numpy(a.view(np.int16)).view(torch.bfloat16) if a.dtype == "V2" else torch.from_numpy(a)
            for name, a in found.items()
        }
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise ValueError(f"checkpoint: {path} is no archive of arrays, or is damaged ({_line(error)})") from error


def _classes(path: Path, error: Exception) -> list[str]:
    """The classes that a pickle asks for and weights_only=True refuses."""
    try:
        found = [n for n in torch.serialization.get_unsafe_globals_in_checkpoint(path) if n != "argparse.Namespace"]
    except Exception:  # not a zip archive, or damaged
        found = []
    return found[:8] or re.findall(r"(?:Unsupported global: GLOBAL|Unsupported class) (\S+)", str(error))[:1]


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _read_folder(folder: Path, entry: str | None) -> dict[str, Tensor]:
    """What the folder's weights file or index of shards holds."""
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise ValueError(f"checkpoint: {folder} cannot be read ({error})") from error
    chosen = [name for name in FILES if name in names] or [name for name in names if name.endswith(".index.json")]
    shards = [name for name in names if SHARD.fullmatch(name)]
    if shards and not chosen:
        return _read_shards(folder, shards, entry)
    others = [name for name in names if name.endswith(SUFFIXES)]
    if not chosen and len(others) != 1:
        held = ", ".join(names[:8]) or "nothing"
        raise FileNotFoundError(f"checkpoint: {folder} must hold one file of weights, or name it; it holds {held}")
    return read(folder / (chosen or others)[0], entry=entry)


def _read_index(path: Path, entry: str | None) -> dict[str, Tensor]:
    """The weights that an index of shards lists, from the files beside it."""
    try:
        if path.stat().st_size > LARGEST_INDEX:
            raise ValueError("it is too large")
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise ValueError("weight_map must be names of files")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"checkpoint: {path} is no index of shards ({type(error).__name__}: {error})") from error
    files = sorted({*places.values()})
    if outside := [name for name in files if Path(name).name != name or name.endswith(".index.json")]:
        raise ValueError(f"checkpoint: {path} must name files beside it, got {outside[0]!r:.100}")
    found = _read_shards(path.parent, files, entry, whole=False)
    if lacking := [name for name in places if name not in found]:
        raise ValueError(f"checkpoint: the shards of {path} lack {len(lacking)} weights, e.g. {lacking[0]}")
    return found


def _read_shards(folder: Path, names: list[str], entry: str | None, *, whole: bool = True) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    if whole and (match := SHARD.fullmatch(names[0])):
        stem, _, count, suffix = match.groups()
        wanted = [f"{stem}-{i:05d}-of-{count}{suffix}" for i in range(1, int(count) + 1)]
        if names != wanted:
            lacking = next((n for n in wanted if n not in names), f"an index, for {names[-1]}")
            raise FileNotFoundError(f"checkpoint: the shards of {folder} lack {lacking}")
    for name in names:
        part = read(folder / name, entry=entry)
        if twice := found.keys() & part.keys():
            raise ValueError(f"checkpoint: two shards of {folder} hold {min(twice)}")
        found |= part
    return found


def _unwrapped(content: Any, where: str | Path, entry: str | None = None) -> dict[str, Tensor]:
    """The innermost name -> tensor of what was saved; JAX's layout becomes transformers'."""
    if entry is not None:
        if not isinstance(content, Mapping) or entry not in content:
            raise ValueError(f"checkpoint: {where} must have an entry {entry!r}, it has {_entries(content)}")
        content = content[entry]
    while isinstance(content, Mapping):
        inner = [n for n, v in content.items() if isinstance(n, str) and not NO_WEIGHTS.search(n) and _has_tensors(v)]
        known = [name for name in ENTRIES if name in inner]
        tensors = {n: v.detach() for n, v in content.items() if isinstance(n, str) and isinstance(v, Tensor)}
        if known:
            chosen = known[0]
        elif tensors:
            tensors = _plain(tensors, where)
            return as_transformers(tensors) if is_big_vision(tensors) else tensors
        elif len(inner) == 1:
            chosen = inner[0]
        else:
            break
        if len(known) > 1:
            warnings.warn(
                f"checkpoint: {where} holds {', '.join(known)}; {chosen} is read. "
                f'pyvidx.weights.state.read(path, entry="{known[1]}") gives another',
                stacklevel=4,
            )
        content = content[chosen]
    raise ValueError(f"checkpoint: {where} must hold a state dict (name -> tensor), it holds {_entries(content)}")


def _has_tensors(value: Any, depth: int = 3) -> bool:
    if not isinstance(value, Mapping) or not depth:
        return False
    return any(isinstance(v, Tensor) or _has_tensors(v, depth - 1) for v in value.values())


def _entries(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    names = [f"{name!r:.60}" for name in list(content)[:8]]
    return (", ".join(names) or "nothing") + (f" and {len(content) - 8} more" if len(content) > 8 else "")


def _plain(tensors: dict[str, Tensor], where: str | Path) -> dict[str, Tensor]:
    """The tensors, if they hold their values: a pickle may claim any size over a small storage."""
    total = held = 0
    storages = set()
    for name, x in tensors.items():
        if x.layout is not torch.strided or x.is_quantized or x.device.type == "meta":
            kind = "on the meta device" if x.device.type == "meta" else "quantized or sparse"
            raise ValueError(f"checkpoint: {name} of {where} is {kind}; only plain tensors are read")
        storage = x.untyped_storage()
        if storage.data_ptr() not in storages:
            storages.add(storage.data_ptr())
            held += storage.nbytes()
        total += x.numel() * x.element_size()
    if total > 4 * held + (1 << 20):
        raise ValueError(f"checkpoint: the tensors of {where} claim {total} bytes, its storages hold {held}")
    return tensors
