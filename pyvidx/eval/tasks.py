"""The tasks that MA-LMM is evaluated on, as data: eval/tasks.json."""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from pyvidx.eval.answers import by_type, exact_match

EXACT = ("exact", "exact_first_word", "exact_by_type")


@dataclass(frozen=True)
class Task:
    """How one benchmark is run, as in the public run scripts.

    Attributes:
        name: of the task.
        prompt: of the Q-Former and the language model; "{question}" where the annotation asks one.
        frames, memory: T frames of a clip and M entries of both banks.
        train_sampler, eval_sampler: of pyvidx.video.
        preset: of pyvidx.preprocess, in evaluation.
        min_tokens, max_tokens: of an answer.
        beams, returned: searched, and kept as ranked answers.
        length_penalty: of the search.
        metric: "exact" (top 1 and top `returned`), "exact_first_word", "exact_by_type" (ActivityNet-QA), "caption"
            (COCO's caption tools) or "anticipation" (pyvidx.eval.anticipation).
        window: (seconds, stride) of each sample of a long video, or None: the whole video.
        ours: fields that no public code states and pyvidx chose: EPIC-Kitchens-100 is only reported, so numbers under
            them do not compare with the paper's.
    """

    name: str
    prompt: str
    frames: int
    memory: int
    train_sampler: str
    eval_sampler: str
    preset: str
    min_tokens: int
    max_tokens: int
    beams: int
    returned: int
    length_penalty: float
    metric: str
    window: tuple[int, int] | None = None
    ours: tuple[str, ...] = ()

    def ask(self, question: str | None = None) -> str:
        """The prompt of one sample."""
        if ("{question}" in self.prompt) != (question is not None):
            needs = "a" if "{question}" in self.prompt else "no"
            raise ValueError(f"task {self.name}: the prompt takes {needs} question, got {question!r}")
        return self.prompt.replace("{question}", question or "")

    @property
    def generation(self) -> dict:
        """Options of Language.generate."""
        return {
            "min_new_tokens": self.min_tokens,
            "max_new_tokens": self.max_tokens,
            "num_beams": self.beams,
            "num_return_sequences": self.returned,
            "length_penalty": self.length_penalty,
        }

    def score(
        self,
        predictions: Mapping[str, str | Sequence[str]],
        annotations: Mapping[str, Mapping],
        compat: str | None = None,
    ) -> dict[str, float]:
        """The task's numbers from answers by sample id.

        Args:
            predictions: id -> a text or the ranked texts.
            annotations: id -> {"answer": text, and for ActivityNet-QA "answer_type": int}.
            compat: "official": ActivityNet's share of free questions as the published script has it.

        Raises:
            ValueError: an annotated sample has no prediction, or the metric is not exact match.
        """
        if self.metric not in EXACT:
            tool = {
                "caption": "pycocoevalcap (it needs Java)",
                "anticipation": "pyvidx eval anticipation",
            }
            raise ValueError(f"task {self.name}: its metric is {self.metric}, which is the work of {tool[self.metric]}")
        if compat is not None and self.metric != "exact_by_type":
            raise ValueError(f"task {self.name}: it has no compat, got {compat!r}")
        fields = ("answer", "answer_type") if self.metric == "exact_by_type" else ("answer",)
        kinds = {"answer": str, "answer_type": (int, str)}
        incomplete = [
            key
            for key, row in annotations.items()
            if not isinstance(row, Mapping) or not all(isinstance(row.get(name), kinds[name]) for name in fields)
        ]
        if incomplete:
            raise ValueError(f"task {self.name}: annotations must hold {' and '.join(fields)}, e.g. {incomplete[:3]}")
        lacking = [key for key in annotations if key not in predictions]
        if lacking or not annotations:
            raise ValueError(f"task {self.name}: predictions lack {len(lacking)} samples, e.g. {lacking[:3]}")
        found = [predictions[key] for key in annotations]
        answers = [row["answer"] for row in annotations.values()]
        odd = [p for p in found if not (isinstance(p, str) or (_texts(p) and p))]
        if odd:
            raise ValueError(f"task {self.name}: a prediction must be a text or ranked texts, got {odd[0]!r}")
        if self.metric == "exact_by_type":
            first = [p if isinstance(p, str) else p[0] for p in found]
            types = [row["answer_type"] for row in annotations.values()]
            wrong = [t for t in types if not str(t).isdecimal()]
            if wrong:
                raise ValueError(f"task {self.name}: an answer_type must be a whole number, got {wrong[0]!r}")
            types = list(map(int, types))
            return {name: 100 * value for name, value in by_type(first, answers, types, compat=compat).items()}
        words = self.metric == "exact_first_word"
        ranked = any(not isinstance(p, str) and len(p) > 1 for p in found)
        tops = (1, self.returned) if ranked else (1,)
        return {f"top-{k}": exact_match(found, answers, top=k, first_word=words) for k in tops}


def _texts(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value)


@functools.cache
def _table() -> dict[str, Task]:
    rows = json.loads((Path(__file__).parent / "tasks.json").read_text())
    common = rows.pop("common")
    known = {f.name for f in fields(Task)}
    tasks = {}
    for name, row in rows.items():
        row = common | row
        row["window"] = tuple(row["window"]) if row.get("window") else None
        row["ours"] = tuple(row.get("ours", ()))
        tasks[name] = Task(name=name, **{key: value for key, value in row.items() if key in known})
    return tasks


def names() -> list[str]:
    """The tasks that `task` knows."""
    return list(_table())


def task(name: str) -> Task:
    """A task by name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in _table():
        raise ValueError(f"task: the name must be one of {', '.join(names())}, got {name!r}")
    return _table()[name]
