"""A model in one safetensors file: its parameters, and in the header what is needed to build it."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FILE_NAME = "model.safetensors"


def write(path: str | Path, kind: str, model: nn.Module | Mapping[str, Tensor], header: dict) -> Path:
    """Write the parameters and {"model": kind, **header}. A path without .safetensors is a folder, made if need be."""
    path = _file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = model.state_dict() if isinstance(model, nn.Module) else model
    weights = {name: p.detach().cpu().contiguous() for name, p in state.items()}
    save_file(weights, path, {"format": "pt", "pyvidx": json.dumps({"model": kind, **header})})
    return path


def read(path: str | Path, kind: str) -> tuple[dict, dict[str, Tensor]]:
    """Header and parameters that `write` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file was not written by `write`, or for another kind of model.
    """
    path = _file(path)
    if not path.exists():
        raise FileNotFoundError(f"{kind}: there is no {path}")
    with safe_open(path, "pt") as file:
        header = json.loads((file.metadata() or {}).get("pyvidx", "{}"))
        if header.get("model") != kind:
            raise ValueError(
                f"{kind}: {path} holds {header.get('model', 'weights that pyvidx did not write')}; "
                "published weights are read by pyvidx.integrations.checkpoints"
            )
        # Cloned: tensors of a mapped file start at any address, which makes CPU GEMMs slower.
        return header, {name: file.get_tensor(name).clone() for name in file.keys()}


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
