"""What 8 bits cost in retrieval, in the world of moving shapes: python -m bench.int8_retrieval --out FILE.json

The model that ships with pyvidx, in float32 and with precision="int8", on clips of objects that no training had: R@1 of
captions among all clips and their opposites (what happens), and among clips that look different (what is to be seen).
The text tower is float32 in both.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bench.motion import world
from pyvidx.data import motion
from pyvidx.files import check_output, write_json
from pyvidx.layers import int8
from pyvidx.models.text_video import TextVideo
from pyvidx.preprocess import clip_preprocess


@torch.inference_mode()
def study(both: TextVideo, singles: int, pairs: int) -> dict:
    """world.scores of both precisions, and the cosines between their embeddings."""
    models = {"float": both.model.fold(), "int8": both.model.fold(precision="int8")}
    events = world.event_gallery(motion.HELD_OUT, 0, singles, pairs)
    looks = world.look_gallery(motion.HELD_OUT, 1, singles, pairs)
    found, seen = {}, []
    for precision, model in models.items():
        encode = encoder(both, model)
        video = torch.stack([encode(events), encode([motion.opposite(s) for s in events])], dim=1)
        texts = texts_of(both, [motion.caption(x) for s in events for x in (s, motion.opposite(s))])
        looking = encode(looks)
        look_texts = texts_of(both, [motion.appearance(s) for s in looks])
        found[precision] = world.scores(
            video, texts.unflatten(0, (-1, 2)), [s.kind for s in events], looking, look_texts
        )
        seen.append(torch.cat([video.flatten(0, 1), looking]))
    cosines = torch.cosine_similarity(*seen)
    layers = [type(m) for m in models["int8"].modules()]
    return {
        **found,
        "cosine": {"least": cosines.min().item(), "mean": cosines.mean().item()},
        "layers": {"int8": layers.count(int8.Int8Linear), "float": layers.count(torch.nn.Linear)},
    }


def encoder(both: TextVideo, model) -> Callable[[Sequence[motion.Scene]], Tensor]:
    T, size = both.about["frames"], both.model.tower.config.image_size

    def encode(scenes):
        pixels = (clip_preprocess(motion.render(s, T, size), size) for s in scenes)
        return torch.cat([model(p[None], outputs=("pooled",)).pooled for p in pixels])

    return encode


def texts_of(both: TextVideo, captions: Sequence[str]) -> Tensor:
    return torch.cat([both.text(both.words(captions[i : i + 64])) for i in range(0, len(captions), 64)])


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--singles", type=int, default=150, help="scenes of one object")
    p.add_argument("--pairs", type=int, default=30, help="scenes of two objects, of every kind")
    p.add_argument("--out", type=Path, required=True)
    options = p.parse_args(argv)
    check_output(options.out)
    found = study(TextVideo.default(), options.singles, options.pairs)
    sizes = {"singles": options.singles, "pairs": options.pairs}
    write_json(options.out, {"torch": torch.__version__, "vnni": int8.VNNI, **sizes, **found}, indent=1)
    for precision in ("float", "int8"):
        row = found[precision]
        print(f"{precision}: appearance {row['appearance']:.1f}, time {row['time']:.1f}, pair {row['pair']:.1f}")
    print(f"cosine: least {found['cosine']['least']:.5f}")


if __name__ == "__main__":
    main()
