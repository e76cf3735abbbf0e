"""A tokenizer that spells, for hosts whose processors write texts: every byte is a token, and some words are one."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.hosts.tiny import IMAGE, PAD, VIDEO

MERGES = [("F", "r"), ("Fr", "a"), ("Ġ", "f"), ("Ċ", "Ċ"), ("0", "1"), ("Ġ", "Y"), ("s", "e")]


def tokenizer(image: str, video: str, others: list[str], **named: str) -> PreTrainedTokenizerFast:
    """Ids 5 to 260 are bytes; IMAGE and VIDEO as the models have them. others: at most 4 special tokens. named: special
    tokens that become attributes."""
    vocab = {"<pad>": PAD, **{word: i + 1 for i, word in enumerate(others)}, image: IMAGE, video: VIDEO}
    letters = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in MERGES]
    raw = Tokenizer(models.BPE(vocab | {x: i + 5 for i, x in enumerate(letters)}, MERGES))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<pad>", *others, image, video])
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", extra_special_tokens=named)
