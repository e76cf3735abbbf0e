"""Write what was measured into README and docs: numbers into their text, docs/cases, with --pictures the pictures."""

import argparse
import tempfile
from pathlib import Path

from bench.pages import ROOT, dependencies, tables, wheels, written
from bench.pages.claims import BRANCH, CLAIMS, MEMORY, ZEN4
from pyvidx.cli import bench, demo, memory
from pyvidx.data import motion
from pyvidx.files import write_text
from pyvidx.models import TextVideo
from pyvidx.video import read

SCENE = motion.Scene("order", (("cyan", "cross"), ("orange", "circle")), "navy", forward=True, seed=3)


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m bench.pages", description=__doc__)
    p.add_argument("--pictures", action="store_true", help="draw docs/*.png anew, with the library's commands")
    p.add_argument("--dependencies", action="store_true", help="write the licences of what is installed, too")
    options = p.parse_args()
    texts = {name: written((ROOT / name).read_text(), claims()) for name, claims in CLAIMS.items()}
    stated = {dependencies.PAGE: dependencies.page()} if options.dependencies else {}
    for name, text in (texts | tables.pages() | wheels.pages() | stated).items():
        if not (ROOT / name).exists() or (ROOT / name).read_text() != text:
            write_text(ROOT / name, text)
            print(f"wrote {name}")
    if options.pictures:
        pictures(ROOT / "docs")


def pictures(folder: Path) -> None:
    """roofline.png, slots.png and similarity.png."""
    results = [str(ROOT / f"bench/results/{name}.json") for name in (ZEN4, BRANCH, MEMORY)]
    bench.main(["report", *results, "--markdown", "--overwrite", "--plot", str(folder / "roofline.png")])
    with tempfile.TemporaryDirectory() as work:
        clip = Path(work) / "clip.mp4"
        motion.write_clip(clip, SCENE)
        slots = ["--policy", "merge:unit=frame", "--capacity", "6", "--out", str(folder / "slots.png"), "--overwrite"]
        memory.main([str(clip), *slots])
        motion.write_clip(clip, demo.SCENE)
        frames = read(clip, frames=12)
    demo.plot(frames, demo.frame_similarity(TextVideo.default().model, frames), folder / "similarity.png")


if __name__ == "__main__":
    main()
