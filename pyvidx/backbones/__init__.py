from pyvidx.backbones.text import SIGLIP_TEXT_B, TextConfig, TextTower
from pyvidx.backbones.vit import EVA_G, SIGLIP_B, ViT, ViTConfig

__all__ = ["EVA_G", "SIGLIP_B", "SIGLIP_TEXT_B", "TextConfig", "TextTower", "ViT", "ViTConfig"]
