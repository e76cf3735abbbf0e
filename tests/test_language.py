"""MA-LMM into a causal language model: sequences, losses and answers, against what is written out here."""

import pytest
import torch
import torch.nn.functional as F

from pyvidx.models import MALMM, MALMMConfig
from tests.torchvision_shim import mend_torchvision

mend_torchvision()
transformers = pytest.importorskip("transformers", reason="pip install 'pyvidx[hosts]'")

from pyvidx.models.language import Language  # noqa: E402
from pyvidx.reference.malmm import ReferenceMALMM  # noqa: E402
from pyvidx.weights.malmm import export_malmm  # noqa: E402

WORDS = "what is the person doing ? color of cup running red stirring eggs and then blue".split()


def tokenizer(bos: bool = True):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocab = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def causal_lm(kind: str = "llama", seed: int = 0):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=24, n_layer=2, n_head=4, n_positions=128, **sizes)
    else:
        sizes |= {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4}
        config = (transformers.LlamaConfig if kind == "llama" else transformers.Qwen2Config)(**sizes)
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.fixture
def language():
    return Language(causal_lm(), tokenizer(), tokenizer(bos=False))


PROMPTS = ["what is the person doing ?", "color of the cup ?"]
ANSWERS = ["stirring eggs", "red"]


def cross_entropy(language, tokens, prompt, answer, q=None):
    """Summed over the answer and its eos, and how many those are, without any padding. q: the instruction's ids."""
    t = language.tokenizer
    q, a = q or t(prompt)["input_ids"], t(answer, add_special_tokens=False)["input_ids"] + [t.eos_token_id]
    embed = language.causal_lm.get_input_embeddings()
    x = torch.cat([tokens, embed(torch.tensor(q + a))])[None]
    logits = language.causal_lm(inputs_embeds=x).logits[0, -len(a) - 1 : -1]
    return F.cross_entropy(logits, torch.tensor(a), reduction="sum"), len(a)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_loss_counts_answers_alone(kind):
    language = Language(causal_lm(kind), tokenizer())
    tokens = torch.randn(2, 8, 24)
    sums, counts = zip(*(cross_entropy(language, *each) for each in zip(tokens, PROMPTS, ANSWERS)))
    torch.testing.assert_close(language.loss(tokens, PROMPTS, ANSWERS), sum(sums) / sum(counts))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_generate_is_the_likeliest_word_each_time(kind):
    language = Language(causal_lm(kind), tokenizer())
    tokens = torch.randn(2, 8, 24)
    found = language.generate(tokens, PROMPTS, num_beams=1, repetition_penalty=1.0, max_new_tokens=6, min_new_tokens=6)
    embed = language.causal_lm.get_input_embeddings()
    for visual, prompt, answer in zip(tokens, PROMPTS, found):
        ids = []
        for _ in range(6):
            x = torch.cat([visual, embed(torch.tensor(language.tokenizer(prompt)["input_ids"] + ids))])[None]
            logits = language.causal_lm(inputs_embeds=x).logits[0, -1]
            logits[language.tokenizer.eos_token_id] = -torch.inf  # as min_new_tokens does
            ids.append(int(logits.argmax()))
        assert answer == language.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_prompts_of_no_words():
    """Where the tokenizer puts no bos before them."""
    bare, tokens = Language(causal_lm("gpt2"), tokenizer(bos=False)), torch.randn(2, 8, 24)
    for prompts in (["", PROMPTS[0]], ["", ""]):
        with pytest.raises(ValueError, match="every text must have a token"):
            bare.generate(tokens, prompts)
    assert len(Language(causal_lm("gpt2"), tokenizer()).generate(tokens, ["", PROMPTS[0]], max_new_tokens=2)) == 2


def test_beams_and_the_callers_tokenizer(language):
    theirs = tokenizer()
    again = Language(language.causal_lm, theirs)
    assert theirs.pad_token is None and theirs.truncation_side == "right"
    beams = again.generate(torch.randn(2, 8, 24), PROMPTS, num_return_sequences=3, max_new_tokens=4)
    assert [len(b) for b in beams] == [3, 3] and all(isinstance(text, str) for b in beams for text in b)
    assert again.question_ids(PROMPTS) == (None, None)


def test_long_prompts_lose_their_start(language):
    language.max_text = 4
    ids, mask = language.question_ids(PROMPTS)
    assert language.tokenizer.convert_ids_to_tokens(ids[0]) == ["the", "person", "doing", "?"]
    assert mask.all()


def test_bos_of_the_public_code():
    """Instructions start with </s>, id 2, in the loss and in generate, and count it where they are cut."""
    lm, tokens = causal_lm(), torch.randn(2, 8, 24)
    language = Language(lm, tokenizer(), bos="</s>")
    plain = tokenizer(bos=False)
    rows = [[2, *plain(prompt)["input_ids"]] for prompt in PROMPTS]
    sums, counts = zip(*(cross_entropy(language, *each) for each in zip(tokens, PROMPTS, ANSWERS, rows)))
    want = sum(sums) / sum(counts)
    torch.testing.assert_close(language.loss(tokens, PROMPTS, ANSWERS), want)
    assert abs(Language(lm, tokenizer()).loss(tokens, PROMPTS, ANSWERS) - want) > 1e-4
    seen = []
    handle = lm.get_input_embeddings().register_forward_hook(lambda module, args, out: seen.append(args[0].tolist()))
    language.generate(tokens, PROMPTS, num_beams=1, max_new_tokens=1)
    language.max_text = 3
    language.generate(tokens, PROMPTS, num_beams=1, max_new_tokens=1)
    handle.remove()
    width = max(map(len, rows))
    assert seen[0] == [[language.tokenizer.pad_token_id] * (width - len(row)) + row for row in rows]
    assert seen[1] == [[2, *row[-2:]] for row in rows]


def test_model_frozen_tokens_learn(language):
    model = MALMM.default().train()
    pixels = torch.randn(2, 5, 3, 42, 42)
    model.loss(pixels, PROMPTS, ANSWERS, language, memory={"length": 2}).backward()
    assert not language.causal_lm.training and all(p.grad is None for p in language.parameters())
    assert model.projection.weight.grad.abs().sum() > 0 and model.qformer.query_tokens.grad.abs().sum() > 0


def test_gradients_are_the_official_ones(language):
    """Loss and gradients of the public algorithm in plain torch, which keeps a graph of every frame."""
    model = MALMM.default()
    reference = ReferenceMALMM(model.config).eval()
    reference.load_state_dict(export_malmm(model, "lavis"))
    pixels = torch.randn(2, 6, 3, 42, 42)
    ids, mask = language.question_ids(PROMPTS)
    ours = model.loss(pixels, PROMPTS, ANSWERS, language, memory={"length": 2})
    theirs = language.loss(reference(pixels, ids, mask, length=2), PROMPTS, ANSWERS)
    torch.testing.assert_close(ours, theirs)
    ours.backward(), theirs.backward()
    for mine, name in (
        (model.qformer.query_tokens, "query_tokens"),
        (model.projection.weight, "llm_proj.weight"),
        (model.time, "image_pe.weight"),
        (model.qformer.layers[2].out.weight, "Qformer.bert.encoder.layer.2.attention.output.dense.weight"),
    ):
        want = reference.get_parameter(name).grad
        torch.testing.assert_close(mine.grad, want.view_as(mine), rtol=2e-4, atol=1e-6)


def test_questions_share_a_video_and_streams_agree(language):
    model, pixels = MALMM.default(), torch.randn(2, 6, 3, 42, 42)
    options = {"num_beams": 1, "max_new_tokens": 5}
    both = model.generate(pixels, [PROMPTS, PROMPTS[::-1]], language, memory={"length": 2}, **options)
    assert [len(row) for row in both] == [2, 2]
    with torch.inference_mode():
        memories = model.start(model.prompt(*language.question_ids([PROMPTS, PROMPTS[::-1]])), length=2)
        for frame in pixels.unbind(1):
            memories = model.push(memories, model.features(frame))
        tokens = model.project(model.ask(memories))
    assert language.generate(tokens, [PROMPTS, PROMPTS[::-1]], **options) == both


def test_ragged_clips(language):
    model, pixels = MALMM.default(), torch.randn(3, 7, 3, 42, 42)
    ids, mask = language.question_ids([*PROMPTS, PROMPTS[0]])
    with torch.no_grad():
        found = model(pixels, ids, mask, length=2, frames=[7, 3, 7])
        for row, T in enumerate([7, 3, 7]):
            want = model(pixels[row : row + 1, :T], ids[row : row + 1], mask[row : row + 1], length=2)
            torch.testing.assert_close(found[row : row + 1], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda l: l.loss(torch.randn(2, 8, 24), PROMPTS, ["red"]), "answers must be like prompts, 2, got 1"),
        (lambda l: l.generate(torch.randn(2, 8, 23), PROMPTS), r"tokens must be \[2, n, 24\]"),
        (lambda l: l.generate(torch.randn(1, 3, 8, 24), [PROMPTS]), r"tokens must be \[B, 2, n, 24\]"),
        (lambda l: l.generate(torch.randn(1, 8, 24), "what"), "texts must be a list"),
        (lambda l: MALMM.default()(torch.randn(2, 3, 3, 42, 42), frames=[4, 1]), "numbers from 1 to T = 3"),
        (lambda l: MALMM.default()(torch.randn(2, 3, 3, 42, 42), frames=[1.5, 2]), "whole numbers from 1 to T = 3"),
        (lambda l: MALMM.default()(torch.randn(0, 3, 3, 42, 42), frames=[]), "B > 0 whole numbers"),
        (lambda l: MALMM.default()(torch.randn(2, 3, 3, 42, 42), frames=[3, 1], length=0), "all videos must have T"),
        (
            lambda l: MALMM.default()(torch.randn(2, 3, 3, 42, 42), torch.ones(3, 2, dtype=torch.long), frames=[3, 1]),
            "text must be of 2 videos",
        ),
        (lambda l: Language(l.causal_lm, l.tokenizer, bos="<bos>"), "bos must be a token of the vocabulary"),
    ],
)
def test_errors(language, wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong(language)


def test_answers_can_be_learned(language):
    """Two videos, two answers: the tokens of a tiny model come to say which is which."""
    model = MALMM(MALMMConfig.tiny()).train()
    model.freeze_vision()
    pixels = torch.randn(2, 3, 3, 42, 42)
    prompts = [PROMPTS[0]] * 2
    with torch.no_grad():  # a random language model hardly listens: let the tokens speak up
        for p in language.causal_lm.parameters():
            p.mul_(10 if p.dim() == 2 else 1)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    first = None
    for _ in range(150):
        loss = model.loss(pixels, prompts, ANSWERS, language, memory={"length": 2})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first = loss.item() if first is None else first
    assert loss.item() < 0.5 * first
    assert model.eval().generate(pixels, prompts, language, memory={"length": 2}, max_new_tokens=4) == ANSWERS
