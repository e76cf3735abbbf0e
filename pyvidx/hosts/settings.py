"""What a folder of transformers says of itself, in its JSON files: read without transformers."""

from dataclasses import replace
from pathlib import Path

from pyvidx.data.tables import read_json
from pyvidx.preprocess import Preset

SQUASHED = Preset(resize="squash")
# Pillow's numbers of filters.
FILTERS = {0: "nearest", 2: "pillow_bilinear", 3: "pillow"}
# Where a processor's sizes stand, in the order in which transformers writes them today and wrote them.
SETTINGS = (
    ("processor_config.json", "video_processor"),
    ("processor_config.json", "image_processor"),
    ("video_preprocessor_config.json", None),
    ("preprocessor_config.json", None),
)


def model_type(folder: str | Path) -> str:
    """What the config.json of a folder of transformers says that it holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not say it.
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"hosts: there is no {file}: the model must be a folder of transformers")
    kind = read_json(file, dict).get("model_type")
    if not isinstance(kind, str):
        raise ValueError(f"hosts: {file} must say its model_type, got {kind!r:.100}")
    return kind


def preset_of(folder: str | Path) -> Preset:
    """How a folder's processor makes pixels of frames: squashed to a square, by Pillow's filters, without needing
    torchvision. What it does not say is InstructBLIP's.

    Raises:
        ValueError: it does something else.
    """
    told = {}
    for name, part in SETTINGS:
        file = Path(folder) / name
        found = read_json(file, dict) if file.is_file() else {}
        told = found if part is None else found.get(part)
        if told:
            break
    told = told or {}
    if told.get("do_center_crop") or told.get("resample", 3) not in FILTERS:
        raise ValueError(f"InstructBLIP: the processor of {folder} must resize without a crop, by a known filter")
    size = told.get("size") or {}
    square = not isinstance(size, dict) or not size or None is not size.get("height") == size.get("width")
    off = [name for name in ("do_resize", "do_rescale", "do_normalize") if told.get(name) is False]
    if off or not square:
        raise ValueError(
            f"InstructBLIP: the processor of {folder} must squash frames to a square and normalize them, it has "
            + (f"{off[0]} false" if off else f"size {size!r:.100}")
        )
    values = {name: tuple(told[f"image_{name}"]) for name in ("mean", "std") if told.get(f"image_{name}")}
    return replace(SQUASHED, filter=FILTERS[told.get("resample", 3)], **values)
