"""What tiny hosts have in common whose pixels are one list of patches with a grid of each video."""

import torch

from tests.hosts.tiny import IMAGE, VIDEO, Image, Tiny, Video

IDS = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=292, vision_end_token_id=293)
VISION = dict(
    depth=2, hidden_size=32, intermediate_size=64, num_heads=4, out_hidden_size=32, patch_size=4, spatial_merge_size=2,
    temporal_patch_size=2,
)  # fmt: skip
ROPE = dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2])
H, W = 4, 8  # patches of a step


class Patched(Tiny):
    """Of pixels as one list of patches; a step's block is `frame`."""

    timeless = False
    width = 3 * 2 * 4 * 4  # of a patch

    def patches(self, number: int, seed: int) -> torch.Tensor:
        return torch.randn(number, self.width, generator=torch.Generator().manual_seed(seed))

    def pixels(self, videos: list[Video], images: list[Image]) -> dict:
        found = {}
        if videos:
            clips = [self.patches((v.first + v.steps) * H * W, v.seed)[v.first * H * W :] for v in videos]
            found["pixel_values_videos"] = torch.cat(clips)
            found["video_grid_thw"] = torch.tensor([[v.steps, H, W] for v in videos])
        if images:
            found["pixel_values"] = torch.cat([self.patches(4 * 4, i.seed) for i in images])
            found["image_grid_thw"] = torch.tensor([[1, 4, 4]] * len(images))
        return found

    def block(self, steps: int) -> list[int]:
        return [292] + [VIDEO] * (steps * H * W // 4) + [293]

    def picture(self) -> list[int]:
        return [292] + [IMAGE] * 4 + [293]

    def inputs(self, *rows, side: str = "left", types: bool = False) -> dict:
        return super().inputs(*rows, side=side, types=True)
