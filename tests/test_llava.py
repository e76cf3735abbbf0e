"""LLaVA with BT-Adapter in its tower: published files, tokens, prompts, round trips, compile and export."""

import json
from importlib.util import find_spec

import pytest
import torch

from pyvidx.hosts.templates import TEMPLATES, VIDEO
from pyvidx.preprocess import Preset, preprocess
from pyvidx.video import sampling
from pyvidx.weights.bt_adapter import load_official
from pyvidx.weights.projector import load_projector
from tests.test_published import chat_files, close, pretraining_file, vectors
from tests.torchvision_shim import mend_torchvision

mend_torchvision()
transformers = pytest.importorskip("transformers", reason="pip install 'pyvidx[hosts]'")
pytest.importorskip("torchvision", reason="pip install 'pyvidx[hosts]'")

from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoVideoProcessor,
)
from transformers import LlavaForConditionalGeneration as Llava  # noqa: E402

from pyvidx.hosts import llava  # noqa: E402

WORDS = "what is the person doing ? USER: ASSISTANT: a chat between running red".split()
SIZES = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 4, "bos_token_id": 1, "eos_token_id": 2}


def tokenizer():
    """Words, as a Vicuna's begins: a bos of its own, no padding token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocab = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocab | {f"w{i}": i for i in range(len(vocab), 64)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def authors_folder(folder, **changes):
    """LLaVA-Lightning as its authors save it: a LLaMA with LLaVA's settings among its own, and no tower."""
    lm = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).half()
    state = lm.state_dict() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(6)}
    folder.mkdir()
    torch.save(state | changes, folder / "pytorch_model.bin")
    config = {**SIZES, "model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "mm_hidden_size": 32}
    (folder / "config.json").write_text(json.dumps({**config, "mm_vision_tower": "openai/clip-vit-large-patch14"}))
    tokenizer().save_pretrained(folder)
    return state


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The authors' four files, and a folder of what they became."""
    folder = tmp_path_factory.mktemp("llava")
    file = vectors("bt_adapter/llava_sft")
    linear = chat_files(folder, file)
    table = authors_folder(folder / "lightning")["model.embed_tokens.weight"]
    rows = torch.cat([table.float(), torch.randn(3, 48)])  # with those of <vid_patch>, <vid_start>, <vid_end>
    torch.save(linear | {"model.embed_tokens.weight": rows}, folder / "sft_mm_projector.bin")
    model, processor, report = llava.load(
        folder / "lightning",
        folder / "sft_btadapter_weight.bin",
        clip=folder / "clip-vit-large-patch14",
        projector=folder / "sft_mm_projector.bin",
        dtype=torch.float32,
    )
    model.save_pretrained(folder / "chat")
    processor.save_pretrained(folder / "chat")
    return folder, file, rows, model, processor, report


def test_tokens_of_the_public_code(published):
    """hidden_states[-2] of the public tower through transformers' projector, 8 frames and 100."""
    folder, file, rows, model, _, report = published
    projector = load_projector(folder / "sft_mm_projector.bin")
    tower, _ = load_official(folder / "clip-vit-large-patch14", folder / "sft_btadapter_weight.bin", part="tokens")
    for frames in ("8", "100"):
        pixels, want = file.tensors[f"pixels_{frames}"], file.tensors[f"tokens_{frames}"]
        out = model.model.vision_tower(pixels, output_hidden_states=-2)
        close(out.hidden_states[-2], want)
        torch.testing.assert_close(out.last_hidden_state, tower(pixels).tokens, rtol=0, atol=1e-5)
        features = model.get_image_features(pixels, return_dict=True).pooler_output
        assert len(features) == 1
        close(features[0], projector(want)[0])
    assert not report.unexpected and not report.tower.unexpected and report.left_out
    assert {*report.assumed} == {"lm_head.weight", "model.multi_modal_projector.linear_2"}
    torch.testing.assert_close(model.get_input_embeddings().weight, rows, rtol=0, atol=1e-3)  # through float16
    assert "temporal.branch.gate" in report.tower.assumed and "assumed lm_head" in str(report)


def test_every_state(published):
    """States of frames, then of videos, against the public tower's own; the last is None."""
    file = vectors("bt_adapter/llava_infer")
    encoder, _ = load_official(file.part("weights."), part="tokens", heads=4)
    model = llava.BTAdapterVisionModel(llava.BTAdapterVisionConfig.of(encoder))
    model.encoder.load_state_dict(encoder.state_dict())
    pixels = file.tensors["in.T4.pixels"][None]
    states = model(pixels, output_hidden_states=True).hidden_states
    layers = model.config.num_hidden_layers
    assert len(states) == layers + 1 and states[-1] is None
    for i in range(layers):
        close(states[i], file.tensors[f"out.T4.hidden.{i}"])
    some = model(pixels, output_hidden_states=[1, -3]).hidden_states
    assert [x is not None for x in some] == [i in (1, layers - 2, layers - 1) for i in range(layers + 1)]
    torch.testing.assert_close(some[1], states[1])
    ragged = model([pixels[0], pixels[0, :2]], output_hidden_states=True).hidden_states
    alone = model(pixels[:1, :2], output_hidden_states=True).hidden_states
    for got, a, b in zip(ragged[:-1], states, alone):
        torch.testing.assert_close(got, torch.cat([a[: len(a) // len(pixels)], b]))
    three = torch.randn(2, 3, 3, 16, 16)  # the public code takes the frames of such a clip for channels
    got, states = model(three).last_hidden_state, model(three, output_hidden_states=True).hidden_states
    torch.testing.assert_close(got, states[-2], rtol=0, atol=1e-5)


def test_folder(published):
    """save_pretrained, then from_pretrained by the Auto classes' names; dtype and device_map are kept."""
    folder, file, _, model, processor, _ = published
    llava.register(), llava.register()
    chat = llava.open(folder / "chat", device="cpu")
    pixels = file.tensors["pixels_8"]
    want = model.get_image_features(pixels, return_dict=True).pooler_output[0]
    close(chat.model.get_image_features(pixels, return_dict=True).pooler_output[0], want)
    for name, value in model.state_dict().items():
        assert torch.equal(chat.model.state_dict()[name], value), name
    assert isinstance(AutoVideoProcessor.from_pretrained(folder / "chat"), llava.BTAdapterVideoProcessor)
    assert AutoProcessor.from_pretrained(folder / "chat").chat_template == processor.chat_template
    config = AutoConfig.from_pretrained(folder / "chat").vision_config
    assert config.to_dict() == model.config.vision_config.to_dict()
    assert isinstance(AutoModel.from_config(config), llava.BTAdapterVisionModel)
    model.model.vision_tower.save_pretrained(folder / "tower")
    alone = AutoModel.from_pretrained(folder / "tower")
    assert isinstance(alone, llava.BTAdapterVisionModel) and all(p.requires_grad for p in alone.parameters())
    close(alone(pixels).last_hidden_state, model.model.vision_tower(pixels).last_hidden_state)
    half = AutoModelForImageTextToText.from_pretrained(folder / "chat", dtype=torch.bfloat16)
    assert isinstance(half, Llava)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.get_image_features(pixels, return_dict=True).pooler_output[0].dtype == torch.bfloat16
    if find_spec("accelerate"):
        places = {"model.vision_tower": "disk", "model.multi_modal_projector": "cpu", "model.language_model": "cpu"}
        places |= {"lm_head": "cpu"}
        mapped = Llava.from_pretrained(folder / "chat", device_map=places, offload_folder=folder / "offload")
        assert mapped.hf_device_map == places
        with torch.no_grad():
            close(mapped.get_image_features(pixels, return_dict=True).pooler_output[0], want)


def messages(question):
    return [{"role": "user", "content": [{"type": "text", "text": question}, {"type": "video"}]}]


def test_prompt_and_places(published):
    """The public evaluation's text to the character, and one place for each of the video's tokens."""
    _, _, _, model, processor, _ = published
    question = "what is the person doing ?"
    text = processor.apply_chat_template(messages(question), add_generation_prompt=True, tokenize=False)
    assert text == (
        "You are Video-ChatGPT, a large vision-language assistant. You are able to understand the video content that "
        "the user provides, and assist the user with a variety of tasks using natural language.Follow the instructions "
        "carefully and explain your answers in detail based on the provided video. USER: what is the person doing ?\n"
        "<video> ASSISTANT:"
    )
    frames = torch.randint(256, (9, 3, 40, 60), dtype=torch.uint8)
    inputs = processor(text=text, videos=[frames], return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    patch, start, end = processor.tokenizer.convert_tokens_to_ids(["<vid_patch>", "<vid_start>", "<vid_end>"])
    assert (patch, start, end) == (64, 65, 66) and model.config.image_token_id == patch
    first = ids.index(start)
    assert ids[first : first + 19] == [start, *[patch] * 17, end] and ids.count(patch) == 17
    assert ids[0] == 1 and processor.tokenizer.decode(ids[first + 19 :]) == "ASSISTANT:"
    taken = frames.permute(0, 2, 3, 1)[sampling.sample("midpoint", 9, 8)]
    want = preprocess(taken, Preset(28, "squash", None, "nearest"))
    torch.testing.assert_close(inputs["pixel_values"][0], want, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="<video>"):
        processor(text=text.replace("<video>", ""), videos=[frames])


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_of_jinja(name):
    """A text and its Jinja are the same, with a history and without, asked and answered."""
    t = tokenizer()
    t.chat_template = TEMPLATES[name].jinja()
    turns = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": 'who "is"\n it?'}]}]
    turns += [{"role": "assistant", "content": "a man"}, {"role": "user", "content": "why?"}]
    for n, history, last in ((1, [], 'who "is"\n it?'), (3, [('who "is"\n it?', "a man")], "why?")):
        found = t.apply_chat_template(turns[:n], add_generation_prompt=True, tokenize=False)
        assert found == TEMPLATES[name].prompt(last, history) and found.count(VIDEO) == 1
    answered = [*turns, {"role": "assistant", "content": "he ran"}]
    want = TEMPLATES[name].prompt("why?", [('who "is"\n it?', "a man")], answer="he ran")
    assert t.apply_chat_template(answered, tokenize=False) == want
    for wrong in ((VIDEO, None), ("who?", VIDEO)):
        with pytest.raises(ValueError, match="no text may hold <video>"):
            TEMPLATES[name].prompt(wrong[0], answer=wrong[1])
    for wrong in ([{"role": "tool", "content": ""}], [{"role": "user", "content": [{"type": "image"}]}]):
        with pytest.raises(Exception, match="must be"):
            t.apply_chat_template(wrong, tokenize=False)


def test_answers(published):
    """Any number of frames; videos of unequal lengths in one batch are as alone; beams; the sum is the parts'."""
    folder, _, _, model, processor, _ = published
    chat = llava.open(folder / "chat")
    assert chat.model.generation_config.temperature == 0.2 and chat.model.generation_config.max_new_tokens == 1024
    greedy = {"do_sample": False, "max_new_tokens": 4, "temperature": None}
    for T in (1, 2, 7, 131):
        frames = torch.randint(256, (T, 30, 40, 3), dtype=torch.uint8)
        inputs = chat.inputs(frames, "what is a person ?")
        assert inputs["pixel_values"].shape == (1, {1: 2, 2: 2, 7: 6, 131: 100}[T], 3, 28, 28)
        assert isinstance(chat.answer(frames, "what is a person ?", **greedy), str)
        taken = chat.inputs(frames[chat.sampled(T)], "what is a person ?", sample=False)
        assert torch.equal(taken["pixel_values"], inputs["pixel_values"])
    videos = [torch.randint(256, (T, 3, 30, 40), dtype=torch.uint8) for T in (4, 9, 4)]
    text = processor.apply_chat_template(messages("running ?"), add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text] * 3, videos=videos, return_tensors="pt")
    assert [len(clip) for clip in inputs["pixel_values"]] == [4, 8, 4]
    moved = processor(text=[text] * 3, videos=videos, return_tensors="pt").to("cpu", torch.bfloat16)
    assert {clip.dtype for clip in moved["pixel_values"]} == {torch.bfloat16} and not moved[
        "input_ids"
    ].is_floating_point()
    with torch.no_grad():
        logits = model(**inputs).logits
        for i, video in enumerate(videos):
            alone = processor(text=text, videos=[video], return_tensors="pt")
            torch.testing.assert_close(logits[i], model(**alone).logits[0], rtol=1e-4, atol=1e-4)
    unequal = [text, text.replace("running ?", "what is the person doing ?")]
    padded = processor(text=unequal, videos=videos[:2], return_tensors="pt", padding=True)
    assert padded["attention_mask"].sum(1).diff().item() == 4 and not padded["attention_mask"][0, 0]
    both = model.generate(**padded, **greedy)[:, -4:]
    assert torch.equal(
        both[0], model.generate(**processor(text=text, videos=videos[:1], return_tensors="pt"), **greedy)[0, -4:]
    )
    together = model.generate(**inputs, **greedy)
    assert len(together) == 3
    if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 20):  # before, beams took no list of clips
        assert len(model.generate(**inputs, **greedy, num_beams=2)) == 3
    told = chat.inputs(frames, "and ?", history=[("what ?", "running")])["input_ids"][0]
    assert "ASSISTANT: running" in processor.tokenizer.decode(told)


def test_paths(published, tmp_path):
    """A file is read by pyvidx.video, the sampled frames only."""
    from pyvidx import video

    pytest.importorskip("av", reason="pip install 'pyvidx[video]'")
    processor = published[4]
    frames = torch.randint(256, (7, 32, 48, 3), dtype=torch.uint8)
    path = str(tmp_path / "clip.mp4")
    video.write(path, frames, fps=7)
    found = processor.video_processor(path, return_metadata=True)
    whole = video.read(path, 7, "arange").frames.permute(0, 3, 1, 2)
    want = processor.video_processor(whole)["pixel_values"]
    assert torch.equal(found["pixel_values"], want) and found["video_metadata"][0].total_num_frames == 7
    assert processor.video_processor(path, do_sample_frames=False)["pixel_values"].shape[1] == 7
    told = [{"role": "user", "content": [{"type": "video", "path": path}, {"type": "text", "text": "what is ?"}]}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    assert torch.equal(processor.apply_chat_template(told, **options)["pixel_values"], want)


def test_nothing_stays_random(published, tmp_path):
    """A file without some of the tower is an error that names it, by whichever door."""
    folder, file, _, model, _, _ = published
    parts = dict(clip=folder / "clip-vit-large-patch14", projector=folder / "sft_mm_projector.bin")
    sft = file.part("sft.")
    with pytest.raises(ValueError, match="temporal.branch.spatial"):
        llava.load(folder / "lightning", {k: v for k, v in sft.items() if "S_layers.1" not in k}, **parts)
    with pytest.raises(ValueError, match="multi_modal_projector.linear_1.weight; .*needs projector="):
        llava.load(folder / "lightning", sft, clip=parts["clip"])
    with pytest.raises(ValueError, match="a branch alone: give its CLIP"):
        llava.load(folder / "lightning", sft, projector=parts["projector"])
    authors_folder(tmp_path / "cut")
    state = torch.load(tmp_path / "cut/pytorch_model.bin")
    torch.save({k: v for k, v in state.items() if "layers.1.mlp" not in k}, tmp_path / "cut/pytorch_model.bin")
    with pytest.raises(ValueError, match=r"nothing fills 3 parameters.*layers.\*.mlp"):
        llava.load(tmp_path / "cut", sft, **parts)

    state = {k: v for k, v in model.state_dict().items() if "spatial.0.fc1" not in k}
    with pytest.raises(ValueError, match="it lacks encoder.temporal.branch.spatial.0.fc1.bias"):
        Llava.from_pretrained(None, config=model.config, state_dict=state)
    clip = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_attention_heads=2)
    )
    clip.save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="it lacks .*pyvidx.hosts.llava.load"):
        llava.BTAdapterVisionModel.from_pretrained(tmp_path / "clip", config=model.config.vision_config)
    gateless = {k: v for k, v in model.state_dict().items() if not k.endswith("branch.gate")}
    again = Llava.from_pretrained(None, config=model.config, state_dict=gateless)
    assert not again.model.vision_tower.encoder.temporal.branch.gate.any()


def test_pretraining_file_and_layout_of_transformers(tmp_path):
    """The branch and its CLIP in one file, beside a LLaVA of transformers with its two-layer projector and a tower that
    is not asked; old names and new."""
    file = vectors("bt_adapter/llava_infer")
    branch = pretraining_file(tmp_path / "pretrain_btadapter_weight.pth", file.part("weights."))
    vision = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=16, patch_size=4),
        text_config=transformers.LlamaConfig(**SIZES),
    )
    theirs = Llava(config)
    theirs.save_pretrained(tmp_path / "hf")
    tokenizer().save_pretrained(tmp_path / "hf")
    model, _, report = llava.load(tmp_path / "hf", branch, heads=4)
    pixels = file.tensors["in.T8.pixels"][None]
    want = theirs.model.multi_modal_projector(file.tensors["out.T8.llm_tokens"])[0]
    close(model.get_image_features(pixels, return_dict=True).pooler_output[0], want)
    assert not report.unexpected and model.config.projector_hidden_act == "gelu"
    for name, value in theirs.model.language_model.state_dict().items():
        if name != "embed_tokens.weight":
            assert torch.equal(model.model.language_model.state_dict()[name], value), name
    state = theirs.state_dict()
    old = {k.replace("model.language_model.", "language_model.model."): v for k, v in state.items()}
    old = {k.replace("model.vision_tower.", "vision_tower.vision_model."): v for k, v in old.items()}
    old = {k.replace("model.multi_modal", "multi_modal"): v for k, v in old.items()}
    old["language_model.lm_head.weight"] = old.pop("lm_head.weight")
    (tmp_path / "hf/model.safetensors").unlink()
    torch.save(old, tmp_path / "hf/pytorch_model.bin")
    again, _, _ = llava.load(tmp_path / "hf", branch, heads=4)
    assert all(torch.equal(again.state_dict()[k], v) for k, v in model.state_dict().items())


def test_branch_beside_llavas_own_tower(tmp_path):
    """A tuned branch on the CLIP that a LLaVA of transformers brings, with what its config says about it."""
    file = vectors("bt_adapter/llava_sft")
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=2)
    theirs = Llava(
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**vision, image_size=28, patch_size=7),
            text_config=transformers.LlamaConfig(**SIZES),
        )
    )
    clip = {k.removeprefix("vision_model."): v for k, v in file.part("clip.").items() if k.startswith("vision_model.")}
    theirs.model.vision_tower.load_state_dict(clip)
    theirs.bfloat16().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model, _, report = llava.load(tmp_path, file.part("sft."), dtype=torch.float32)
    got = model.model.vision_tower(file.tensors["pixels_8"]).last_hidden_state
    told = {"part": "tokens", "heads": 2, "hidden_act": "quick_gelu"}
    want, _ = load_official({k: v.bfloat16() for k, v in clip.items()}, file.part("sft."), **told)
    close(got, want(file.tensors["pixels_8"]).tokens)
    assert not report.unexpected and llava.load(tmp_path, file.part("sft."))[0].dtype == torch.bfloat16


@torch.no_grad()
def test_compile_and_export():
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
    config = llava.BTAdapterVisionConfig(**sizes, image_size=28, patch_size=14, branch_depth=2)
    tower, pixels = llava.BTAdapterVisionModel(config).eval(), torch.randn(2, 4, 3, 28, 28)
    want = tower(pixels).last_hidden_state
    states = torch.compile(lambda x: tower(x, output_hidden_states=-2).hidden_states, fullgraph=True, backend="eager")
    torch.testing.assert_close(states(pixels)[-2], want, rtol=0, atol=1e-5)
    exported = torch.export.export(tower, (pixels,))
    torch.testing.assert_close(exported.module()(pixels).last_hidden_state, want, rtol=0, atol=1e-5)


def test_errors(published, tmp_path):
    model, processor = published[3], published[4]
    for shape in ((8, 3, 28, 28), (1, 8, 4, 28, 28), (1, 8, 28, 28, 3)):
        with pytest.raises(ValueError, match=r"must be clips \[B, T, 3, h, w\]"):
            model.model.vision_tower(torch.randn(shape))
    for wrong in ([], [1.0], [torch.randn(8, 3, 28, 28), torch.randn(8, 4, 28, 28)]):
        with pytest.raises(ValueError, match=r"must be clips \[B, T, 3, h, w\]"):
            model.model.vision_tower(wrong)
    for wrong in (-1, [2, 99], 6):
        with pytest.raises(ValueError, match="hidden states are those of 0 to 5"):
            model.model.vision_tower(torch.randn(1, 4, 3, 28, 28), output_hidden_states=wrong)
    with pytest.raises(ValueError, match="T must be in"):
        model.model.vision_tower(torch.randn(1, 1, 3, 28, 28))
    with pytest.raises(ValueError, match="video-chatgpt_v1, vicuna_v1_1"):
        llava.load("nowhere", {}, conversation="vicuna")
    with pytest.raises(FileNotFoundError):
        llava.load("nowhere", {})
    folder, sft = published[0], published[1].part("sft.")
    parts = dict(clip=folder / "clip-vit-large-patch14", projector=folder / "sft_mm_projector.bin")
    with pytest.raises(ValueError, match="num_frames must be from 2 to 128, got 200"):
        llava.load(folder / "lightning", sft, **parts, num_frames=200)
    rows = {**torch.load(parts["projector"]), "model.embed_tokens.weight": torch.zeros(3, 48)}
    with pytest.raises(ValueError, match="must be the two rows of <vid_start> and <vid_end>, or all 67 x 48"):
        llava.load(folder / "lightning", sft, clip=parts["clip"], projector=rows)
    with pytest.raises(ValueError, match="give num_frames, not fps"):
        processor.video_processor(torch.zeros(4, 3, 28, 28, dtype=torch.uint8), fps=2.0)
    chat = llava.Chat(model, processor)
    with pytest.raises(ValueError, match="Chat: frames"):
        chat.inputs(torch.zeros(0, 28, 28, 3, dtype=torch.uint8), "?")
    with pytest.raises(ValueError, match="<video>"):
        chat.inputs(torch.zeros(2, 28, 28, 3, dtype=torch.uint8), "what is <video>?")
    clip = torch.zeros(2, 28, 28, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="must not hold <vid_patch>"):
        chat.inputs(clip, "what is <vid_patch>?")
    with pytest.raises(ValueError, match="must return one sequence, got num_return_sequences=2"):
        chat.answer(clip, "?", num_beams=2, num_return_sequences=2)
    with pytest.raises(ValueError, match="media must be videos, got images"):
        processor(text="?", images=[clip[0]])
    with pytest.raises(ValueError, match="num_frames must be 2 or more, got 0"):
        processor.video_processor(clip.permute(0, 3, 1, 2), num_frames=0)
    published[3].config.text_config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must hold a LLaVA with BT-Adapter in its tower, got a llama"):
        llava.open(tmp_path)
    with pytest.raises(ValueError, match="<vid_patch>"):
        llava.BTAdapterLlavaProcessor(processor.video_processor, tokenizer())
