import pytest
import torch

if "+cpu" in torch.__version__:
    # PyPI's torchvision is a CUDA build and cannot load its library beside a CPU torch. open_clip and transformers need
    # only its Python part, which imports once these two operators are declared.
    _torchvision = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _torchvision.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture(autouse=True)
def one_thread_and_a_seed():
    """One thread: with a busy second core every parallel region costs milliseconds."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
