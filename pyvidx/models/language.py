"""A frozen causal language model of transformers that answers questions about a video's tokens."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

IGNORED = -100  # labels of transformers' losses that do not count
# The public code's, but for its limit of 256 new tokens; anything may be given in their place.
GENERATION = {"num_beams": 5, "do_sample": False, "repetition_penalty": 1.5, "length_penalty": 1.0, "min_new_tokens": 1}


class Language(nn.Module):
    """A causal language model, its tokenizer, and the tokenizer of the Q-Former's text.

    The sequence is [visual tokens][instruction, from its bos on][answer, eos] (MA-LMM, arXiv:2404.05726, section 3.3).
    The model is frozen and stays in eval mode. Padding is never attended to, so a tokenizer without a padding token
    needs none and the vocabulary does not grow; the public code adds '[PAD]' and then masks it, with the same numbers.

        language = Language(AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path), bert)
        language.generate(model.project(model.ask(memories)), ["what is the person doing?"])   # of a stream

    Args:
        causal_lm: any transformers model with generate(inputs_embeds=...): LLaMA / Vicuna, Qwen2, GPT-2, ...; FLAN-T5
            too, of InstructBLIP and BLIP-2, but for its loss.
        tokenizer: its tokenizer; a copy is kept, with the settings needed here.
        text_tokenizer: the Q-Former's (BERT wordpieces); None where the Q-Former reads no text (BLIP-2).
        max_text: instruction tokens kept, the last ones, for the Q-Former and for the language model.
        max_answer: answer tokens kept in training, eos not counted.
        bos: the token that instructions start with, in place of what the tokenizer puts there (for LLaMA "<s>", for
            Qwen2 and GPT-2 nothing). "</s>" for the Vicuna of InstructBLIP and MA-LMM: the public code makes that the
            tokenizer's bos, so the published weights were trained with it.

    Raises:
        ValueError: the tokenizer has no eos, or its vocabulary lacks bos.
    """

    def __init__(
        self,
        causal_lm: nn.Module,
        tokenizer: Any,
        text_tokenizer: Any = None,
        *,
        max_text: int = 128,
        max_answer: int = 255,
        bos: str | None = None,
    ):
        super().__init__()
        self.causal_lm = causal_lm.requires_grad_(False).eval()
        self.tokenizer, self.text_tokenizer = copy.deepcopy(tokenizer), copy.deepcopy(text_tokenizer)
        self.max_text, self.max_answer, self.bos = max_text, max_answer, bos
        if self.tokenizer.eos_token_id is None:
            raise ValueError("Language: the tokenizer must have an eos token, as answers end in it")
        if bos is not None and bos not in self.tokenizer.get_vocab():
            raise ValueError(f"Language: bos must be a token of the vocabulary, got {bos!r}")
        for t in (self.tokenizer, self.text_tokenizer):
            if t is not None:
                t.truncation_side = "left"
                t.pad_token = t.pad_token or t.eos_token

    def train(self, mode: bool = True) -> "Language":
        """Stays in eval mode: its dropout is no part of the method."""
        return super().train(False)

    @property
    def encodes(self) -> bool:
        """An encoder reads tokens and instruction, a decoder writes the answer (FLAN-T5)."""
        return self.causal_lm.config.is_encoder_decoder

    @property
    def width(self) -> int:
        """Of its token embeddings."""
        return self.causal_lm.get_input_embeddings().weight.shape[1]

    def question_ids(self, prompts: Sequence[str] | Sequence[Sequence[str]]) -> tuple[Tensor | None, Tensor | None]:
        """The instructions for MALMM.prompt: ids and mask, int64 [B, L], or [B, G, L] of G questions per video."""
        if self.text_tokenizer is None:
            return None, None
        flat, groups = _flatten(prompts)
        text = self.text_tokenizer(
            flat, padding="longest", padding_side="right", truncation=True, max_length=self.max_text,
            return_tensors="pt", return_token_type_ids=False,
        )  # fmt: skip
        ids, mask = (text[name].to(self._device) for name in ("input_ids", "attention_mask"))
        return (ids, mask) if groups is None else (ids.unflatten(0, (-1, groups)), mask.unflatten(0, (-1, groups)))

    @torch.no_grad()
    def generate(self, tokens: Tensor, prompts: Sequence[Any], **options: Any) -> list[Any]:
        """Answers in words.

        Args:
            tokens: [B, n, width] visual tokens, or [B, G, n, width] for G questions per video.
            prompts: B instructions, or B lists of G.
            options: of transformers' generate, over the defaults of the public code (GENERATION) and max_new_tokens =
                256; num_return_sequences = K gives the K best beams.

        Returns:
            as prompts, an answer in place of each, or a list of K answers, best first.

        Raises:
            ValueError: the tokens do not fit the prompts or the model, or a prompt has no token, not even a bos.
        """
        flat, groups = _flatten(prompts)
        visual = self._visual(tokens, len(flat), groups)
        questions, pad = self._instructions(flat), self.tokenizer.pad_token_id
        if not all(questions):  # the answer's first word is read after the last place, which would be padding
            raise ValueError("Language: every text must have a token, got one of none; give it a word, or pass bos=")
        rows = [torch.tensor(row) for row in questions]
        side = "right" if self.encodes else "left"  # T5 counts distances over padding; a decoder goes on at the end
        ids = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side=side).to(self._device)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side).to(ids)
        options = {"max_new_tokens": 256, "pad_token_id": pad} | GENERATION | options
        ids = self.causal_lm.generate(
            inputs_embeds=torch.cat([visual, self._embed(ids)], dim=1),
            attention_mask=torch.cat([mask.new_ones(visual.shape[:2]), mask], dim=1),
            eos_token_id=options.pop("eos_token_id", self.tokenizer.eos_token_id),
            **options,
        )
        ids = getattr(ids, "sequences", ids)
        answers = [answer.strip() for answer in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]
        beams = options.get("num_return_sequences", 1)
        answers = answers if beams == 1 else _chunks(answers, beams)
        return answers if groups is None else _chunks(answers, groups)

    def loss(self, tokens: Tensor, prompts: Sequence[Any], answers: Sequence[Any]) -> Tensor:
        """Mean cross-entropy of the answers' tokens and of the eos after each, over all of them; a scalar.

        Args:
            tokens, prompts: as in generate; gradients flow into tokens.
            answers: a text for each prompt.

        Raises:
            ValueError: the tokens or answers do not fit the prompts or the model, or that has an encoder.
        """
        if self.encodes:
            raise ValueError(
                "Language: loss needs a decoder alone, got an encoder and a decoder, which can generate only"
            )
        flat, groups = _flatten(prompts)
        flat_answers, answer_groups = _flatten(answers)
        if len(flat_answers) != len(flat) or groups != answer_groups:
            raise ValueError(f"Language: answers must be like prompts, {len(flat)}, got {len(flat_answers)}")
        visual = self._visual(tokens, len(flat), groups)
        questions = self._instructions(flat)
        wanted = self.tokenizer(flat_answers, add_special_tokens=False)["input_ids"]
        wanted = [ids[: self.max_answer] + [self.tokenizer.eos_token_id] for ids in wanted]
        rows = [q + a for q, a in zip(questions, wanted)]
        length = max(len(row) for row in rows)
        ids = torch.tensor([row + [self.tokenizer.pad_token_id] * (length - len(row)) for row in rows])
        labels = torch.full((len(rows), visual.shape[1] + length), IGNORED)
        mask = torch.zeros_like(labels)
        for i, (q, row) in enumerate(zip(questions, rows)):
            begin, end = visual.shape[1] + len(q), visual.shape[1] + len(row)
            labels[i, begin:end] = torch.tensor(row[len(q) :])
            mask[i, :end] = 1
        embeds = torch.cat([visual, self._embed(ids.to(self._device))], dim=1)
        device = self._device
        return self.causal_lm(inputs_embeds=embeds, attention_mask=mask.to(device), labels=labels.to(device)).loss

    @property
    def _device(self) -> torch.device:
        return self.causal_lm.get_input_embeddings().weight.device

    def _instructions(self, texts: list[str]) -> list[list[int]]:
        """Token ids, bos first. Setting the tokenizer's bos_token would not change them in transformers 5."""
        if self.bos is None:
            return self.tokenizer(texts, truncation=True, max_length=self.max_text)["input_ids"]
        bos = self.tokenizer.convert_tokens_to_ids(self.bos)
        rows = self.tokenizer(texts, add_special_tokens=False, truncation=True, max_length=self.max_text - 1)
        return [[bos, *row] for row in rows["input_ids"]]

    def _embed(self, ids: Tensor) -> Tensor:
        return self.causal_lm.get_input_embeddings()(ids)

    def _visual(self, tokens: Tensor, count: int, groups: int | None) -> Tensor:
        """[B, n, width] or [B, G, n, width] -> [count, n, width] in the model's dtype."""
        wanted = 3 if groups is None else 4
        fits = tokens.dim() == wanted and tokens.shape[-1] == self.width and tokens.shape[:-2].numel() == count
        if not fits or (groups is not None and tokens.shape[1] != groups):
            shape = f"[{count}, n, {self.width}]" if groups is None else f"[B, {groups}, n, {self.width}]"
            raise ValueError(f"Language: tokens must be {shape}, as the prompts, got {tuple(tokens.shape)}")
        weight = self.causal_lm.get_input_embeddings().weight
        return tokens.flatten(0, -3).to(weight.device, weight.dtype)


def _flatten(texts: Sequence[Any]) -> tuple[list[str], int | None]:
    """Texts in one list, and how many there are per video; None where they have no axis for it."""
    if isinstance(texts, str) or not texts:
        raise ValueError(f"Language: texts must be a list, one per video, got {texts!r}")
    if all(isinstance(text, str) for text in texts):
        return list(texts), None
    if any(isinstance(row, str) for row in texts) or len({len(row) for row in texts}) != 1 or not texts[0]:
        raise ValueError("Language: texts must be one per video, or a list of equally many for each video")
    return [text for row in texts for text in row], len(texts[0])


def _chunks(items: list[Any], size: int) -> list[list[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
