"""Tiny random hosts of transformers with tokenizers built offline, for tests.

python -m tests.tiny_hosts MODEL VIDEOS     writes a MiniGPT-4 with a BT-Adapter, and two videos
"""

import sys
from pathlib import Path

import torch
from torch import nn

from tests.torchvision_shim import mend_torchvision

WORDS = "what is the person doing ? color of cup running red stirring eggs and then blue".split()


def tokenizer(special=(), bos: bool = True, **options):
    """One token per word: <unk>, <s>, </s>, `special` and WORDS."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocab = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", *special, *WORDS])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, additional_special_tokens=list(special), **named | options
    )


def blip(kind: str = "instructblipvideo", language: str = "opt"):
    """An InstructBLIP(-Video) or BLIP-2, as pyvidx.hosts.instructblip.MODELS names them, with 8 query tokens."""
    mend_torchvision()
    import transformers

    config, build = {
        "instructblip": ("InstructBlipConfig", "InstructBlipForConditionalGeneration"),
        "instructblipvideo": ("InstructBlipVideoConfig", "InstructBlipVideoForConditionalGeneration"),
        "blip-2": ("Blip2Config", "Blip2ForConditionalGeneration"),
    }[kind]
    text = {
        "opt": dict(ffn_dim=64, num_hidden_layers=1, num_attention_heads=4, word_embed_proj_dim=32, hidden_size=32),
        "llama": dict(intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, hidden_size=32),
        "t5": dict(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=1),
    }[language]
    ids = {"video_token_id": 3, "video_token_index": 3} if kind == "instructblipvideo" else {"image_token_index": 3}
    torch.manual_seed(0)
    model = getattr(transformers, build)(
        getattr(transformers, config)(
            vision_config=dict(
                hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28,
                patch_size=14,
            ),
            qformer_config=dict(
                vocab_size=100, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64,
                max_position_embeddings=32, encoder_hidden_size=48,
            ),
            text_config=dict(model_type=language, vocab_size=64, pad_token_id=2, bos_token_id=1, eos_token_id=2) | text,
            num_query_tokens=8, **ids,
        )
    ).eval()  # fmt: skip
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model


def bt_adapter_llava():
    """A LLaVA with a BT-Adapter in its tower, and its processor, which takes 8 frames."""
    mend_torchvision()
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from pyvidx.hosts import llava
    from pyvidx.hosts.templates import template

    llava.register()
    tower = llava.BTAdapterVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, image_size=28, branch_depth=2,
        time_length=16,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=3,
        vision_feature_select_strategy="full",
        vision_feature_layer=-2,
    )
    model = LlavaForConditionalGeneration(config).eval()
    processor = llava.BTAdapterLlavaProcessor(
        llava.BTAdapterVideoProcessor(size={"height": 28, "width": 28}, num_frames=8),
        tokenizer(["<vid_patch>", "<vid_start>", "<vid_end>"]),
        chat_template=template("vicuna_v1_1").jinja(),
    )
    return model, processor


def save_minigpt4(folder: Path) -> None:
    """A MiniGPT-4 with a BT-Adapter, as `pyvidx ask` opens it; it takes 12 frames. It needs no torchvision."""
    from pyvidx.hosts import minigpt4
    from pyvidx.models.minigpt4 import MiniGPT4, MiniGPT4Config
    from tests.test_language import causal_lm

    minigpt4.Chat(MiniGPT4(MiniGPT4Config.tiny()), causal_lm(), tokenizer(), num_frames=12).save(folder)


def main(model: str, videos: str) -> None:
    from pyvidx.data import motion

    mend_torchvision()
    save_minigpt4(Path(model))
    scene = motion.Scene("horizontal", (("green", "cross"),), "black", forward=False, seed=7)
    Path(videos).mkdir(parents=True)
    motion.write_clip(Path(videos) / "left.mp4", scene)
    motion.write_clip(Path(videos) / "right.mp4", motion.opposite(scene))


if __name__ == "__main__":
    main(*sys.argv[1:])
