"""A tokenizer of whole words, for text towers that are read at the largest id."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Words:
    """Ids of the words of a closed vocabulary: 0 is padding, 1..n the words, n + 1 the end token, the largest id.

    Args:
        vocabulary: the words, in the order of their ids.
        context: longest text, end token included.
    """

    def __init__(self, vocabulary: Sequence[str], context: int):
        self.vocabulary, self.context = tuple(vocabulary), context
        self._ids = {word: i for i, word in enumerate(self.vocabulary, 1)}
        if len(self._ids) != len(self.vocabulary):
            raise ValueError("Words: a word stands twice in the vocabulary")

    def __len__(self) -> int:
        """Number of ids, padding and end token included."""
        return len(self.vocabulary) + 2

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Token ids of lower-cased texts, split at spaces.

        Returns:
            int64 [B, context], the end token after each text, 0 from there on.

        Raises:
            ValueError: texts is one text, a word is not in the vocabulary, or a text is too long.
        """
        if isinstance(texts, str):
            raise ValueError(f"Words: texts must be a list, got one text: {texts!r:.100}")
        ids = torch.zeros(len(texts), self.context, dtype=torch.int64)
        for row, text in zip(ids, texts):
            words = text.lower().split()
            unknown = [w for w in words if w not in self._ids]
            if unknown:
                raise ValueError(f"Words: {unknown[0]!r} is not one of the {len(self.vocabulary)} words known here")
            if len(words) >= self.context:
                raise ValueError(f"Words: a text must have at most {self.context - 1} words, got {len(words)}: {text}")
            row[: len(words) + 1] = torch.tensor([self._ids[w] for w in words] + [len(self) - 1])
        return ids

    def text(self, ids: Tensor) -> str:
        """The text of one row of ids, up to the end token.

        Raises:
            ValueError: there is no end token, or something that is no word before it.
        """
        found, end = [int(i) for i in ids], len(self) - 1
        words = found[: found.index(end)] if end in found else []
        if end not in found or not all(0 < i < end for i in words):
            raise ValueError(f"Words: ids must be of words, in [1, {end - 1}], up to the end token {end}, got {found}")
        return " ".join(self.vocabulary[i - 1] for i in words)
