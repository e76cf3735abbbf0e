from pyvidx.backbones.clip import CLIPVision, CLIPVisionConfig

__all__ = ["CLIPVision", "CLIPVisionConfig"]
