from pyvidx.backbones.clip import CLIPVision, CLIPVisionConfig
from pyvidx.backbones.eva import EVAVision, EVAVisionConfig

__all__ = ["CLIPVision", "CLIPVisionConfig", "EVAVision", "EVAVisionConfig"]
