"""Texts to embeddings with CLIP's text tower, cut to a length the way BT-Adapter's configurations do or a safer one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pyvidx.backbones.text import TextTower
from pyvidx.hosts.importing import LOCAL, importing

CUTS = ("end", "official")
CONTEXT = 77  # of CLIP's own tokenizer


@dataclass(frozen=True)
class Tokenizer:
    """encode: a text -> its ids, without the start and end tokens."""

    encode: Callable[[str], list[int]]
    start: int
    end: int


def load_tokenizer(name: str | Path) -> Tokenizer:
    """CLIP's tokenizer from a folder with transformers' files, or the one inside open_clip by the name "open_clip".

    Raises:
        FileNotFoundError: there is no such folder.
        RuntimeError: the library that reads it is not installed, or cannot be imported.
    """
    if str(name) == "open_clip":
        with importing("tokenizer", "open_clip"):
            from open_clip.tokenizer import SimpleTokenizer

        theirs = SimpleTokenizer()
        return Tokenizer(theirs.encode, theirs.sot_token_id, theirs.eot_token_id)
    if not Path(name).is_dir():
        raise FileNotFoundError(f"tokenizer: there is no folder {name}; or 'open_clip'")
    with importing("tokenizer", "transformers"):
        from transformers import CLIPTokenizer
    theirs = CLIPTokenizer.from_pretrained(name, **LOCAL)
    encode = lambda text: theirs(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    return Tokenizer(encode, theirs.bos_token_id, theirs.eos_token_id)


def token_ids(
    texts: Sequence[str], tokenizer: Tokenizer, length: int = CONTEXT, *, cut: str = "end"
) -> tuple[Tensor, int]:
    """Start, text, end, zeros.

    Args:
        length: of the result, at most.
        cut: a longer text keeps its "end" token, in the last place; "official": it is cut to 77 with the end token and
            then to `length` without one, so the tower reads it at whatever id is largest.

    Returns:
        int64 [texts, length], and how many texts were cut.
    """
    if cut not in CUTS or length < 2:
        raise ValueError(f"token_ids: cut must be one of {', '.join(CUTS)} and length above 1, got {cut!r}, {length}")
    ids, shortened = torch.zeros(len(texts), length, dtype=torch.long), 0
    for row, text in zip(ids, texts):
        found = [tokenizer.start, *tokenizer.encode(text), tokenizer.end]
        shortened += len(found) > length
        if cut == "official" and len(found) > CONTEXT:
            found = found[: CONTEXT - 1] + [tokenizer.end]
        if cut == "end" and len(found) > length:
            found = found[: length - 1] + [tokenizer.end]
        row[: len(found)] = torch.tensor(found[:length])
    return ids, shortened


@torch.inference_mode()
def embed(tower: TextTower, ids: Tensor, *, batch: int = 256) -> Tensor:
    """The tower's embeddings of ids [n, L] -> float32 [n, E], on the CPU, not normalized."""
    device = tower.position.device
    return torch.cat([tower(part.to(device)).float().cpu() for part in ids.split(batch)])
