"""Instruction tuning of a chat model's branch and projector (arXiv:2309.15785, section 3.3), as its scripts do it: from
what the frozen CLIP gives for every video, stored once, through the frozen language model."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from pyvidx.data.captions import Captioned
from pyvidx.files import write_tensors
from pyvidx.hosts.importing import importing
from pyvidx.hosts.templates import TEMPLATES, VIDEO, template
from pyvidx.models.language import IGNORED
from pyvidx.preprocess import PRESETS, as_preset
from pyvidx.train.data import READERS, Row, Take, rows, sized
from pyvidx.train.distributed import Ranks
from pyvidx.train.features import Features, StoredPairs, digest, store
from pyvidx.train.fields import FRAMES, MANY, check_choices, check_ranges, fields
from pyvidx.train.loop import autocast
from pyvidx.train.outputs import written
from pyvidx.train.pairs import Pairs, PairVideos
from pyvidx.train.recipe import Recipe
from pyvidx.train.task import Task
from pyvidx.train.tokens import vocabulary
from pyvidx.weights.mma_export import export_names

DTYPES = ("float32", "float16", "bfloat16")
BRANCH = "temporal.branch."
# Frozen, as by the public code.
GATE = f"{BRANCH}gate"


@dataclass(frozen=True)
class Config:
    """A tuning run, as in train/configs/btadapter-chat.json. Paths are relative to where the command runs.

    Attributes:
        out: folder for checkpoint, weights, losses and what could not be read.
        train, held_out: rows (see train.data.rows) about whole videos; held_out may be left out.
        root: folder of the videos. outside: rows may name videos that are not below it.
        model: folder of a chat model, as `pyvidx.hosts.llava.load` makes and save_pretrained writes it.
        features: where the stored outputs of CLIP are, see train.features.Features. They are made where they are not
            there: one layer of every video, 52.6 MB in float16 of ViT-L/14 with 100 frames.
        language_dtype: of the frozen language model.
        conversation: the template of the texts, of pyvidx.hosts.templates.
        frames, preset, reader: see train.data.Take; frames are spread evenly, and repeat in a video of fewer.
        max_tokens: of a text, the video's among them; of a longer one the end is left out.
        recipe: see Recipe.
    """

    out: str
    train: str
    model: str
    features: Features
    root: str = "."
    outside: bool = False
    held_out: str | None = None
    language_dtype: str = "float16"
    conversation: str = "vicuna_v1_1"
    frames: int = 100
    preset: str = "bt_adapter_retrieval_256"
    reader: str = "auto"
    max_tokens: int = 2048
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self):
        check_choices(self, {"language_dtype": DTYPES, "preset": PRESETS, "reader": READERS, "conversation": TEMPLATES})
        check_ranges(self, {"frames": (1, FRAMES), "max_tokens": (1, MANY)})
        if self.features.variants != 1:
            raise ValueError(f"Config: features must have one variant, as no frames are drawn, got {self.features}")
        if self.recipe.amp in DTYPES[1:] and self.language_dtype not in ("float32", self.recipe.amp):
            raise ValueError(  # autocast does not mix the two 16-bit dtypes
                f"Config: language_dtype must be float32 or amp's {self.recipe.amp}, got {self.language_dtype}"
            )

    @classmethod
    def from_dict(cls, values: dict) -> "Config":
        """Raises ValueError for fields that are unknown, missing or not of their types."""
        return cls(**fields(cls, values, ("out", "train", "model", "features")))

    @property
    def about(self) -> dict:
        """What of it makes another run, beside the recipe."""
        names = ("language_dtype", "conversation", "frames", "preset", "max_tokens")
        return {name: getattr(self, name) for name in names}


class Tuned(nn.Module):
    """What of a chat model is trained, and the frozen tower beside it: branch, projector, and the embeddings of the
    tokens before and after a video. The language model is held beside it, so no checkpoint has it.

    Args:
        model: LlavaForConditionalGeneration with BT-Adapter in its tower.
        ids: of <vid_start> and <vid_end>.
    """

    def __init__(self, model: nn.Module, ids: Sequence[int]):
        super().__init__()
        object.__setattr__(self, "host", model.requires_grad_(False).eval())  # not a submodule
        self.encoder, self.projector = model.model.vision_tower.encoder, model.model.multi_modal_projector
        self.ids, self.is_random = list(ids), False
        rows = model.get_input_embeddings().weight.detach()[self.ids]
        self.rows = nn.Parameter(rows.float())
        self.encoder, self.projector = self.encoder.float(), self.projector.float()
        self.single = model.config.projector_hidden_act == "linear"  # then its second map is the identity, and stays
        for name, p in self.encoder.named_parameters():
            p.requires_grad_(name.startswith(BRANCH) and name != GATE)
        for name, p in self.projector.named_parameters():
            p.requires_grad_(name.startswith("linear_1.") or not self.single)

    @property
    def layer(self) -> int:
        """The last layer of the tower before those that the branch reads: its output is what is stored."""
        return self.encoder.temporal.reads.start - 1

    def tokens(self, features: Tensor) -> Tensor:
        """A video's tokens for the language model. [B, T, 1+P, C], the output of `layer` -> [B, 1+P, width]."""
        return self.projector(self.encoder.from_features(features, outputs=["tokens"]).tokens)

    def weights(self) -> dict[str, Tensor]:
        """What was trained, under the names of the public tuned files, which are here one: pyvidx.hosts.llava.load
        takes it as `branch` and as `projector`. The gates are not in theirs, and here where they are not zero."""
        own = {f"model.{name}": p for name, p in self.encoder.named_parameters() if name.startswith(BRANCH)}
        gate = own.get(f"model.{GATE}")
        if gate is not None and not bool(gate.any()):
            del own[f"model.{GATE}"]
        found = {name.replace("backbone.", "model.vision_tower.", 1): x for name, x in export_names(own).items()}
        parts = ("linear_1",) if self.single else ("linear_1", "linear_2")
        for part, name in zip(parts, ("",) if self.single else ("0.", "2.")):
            for key, x in getattr(self.projector, part).state_dict().items():
                found[f"model.mm_projector.{name}{key}"] = x.clone()
        found["model.embed_tokens.weight"] = self.rows.detach().clone()
        return {name: x.cpu() for name, x in found.items()}

    def save(self, path: str | Path) -> Path:
        """Write `weights` as .safetensors."""
        return write_tensors(path, self.weights(), {})


class Batch(NamedTuple):
    """features [B, T, 1+P, C], B prompts and answers; the videos that could not be read, with why, are not in it."""

    features: Tensor
    prompts: list[str]
    answers: list[str]
    broken: dict[str, str]

    def __len__(self) -> int:
        return len(self.prompts)


class ChatTask(Task):
    """Trained: the branch but for its gates, the projector, and two rows of embeddings. Frozen: CLIP, language model.

    Args:
        model: on its device, as the language model beside it.
        tokenizer: that knows the tokens of a video.
        conversation, max_tokens: see Config.
    """

    some_unused = True  # the class token's path of the branch's last layer leads nowhere

    def __init__(self, model: Tuned, tokenizer, conversation: str, max_tokens: int):
        super().__init__()
        self.model, self.tokenizer, self.max_tokens = model, tokenizer, max_tokens
        self.template, self.patch = template(conversation), model.host.config.image_token_id
        start, end = tokenizer.convert_ids_to_tokens(model.ids)
        count = 1 + model.encoder.config.vision.patches
        self.video = start + tokenizer.convert_ids_to_tokens(self.patch) * count + end

    def count(self, batch: Batch) -> int:
        """Tokens of the answers, with the end of each."""
        return sum(len(ids) - begin for ids, begin in self._texts(batch))

    def forward(self, batch: Batch) -> Tensor:
        host, device = self.model.host, self.model.rows.device
        texts = self._texts(batch)
        length = max(len(ids) for ids, _ in texts)
        ids = torch.zeros(len(texts), length, dtype=torch.int64)
        labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
        for i, (row, begin) in enumerate(texts):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
            labels[i, begin : len(row)] = ids[i, begin : len(row)]
        ids, labels, mask = ids.to(device), labels.to(device), mask.to(device)
        tokens = self.model.tokens(batch.features.to(device))
        embeds = host.get_input_embeddings()(ids)
        for token, row in zip(self.model.ids, self.model.rows):
            embeds = torch.where((ids == token)[..., None], row.to(embeds.dtype), embeds)
        embeds = embeds.masked_scatter((ids == self.patch)[..., None], tokens.to(embeds.dtype))
        return host(inputs_embeds=embeds, attention_mask=mask, labels=labels).loss

    def outside(self) -> dict[str, Tensor]:
        return self.model.host.model.language_model.state_dict()

    def export(self, path: Path, epoch: int) -> None:
        """What was trained, under the public names: .safetensors, or .pth as torch writes."""
        weights = self.model.weights()
        if path.suffix == ".safetensors":
            write_tensors(path, weights, {})
            return
        with written(path) as part:
            torch.save(weights, part)

    def check(self, row: Row) -> None:
        """Raise ValueError where a row's video, or a first token of its answer, does not fit into its text."""
        ((ids, answer),) = self._texts(Batch(torch.empty(0), [row.prompt], [row.answer], {}))
        got, want = ids.count(self.patch), 1 + self.model.encoder.config.vision.patches
        about = f"with the prompt {row.prompt!r:.80} and the answer {row.answer!r:.80} about {row.video}"
        if got != want:
            raise ValueError(
                f"train: a text of {self.max_tokens} tokens must hold the {want} of its video, got {got} {about}"
            )
        if answer == len(ids):
            raise ValueError(
                f"train: a text of {self.max_tokens} tokens must hold some of its answer, got none {about}; raise "
                f"max_tokens or shorten the prompt"
            )

    def _texts(self, batch: Batch) -> list[tuple[list[int], int]]:
        """Token ids of each conversation, and where its answer begins."""
        found = []
        for prompt, answer in zip(batch.prompts, batch.answers):
            asked, told = (self.template.prompt(prompt, answer=a).replace(VIDEO, self.video) for a in (None, answer))
            asked, told = (self.tokenizer(text)["input_ids"][: self.max_tokens] for text in (asked, told))
            same = next((i for i, (a, b) in enumerate(zip(asked, told)) if a != b), min(len(asked), len(told)))
            found.append((told, same))
        return found


class ChatRows(Dataset):
    """Rows with the stored features of their videos, indexed by (epoch, row). A video that could not be read takes the
    rows about it along.

    Args:
        rows: the samples.
        videos: their distinct videos, as they were stored.
        stored: what was.
    """

    def __init__(self, rows: Sequence[Row], videos: Sequence[str], stored: StoredPairs):
        self.rows, self.stored = list(rows), stored
        self.places = {video: i for i, video in enumerate(videos)}

    def __len__(self) -> int:
        return len(self.rows)

    def digest(self) -> str:
        """A hash of the rows: whether two are the same."""
        return f"{self.stored.digest()} {digest_of(self.rows)}"

    def __getitem__(self, at: tuple[int, int]) -> tuple[Row, Tensor | str]:
        row = self.rows[at[1]]
        place = self.places[row.video]
        pair = self.stored[at[0], place]
        if pair.at[1] != place:  # another video in the place of one that could not be read
            return row, pair.broken.get(row.video, "it could not be read")
        return row, pair.video[0]

    @staticmethod
    def collate(samples: Sequence[tuple[Row, Tensor | str]]) -> Batch:
        good = [(row, x) for row, x in samples if isinstance(x, Tensor)]
        return Batch(
            torch.stack([x for _, x in good]) if good else torch.empty(0),
            [row.prompt for row, _ in good],
            [row.answer for row, _ in good],
            {row.video: why for row, why in samples if isinstance(why, str)},
        )


def digest_of(found: Sequence[Row]) -> str:
    """A hash of rows."""
    return hashlib.sha256("\n".join(map(repr, found)).encode(errors="surrogatepass")).hexdigest()


def build(config: Config, device: torch.device) -> ChatTask:
    """The tuning of a configuration.

    Raises:
        FileNotFoundError, ValueError: the model is not there or does not fit.
        RuntimeError: transformers is not installed.
    """
    if not Path(config.model).is_dir():
        raise FileNotFoundError(f"train: there is no folder {config.model}")
    with importing("train: a chat model", "transformers"):
        from pyvidx.hosts import llava
    chat = llava.open(config.model, dtype=getattr(torch, config.language_dtype))
    tokenizer = chat.processor.tokenizer
    ids = tokenizer.convert_tokens_to_ids(["<vid_start>", "<vid_end>"])
    model = Tuned(chat.model.to(device), ids)
    if model.layer < 0:
        raise ValueError(f"train: the branch of {config.model} must start after a layer of CLIP, to store its output")
    v = model.encoder.config.vision
    model.encoder.temporal.check(config.frames, v.patches)
    # What training will read must be taken before a corpus is encoded: the official tower takes no 3 frames.
    model.encoder.read_features(torch.empty(1, config.frames, 1 + v.patches, v.width, device="meta"))
    task = ChatTask(model.to(device), tokenizer, config.conversation, config.max_tokens)
    task.about = config.about | {"tokenizer": vocabulary(config.model)}
    count = sum(p.numel() for p in task.parameters() if p.requires_grad)
    task.said = f"branch, projector and two embeddings of {config.model}: {count:,} values are trained"
    return task


def datasets(config: Config, task: ChatTask, ranks: Ranks) -> tuple[ChatRows, ChatRows | None]:
    """Training rows and held-out ones, with their features, which are made where they are not there.

    Raises:
        FileNotFoundError, ValueError: rows are not there or do not parse; stored features are of something else.
    """
    held_out = None
    if config.held_out is not None:
        apart = replace(config.features, folder=f"{config.features.folder}-held-out")
        held_out = _stored(config, config.held_out, apart, task, ranks)
    return _stored(config, config.train, config.features, task, ranks), held_out


def _stored(config: Config, file: str, features: Features, task: ChatTask, ranks: Ranks) -> ChatRows:
    found = rows(file, outside=config.outside)
    if cut := [row for row in found if (row.start, row.end) != (None, None)]:
        raise ValueError(f"train: rows of chat must be about whole videos, {file} has times of {cut[0].video}")
    most = config.max_tokens - len(task.tokenizer(task.template.prompt("").replace(VIDEO, task.video))["input_ids"])
    for row in found:
        # The others fit: no token has less than a byte, and those of a video begin with this one.
        if len(row.prompt.encode()) >= most or "<" in row.prompt + row.answer:
            task.check(row)
    videos = list(dict.fromkeys(row.video for row in found))
    model, size = task.model, task.model.encoder.config.vision.image_size
    preset = as_preset(config.preset)
    preset = preset if preset.crop == size else sized(preset, size)
    data = PairVideos(
        Captioned(videos, ["-"] * len(videos), config.root),
        Take(config.frames, "uniform", preset, reader=config.reader),
        config.recipe.seed,
    )
    about = {"frames": config.frames, "preset": config.preset, "rows": data.digest(), "layer": model.layer,
             "tower": digest(model.encoder.tower), "amp": config.recipe.amp}  # fmt: skip

    def frozen(batch: Pairs) -> tuple[tuple[Tensor, ...], Tensor]:
        with autocast(config.recipe, ranks):
            found = model.encoder.tower(batch.video.to(model.rows.device), [model.layer])
        return found, torch.zeros(len(batch), 1)

    v = model.encoder.config.vision
    shape = (1, config.frames, 1 + v.patches, v.width, 1)
    store(features, data, frozen, about, ranks, 1, config.recipe.workers, shape=shape)
    return ChatRows(found, videos, StoredPairs(features, about))
