"""Whether a device that was asked for is here."""

import torch


def usable(name: str) -> torch.device:
    """The device of this name.

    Raises:
        ValueError: torch knows no such device.
        RuntimeError: it is not here.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type == "meta":
        raise ValueError(f"device: it must be cpu, cuda, cuda:N or another of torch's, got {name!r}")
    try:
        torch.empty(0, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        count = torch.cuda.device_count()
        seen = f"{count} CUDA GPUs" if count else "no CUDA GPU"
        raise RuntimeError(f"device: {name} is not here, torch {torch.__version__} sees {seen}; give cpu") from error
    return device
