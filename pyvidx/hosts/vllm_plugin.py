"""What pyvidx adds to vLLM, by the entry point "pyvidx" of the group vllm.general_plugins.

vLLM prunes the tokens of Qwen2.5-VL by "evs" alone, and its list of methods is closed. So there is one more model:

    vllm.LLM(folder, hf_overrides={"architectures": ["PyvidxQwen2_5_VLForConditionalGeneration"]},
             video_pruning_rate=0.75, video_pruning_method="vidcom2")

Nothing that vLLM has is replaced, and pyvidx.hosts.vllm_models is imported only when that name is asked for. For videos
that were merged before they are served, no plug-in is needed: pyvidx.hosts.serving.
"""

ARCHITECTURE = "PyvidxQwen2_5_VLForConditionalGeneration"


def register() -> None:
    """Make the model known. vLLM calls this in each of its processes, maybe more than once."""
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "pyvidx.hosts.vllm_models:PyvidxQwen2_5_VLForConditionalGeneration")
