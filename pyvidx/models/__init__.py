from pyvidx.models.bt_adapter import BTAdapter
from pyvidx.models.config import BTAdapterConfig
from pyvidx.models.malmm import MALMM
from pyvidx.models.malmm_config import MALMMConfig
from pyvidx.models.minigpt4 import MiniGPT4, MiniGPT4Config
from pyvidx.models.text_video import TextVideo
from pyvidx.models.video_encoder import VideoEncoder
from pyvidx.temporal.encoding import Encoding

__all__ = [
    "BTAdapter",
    "BTAdapterConfig",
    "Encoding",
    "MALMM",
    "MALMMConfig",
    "MiniGPT4",
    "MiniGPT4Config",
    "TextVideo",
    "VideoEncoder",
]
