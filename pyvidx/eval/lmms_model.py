"""The class that lmms-eval runs, see pyvidx.eval.lmms. Importing it imports lmms-eval."""

from __future__ import annotations

import os

import torch
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms

from pyvidx.device import usable
from pyvidx.eval.watch import Watcher, until
from pyvidx.hosts.importing import LOCAL, importing

GENERATE = ("max_new_tokens", "temperature", "top_p", "num_beams", "do_sample")
LONGEST = 1024


class Pyvidx(lmms):
    """A host of transformers with a memory between its encoder and its language model.

    Args:
        pretrained: its folder, or a name in transformers' cache; nothing is downloaded.
        policy, capacity, frames, sampler, seed, options: see pyvidx.eval.watch.Watcher; "None", as a command line has
            it, is None.
        device, dtype: of the model; dtype a name of torch's, or "auto", as saved.
        batch_size: 1. max_batch_size: lmms-eval's, unused.

    Raises:
        ValueError: an option does not fit.
        RuntimeError: transformers is missing or older than 5.20.2, or the device is not here.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        policy: str = "merge",
        capacity: int | str | None = 16,
        frames: int = 64,
        sampler: str = "linspace",
        seed: int = 0,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **options,
    ):
        super().__init__()
        if str(batch_size) != "1":
            raise ValueError(f"pyvidx: batch_size must be 1, got {batch_size}: a video is watched at a time")
        device = usable(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        with importing("pyvidx.eval.lmms_model", "transformers"):
            from transformers import AutoModelForImageTextToText, AutoProcessor
        processor = AutoProcessor.from_pretrained(pretrained, **LOCAL)
        model = AutoModelForImageTextToText.from_pretrained(pretrained, dtype=dtype, **LOCAL).to(device).eval()
        self.watch = Watcher(
            model, processor, policy, capacity=None if capacity == "None" else capacity, frames=frames, sampler=sampler,
            seed=seed, **{name: None if x == "None" else x for name, x in options.items()},
        )  # fmt: skip

    def generate_until(self, requests) -> list[GenerationResult]:
        """An answer to each question about one video, of at most LONGEST tokens where its task does not say.

        Raises:
            ValueError: a question is about something else than one video file.
        """
        found = []
        for request in requests:
            question, settings, visuals_of, number, task, split = request.args
            visuals = visuals_of(self.task_dict[task][split][number])
            if len(visuals) != 1 or not isinstance(visuals[0], str | os.PathLike):
                kinds = [type(x).__name__ for x in visuals]
                raise ValueError(f"pyvidx: questions must be about one video file, {task} has {kinds} in {number}")
            options = {name: settings[name] for name in GENERATE if settings.get(name) is not None}
            if not options.get("temperature"):  # 0: the likeliest
                options = {k: v for k, v in options.items() if k not in ("temperature", "top_p")} | {"do_sample": False}
            answer = self.watch(visuals[0], question, **{"max_new_tokens": LONGEST} | options)
            text = until(answer.text, settings.get("until") or [])
            found.append(GenerationResult(text=text, token_counts=TokenCounts(output_tokens=len(answer.tokens))))
        return found

    def loglikelihood(self, requests):
        """Raises NotImplementedError: a memory changes what is generated; take a task of generate_until."""
        raise NotImplementedError("pyvidx: tasks of loglikelihoods are not answered, take one of generate_until")

    def generate_until_multi_round(self, requests):
        """Raises NotImplementedError: take a task of one round."""
        raise NotImplementedError("pyvidx: tasks of several rounds are not answered, take one of generate_until")
