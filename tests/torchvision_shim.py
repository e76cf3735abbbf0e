"""Lets torchvision import on a CPU torch when its wheel was built for CUDA, as PyPI's is."""

import torch

_DECLARED: list[torch.library.Library] = []


def mend_torchvision() -> None:
    """Declare the two operators whose absence stops `import torchvision`, if nothing else has declared them."""
    if torch.version.cuda is not None or _DECLARED or hasattr(torch.ops.torchvision, "nms"):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _DECLARED.append(library)  # the declarations live as long as the object
