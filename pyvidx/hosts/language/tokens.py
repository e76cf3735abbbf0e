"""Prompts whose blocks of video tokens are replaced: ids, attention mask, token types and labels, padded again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyvidx.ops._library import require

GONE = ("position_ids", "cache_position", "rope_deltas", "video_metadata", "text_replacement_offsets")
TYPES = ("mm_token_type_ids", "token_type_ids")
IGNORED = -100  # a label that no loss looks at
# What goes along the tokens, [B, L] each, and what it is for padding (of ids any that stands for no image or video).
ALONG = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED} | dict.fromkeys(TYPES, 0)


@dataclass(frozen=True)
class Prompt:
    """What the host (the CPU) knows of the inputs' tokens."""

    ids: Tensor  # int64 [B, L]
    seen: Tensor  # bool [B, L], of the attention mask

    @staticmethod
    def of(inputs: Mapping[str, Any]) -> Prompt:
        """Brings ids and mask to the CPU, in one transfer.

        Raises:
            ValueError: there are no ids, or they and the mask do not fit.
        """
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        fits = isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point()
        require(fits, "compress: inputs must hold input_ids, int [B, L] (return_tensors='pt' of a processor)", ids)
        if inputs.get("inputs_embeds") is not None:
            raise ValueError("compress: inputs must not hold inputs_embeds, whose tokens it cannot replace")
        if mask is None:
            ids = ids.cpu()
            return Prompt(ids.long(), torch.ones_like(ids, dtype=torch.bool))
        fits = isinstance(mask, Tensor) and mask.shape == ids.shape
        require(fits, "compress: attention_mask must be [B, L] as input_ids", mask)
        ids, mask = torch.stack([ids.long(), mask.to(ids.device).long()]).cpu()
        return Prompt(ids, mask != 0)

    def blocks(self, token: int, counts: Sequence[int], what: str = "video") -> list[tuple[int, int, int]]:
        """Row, start and stop of every video, whose placeholders stand one after another.

        Args:
            token: the placeholder's id. counts: how many each video has, in order of rows and places. what: has them,
                where it is a part of a video.

        Raises:
            ValueError: there are more or fewer, or a video's are not all together.
        """
        row, place = (self.ids == token).nonzero(as_tuple=True)
        text = f"compress: input_ids hold {len(row)} placeholders of videos (token {token})"
        if not len(counts) and len(row):
            raise ValueError(f"{text} and the inputs no pixels of any: give what the processor made of videos=")
        require(
            len(row) == sum(counts), f"{text}, the pixels ask for {sum(counts)}: {list(counts)} of the {what}s in order"
        )
        found, at = [], 0
        for i, count in enumerate(counts):
            first, last = at, at + count - 1
            together = row[first] == row[last] and place[last] - place[first] == count - 1
            require(bool(together), f"compress: the {count} placeholders of {what} {i} must stand together in one row")
            found.append((int(row[first]), int(place[first]), int(place[last]) + 1))
            at += count
        return found


@dataclass(frozen=True)
class Edit:
    """Tokens [start, stop) of a row become others."""

    row: int
    start: int
    stop: int
    ids: Sequence[int]


def check_along(inputs: Mapping[str, Any], passed: Sequence[str] = ()) -> None:
    """Refuse inputs that go along the tokens in a way that is not known.

    Args:
        passed: names of inputs of the shape of input_ids that are not about its tokens.

    Raises:
        ValueError: there is one.
    """
    known = (*ALONG, *GONE, *passed)
    for name, x in inputs.items():
        if isinstance(x, Tensor) and x.shape == inputs["input_ids"].shape and name not in known:
            raise ValueError(f"compress: {name} has the shape of input_ids and is not known; take it out of the inputs")


def edited(inputs: Mapping[str, Any], prompt: Prompt, edits: Sequence[Edit], pad: int) -> dict[str, Tensor]:
    """The inputs that go along the tokens, with some of the tokens replaced and rows padded again: on the right where
    the attention mask padded there, else on the left, as generate needs it.

    A new token has the type of the old ones of its id in the block, else 0; and is a label where those were labels.

    Args:
        pad: the id of padding; where a row was padded already, its own.
    """
    ids = inputs["input_ids"]
    rows = [_row(prompt, b, [e for e in edits if e.row == b]) for b in range(len(prompt.ids))]
    right = bool((~prompt.seen[:, -1]).any()) and bool(prompt.seen[:, 0].all())
    length = max((len(row[0]) for row in rows), default=0)
    hidden = prompt.ids[~prompt.seen]
    pad = int(hidden[0]) if len(hidden) else pad
    new, source, fresh = (
        torch.stack([padded(row[i], length, fill, right) for row in rows]) for i, fill in enumerate((pad, -1, False))
    )
    there = (source >= 0) | fresh
    new, source, fresh, visible = (x.to(ids.device, non_blocking=True) for x in (new, source, fresh, there))
    old, kept = source.clamp_min(0), source >= 0
    out = {"input_ids": new.to(ids.dtype)}
    if (mask := inputs.get("attention_mask")) is not None:
        out["attention_mask"] = torch.where(kept, mask.to(ids.device).gather(1, old), 0).where(~fresh, 1).to(mask.dtype)
    elif not bool(there.all()):
        out["attention_mask"] = visible.long()
    for name in TYPES:
        if (types := inputs.get(name)) is not None:
            out[name] = types.gather(1, old.to(types.device)).where(kept.to(types.device), 0)
    if (labels := inputs.get("labels")) is not None:
        device = labels.device
        old, kept, fresh = (x.to(device) for x in (old, kept, fresh))
        said = labels.gather(1, old)
        said = said.where(~fresh | (said == ids.to(device).gather(1, old)), IGNORED)
        out["labels"] = said.where(kept, IGNORED)
    return out


def _row(prompt: Prompt, b: int, edits: Sequence[Edit]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, the old places they are from or are like (-1: none), and which are new; without padding."""
    ids, seen = prompt.ids[b], prompt.seen[b]
    shown = seen.nonzero()[:, 0]
    begin, end = (int(shown[0]), int(shown[-1]) + 1) if len(shown) else (0, 0)
    pieces, at = [], begin
    for e in sorted(edits, key=lambda e: e.start):
        pieces += [_kept(ids, at, e.start), _fresh(ids, e)]
        at = e.stop
    return tuple(torch.cat(x) for x in zip(*pieces, _kept(ids, at, end)))


def _kept(ids: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
    return ids[start:stop], torch.arange(start, stop), torch.zeros(stop - start, dtype=torch.bool)


def _fresh(ids: Tensor, e: Edit) -> tuple[Tensor, Tensor, Tensor]:
    new, old = torch.tensor(e.ids, dtype=torch.int64), ids[e.start : e.stop]
    like = torch.full_like(new, -1)
    for token in new.unique():
        if len(same := (old == token).nonzero()):
            like[new == token] = e.start + same[0]
    return new, like, torch.ones_like(new, dtype=torch.bool)


def padded(x: Tensor, length: int, fill: float | bool, right: bool) -> Tensor:
    """x [..., n] with more at the end, or before, to [..., length]."""
    more = x.new_full((*x.shape[:-1], length - x.shape[-1]), fill)
    return torch.cat([x, more] if right else [more, x], -1)
