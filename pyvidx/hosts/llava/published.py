"""Published files of LLaVA, CLIP and BT-Adapter into one model, with a report of every key."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
)

from pyvidx.data.tables import read_json
from pyvidx.hosts.importing import LOCAL
from pyvidx.hosts.llava.processing import END, PATCH, START, BTAdapterLlavaProcessor, BTAdapterVideoProcessor
from pyvidx.hosts.llava.register import register
from pyvidx.hosts.llava.tower import BTAdapterVisionConfig
from pyvidx.hosts.templates import template
from pyvidx.weights.bt_adapter import load_official
from pyvidx.weights.keys import check_plain, different, groups, rename
from pyvidx.weights.place import MissingWeights, Report
from pyvidx.weights.state import Source, naming, state_of
from pyvidx.weights.towers import told_by_config

# Of the public evaluation.
GENERATION = {"do_sample": True, "temperature": 0.2, "max_new_tokens": 1024}
EMBED, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
PROJECTOR = "model.multi_modal_projector"
# LLaVA's names, transformers' old and new and the authors', -> transformers' new. The first that matches.
NAMES = (
    (re.compile(r"(?:model\.)?multi_modal_projector\.(linear_[12]\.(?:weight|bias))"), PROJECTOR + r".\1"),
    (re.compile(r"(?:model\.)?mm_projector\.(?:0\.)?(weight|bias)"), PROJECTOR + r".linear_1.\1"),
    (re.compile(r"(?:model\.)?mm_projector\.2\.(weight|bias)"), PROJECTOR + r".linear_2.\1"),
    (
        re.compile(r"(?:model\.)?language_model\.(?:model\.)?((?:layers|norm|embed_tokens)\..+)"),
        r"model.language_model.\1",
    ),
    (re.compile(r"model\.((?:layers|norm|embed_tokens)\..+)"), r"model.language_model.\1"),
    (re.compile(r"(?:language_model\.)?(lm_head\.weight)"), r"\1"),
)
TOWER = re.compile(r"(?:model\.)?vision_tower\.(?:vision_tower\.)?(.+)")
LEFT_OUT = re.compile(r".*rotary_emb\.inv_freq$|(?:model\.)?image_newline$")


@dataclass
class LlavaReport:
    """What became of every key; print() it.

    Attributes:
        tower: of the tower's, see pyvidx.weights.place.Report.
        loaded: parameters of the rest.
        left_out: known keys that have no place.
        unexpected: keys that are not understood.
        assumed: parameters that no file holds and that have a known value all the same -> that value, in words.
    """

    tower: Report
    loaded: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    assumed: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = ["tower: " + str(self.tower), f"language model and projector: loaded {len(self.loaded)} parameters"]
        for name in ("unexpected", "left_out"):
            if keys := getattr(self, name):
                lines.append(f"{name} {len(keys)}: {', '.join(groups(keys))}")
        return "\n".join(lines + [f"assumed {name}: {value}" for name, value in self.assumed.items()])


def load(
    llava: str | Path,
    branch: Source,
    *,
    clip: Source | None = None,
    projector: Source | None = None,
    conversation: str = "video-chatgpt_v1",
    num_frames: int = 100,
    compat: str = "official",
    dtype: torch.dtype | None = None,
    device_map: Any = None,
    **sizes: Any,
) -> tuple[LlavaForConditionalGeneration, BTAdapterLlavaProcessor, LlavaReport]:
    """A chat model from published files. Nothing is downloaded, and nothing stays random.

    Args:
        llava: a folder of LLaVA in transformers' layout or the authors' (LLaVA-Lightning-7B-v1-1), or of a LLaMA or
            Vicuna, which has no projector; with its tokenizer.
        branch: BT-Adapter's file, tuned (sft_btadapter_weight.bin) or of pretraining.
        clip: the CLIP that the branch is beside: folder or file. Default what the branch's file holds, else LLaVA's.
        projector: mm_projector.bin, with the rows of the video's start and end token if it has them. Default LLaVA's.
        conversation: name of a template of pyvidx.hosts.templates.
        num_frames: that the processor takes of a video.
        compat: see BTAdapter. The default gives the numbers of the public code, for which the weights were made.
        dtype: default that of the language model's file.
        device_map: of from_pretrained.
        sizes: what the tower's weights do not tell, see pyvidx.weights.bt_adapter.load_official.

    Returns:
        the model in eval mode, its processor, and the report.

    Raises:
        FileNotFoundError, OSError: a file is not there, or the tokenizer.
        ValueError: a file cannot be read, a parameter is missing (named), a shape differs, or num_frames are more than
            the tower takes.
    """
    chosen = template(conversation)
    register()
    with naming([llava] if projector is None else [llava, projector]):
        state, tower_state, report = _renamed(state_of(llava))
        tokenizer = AutoTokenizer.from_pretrained(llava, **LOCAL)
        tokenizer.padding_side = "left"  # answers of a batch begin together
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token
        text_config, vision_config = _configs(Path(llava))
        rows = None if projector is None else _projector(state, projector, report)
        _need(state, (EMBED, f"{PROJECTOR}.linear_1.weight"))
        _add_tokens(state, tokenizer, rows, report)
        text_config.vocab_size = len(state[EMBED])
        single = f"{PROJECTOR}.linear_2.weight" not in state
    if clip is None and tower_state and "tower.class_token" not in rename(state_of(branch)).weights:
        clip = tower_state
        if vision_config is not None:
            told = told_by_config(vision_config.to_dict())
            sizes = {"heads": told.heads, "hidden_act": told.hidden_act} | sizes
    vision = [branch] if clip is None else [clip, branch]
    encoder, report.tower = load_official(*vision, part="tokens", compat=compat, **sizes)
    if not 2 <= num_frames <= 2 * encoder.config.time_length:
        raise ValueError(f"llava: num_frames must be from 2 to {2 * encoder.config.time_length}, got {num_frames}")
    config = LlavaConfig(
        vision_config=BTAdapterVisionConfig.of(encoder),
        text_config=text_config,
        image_token_index=tokenizer.convert_tokens_to_ids(PATCH),
        image_seq_length=1 + encoder.config.vision.patches,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
        projector_hidden_act="linear" if single else "gelu",
        tie_word_embeddings=text_config.tie_word_embeddings,
    )
    if single:  # transformers has two maps and a function between them: here the second is the identity
        like = state[f"{PROJECTOR}.linear_1.weight"]
        state[f"{PROJECTOR}.linear_2.weight"] = torch.eye(len(like), dtype=like.dtype)
        state[f"{PROJECTOR}.linear_2.bias"] = like.new_zeros(len(like))
        report.assumed[f"{PROJECTOR}.linear_2"] = "the identity, as the projector is one linear map"
    state |= {f"model.vision_tower.encoder.{name}": value for name, value in encoder.state_dict().items()}
    _check(config, state, report)
    model = LlavaForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype or state[EMBED].dtype, device_map=device_map
    )
    model.generation_config = _generation(tokenizer)
    size = {"height": encoder.config.vision.image_size, "width": encoder.config.vision.image_size}
    processor = BTAdapterLlavaProcessor(
        BTAdapterVideoProcessor(size=size, num_frames=num_frames),
        tokenizer,
        chat_template=chosen.jinja(),
        patch_size=encoder.config.vision.patch_size,
    )
    return model.eval(), processor, report


def _renamed(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], LlavaReport]:
    """LLaVA's weights under transformers' names, those of its tower under CLIP's, and a report of the others."""
    found, tower, report = {}, {}, LlavaReport(Report())
    for key, value in state.items():
        if match := TOWER.fullmatch(key):
            tower[match[1]] = value
        elif LEFT_OUT.fullmatch(key):
            report.left_out.append(key)
        elif (name := _name(key)) is None:
            report.unexpected.append(key)
        elif name in found:
            raise ValueError(f"llava: {key} and another key both mean {name}")
        else:
            found[name] = value
    return found, tower, report


def _name(key: str) -> str | None:
    for pattern, new in NAMES:
        if pattern.fullmatch(key):
            return pattern.sub(new, key)
    return None


def _configs(folder: Path) -> tuple[PreTrainedConfig, PreTrainedConfig | None]:
    """The configurations of language model and tower; the authors' LLaVA has the first in one with its own and says
    nothing of the second."""
    values = read_json(folder / "config.json", dict)
    if "text_config" in values:
        config = AutoConfig.from_pretrained(folder, **LOCAL)
        return config.text_config, config.vision_config
    if values.get("model_type") not in ("llama", "llava", "VideoChatGPT"):
        raise ValueError(
            f"llava: the language model must be a LLaMA, a Vicuna or a LLaVA, got {values.get('model_type')!r}"
        )
    own = {k: v for k, v in values.items() if not k.startswith("mm_") and k not in ("model_type", "architectures")}
    return LlamaConfig.from_dict(own), None


def _projector(state: dict[str, Tensor], source: Source, report: LlavaReport) -> Tensor | None:
    """Put the projector of a file in the place of the one there may be; the rows of tokens beside it, if any."""
    found, _, other = _renamed(state_of(source))
    report.unexpected += other.unexpected
    rows = found.pop(EMBED, None)
    _need(found, (f"{PROJECTOR}.linear_1.weight", f"{PROJECTOR}.linear_1.bias"))
    for name in [name for name in state if name.startswith(PROJECTOR)]:
        del state[name]
    state.update(found)
    return rows


def _add_tokens(state: dict[str, Tensor], tokenizer: Any, rows: Tensor | None, report: LlavaReport) -> None:
    """Give the tokenizer the three tokens of a video, and the tables their rows.

    rows: [2, C] of start and end token, or the whole table, as in the published files.
    """
    known = len(tokenizer)
    added = [token for token in (PATCH, START, END) if token not in tokenizer.get_vocab()]
    for token in added:  # one by one: the order of their numbers is that of the public code
        tokenizer.add_tokens([token], special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids([PATCH, START, END])
    for name in (EMBED, HEAD):
        if name not in state:  # tied
            continue
        table = state[name]
        mean = table[:known].float().mean(dim=0).to(table.dtype)
        table = torch.cat([table, mean.expand(max(0, len(tokenizer) - len(table)), -1)])
        table[tokenizer.convert_tokens_to_ids(added)] = mean
        state[name] = table
        if added:
            report.assumed[name] = (
                f"for {', '.join(added)} the mean of the others, as at the start of the public tuning"
            )
    if rows is None:
        return
    if rows.shape == (2, state[EMBED].shape[1]):
        state[EMBED][ids[1:]] = rows.to(state[EMBED].dtype)
    elif rows.shape[1:] == state[EMBED].shape[1:] and len(rows) >= max(ids) + 1 and len(rows) <= len(state[EMBED]):
        state[EMBED][: len(rows)] = rows.to(state[EMBED].dtype)
    else:
        raise ValueError(
            f"llava: embed_tokens.weight beside the projector must be the two rows of {START} and {END}, or all "
            f"{len(state[EMBED])} x {state[EMBED].shape[1]}, got {tuple(rows.shape)}"
        )
    report.assumed.pop(EMBED, None)


def _need(state: Mapping[str, Tensor], names: Sequence[str]) -> None:
    if absent := [name for name in names if name not in state]:
        raise MissingWeights(
            f"llava: there is no {', '.join(absent)}; a LLaMA or Vicuna needs projector=; the keys are "
            f"{', '.join(groups(state)) or 'none'}"
        )


def _check(config: LlavaConfig, state: dict[str, Tensor], report: LlavaReport) -> None:
    """Every parameter has its weight, of its shape."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration._from_config(config)
    own = model.state_dict().keys()
    tied = {HEAD} if config.tie_word_embeddings else set()
    if missing := sorted(own - state.keys() - tied):
        raise MissingWeights(f"llava: nothing fills {len(missing)} parameters: {', '.join(groups(missing))}")
    if wrong := different(model, state):
        raise ValueError(f"llava: shapes differ: {wrong}")
    check_plain(state, {})
    report.unexpected += sorted(state.keys() - own)
    for name in state.keys() - own:
        del state[name]
    report.loaded = sorted(name for name in state if not name.startswith("model.vision_tower."))


def _generation(tokenizer: Any) -> GenerationConfig:
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    ids["pad_token_id"] = ids["eos_token_id"] if ids["pad_token_id"] is None else ids["pad_token_id"]
    return GenerationConfig(**GENERATION, **ids)
