"""Banks in files: save after every so many frames, load after a crash, go on with the same bits."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pyvidx.memory.bank import Bank
from pyvidx.memory.policy import Policy
from pyvidx.memory.registry import create
from pyvidx.ops._library import require

_KEY = "pyvidx.memory"


def save(path: str | Path, policy: Policy, bank: Bank) -> Path:
    """Write a bank and its policy to a .safetensors file. A crash leaves the old file whole."""
    path = Path(path)
    require(path.suffix == ".safetensors", f"memory.save: path must end in .safetensors, got {path.name}")
    policy.check(bank)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        save_file(bank.state_dict(), part, {"format": "pt", _KEY: json.dumps(policy.spec())})
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def load(path: str | Path, device: torch.device | str = "cpu") -> tuple[Policy, Bank]:
    """The policy and the bank of a file written by `save`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no bank.
    """
    with safe_open(path, "pt") as file:
        about = (file.metadata() or {}).get(_KEY)
    require(about is not None, f"memory.load: {path} must be a file of memory.save, got other tensors")
    policy = create(**json.loads(about))
    return policy, policy.check(Bank.load_state_dict(load_file(path, device=str(device))))
