"""A memory in the call of a model, for programs that cannot be edited."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from pyvidx.hosts.answers import option, readdressed
from pyvidx.hosts.compress import CHUNK, compress
from pyvidx.hosts.language import host_of
from pyvidx.hosts.language.kept import method
from pyvidx.memory import Policy
from pyvidx.sizes import check_counts

_CALLS = ("forward", "generate")
_LENGTHS = ("max_length", "min_length")  # of generate: they count the prompt

log = logging.getLogger(__name__)


class attached:  # noqa: N801  (used as a statement: with attached(...))
    """While this is entered, the model sees through a memory whatever calls it.

        with attached(model, "merge", capacity=16):
            somebody_elses_program(model)

    It replaces `forward` and `generate` of this one object by calls of compress before its own; a call without pixels
    of a video (text, images, what `compress` made, the later steps of generate) goes through as it is. On leaving, also
    by an exception, both are what they were. `generate` returns the prompt that it was given in front of the answer,
    as programs cut that off by its length; max_length and min_length count that one too. `forward` returns logits of
    the compressed prompt, whose last is the last.

    Every compressed call is logged (logging.getLogger("pyvidx.hosts.attached"), INFO), and counted in repr().

    Args:
        model: of transformers, as for compress.
        policy, options: as of compress: capacity, processor, chunk, and those of the policy.

    Raises:
        ValueError: the model is no host, or an option does not fit the policy.
        RuntimeError: transformers is older than 5.20.2; or, on entering, the model has one attached already.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: str | Policy = "merge",
        *,
        capacity: int | None = None,
        processor: Any = None,
        chunk: int = CHUNK,
        **options: Any,
    ):
        check_counts("attached", chunk=chunk)
        self._host = host_of(model, processor)
        method(policy, capacity, options)  # raises where an option does not fit
        said = {"capacity": capacity, **options}
        said = "".join(f", {name}={value!r}" for name, value in said.items() if value is not None)
        self._said = (repr(policy) if isinstance(policy, str) else str(policy)) + said
        self._compress = functools.partial(
            compress, policy=policy, capacity=capacity, processor=processor, chunk=chunk, **options
        )
        self._were: dict[str, Any] | None = None  # what the model itself held under the names of _CALLS
        self.calls = self.tokens_in = self.tokens_out = 0

    def __enter__(self) -> attached:
        model = self._host.model
        if any(hasattr(vars(model).get(name), "_attached") for name in _CALLS):
            raise RuntimeError(f"attached: {type(model).__name__} has a memory attached already; leave that one first")
        self._were = {name: vars(model)[name] for name in _CALLS if name in vars(model)}
        model.forward, model.generate = self._forward(model.forward), self._generate(model.generate)
        log.info("%r", self)
        return self

    def __exit__(self, *_: object) -> None:
        were, self._were = self._were, None
        for name in _CALLS:
            if name in were:
                setattr(self._host.model, name, were[name])
            else:
                delattr(self._host.model, name)
        log.info("%r", self)

    def __repr__(self) -> str:
        state = "not entered" if self._were is None else "entered"
        count = f"{self.calls} calls, {self.tokens_in} tokens became {self.tokens_out}"
        return f"attached({type(self._host.model).__name__}, {self._said}), {state}: {count}"

    def _forward(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            inputs = _named(forward, args, kwargs)
            return forward(**self._compressed(inputs)) if self._sees(inputs) else forward(*args, **kwargs)

        call._attached = True
        return call

    def _generate(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(generate)
        def call(*args: Any, **kwargs: Any) -> Any:
            inputs = _named(generate, args, kwargs)
            if inputs.get("input_ids") is None and "inputs" in inputs:
                inputs["input_ids"] = inputs.pop("inputs")
            if not self._sees(inputs):
                return generate(*args, **kwargs)
            small, given = self._compressed(inputs), inputs["input_ids"]
            shorter = given.shape[1] - small["input_ids"].shape[1]
            lengths = {name: option(self._host.model, small, name) for name in _LENGTHS}
            small |= {name: max(0, n - shorter) for name, n in lengths.items() if n is not None}
            found = generate(**small)
            whole = readdressed(getattr(found, "sequences", found), small["input_ids"], given)
            if not hasattr(found, "sequences"):
                return whole
            found.sequences = whole
            return found

        call._attached = True
        return call

    def _sees(self, inputs: Mapping[str, Any]) -> bool:
        if self._host.embedded and inputs.get("inputs_embeds") is not None:
            return False
        return any(inputs.get(name) is not None for name in self._host.pixels)

    def _compressed(self, inputs: dict[str, Any]) -> dict[str, Any]:
        small = self._compress(self._host.model, inputs)
        before, after = inputs["input_ids"].shape, small["input_ids"].shape
        self.calls += 1
        self.tokens_in, self.tokens_out = self.tokens_in + before.numel(), self.tokens_out + after.numel()
        log.info("%s: prompts of %d tokens became %d", self._said, before[1], after[1])
        return small


def _named(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name."""
    signature = inspect.signature(call)
    found = dict(signature.bind_partial(*args, **kwargs).arguments)
    more = [p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
    for name in more:
        found |= found.pop(name, {})
    return found
