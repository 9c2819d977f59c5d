"""Tokenizers of different kinds, trained here on a few sentences in several scripts.

Those in `EXACT` can write every text; ``unigram`` and ``wordpiece`` have no token for some characters, and the latter
writes no capitals.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SENTENCES = (
    "The speaker sounds happy and excited, talking quickly in a high, bright voice.",
    "A woman speaks slowly and softly; her low pitch and long pauses make her sound sad.",
    "Die Sprecherin klingt fröhlich, aber müde: große Überraschung für alle Hörer!",
    "说话者听起来很高兴，语速很快，声音明亮。 她很惊讶。",
    "The crowd cheers 🎉🎉 and the naïve café owner smiles 🙂.",
)
EXACT = ("bytes", "byte_bpe", "byte_bpe_spaced", "metaspace", "llama")
KINDS = (*EXACT, "unigram", "wordpiece")

_SPECIAL = ["<pad>", "</s>", "<|note|>"]
_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


@functools.cache
def build(kind: str) -> Any:
    """A tokenizer with ``</s>`` as its end of sequence."""
    backend = _BUILD[kind]()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", extra_special_tokens=["<|note|>"]
    )


def _byte_level(size: int, *, add_prefix_space: bool = False, special: Sequence[str] = _SPECIAL) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=_BYTES, special_tokens=list(special), show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def _with_byte_fallback(size: int, *, prepend: bool) -> Tokenizer:
    """SentencePiece's BPE: a word begins with its space, and characters without a token are written in bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if prepend:  # as Llama 2 has it
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<unk>", *_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        limit_alphabet=48,  # so that Chinese and emoji need their bytes
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES[:3], trainer)
    for token in [f"<0x{byte:02X}>" for byte in range(256)]:
        assert tokenizer.token_to_id(token) is not None
    return _bytes_are_ordinary(tokenizer)


def _bytes_are_ordinary(tokenizer: Tokenizer) -> Tokenizer:
    """The trainer takes byte tokens as special ones, which would have no text."""
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [added for added in spec["added_tokens"] if not added["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(spec))


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<unk>", *_SPECIAL], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES[:3], trainer)
    return tokenizer


def _wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["<unk>", *_SPECIAL], show_progress=False)
    tokenizer.train_from_iterator(SENTENCES[:4], trainer)
    return tokenizer


_BUILD = {
    "bytes": lambda: _byte_level(259),
    "byte_bpe": lambda: _byte_level(420, special=[*reversed(_SPECIAL)]),
    "byte_bpe_spaced": lambda: _byte_level(340, add_prefix_space=True),
    "metaspace": lambda: _with_byte_fallback(400, prepend=False),
    "llama": lambda: _with_byte_fallback(380, prepend=True),
    "unigram": _unigram,
    "wordpiece": _wordpiece,
}


def pieces(kind: str, ids: Sequence[int]) -> list[bytes]:
    """Bytes that each token adds to a text, read off the vocabulary of one of `EXACT`."""
    tokenizer = build(kind)
    found: list[bytes] = []
    begins = True
    for token in tokenizer.convert_ids_to_tokens(list(ids)):
        if token is None or token in _SPECIAL or token == "<unk>":
            found.append(b"")
            continue
        if kind in ("metaspace", "llama"):
            is_byte = token.startswith("<0x")
            piece = bytes([int(token[3:5], 16)]) if is_byte else token.replace("▁", " ").encode()
            found.append(piece.removeprefix(b" ") if begins else piece)
        else:
            found.append(bytes(_byte_of()[character] for character in token))
        begins = False
    return found


@functools.cache
def _byte_of() -> dict[str, int]:
    """GPT-2's alphabet: a printable character for each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
