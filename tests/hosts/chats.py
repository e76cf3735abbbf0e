"""Processors for the tiny models of this folder, made offline: bytes as tokens, and transformers' own video processors.

PROCESSORS has a function for each host by its model_type; what it makes has the ids of tests.hosts.tiny.
"""

from tests.hosts.tiny import IMAGE  # isort: skip  (it mends torchvision, which transformers imports)

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.hosts.spelled import tokenizer as spelled

TEMPLATE = """{% for m in messages %}{{ m['role'] }}:{% for part in m['content'] %}
{%- if part['type'] == 'video' %}VIDEO{% elif part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}
{%- endfor %};{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""


def tokenizer(*special: str) -> PreTrainedTokenizerFast:
    """One token per byte; the special ones from IMAGE on."""
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {f"<{i}>": i for i in range(len(vocab), IMAGE)}
    plain = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<256>", eos_token="<257>")
    made.add_special_tokens({"additional_special_tokens": list(special)})
    return made


def template(video: str, image: str) -> str:
    return TEMPLATE.replace("VIDEO", video).replace("IMAGE", image)


def llava_onevision(**video):
    from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor

    size = {"height": 32, "width": 32}
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size),
        tokenizer("<image>", "<video>"),
        LlavaOnevisionVideoProcessor(**{"size": size} | video),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=template("<video>", "<image>"),
    )


def video_llava(**video):
    from transformers import VideoLlavaImageProcessor, VideoLlavaProcessor, VideoLlavaVideoProcessor

    size = {"size": {"height": 32, "width": 32}, "crop_size": {"height": 32, "width": 32}}
    return VideoLlavaProcessor(
        VideoLlavaImageProcessor(**size),
        VideoLlavaVideoProcessor(**size | video),
        tokenizer("<image>", "<video>"),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<video>", "<image>"),
    )


def _qwen(processor: str, video_processor: str, **video):
    import transformers

    patches = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    wide = {"shortest_edge": 64, "longest_edge": 2**24}  # frames stay as they are
    words = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    return getattr(transformers, processor)(
        transformers.Qwen2VLImageProcessor(**patches),
        tokenizer(*words),
        getattr(transformers, video_processor)(**patches | {"size": wide, "cap_pixels_per_frame": False} | video),
        chat_template=template(*(f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("video", "image"))),
    )


def qwen2_5_vl(**video):
    return _qwen("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor", **video)


def qwen3_vl(**video):
    return _qwen("Qwen3VLProcessor", "Qwen3VLVideoProcessor", **video)


def video_llama_3(**video):
    from transformers import VideoLlama3ImageProcessor, VideoLlama3Processor, VideoLlama3VideoProcessor

    size = {"shortest_edge": 64, "longest_edge": 2**24}
    patches = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 1, "size": size, "use_token_compression": False}
    return VideoLlama3Processor(
        VideoLlama3ImageProcessor(patch_size=4, merge_size=1, size=size),
        tokenizer("<|image_pad|>", "<|video_pad|>"),
        VideoLlama3VideoProcessor(**patches | video),
        chat_template=template("<|video_pad|>", "<|image_pad|>"),
    )


def llava_next_video(**video):
    from transformers import LlavaNextImageProcessor, LlavaNextVideoProcessor, LlavaNextVideoVideoProcessor

    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    return LlavaNextVideoProcessor(
        LlavaNextVideoVideoProcessor(**size | video),
        LlavaNextImageProcessor(**size),
        tokenizer("<image>", "<video>"),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<video>", "<image>"),
    )


def internvl(**video):
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    size = {"height": 32, "width": 32}
    named = dict(context_image_token="<IMG_CONTEXT>", video_token="<video>", start_image_token="<img>")
    return InternVLProcessor(
        GotOcr2ImageProcessor(size=size, max_patches=3),
        spelled("<IMG_CONTEXT>", "<video>", ["<img>", "</img>"], end_image_token="</img>", **named),
        InternVLVideoProcessor(**{"size": size} | video),
        image_seq_length=4,
        chat_template=template("<video>", "<IMG_CONTEXT>"),
    )


def smolvlm(**video):
    """It needs num2words."""
    from transformers import SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor

    sizes = dict(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    special = ["<fake_token_around_image>", "<global-img>", "<row_1_col_1>", "<row_1_col_2>"]
    return SmolVLMProcessor(
        SmolVLMImageProcessor(**sizes),
        spelled("<image>", "<video>", special),
        SmolVLMVideoProcessor(**sizes | video),
        image_seq_len=4,
        chat_template=template("<video>", "<image>"),
    )


def perception_lm(**video):
    from transformers import PerceptionLMImageProcessor, PerceptionLMProcessor, PerceptionLMVideoProcessor

    return PerceptionLMProcessor(
        PerceptionLMVideoProcessor(**{"size": {"height": 32, "width": 32}} | video),
        PerceptionLMImageProcessor(tile_size=32, max_num_tiles=2),
        spelled("<image>", "<video>", [], image_token="<image>", video_token="<video>"),
        patch_size=8,
        pooling_ratio=2,
        chat_template=template("<video>", "<image>"),
    )


PROCESSORS = {
    made.__name__: made
    for made in (
        llava_onevision, llava_next_video, video_llava, qwen2_5_vl, qwen3_vl, video_llama_3, internvl, smolvlm,
        perception_lm,
    )
}  # fmt: skip
