"""Whether two models mean the same by a token id."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Protocol

from ugsd_fast.errors import VocabularyMismatchError


class HasTokenizer(Protocol):
    """A drafter or a verifier."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, None where none is known."""


def check_vocabularies(draft: HasTokenizer, verifier: HasTokenizer) -> None:
    """Refuse a pair whose token ids mean different text.

    Only the text tokens are compared. Special tokens may differ, as Qwen2.5-Omni's and Qwen3-Omni's do, and so may the
    padded size of the logits: each model's prompt is its own. A side without a tokenizer is taken at its word.

    Raises
    ------
    VocabularyMismatchError
        Naming how many tokens differ, and the first of them.
    """
    expect = getattr(verifier, "expect_vocabulary", None)  # of a remote verifier: no need to fetch its tokenizer
    if expect is not None and draft.tokenizer is not None and expect(fingerprint(draft.tokenizer)):
        return
    if draft.tokenizer is None or verifier.tokenizer is None:
        return
    ours, theirs = _text_vocabulary(draft.tokenizer), _text_vocabulary(verifier.tokenizer)
    if ours == theirs:
        return
    differing = sorted(
        (token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)),
        key=lambda token: ours.get(token, len(ours)),
    )
    token = differing[0]
    raise VocabularyMismatchError(
        f"vocabularies differ in {len(differing)} of {len(ours.keys() | theirs.keys())} text tokens: {token!r} is "
        f"{ours.get(token)} for the drafter and {theirs.get(token)} for the verifier, expected the same token ids"
    )


def fingerprint(tokenizer: Any) -> str:
    """A digest of a tokenizer's text tokens and their ids; empty for None."""
    if tokenizer is None:
        return ""
    listed = sorted((index, token) for token, index in _text_vocabulary(tokenizer).items())
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def _text_vocabulary(tokenizer: Any) -> dict[str, int]:
    added = tokenizer.get_added_vocab()
    return {token: index for token, index in tokenizer.get_vocab().items() if token not in added}
