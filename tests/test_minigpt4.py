"""MiniGPT-4 with BT-Adapter: published layouts, against the branch of the EVA tower written out in plain torch."""

import dataclasses

import pytest
import torch
from torch import nn

from pyvidx.models.malmm_config import MALMMConfig
from pyvidx.models.minigpt4 import MiniGPT4, MiniGPT4Config
from pyvidx.reference.malmm import ReferenceMALMM
from pyvidx.reference.malmm_layers import EVAAttention, EVABlock
from pyvidx.weights.malmm_keys import export
from pyvidx.weights.minigpt4 import load_minigpt4
from tests.test_backbones import close, randomized
from tests.torchvision_shim import mend_torchvision

WIDTH, HEADS, LAYERS, DEPTH = 48, 4, 5, 3


class Published(nn.Module):
    """The parts under the names of the public files."""

    def __init__(self):
        super().__init__()
        config = MALMMConfig.tiny()
        vision = dataclasses.replace(config.vision, layers=LAYERS, norm_eps=1e-5)
        self.rest = ReferenceMALMM(dataclasses.replace(config, vision=vision))
        self.btadapter_S = nn.ModuleList(EVABlock(WIDTH, HEADS, 96, eps=1e-5) for _ in range(DEPTH))
        self.btadapter_T = nn.ModuleList(nn.Module() for _ in range(DEPTH))
        for layer in self.btadapter_T:
            layer.attn, layer.norm1 = EVAAttention(WIDTH, HEADS), nn.LayerNorm(WIDTH, eps=1e-6)
            layer.temporal_fc = nn.Linear(WIDTH, WIDTH)
        self.btadapter_cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.btadapter_position = nn.Embedding(64, WIDTH)
        self.llama_proj = nn.Linear(32, 24)

    def branch(self, j, x, cls, z):
        """Layer j on backbone tokens [B, T, 1+P, C]; class [B, C] and patches [B, T, P, C], None before layer 0."""
        B, T, N, C = x.shape
        if z is None:
            pos = self.rest.visual_encoder.pos_embed[0]
            cls = (x[:, :, 0].mean(1) + self.btadapter_cls[0] + pos[0]) / 2
            z = x[:, :, 1:] + pos[1:] + self.btadapter_position.weight[:T, None]
        else:
            cls, z = cls + x[:, :, 0].mean(1), z + x[:, :, 1:]
        t, s = self.btadapter_T[j], self.btadapter_S[j]
        over_time = z.transpose(1, 2).reshape(-1, T, C)
        z = z + t.temporal_fc(t.attn(t.norm1(over_time))).view(B, N - 1, T, C).transpose(1, 2)
        rows = torch.cat([cls[:, None, None].expand(B, T, 1, C), z], dim=2)
        a = s.attn(s.norm1(rows.flatten(0, 1))).view(rows.shape)
        cls, z = cls + a[:, :, 0].mean(1), z + a[:, :, 1:]
        return cls + s.mlp(s.norm2(cls)), z + s.mlp(s.norm2(z))

    def forward(self, pixels):
        trace, cls, z = {}, None, None
        self.rest.visual_encoder(pixels.flatten(0, 1), trace)
        for j in range(DEPTH - 1):  # up to the last block but one, which is the last of BLIP-2's tower
            x = trace[f"block{LAYERS - DEPTH + j}"].unflatten(0, pixels.shape[:2])
            cls, z = self.branch(j, x, cls, z)
        tokens = torch.cat([cls[:, None] + x[:, :, 0].mean(1)[:, None], z.mean(1) + x[:, :, 1:].mean(1)], dim=1) / 2
        rows, _ = self.rest._embed(None, None, len(pixels))
        for layer in self.rest.Qformer.bert.encoder.layer:
            rows = layer(rows, rows, self.rest.ln_vision(tokens), None, rows.shape[1])
        return self.llama_proj(rows)


def files(folder, theirs):
    """eva_vit_g, BLIP-2, BT-Adapter's pretraining of an EVA tower (branch alone) and MiniGPT-4, as published."""
    rest = theirs.rest.state_dict()
    eva = {k.removeprefix("visual_encoder."): v for k, v in rest.items() if k.startswith("visual_encoder.")}
    eva |= {"norm.weight": torch.zeros(WIDTH), "head.weight": torch.zeros(2, WIDTH)}
    torch.save(eva, folder / "eva_vit_g.pth")
    text = ("word_embeddings", "position_embeddings", ".intermediate.", ".layer.0.output.")
    blip = {k: v for k, v in rest.items() if k.startswith(("Qformer", "query_tokens", "ln_vision"))}
    blip = {k: v for k, v in blip.items() if not any(part in k for part in text)}
    torch.save({"model": blip | {"t5_proj.weight": torch.zeros(2)}}, folder / "blip2.pth")
    branch = {f"backbone.{k}": v for k, v in theirs.state_dict().items() if k.startswith("btadapter")}
    branch |= {"text_backbone.logit_scale": torch.zeros(())}
    torch.save({"meta": {"epoch": 1}, "state_dict": branch}, folder / "btadapter_eva.pth")
    projector = {f"llama_proj.{k}": v for k, v in theirs.llama_proj.state_dict().items()}
    torch.save({"model": projector, "optimizer": {"state": {}}, "epoch": 3}, folder / "minigpt4.pth")
    return [folder / name for name in ("eva_vit_g.pth", "blip2.pth", "btadapter_eva.pth", "minigpt4.pth")]


HEADS_TOLD = {"vision_heads": HEADS, "heads": 4}


@torch.no_grad()
def test_published_files(tmp_path):
    theirs = randomized(Published()).eval()
    sources = files(tmp_path, theirs)
    model, report = load_minigpt4(*sources, **HEADS_TOLD)
    assert not report.missing and not report.unexpected and not model.is_random
    for T in (1, 3, 8):
        pixels = torch.randn(2, T, 3, 42, 42)
        close(model(pixels), theirs(pixels))
    padded = torch.cat([pixels, torch.randn(2, 2, 3, 42, 42)], dim=1)
    mask = torch.arange(10).expand(2, -1) < 8
    close(model(padded, frame_mask=mask), model(pixels))
    model.save(tmp_path / "out")
    close(MiniGPT4.from_pretrained(tmp_path / "out")(pixels), model(pixels))
    close(model.fold()(pixels), model(pixels))
    whole = torch.load(sources[2]) | {}
    tower = {f"backbone.{k}": v for k, v in torch.load(sources[0]).items()}
    whole["state_dict"] |= tower  # the pretraining file with its tower in it
    again, _ = load_minigpt4(sources[1], whole["state_dict"], sources[3], **HEADS_TOLD)
    close(again(pixels), model(pixels))
    named = {name.replace("encoder.tower.", "vision."): value for name, value in model.state_dict().items()}
    named |= {f"vision.norm_post.{leaf}": named.pop(f"norm.{leaf}") for leaf in ("weight", "bias")}
    blip = export(named, "huggingface")  # a BLIP-2 of transformers, whose tower ends before the last block
    again, report = load_minigpt4(blip, *sources[2:], layers=LAYERS, **HEADS_TOLD)
    assert again.norm.eps == 1e-6 and not report.unexpected
    close(again(pixels), model(pixels))


def test_what_is_missing(tmp_path):
    sources = files(tmp_path, Published())
    with pytest.raises(ValueError, match="no sizes without projection.weight; .*there must be EVA-ViT-g"):
        load_minigpt4(*sources[:3], **HEADS_TOLD)
    branch = torch.load(sources[2])["state_dict"]
    cut = {k: v for k, v in branch.items() if "btadapter_T.1.attn.proj" not in k}
    with pytest.raises(ValueError, match=r"nothing fills 2 parameters: encoder.temporal.branch.temporal.\*.out"):
        load_minigpt4(*sources[:2], cut, sources[3], **HEADS_TOLD)
    with pytest.raises(ValueError, match="must hold a video, B > 0"):
        MiniGPT4.default()(torch.zeros(0, 2, 3, 42, 42))
    with pytest.raises(ValueError, match="the Q-Former without text"):
        dataclasses.replace(MiniGPT4Config.tiny(), qformer=MALMMConfig.tiny().qformer)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    mend_torchvision()
    transformers = pytest.importorskip("transformers", reason="pip install 'pyvidx[hosts]'")
    from pyvidx.hosts import minigpt4
    from tests.test_language import causal_lm, tokenizer

    folder = tmp_path_factory.mktemp("minigpt4")
    causal_lm().save_pretrained(folder / "vicuna")
    t = tokenizer()
    assert isinstance(t, transformers.PreTrainedTokenizerBase)
    t.save_pretrained(folder / "vicuna")
    sources = files(folder, Published())
    chat, report = minigpt4.load(*sources, language=folder / "vicuna", **HEADS_TOLD)
    chat.save(folder / "chat")
    return minigpt4, chat, minigpt4.open(folder / "chat"), folder


def test_places_and_texts(chats):
    """The public chat's text to the character, with 8 tokens of the video in its place."""
    _, chat, again, _ = chats
    frames = torch.randint(256, (70, 50, 60, 3), dtype=torch.uint8)
    seen, words = [], chat.tokenizer
    chat.tokenizer = lambda text, **options: (
        seen.append((text, options["add_special_tokens"])) or words(text, **options)
    )
    inputs = chat.inputs(frames, "what is the person doing ?")
    chat.tokenizer = words
    system = (
        "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to "
        "you. Please answer my questions."
    )
    assert seen == [(system + "###Human: <Img>", True), ("</Img> what is the person doing ?###Assistant: ", False)]
    first = len(words(seen[0][0])["input_ids"])
    rest = len(words(seen[1][0], add_special_tokens=False)["input_ids"])
    assert inputs["inputs_embeds"].shape == (1, first + 8 + rest, 24) and inputs["attention_mask"].all()
    taken = frames[chat.sampled(70)]
    assert len(taken) == 64
    assert torch.equal(
        chat.inputs(taken, "why ?", sample=False)["inputs_embeds"], chat.inputs(frames, "why ?")["inputs_embeds"]
    )
    from pyvidx.preprocess import preprocess

    with torch.no_grad():
        want = chat.model(preprocess(taken, chat.preset)[None])
    assert torch.equal(inputs["inputs_embeds"][:, first : first + 8], want)
    close(again.inputs(frames, "what is the person doing ?")["inputs_embeds"], inputs["inputs_embeds"])


def test_answers_end_where_they_should(chats):
    minigpt4, chat, again, folder = chats
    frames = torch.randint(256, (3, 50, 60, 3), dtype=torch.uint8)
    greedy = {"do_sample": False, "top_p": None, "temperature": None, "max_new_tokens": 6, "min_new_tokens": 1}
    told = chat.answer(frames, "color of cup ?", **greedy)
    assert told == again.answer(frames, "color of cup ?", **greedy)
    llama2 = minigpt4.Chat(chat.model, chat.causal_lm, chat.tokenizer, "minigpt4_llama2")
    assert llama2.template.prompt("why?").endswith("questions.<s>[INST] <Img><video></Img> why? [/INST] ")
    assert isinstance(llama2.answer(frames, "why ?", history=[("what ?", "cup")], **greedy), str)

    class Speaker:
        """Says a fixed text, word for word, as far as it is let."""

        def __init__(self, text):
            self.ids = torch.tensor([chat.tokenizer(text, add_special_tokens=False)["input_ids"]])

        def __getattr__(self, name):
            return getattr(chat.causal_lm, name)

        def generate(self, stopping_criteria, **options):
            for n in range(1, self.ids.shape[1] + 1):
                if all(bool(stop(self.ids[:, :n], None)) for stop in stopping_criteria):
                    break
            self.said = n
            return self.ids[:, :n]

    decode = chat.tokenizer.decode
    again.causal_lm = speaker = Speaker("red cup running eggs")
    again.tokenizer.decode = lambda ids, **options: decode(ids, **options).replace("running", "###Human")
    again.tokenizer.batch_decode = lambda rows: [again.tokenizer.decode(row) for row in rows]
    assert again.answer(frames, "color of cup ?") == "red cup" and speaker.said == 3
    with pytest.raises(ValueError, match="num_frames must be from 1 to 64"):
        minigpt4.Chat(chat.model, chat.causal_lm, chat.tokenizer, num_frames=65)
    with pytest.raises(ValueError, match="llm_width must be 24"):
        model = MiniGPT4(dataclasses.replace(MiniGPT4Config.tiny(), llm_width=8))
        minigpt4.Chat(model, chat.causal_lm, chat.tokenizer)
    with pytest.raises(ValueError, match="must return one sequence, got num_return_sequences=2"):
        chat.answer(frames, "why ?", num_beams=2, num_return_sequences=2)
    two = [lambda ids, scores, **_: torch.tensor([ids.shape[1] >= 2])]
    assert len(chat.answer(frames, "why ?", **greedy, stopping_criteria=two, return_dict_in_generate=True).split()) <= 2
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        minigpt4.load(*files(folder, Published()), language=folder / "none", **HEADS_TOLD)
    settings = (folder / "chat/config.json").read_text()
    (folder / "chat/config.json").write_text('{"model_type": "pyvidx_minigpt4", "num_frames": 3}')
    with pytest.raises(ValueError, match="must have conversation"):
        minigpt4.open(folder / "chat")
    (folder / "chat/config.json").write_text(settings)
    with pytest.raises(ValueError, match="must hold a pyvidx_minigpt4"):
        minigpt4.open(folder / "vicuna")
    with pytest.raises(ValueError, match="T > 0"):
        chat.inputs(frames[:0], "why ?")
    half = minigpt4.open(folder / "chat", dtype=torch.bfloat16)
    assert half.inputs(frames, "why ?")["inputs_embeds"].dtype == torch.bfloat16
