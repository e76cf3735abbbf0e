"""BT-Adapter on CLIP as a vision tower of transformers: what LLaVA's projector reads is a video's tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from pyvidx.backbones.vit import ViTConfig
from pyvidx.models import BTAdapter, BTAdapterConfig
from pyvidx.temporal.branch import fused_tokens
from pyvidx.temporal.bt_adapter import split_rows

MODEL_TYPE = "pyvidx_bt_adapter_vision"
GATE = "encoder.temporal.branch.gate"  # 0.5 in every channel where no file holds it, as in the public chat tower


@strict
class BTAdapterVisionConfig(PreTrainedConfig):
    """Sizes of CLIP, under transformers' names for them, and of the branch.

    No subclass of CLIPVisionConfig: serving engines take such a one for a plain CLIP and leave the branch out.

    Attributes:
        branch_depth: d, branch layers of the whole BT-Adapter; a tower has d - 1, as it ends before the last layer.
        time_length: rows of the time table. Longer clips, up to twice that, are averaged in pairs of frames.
        gated, gate_scale: see BTAdapterConfig.
        compat: "official" or "paper", see pyvidx.models.BTAdapter.
    """

    model_type = MODEL_TYPE
    base_config_key = "vision_config"

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    branch_depth: int = 4
    branch_eps: float = 1e-5
    time_length: int = 64
    gated: bool = True
    gate_scale: float = 100.0
    compat: str = "official"

    @property
    def tokens(self) -> int:
        """Of a video: its patches, and the class token after them."""
        return (self.image_size // self.patch_size) ** 2 + 1

    def encoder_config(self) -> BTAdapterConfig:
        vision = ViTConfig(
            self.image_size,
            self.patch_size,
            self.hidden_size,
            self.num_attention_heads,
            self.num_hidden_layers,
            self.intermediate_size,
            hidden_act=self.hidden_act,
            eps=self.layer_norm_eps,
        )
        return BTAdapterConfig(
            vision,
            depth=self.branch_depth,
            time_length=self.time_length,
            gated=self.gated,
            gate_scale=self.gate_scale,
            branch_eps=self.branch_eps,
            part="tokens",
        )

    @classmethod
    def of(cls, encoder: BTAdapter) -> "BTAdapterVisionConfig":
        """The configuration of a tower that holds this encoder, of part "tokens".

        Raises:
            ValueError: there is something in it that a tower has no place for.
        """
        c, v = encoder.config, encoder.config.vision
        config = cls(
            hidden_size=v.width,
            intermediate_size=v.mlp_width,
            num_hidden_layers=v.layers,
            num_attention_heads=v.heads,
            image_size=v.image_size,
            patch_size=v.patch_size,
            hidden_act=v.hidden_act,
            layer_norm_eps=v.eps,
            branch_depth=c.depth,
            branch_eps=c.branch_eps,
            time_length=c.time_length,
            gated=c.gated,
            gate_scale=c.gate_scale,
            compat=encoder.compat,
        )
        if config.encoder_config() != c:
            raise ValueError(f'BTAdapterVisionConfig: the encoder must be of a CLIP and of part "tokens", got {c}')
        return config


class BTAdapterVisionModel(PreTrainedModel):
    """The tower. Frames of a clip go in together: [B, T, 3, h, w].

    Its parameters are those of pyvidx.models.BTAdapter(part="tokens"), under `encoder.`. A file that lacks one of them
    is an error: transformers alone would leave it random, with a warning.
    """

    config_class = BTAdapterVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("video",)
    _no_split_modules = ["BTAdapter"]
    # Attention is the tower's own, whatever the language model beside it is told to use.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: BTAdapterVisionConfig):
        super().__init__(config)
        self.encoder = BTAdapter(config.encoder_config(), compat=config.compat, variant="llava")
        self.encoder.tower.requires_grad_(True)  # nothing is frozen in a model of transformers until its user does it
        self._from_file = self.encoder.tower.position.is_meta  # from_pretrained builds without memory and then fills
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """pyvidx's modules start by themselves. What is asked for here while a file is read is not in that file."""
        if not self._from_file:
            return
        # What is on the meta device still is offloaded to a disk, not missing.
        here = {name: p for name, p in self.named_parameters() if not p.is_meta}
        missing = {name: p for name, p in here.items() if not getattr(p, "_is_hf_initialized", False)}
        if (gate := missing.pop(GATE, None)) is not None and not missing:
            torch.nn.init.zeros_(gate)
        if missing:
            names = ", ".join(sorted(missing)[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
            raise ValueError(
                f"BTAdapterVisionModel: the file must hold every parameter of the tower, it lacks {names}; published "
                "files of CLIP, LLaVA and BT-Adapter are joined by pyvidx.hosts.llava.load"
            )

    def forward(
        self,
        pixel_values: Tensor | Sequence[Tensor],
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Tokens of videos.

        Args:
            pixel_values: [B, T, 3, h, w] normalized, or B clips [T, 3, h, w] whose T differ.
            interpolate_pos_encoding: take frames of another size, with the position table resized.
            output_hidden_states: True for all states, or those of these indices (as LLaVA asks for them).
            return_dict: False for a tuple.

        Returns:
            last_hidden_state: [B, 1+P, C], patches first, class token last: time averages of backbone and branch.
            hidden_states: L + 1 of them, as of a CLIP of L layers: the embeddings, then the output of every layer,
            [B * T, 1+P, C] as long as there are only frames, and [B, 1+P, C] from the first branch layer on. Entry -2
            is last_hidden_state, which is what LLaVA reads; the last layer is not there, and its entry None. None also
            stands for entries that were not asked for.

        Raises:
            ValueError: the pixels or the number of frames do not fit, or a state is asked for that is not there.
        """
        ragged = isinstance(pixel_values, Sequence) and len(pixel_values) and all(map(torch.is_tensor, pixel_values))
        run = self._ragged if ragged else self._states
        states = run(pixel_values, output_hidden_states, interpolate_pos_encoding)
        hidden = None if output_hidden_states is None or output_hidden_states is False else states
        found = BaseModelOutputWithPooling(last_hidden_state=states[-2], hidden_states=hidden)
        return found.to_tuple() if return_dict is False else found

    def _ragged(self, clips: Sequence[Tensor], wanted: Any, interpolate: bool) -> tuple[Tensor | None, ...]:
        """Clips of one length at a time. States of frames are those of clip after clip."""
        shapes = [tuple(clip.shape) for clip in clips]
        found: list[tuple[Tensor | None, ...]] = [()] * len(clips)
        for shape in sorted({*shapes}):
            rows = [i for i, other in enumerate(shapes) if other == shape]
            states = self._states(torch.stack([clips[i] for i in rows]), wanted, interpolate)
            for k, i in enumerate(rows):
                found[i] = tuple(x if x is None else x.view(len(rows), -1, *x.shape[1:])[k] for x in states)
        return tuple(None if parts[0] is None else torch.cat(parts) for parts in zip(*found))

    def _states(self, pixels: Tensor, wanted: Any, interpolate: bool) -> tuple[Tensor | None, ...]:
        layers = self.config.num_hidden_layers
        if not isinstance(pixels, Tensor) or pixels.dim() != 5 or pixels.shape[2] != 3:
            shape = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
            raise ValueError(
                "BTAdapterVisionModel: pixel_values must be clips [B, T, 3, h, w], all frames of a video in one, "
                f"got {shape}; an image is a clip of one frame"
            )
        pixels = pixels.to(self.dtype)
        # The public code, in "official", takes any axis 1 of length 3 for channels; given channels first it is right.
        given = pixels.transpose(1, 2) if self.config.compat == "official" else pixels
        if wanted is not True:
            selected = [-2] if wanted is None or wanted is False else [wanted] if isinstance(wanted, int) else wanted
            if off := [i for i in selected if not -layers - 1 <= i < layers or i == -1]:
                raise ValueError(
                    f"BTAdapterVisionModel: hidden states are those of 0 to {layers - 1}, or -2 and less, as the tower "
                    f"ends before CLIP's last layer, got {off[0]}; LLaVA reads -2, its vision_feature_layer"
                )
            if all(i % (layers + 1) == layers - 1 for i in selected):
                tokens = self.encoder(given, interpolate=interpolate).tokens
                return (*(None,) * (layers - 1), tokens, None)
        states = self._all(pixels, interpolate)
        if wanted is True:
            return states
        kept = {i % (layers + 1) for i in selected} | {layers - 1}
        return tuple(x if i in kept else None for i, x in enumerate(states))

    def _all(self, pixels: Tensor, interpolate: bool) -> tuple[Tensor | None, ...]:
        """Every state there is."""
        tower, module = self.encoder.tower, self.encoder.temporal
        grid = tower.grid_of(pixels)
        group = module.grouping(pixels.shape[1], grid[0] * grid[1], device=pixels.device)
        x = tower.embed(pixels, interpolate=interpolate)
        states = (x, *tower.run(x, tower.layers))
        read = states[self.config.num_hidden_layers - self.config.branch_depth + 1 :]
        position = module.positions(tower, grid if interpolate else None)
        frames = [x.flatten(0, 1) for x in states[: len(states) - len(read)]]
        fused = []
        for x, rows in zip(read, module.branch.rows(read, position, group)):
            z, cls = split_rows(rows)
            fused.append(fused_tokens(x, group.patch_mean(z), cls))
        return (*frames, *fused, None)
