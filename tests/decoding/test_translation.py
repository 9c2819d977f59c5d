"""Drafts between tokenizers: text, entropies and blocks exact, final text untouched, nothing computed twice."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.decoding import tokenizers
from ugsd_fast import UGSDConfig
from ugsd_fast.decoding.drafter import Drafter
from ugsd_fast.decoding.translation import END, Codec, Transcript, TranslatingDrafter, Translation

EXACT = tokenizers.EXACT
PAIRS = [  # drafter, verifier
    ("byte_bpe", "bytes"),
    ("bytes", "byte_bpe"),
    ("metaspace", "byte_bpe"),
    ("byte_bpe", "metaspace"),
    ("llama", "byte_bpe_spaced"),
    ("byte_bpe_spaced", "llama"),
    ("bytes", "metaspace"),
]
TEXTS = st.text(alphabet="Theabcsp ,.äß高兴🎉🙂\n", max_size=24).map(lambda text: text.strip(" "))


def codec(kind: str, *, ends: bool = True) -> Codec:
    tokenizer = tokenizers.build(kind)
    end = tokenizer.eos_token_id
    return Codec(tokenizer, frozenset({end}) if ends else frozenset(), end if ends else None)


def translation(draft: str, verifier: str) -> Translation:
    return Translation(codec(draft), codec(verifier), codec(verifier).ends)


@functools.cache
def table(kind: str) -> list[bytes]:
    """Bytes of each token within a text."""
    some = tokenizers.build(kind).encode("a", add_special_tokens=False)[-1:]
    return [tokenizers.pieces(kind, [*some, token])[-1] for token in range(len(tokenizers.build(kind)))]


class Writer:
    """A model's sequence that writes a given text in tokens of its choice; what it was fed and asked is recorded."""

    pack_key = None

    def __init__(self, kind: str, text: str, seed: int = 0, *, end: bool = False):
        self.kind, self.text = kind, text.encode()
        self.end = tokenizers.build(kind).eos_token_id if end else None
        self.ids: list[int] = []  # in the cache, behind the prompt
        self.entropy: dict[int, float] = {}  # of the token last drawn at each position
        self.length = self.forwards = self.fed = 0
        self._random = random.Random(seed)

    def forward(self, tokens: Tensor, *, keep: int | None = None) -> Tensor:
        assert keep == 1
        assert tokens.shape[1] or not self.length, "nothing to feed"
        self.length += tokens.shape[1] + (3 if not self.length else 0)
        self.forwards += 1
        self.fed += tokens.shape[1]
        self.ids += tokens[0].tolist()
        written = b"".join(tokenizers.pieces(self.kind, self.ids)).removeprefix(b" " if self.kind[-1] == "d" else b"")
        rest = self.text[len(written) :] if self.text.startswith(written) else b""
        start = not any(tokenizers.pieces(self.kind, self.ids))
        fitting = [
            token
            for token, piece in enumerate(table(self.kind))
            if piece and rest.startswith(piece) and not (start and piece.startswith(b" "))
        ]
        if not rest and self.end is not None:
            fitting = [self.end]
        token = self._random.choice(fitting or [t for t, piece in enumerate(table(self.kind)) if piece])
        logits = torch.zeros(1, 1, len(table(self.kind)), dtype=torch.float64)
        logits[..., token] = self._random.uniform(1, 12)
        log_p = logits.log_softmax(-1)
        self.entropy[len(self.ids)] = -(log_p.exp() * log_p).sum().item()
        return logits.float()

    def rollback(self, rejected: int) -> None:
        assert 0 <= rejected <= len(self.ids), "the prompt was rolled back"
        self.length -= rejected
        del self.ids[len(self.ids) - rejected :]


def open_drafter(writer: Writer, verifier: str, config: UGSDConfig | None = None) -> TranslatingDrafter:
    mapping = translation(writer.kind, verifier)
    vocab_size = len(table(writer.kind))
    drafter = Drafter(
        writer,  # type: ignore[arg-type]
        config or UGSDConfig(),
        eos_token_ids=mapping.drafter.ends,
        vocab_size=vocab_size,
        device=torch.device("cpu"),
    )
    return TranslatingDrafter(drafter, mapping, vocab_size=vocab_size)


def own_tokens(drafter: TranslatingDrafter, writer: Writer) -> list[int]:
    return writer.ids + drafter.drafter.pending[0].tolist()


def complete(text: bytes) -> str:
    """Characters of which no byte is missing."""
    return text.decode(errors="ignore")


def expected_entropy(
    written: Sequence[bytes], entropy: Sequence[float], others: Sequence[bytes], first: int
) -> list[float]:
    """From bytes: of each token of `others` from the `first`-th, the largest entropy among those of `written` that
    hold a byte of one of its characters."""
    text = b"".join(written)
    starts = [0]
    for character in complete(text):
        starts.append(starts[-1] + len(character.encode()))
    character_of = [k for k in range(len(starts) - 1) for _ in range(starts[k + 1] - starts[k])]

    def characters(tokens: Sequence[bytes], index: int) -> set[int]:
        begin = sum(map(len, tokens[:index]))
        return set(character_of[begin : begin + (len(tokens[index]) or 1)])  # before a text: of its first character

    theirs = [characters(written, k) if written[k] else set() for k in range(len(written))]
    return [
        max(h for own, h in zip(theirs, entropy, strict=True) if own & characters(others, index))
        for index in range(first, len(others))
    ]


# One side


@pytest.mark.parametrize("kind", EXACT)
@settings(max_examples=40, deadline=None)
@given(text=TEXTS, cut=st.integers(0, 40))
def test_a_transcript_counts_complete_characters(kind: str, text: str, cut: int) -> None:
    ids = tokenizers.build(kind).encode(text, add_special_tokens=False)
    sizes = np.cumsum([0, *map(len, tokenizers.pieces(kind, ids))])
    whole = b"".join(tokenizers.pieces(kind, ids))
    transcript = Transcript(codec(kind))
    transcript.extend(ids[:cut])
    transcript.extend(ids[cut:])
    assert transcript.text == whole.decode()
    assert transcript.ends == [len(complete(whole[:size])) for size in sizes]
    assert transcript.whole == [complete(whole[:size]).encode() == whole[:size] for size in sizes]
    transcript.truncate(min(cut, len(ids)))
    assert transcript.text == complete(whole[: sizes[min(cut, len(ids))]])


@pytest.mark.parametrize("kind", [*EXACT, "wordpiece"])
def test_text_that_looks_like_a_special_token_is_text(kind: str) -> None:
    tokenizer = tokenizers.build(kind)
    ids = codec(kind).encode("a</s>b<|note|>")
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert codec(kind).encode(f"a{END}").count(tokenizer.eos_token_id) == 1
    assert codec(kind).decode([*codec(kind).encode("a"), tokenizer.eos_token_id]).endswith(END)


# Blocks


@pytest.mark.parametrize(("draft", "verifier"), PAIRS)
@settings(max_examples=60, deadline=None)
@given(
    text=TEXTS.filter(bool),
    final=st.integers(0, 30),
    length=st.integers(1, 9),
    gate=st.sampled_from(["max", "mean", "first"]),
    seed=st.integers(0, 99),
)
def test_a_block_is_the_drafters_text_with_its_entropies(
    draft: str, verifier: str, text: str, final: int, length: int, gate: Any, seed: int
) -> None:
    text *= 9
    writer = Writer(draft, text, seed)
    drafter = open_drafter(writer, verifier, UGSDConfig(gate=gate))
    settled = codec(verifier).encode(text)[:final]
    for token in settled:  # the verifier has written them alone
        drafter.commit(0, token)
    block = drafter.draft(length)
    assert len(block) <= length and writer.forwards <= length + 3
    written = tokenizers.pieces(draft, own_tokens(drafter, writer))
    if draft == "byte_bpe_spaced" and written and written[0][:1] == b" ":
        written[0] = written[0][1:]  # where it begins with a space that was never asked for
    others = tokenizers.pieces(verifier, [*settled, *block.token_ids])
    ours, theirs = b"".join(written), b"".join(others)
    if not text.encode().startswith(ours):
        return  # its text is over: the writer writes anything
    assert complete(ours).encode().startswith(theirs)
    entropy = [writer.entropy.get(k, 0.0) for k in range(len(written))]
    assert block.entropy == pytest.approx(expected_entropy(written, entropy, others, len(settled)), abs=1e-5)
    if len(block):
        reduce = {"max": max, "mean": np.mean, "first": lambda h: h[0]}[gate]
        assert block.uncertainty == pytest.approx(reduce(block.entropy), abs=1e-5)
        assert block.escalate == (block.uncertainty > 1.5)
        assert block.tokens.tolist() == [list(block.token_ids)]
    else:
        assert block.escalate
    remaining = complete(ours)[len(complete(b"".join(others[: len(settled)]))) :]
    if remaining and complete(theirs).encode() == theirs and verifier != "byte_bpe_spaced":
        assert len(block), "what can be written is drafted"


@pytest.mark.parametrize(("draft", "verifier"), [*PAIRS, ("unigram", "byte_bpe"), ("wordpiece", "bytes")])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_whatever_the_verifier_says_final_tokens_stay_and_nothing_is_fed_twice(
    draft: str, verifier: str, data: st.DataObject
) -> None:
    kind = draft if draft in EXACT else "byte_bpe"
    text = data.draw(TEXTS.filter(bool))
    writer = Writer(kind, text, data.draw(st.integers(0, 9)))
    drafter = open_drafter(writer, verifier)
    final: list[int] = []
    size = len(tokenizers.build(verifier))
    for _ in range(data.draw(st.integers(1, 6))):
        block = drafter.draft(data.draw(st.integers(1, 6)))
        before = writer.fed
        accepted = data.draw(st.integers(0, len(block)))
        canonical = codec(verifier).encode(text)
        correction = data.draw(st.sampled_from([-1, *canonical]) | st.integers(0, size - 1))
        if not accepted and correction < 0:
            correction = 7
        final += [*block.token_ids[:accepted], *([correction] if correction >= 0 else [])]
        drafter.commit(accepted, correction)
        assert writer.fed == before, "a commit computes nothing"
        own, theirs = tokenizers.pieces(kind, own_tokens(drafter, writer)), tokenizers.pieces(verifier, final)
        text_of_final = complete(b"".join(theirs))
        valid = b"".join(theirs).decode(errors="replace").rstrip("\ufffd") == text_of_final
        if valid and kind != "byte_bpe_spaced" and not text_of_final.startswith(" "):
            # The drafter goes on from the final text (some write no space at its beginning, or always one).
            assert b"".join(own).decode(errors="replace").startswith(text_of_final)
