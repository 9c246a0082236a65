"""Stop strings: whether the text of a row has come to one, with one decoding of a few tokens a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# The text of the second token ids where they follow the first; special tokens left out.
Decode = Callable[[Sequence[int], Sequence[int]], str]


class StopText:
    """The last part of a row's text, decoded anew with every token from a place where that gives the same text.

    A token's text depends on its neighbours: a character may take several tokens, a special token has no text, and some
    tokenizers treat the first token of a text in their own way. So what is decoded begins some tokens before the last
    one. That place moves on once in a while, if the text from the new place is the end of the text from the old one; so
    it is always the end of the whole text.

    Args:
        strings: the stop strings. prompt: the token ids before the row's own. decode: see :data:`Decode`.
    """

    def __init__(self, strings: Sequence[str], prompt: Sequence[int], decode: Decode):
        self._strings, self._decode = strings, decode
        # A stop string that ends with the newest token may begin this many characters before.
        self._characters = max(map(len, strings))
        # Nearly every token is at least one byte of text.
        self._tokens = max(len(s.encode()) for s in strings) + 4
        self._begin, self._before = 0, prompt
        self._shorten_at = 2 * self._tokens

    def reached(self, tokens: Sequence[int]) -> bool:
        """Does a stop string end with the last of ``tokens``, the row's own? Asked after every token."""
        text = self._decode(self._before, tokens[self._begin :])
        if any(s in text for s in self._strings):
            return True
        if len(tokens) >= self._shorten_at:
            self._shorten(tokens, text)
        return False

    def _shorten(self, tokens: Sequence[int], text: str) -> None:
        begin = len(tokens) - self._tokens
        before = tokens[:begin]
        shorter = self._decode(before, tokens[begin:])
        if len(shorter) >= self._characters and text.endswith(shorter):
            self._begin, self._before = begin, before
        self._shorten_at = len(tokens) + self._tokens
