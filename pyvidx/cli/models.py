"""The model of a command, from its --model and --module."""

import sys

from pyvidx.files import printable
from pyvidx.hosts.open import open_model
from pyvidx.models import VideoEncoder


def load(model: str | None, module: str | None = None, **options) -> tuple[VideoEncoder, str]:
    """open_model, with what was loaded on stderr, and a note where its embeddings say little about a video.

    Returns:
        the encoder, and the name of its preprocessing in pyvidx.preprocess.PRESETS.

    Raises:
        FileNotFoundError, RuntimeError, ValueError: see pyvidx.hosts.open.open_model.
    """
    encoder, loaded = open_model(model, module, **options)
    for line in str(loaded).splitlines():
        print(printable(line), file=sys.stderr)
    if model is None:
        print(
            "NOTE: the built-in model knows a small world of moving shapes (pyvidx.data.motion). For other videos the "
            "embeddings show that and how fast everything runs, not what is in them. Give weights with --model.",
            file=sys.stderr,
        )
    if encoder.is_random:
        print(
            "NOTE: these weights were never trained, or some of them: the embeddings do not show what is in a video.",
            file=sys.stderr,
        )
    return encoder, loaded.preset
