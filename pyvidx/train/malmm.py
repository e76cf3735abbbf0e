"""MA-LMM as a Task: fine-tuned on answers through a frozen language model (arXiv:2404.05726, section 4)."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pyvidx.hosts.importing import LOCAL, importing
from pyvidx.models.language import Language
from pyvidx.models.malmm import MALMM
from pyvidx.preprocess import PRESETS
from pyvidx.train.data import READERS, Batch, Videos, rows
from pyvidx.train.distributed import Ranks
from pyvidx.train.fields import FRAMES, MANY, check_choices, check_ranges, fields
from pyvidx.train.outputs import written
from pyvidx.train.recipe import Recipe
from pyvidx.train.task import Task
from pyvidx.train.tokens import vocabulary
from pyvidx.weights.malmm import export_malmm, load_malmm

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Memory:
    """What a configuration may give of MALMM.encode's arguments."""

    length: int = 20
    visual: bool = True
    query: bool = True
    chunk: int = 32


@dataclass(frozen=True)
class Config:
    """A fine-tuning run, as in train/configs/malmm-classification.json. Paths are relative to where the command runs.

    Attributes:
        out: folder for checkpoint, weights, losses and what could not be read.
        train, held_out: rows (see train.data.rows); held_out may be left out.
        root: folder of the videos. outside: rows may name videos that are not below it.
        weights: a file or folder written by MALMM.save, or a list of published files (see load_malmm).
        language, tokenizer, text_tokenizer: folders of transformers: the language model, its tokenizer (default: the
            same) and that of the Q-Former's text (None: a Q-Former without text).
        language_dtype: "float16", as in the public code, "bfloat16" or "float32".
        frames: T, per clip.
        time_length: rows of the temporal table where published weights bring none.
        memory: M and which banks, for MALMM.encode; M = 0: no memory.
        bos, max_text, max_answer: see Language; published weights want "</s>".
        preset, reader: see train.data.Videos.
        recipe: see Recipe.
    """

    out: str
    train: str
    weights: str | list[str]
    language: str
    root: str = "."
    outside: bool = False
    held_out: str | None = None
    tokenizer: str | None = None
    text_tokenizer: str | None = None
    language_dtype: str = "float16"
    frames: int = 100
    time_length: int = 120
    memory: dict = field(default_factory=lambda: {"length": 20})
    bos: str | None = None
    max_text: int = 128
    max_answer: int = 255
    preset: str = "ma_lmm"
    reader: str = "auto"
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self):
        check_choices(self, {"language_dtype": DTYPES, "preset": PRESETS, "reader": READERS})
        counts = ("time_length", "max_text", "max_answer")
        check_ranges(self, {"frames": (1, FRAMES), **dict.fromkeys(counts, (1, MANY))})
        check_ranges(Memory(**fields(Memory, self.memory)), {"length": (0, MANY), "chunk": (1, MANY)})
        if self.recipe.amp in DTYPES[1:] and self.language_dtype not in ("float32", self.recipe.amp):
            raise ValueError(  # autocast does not mix the two 16-bit dtypes
                f"Config: language_dtype must be float32 or amp's {self.recipe.amp}, got {self.language_dtype}"
            )

    @classmethod
    def from_dict(cls, values: dict) -> "Config":
        """Raises ValueError for fields that are unknown, missing or not of their types."""
        return cls(**fields(cls, values, ("out", "train", "weights", "language")))

    @property
    def about(self) -> dict:
        """What of it makes another run, beside the recipe."""
        names = ("language_dtype", "frames", "memory", "bos", "max_text", "max_answer", "preset")
        return {name: getattr(self, name) for name in names}


class MALMMTask(Task):
    """Trained: ln_vision, Q-Former, query tokens, projection and temporal table. The rest is frozen: the tower is part
    of the model, the language model is held beside it, so no checkpoint has it.

    Args:
        model: on its device.
        language: on the same device.
        memory: arguments of MALMM.encode.
    """

    some_unused = True  # the text path of the Q-Former's last layer leads nowhere

    def __init__(self, model: MALMM, language: Language, memory: dict | None = None):
        super().__init__()
        width = model.config.llm_width
        if width != language.width:
            raise ValueError(
                f"MALMMTask: the model's llm_width must be {language.width}, the language model's, got {width}"
            )
        model.freeze_vision()
        self.model, self.memory = model, dict(memory or {})
        object.__setattr__(self, "language", language)  # not a submodule

    def count(self, batch: Batch) -> int:
        """Tokens of the answers, with the end of each."""
        ids = self.language.tokenizer(batch.answers, add_special_tokens=False)["input_ids"]
        return sum(min(len(answer), self.language.max_answer) + 1 for answer in ids)

    def forward(self, batch: Batch) -> Tensor:
        pixels = batch.pixels.to(self.model.projection.weight.device)
        return self.model.loss(pixels, batch.prompts, batch.answers, self.language, memory=self.memory)

    def outside(self) -> dict[str, Tensor]:
        return self.language.causal_lm.state_dict()

    def export(self, path: Path, epoch: int) -> None:
        """What was trained, as in the public code's fine-tuned file: .safetensors, or .pth as it writes."""
        weights = {n: w.cpu() for n, w in export_malmm(self.model, "lavis").items() if not n.startswith("visual_")}
        with written(path) as part:
            if path.suffix == ".safetensors":
                save_file(weights, part)
            else:
                torch.save({"model": weights, "epoch": epoch}, part)


def build(config: Config, device: torch.device) -> MALMMTask:
    """Model and language model of a configuration.

    Raises:
        FileNotFoundError, ValueError: weights are not there or do not fit.
        RuntimeError: transformers is not installed.
    """
    with importing("train: a language model", "transformers"):
        import transformers
    for folder in (config.language, config.tokenizer, config.text_tokenizer):
        if folder is not None and not Path(folder).is_dir():
            raise FileNotFoundError(f"train: there is no folder {folder}")  # transformers would ask the network for it
    if isinstance(config.weights, str):
        model = MALMM.from_pretrained(config.weights)
    else:
        model, _ = load_malmm(*config.weights, allow_missing=["time"], time_length=config.time_length)
    if model.time is not None and config.memory.get("length") != 0 and config.frames > len(model.time):
        raise ValueError(f"Config: frames must be at most {len(model.time)}, the temporal table's, got {config.frames}")
    with importing("train: a language model", "transformers"):  # which imports its parts when they are used
        lm = transformers.AutoModelForCausalLM.from_pretrained(
            config.language, dtype=getattr(torch, config.language_dtype), **LOCAL
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.tokenizer or config.language, **LOCAL)
    text = config.text_tokenizer and transformers.AutoTokenizer.from_pretrained(config.text_tokenizer, **LOCAL)
    language = Language(lm, tokenizer, text, bos=config.bos, max_text=config.max_text, max_answer=config.max_answer)
    # Trained weights have to be float32, whatever the file has; autocast makes the rest.
    task = MALMMTask(model.float().to(device), language.to(device), config.memory)
    task.about = config.about | {
        "tokenizer": vocabulary(config.tokenizer or config.language),
        "text_tokenizer": vocabulary(config.text_tokenizer),
    }
    return task


def datasets(config: Config, task: MALMMTask, ranks: Ranks) -> tuple[Videos, Videos | None]:
    """Training rows and held-out ones.

    Raises:
        FileNotFoundError, ValueError: rows are not there or do not parse.
    """
    make = {
        "root": config.root, "frames": config.frames, "size": task.model.config.vision.image_size,
        "preset": config.preset, "seed": config.recipe.seed, "reader": config.reader,
    }  # fmt: skip
    held_out = (
        None if config.held_out is None else Videos(rows(config.held_out, outside=config.outside), train=False, **make)
    )
    return Videos(rows(config.train, outside=config.outside), **make), held_out
