"""A model in one safetensors file: its parameters, and in the header what is needed to build it."""

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FILE_NAME = "model.safetensors"


def write(path: str | Path, kind: str, model: nn.Module, header: dict) -> Path:
    """Write the parameters and {"model": kind, **header}. A path without .safetensors is a folder, made if need be."""
    path = _file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().cpu().contiguous() for name, p in model.state_dict().items()}
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


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / FILE_NAME
