"""Captions to CLIP's token ids."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from pyvidx.hosts.importing import LOCAL, importing

ENDS = ("official", "kept")
CONTEXT = 77
# Of a folder of transformers, what a tokenizer is read from.
FILES = ("tokenizer*", "vocab*", "merges*", "added_tokens*", "special_tokens*", "spiece*", "sentencepiece*")

Tokenize = Callable[[Sequence[str]], Tensor]


def tokenizer(folder: str | None = None, length: int = CONTEXT, end: str = "official") -> Tokenize:
    """CLIP's byte-pair encoding.

    Args:
        folder: of a transformers tokenizer; None: open_clip, which brings the vocabulary.
        length: L, at most 77.
        end: "official": texts are cut to 77 with their end token, and then to L without it, as by the public code, so
            that a longer one is read at whatever id is largest; "kept": cut to L with it.

    Returns:
        texts -> int64 [B, L].

    Raises:
        ValueError: length or end is not one of these.
        FileNotFoundError: there is no such folder.
        RuntimeError: the library is not installed, or cannot be imported.
    """
    if end not in ENDS or not 2 <= length <= CONTEXT:
        raise ValueError(f"tokenizer: end must be one of {ENDS} and length in [2, {CONTEXT}], got {end!r}, {length}")
    if folder is not None and not Path(folder).is_dir():
        raise FileNotFoundError(f"tokenizer: there is no folder {folder}")  # transformers would ask the network for it
    with importing("tokenizer", "open_clip" if folder is None else "transformers"):
        if folder is None:
            from open_clip.tokenizer import SimpleTokenizer
        else:
            from transformers import AutoTokenizer
    whole = CONTEXT if end == "official" else length
    if folder is None:
        encode = SimpleTokenizer(context_length=whole)
        return lambda texts: encode(list(texts))[:, :length]
    encode = AutoTokenizer.from_pretrained(folder, **LOCAL)
    options = {"padding": "max_length", "truncation": True, "max_length": whole, "return_tensors": "pt"}
    return lambda texts: encode(list(texts), **options)["input_ids"][:, :length]


def vocabulary(folder: str | None) -> str | None:
    """A hash of a transformers tokenizer's files: whether two are the same. None: of no folder."""
    if folder is None:
        return None
    found = hashlib.sha256()
    for path in sorted({path for pattern in FILES for path in Path(folder).glob(pattern) if path.is_file()}):
        found.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return found.hexdigest()[:16]
