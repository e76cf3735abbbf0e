"""Names by which transformers' Auto classes find the parts of a saved folder."""

from transformers import AutoConfig, AutoModel, AutoProcessor, AutoVideoProcessor

from pyvidx.hosts.llava.processing import BTAdapterLlavaProcessor, BTAdapterVideoProcessor
from pyvidx.hosts.llava.tower import MODEL_TYPE, BTAdapterVisionConfig, BTAdapterVisionModel


def register() -> None:
    """Make the tower and its processors known to the Auto classes of transformers; a second call changes nothing.

    A process that reads a saved folder with transformers' own from_pretrained calls this first.
    """
    AutoConfig.register(MODEL_TYPE, BTAdapterVisionConfig, exist_ok=True)
    AutoModel.register(BTAdapterVisionConfig, BTAdapterVisionModel, exist_ok=True)
    AutoVideoProcessor.register(BTAdapterVisionConfig, BTAdapterVideoProcessor, exist_ok=True)
    AutoProcessor.register(BTAdapterVisionConfig, BTAdapterLlavaProcessor, exist_ok=True)
