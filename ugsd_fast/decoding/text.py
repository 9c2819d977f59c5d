"""Text of tokens that arrive in pieces."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class IncrementalText:
    """Decodes a growing token sequence, handing out only text that later tokens cannot change.

    Parameters
    ----------
    decode : callable
        Token ids -> text.

    Examples
    --------
    >>> text = IncrementalText(lambda tokens: bytes(tokens).decode(errors="replace"))
    >>> text.extend([72, 195]), text.extend([164], final=True)
    ('H', 'ä')
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._tokens: list[int] = []
        self.text = ""

    def extend(self, tokens: Sequence[int], *, final: bool = False) -> str:
        """Append tokens and return the text that became final; `final` hands out what was held back, too."""
        self._tokens.extend(tokens)
        text = self._decode(self._tokens)
        if not final:
            # A character whose bytes are spread over tokens shows as U+FFFD until the last of them is there. Decoders
            # with byte fallback then give up the characters before it, too: what was handed out stays.
            text = text.rstrip("\ufffd")
        delta = text[len(self.text) :]
        self.text += delta
        return delta
