from pyvidx.backbones.clip import CLIPVision, CLIPVisionConfig
from pyvidx.backbones.clip_text import CLIPText, CLIPTextConfig
from pyvidx.backbones.eva import EVAVision, EVAVisionConfig

__all__ = ["CLIPText", "CLIPTextConfig", "CLIPVision", "CLIPVisionConfig", "EVAVision", "EVAVisionConfig"]
