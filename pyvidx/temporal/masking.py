"""What the pretraining of BT-Adapter leaves out at random: patch tokens (arXiv:2309.15785, 3.2) and branch paths."""

import torch
from torch import Tensor

Drops = list[tuple[Tensor, Tensor] | None]


def tube_mask(
    B: int, P: int, rate: float = 0.7, *, device: torch.device | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """A tube per video: the same int(rate * P) patches removed from every frame.

    Returns:
        bool [B, P], True = removed.

    Raises:
        ValueError: rate is not in [0, 1).
    """
    return _removed(B, P, rate, device, generator)


def random_mask(
    B: int,
    T: int,
    P: int,
    rate: float = 0.7,
    *,
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """int(rate * T * P) tokens of each clip removed, wherever they are.

    pyvidx.temporal.grouping takes it where the number that stays is a multiple of T.

    Returns:
        bool [B, T*P], frame-major (t * P + p), True = removed.

    Raises:
        ValueError: rate is not in [0, 1).
    """
    return _removed(B, T * P, rate, device, generator)


def drop_path_draws(
    rate: float,
    depth: int,
    B: int,
    S: int,
    K: int,
    *,
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
) -> Drops:
    """DropPath of a branch of this depth: the rate rises linearly from 0 in the first layer to `rate` in the last.

    Returns:
        per layer None (rate 0) or (time [B, K], one draw per group; space [B, S], one draw per frame slot), float32
        factors 0 or 1 / (1 - rate) of what the attention adds.

    Raises:
        ValueError: rate is not in [0, 1).
    """
    _check_rate("drop_path_draws", rate)

    def factors(keep: float, n: int) -> Tensor:
        return (_uniform(B, n, device, generator) < keep).float() / keep

    rates = [rate * layer / max(depth - 1, 1) for layer in range(depth)]
    return [None if r == 0 else (factors(1 - r, K), factors(1 - r, S)) for r in rates]


def _removed(
    B: int, n: int, rate: float, device: torch.device | str | None, generator: torch.Generator | None
) -> Tensor:  # -> bool [B, n], int(rate * n) True in each row
    _check_rate("mask", rate)
    return (_uniform(B, n, device, generator).argsort(dim=1) < int(rate * n)).to(device)


def _uniform(B: int, n: int, device: torch.device | str | None, generator: torch.Generator | None) -> Tensor:
    where = device if generator is None else generator.device
    return torch.rand(B, n, generator=generator, device=where).to(device)


def _check_rate(name: str, rate: float) -> None:
    if not 0 <= rate < 1:
        raise ValueError(f"{name}: rate must be in [0, 1), got {rate}")
