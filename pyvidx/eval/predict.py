"""The answers of MA-LMM to the samples of a task, from video files."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from pyvidx.eval.annotations import Sample
from pyvidx.eval.annotations.sample import load
from pyvidx.eval.files import Named, digest, json_lines, open_to_append
from pyvidx.eval.tasks import Task
from pyvidx.models import MALMM
from pyvidx.models.language import Language
from pyvidx.preprocess import PRESETS, preprocess
from pyvidx.video.pool import shared


def predict(
    samples: Sequence[Sample],
    task: Task,
    model: MALMM,
    language: Language,
    out: str | Path,
    *,
    root: str | Path,
    reader: str = "auto",
    memory: dict | None = None,
    name: str = "",
    shown=lambda samples: samples,
) -> dict[str, str]:
    """Ask about every sample and write each answer at once; what `out` already answers is not asked again.

    Args:
        task: says prompt, frames, sampler, preset, bank length and beams.
        model: in eval mode; language: on the same device.
        out: JSON lines {"id", "by" (a digest of task, memory and name), "answers" (the best first)}.
        root: folder that is searched for the videos.
        memory: more arguments of MALMM.forward, such as visual=False; the length is the task's.
        name: of the weights: answers of others are not taken over.
        shown: wraps the samples that are asked about, e.g. a progress bar.

    Returns:
        samples without an answer, and why: no such file, or it could not be read.

    Raises:
        ValueError: `out` holds answers of another task, memory or name.
    """
    out, how = Path(out), {**(memory or {}), "length": task.memory}
    by = digest([name, how, asdict(task)])
    rows = json_lines(out, ("id", "by", "answers")) if out.exists() else []
    if any(row["by"] != by for row in rows):
        raise ValueError(f"predict: {out} must hold answers of this task and these weights, or be another file")
    done = {row["id"] for row in rows}
    files, size = Named.under(root), model.config.vision.image_size
    preset = replace(PRESETS[task.preset], size=size, crop=size)
    weight, broken = next(model.parameters()), {}
    with open_to_append(out) as file:
        for s in shown([s for s in samples if s.id not in done]):
            path = files.find(s.video)
            try:
                if path is None:
                    raise FileNotFoundError(f"not in {root}")
                clip = shared().read(path, task.frames, task.eval_sampler, reader, start=s.start, end=s.end)
            except Exception as error:  # whatever a damaged file makes a decoder raise
                broken[s.id] = f"{type(error).__name__}: {error}"
                continue
            pixels = preprocess(clip.frames.to(weight.device), preset, dtype=weight.dtype)[None]
            (answer,) = model.generate(pixels, [task.ask(s.question)], language, memory=how, **task.generation)
            answers = [answer] if isinstance(answer, str) else answer
            file.write(json.dumps({"id": s.id, "by": by, "answers": answers}) + "\n")
            file.flush()
    return broken


def read_predictions(path: str | Path) -> dict[str, str | list[str]]:
    """Answers by sample id: JSON lines {"id", "answers"} of `predict`, or a JSON object {id: answer or ranked ones}."""
    path = Path(path)
    if path.suffix == ".jsonl":
        return {row["id"]: row["answers"] for row in json_lines(path, ("id", "answers"))}
    return load(path, dict)
