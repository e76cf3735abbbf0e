"""The tensors of a TorchScript archive, such as OpenAI's CLIP files, without running the program that it is.

The archive's object tree is a pickle. It is read by an unpickler that knows tensors and makes of every other class an
inert object that only keeps its attributes: nothing that the file names is imported or called.
"""

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


class _Inert:
    """Stands for an object of any class: takes whatever it is given, keeps its attributes, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.state = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}


class _Reader(pickle._Unpickler):  # the one in Python: its memo takes no memory for numbers that a file makes up
    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(archive.open(root + "data.pkl"))
        self.archive, self.root, self.storages = archive, root, {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: _tensor(storage, offset, size, stride)
        if module == "torch.jit._pickle":  # typed lists and dicts: the value comes first
            return lambda value, *_: value
        return OrderedDict if (module, name) == ("collections", "OrderedDict") else type(name, (_Inert,), {})

    def persistent_load(self, found: Any) -> Tensor:
        kind, dtype, key, _, count = found
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise ValueError(f"a storage of kind {found!r:.100}")
        if key not in self.storages:
            data = self.archive.read(f"{self.root}data/{key}")
            if len(data) != count * dtype.itemsize:
                raise ValueError(f"storage {key} must have {count} values of {dtype}, it has {len(data)} bytes")
            self.storages[key] = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self.storages[key]


def is_torchscript(archive: zipfile.ZipFile) -> bool:
    """It holds code beside its tensors."""
    return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(archive: zipfile.ZipFile, path: str | Path) -> dict[str, Tensor]:
    """Name -> tensor, of the parameters and buffers of every module: what torch.jit.load(path).state_dict() gives.

    Raises:
        ValueError: the archive is damaged or of another layout.
    """
    try:
        root = next(n for n in archive.namelist() if n.endswith("/constants.pkl")).removesuffix("constants.pkl")
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("its numbers are not little-endian")
        found: dict[str, Tensor] = {}
        _collect(_Reader(archive, root).load(), "", found, set())
    except Exception as error:  # whatever a damaged pickle makes an unpickler raise
        raise ValueError(
            f"checkpoint: {path} is a TorchScript archive that cannot be read without running it ({error}); if you "
            "trust it, save torch.jit.load(path).state_dict() with safetensors.torch.save_file"
        ) from error
    return found


def _collect(module: Any, prefix: str, found: dict[str, Tensor], above: set[int]) -> None:
    if not isinstance(module, _Inert) or id(module) in above:
        return
    for name, value in module.state.items():
        if isinstance(value, Tensor):
            found[f"{prefix}{name}"] = value
        else:
            _collect(value, f"{prefix}{name}.", found, above | {id(module)})


def _tensor(storage: Tensor, offset: int, size: tuple[Any, ...], stride: tuple[Any, ...]) -> Tensor:
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"a tensor of size {size!r:.100}, stride {stride!r:.100}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    count = torch.Size(size).numel()
    if count > len(storage) or (count and last >= len(storage)):
        raise ValueError(f"a tensor of {count} values from a storage of {len(storage)}")
    return torch.as_strided(storage, size, stride, offset)
