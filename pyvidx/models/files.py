"""A model in one safetensors file: its parameters, and in the header what is needed to build it."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pyvidx.files import check_output, write_tensors
from pyvidx.tensor_files import FLOATING, note, opened

FILE_NAME = "model.safetensors"
# Who reads published weights of a kind of model.
DOORS = {
    "bt_adapter": "pyvidx.weights.bt_adapter.load_official",
    "malmm": "pyvidx.weights.malmm.load_malmm",
    "minigpt4": "pyvidx.weights.minigpt4.load_minigpt4",
}
# What a header that describes no model makes its constructor raise.
REFUSALS = (
    ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, ZeroDivisionError, OverflowError,
)  # fmt: skip
NOTES = ("about", "vocabulary")  # entries of a header that are no sizes
COUNTS = ("layers", "depth")  # sizes that are numbers of modules
# Sizes and numbers of modules up to these are harmless in a file of any length.
HARMLESS, FEW = 4096, 256


def write(path: str | Path, kind: str, model: nn.Module | Mapping[str, Tensor], header: dict[str, Any]) -> Path:
    """Write the parameters and {"model": kind, **header}, whole or not at all.

    A path without .safetensors is a folder, made if need be.

    Raises:
        OSError: it cannot be written.
    """
    path = _file(path)
    check_output(path)
    state = model.state_dict() if isinstance(model, nn.Module) else model
    weights = {name: p.detach().cpu().contiguous() for name, p in state.items()}
    return write_tensors(path, weights, {"pyvidx": json.dumps({"model": kind, **header})})


def load(path: str | Path, kind: str, build: Callable[[dict[str, Any]], nn.Module]) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a file that `write` wrote, in eval mode and with the dtypes of the file, and its header.

    Nothing is allocated before the header's sizes are those of the tensors in the file.

    Args:
        build: header -> the model, called on the meta device. What it raises means that the header is wrong.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file was not written by `write`, is for another kind of model, or is damaged.
    """
    path = _existing(path, kind)
    with opened(path, kind) as file:
        header = _header(file, path, kind)
        tensors = {name: file.get_slice(name) for name in file.keys()}
        shapes = {name: tuple(part.get_shape()) for name, part in tensors.items()}
        try:
            _bound(header, max(HARMLESS, sum(map(_product, shapes.values()))), max(FEW, len(shapes)))
            with torch.device("meta"):
                model = build(header)
        except (*REFUSALS, RecursionError) as error:
            raise ValueError(
                f"{kind}: the header of {path} describes no model ({type(error).__name__}: {error})"
            ) from error
        own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        wrong = [f"lacks {name}" for name in own.keys() - shapes.keys()]
        wrong += [f"has {name} that is no part of it" for name in shapes.keys() - own.keys()]
        wrong += [
            f"{name} is {own[name]} in the model, {shapes[name]} in the file"
            for name in own.keys() & shapes.keys()
            if own[name] != shapes[name]
        ]
        wrong += [
            f"{name} must be floating, is {part.get_dtype()}"
            for name, part in tensors.items()
            if part.get_dtype() not in FLOATING
        ]
        if wrong:
            raise ValueError(f"{kind}: {path} must hold the model of its header: {_few(sorted(wrong))}")
        # Cloned: tensors of a mapped file start at any address, which makes CPU GEMMs slower.
        weights = {name: file.get_tensor(name).clone() for name in own}
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval(), header


def read(path: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and parameters that `write` wrote, for a model that exists already.

    Raises:
        FileNotFoundError, ValueError: as in `load`.
    """
    path = _existing(path, kind)
    with opened(path, kind) as file:
        return _header(file, path, kind), {name: file.get_tensor(name).clone() for name in file.keys()}


def is_ours(path: str | Path) -> bool:
    """`write` wrote this file or folder."""
    path = _file(path)
    if not path.is_file():
        return False
    with opened(path, "weights") as file:
        return "pyvidx" in (file.metadata() or {})


def kind(path: str | Path) -> str:
    """The kind of model in a file or folder for which `is_ours`: "bt_adapter", "video_encoder", "malmm", ...

    Raises:
        ValueError: its header does not say.
    """
    with opened(_file(path), "weights") as file:
        header = note(file, path, "pyvidx") or {}
    if not isinstance(header.get("model"), str):
        raise ValueError(f"weights: the header of {path} must name its model, got {header.get('model')!r:.100}")
    return header["model"]


def digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values, in the order of the names; the same however the file is laid out."""
    found = hashlib.sha256()
    for name in sorted(weights):
        w = weights[name].detach().cpu().contiguous()
        found.update(f"{name} {w.dtype} {tuple(w.shape)}\n".encode())
        found.update(w.view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / FILE_NAME


def _existing(path: str | Path, kind: str) -> Path:
    """The file that is meant, with a word about the right door where there is none."""
    path, file = Path(path), _file(path)
    if file == path or file.exists():
        return file
    if path.is_file():
        raise ValueError(f"{kind}: {path} is no file of save, whose name ends in .safetensors; {_door(kind)}")
    if path.is_dir():
        raise FileNotFoundError(f"{kind}: there is no {FILE_NAME} in the folder {path}; {_door(kind)}")
    raise FileNotFoundError(
        f"{kind}: there is no {path}: give a .safetensors file that save wrote, or its folder (nothing is downloaded); "
        f"{_door(kind)}"
    )


def _door(kind: str) -> str:
    return f"published weights are read by {DOORS.get(kind, 'pyvidx.weights')}"


def _header(file: safe_open, path: Path, kind: str) -> dict[str, Any]:
    header = note(file, path, "pyvidx") or {}
    if header.get("model") != kind:
        held = f"a model {header['model']!r:.100}" if "model" in header else "weights that pyvidx did not write"
        raise ValueError(f"{kind}: {path} holds {held}; {_door(kind)}")
    if not isinstance(header.get("is_random", False), bool):
        raise ValueError(f"{kind}: is_random in the header of {path} must be true or false")
    return header


def _bound(header: Any, values: int, tensors: int, name: str = "") -> None:
    """No size of a header is larger than the number of values in its file, no number of layers than its tensors."""
    if isinstance(header, dict):
        for key in header.keys() - {*NOTES}:
            _bound(header[key], values, tensors, key)
    elif isinstance(header, list):
        for value in header:
            _bound(value, values, tensors, name)
    elif isinstance(header, int) and not isinstance(header, bool):
        most = tensors if name in COUNTS else values
        if abs(header) > most:
            raise ValueError(f"{name} is {header:.3g}, more than the file can fill")


def _product(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _few(items: list[str], most: int = 5) -> str:
    return "; ".join(items[:most]) + (f"; and {len(items) - most} more" if len(items) > most else "")
