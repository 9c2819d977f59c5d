"""Drafts between tokenizers: text, entropies and blocks exact, final text untouched, nothing computed twice."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.decoding import tokenizers
from ugsd_fast import AudioLM, Decoder, LocalVerifier, UGSDConfig, VocabularyMismatchError
from ugsd_fast.decoding.drafter import Drafter
from ugsd_fast.decoding.translation import END, Codec, Transcript, TranslatingDrafter, Translation, translation_between

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
    """A model's sequence that writes a given text, in tokens of its choice; what it was fed and asked is recorded.

    Once it has gone another way, or written all, it writes anything, or its end.
    """

    def pack_key(self, tokens: Tensor) -> None:
        return None

    def check_room(self, count: int) -> None:
        """There is always some."""

    def __init__(self, kind: str, text: str, seed: int = 0, *, end: bool = False, longest: bool = False):
        self.kind, self.text, self.seed, self.longest = kind, text.encode(), seed, longest
        self.end = tokenizers.build(kind).eos_token_id if end else None
        self.ids: list[int] = []  # in the cache, behind the prompt
        self.entropy: dict[int, float] = {}  # of the token last drawn at each position
        self.length = self.forwards = self.fed = 0

    def forward(self, tokens: Tensor, *, keep: int) -> Tensor:
        assert tokens.shape[1] or not self.length, "nothing to feed"
        self.length += tokens.shape[1] + (3 if not self.length else 0)
        self.forwards += 1
        self.fed += tokens.shape[1]
        self.ids += tokens[0].tolist()
        ends = range(len(self.ids) - keep + 1, len(self.ids) + 1)
        return torch.stack([self._logits(self.ids[:end]) for end in ends])[None].float()

    def _logits(self, ids: list[int]) -> Tensor:
        pieces = tokenizers.pieces(self.kind, ids)
        written = b"".join(pieces).removeprefix(b" " if self.kind == "byte_bpe_spaced" else b"")
        rest = self.text[len(written) :] if self.text.startswith(written) else b""
        fitting = [
            token
            for token, piece in enumerate(table(self.kind))
            if piece and rest.startswith(piece) and (any(pieces) or not piece.startswith(b" "))
        ]
        chance = random.Random(hash((self.seed, *ids)))
        if fitting and self.longest:
            token = max(fitting, key=lambda token: len(table(self.kind)[token]))
        elif not rest and self.end is not None:
            token = self.end
        else:
            token = chance.choice(fitting or [t for t, piece in enumerate(table(self.kind)) if piece])
        logits = torch.zeros(len(table(self.kind)), dtype=torch.float64)
        logits[token] = chance.uniform(3, 25)
        log_p = logits.log_softmax(-1)
        self.entropy[len(ids)] = -(log_p.exp() * log_p).sum().item()
        return logits

    def rollback(self, rejected: int) -> None:
        assert 0 <= rejected <= len(self.ids), "the prompt was rolled back"
        self.length -= rejected
        del self.ids[len(self.ids) - rejected :]


def open_drafter(writer: Writer, verifier: str, config: UGSDConfig | None = None) -> TranslatingDrafter:
    mapping = translation(writer.kind, verifier)
    drafter = Drafter(
        writer,  # type: ignore[arg-type]
        config or UGSDConfig(),
        eos_token_ids=mapping.drafter.ends,
        vocab_size=len(table(writer.kind)),
        device=torch.device("cpu"),
    )
    return TranslatingDrafter(drafter, mapping)


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
    assert len(block) <= length
    assert writer.forwards <= length + 3
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
        if correction in codec(verifier).ends or (not accepted and correction < 0):
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


def test_a_draft_that_spells_an_end_token_does_not_end_the_caption() -> None:
    # Unigram's vocabulary holds its special tokens as pieces: the text "</s>" would become one.
    drafter = open_drafter(Writer("bytes", "a</s>b a</s>b"), "unigram")
    block = drafter.draft(9)
    assert codec("unigram").decode(block.token_ids) == "a"


def test_an_empty_block_lets_the_verifier_write_and_drafts_nothing_in_vain() -> None:
    # The unigram tokenizer has no emoji; until the verifier has written something, the drafter keeps its own.
    writer = Writer("byte_bpe", "a 🎉 b a 🎉 b")
    drafter = open_drafter(writer, "unigram")
    encode = codec("unigram").encode
    block = drafter.draft(12)
    assert codec("unigram").decode(block.token_ids).strip() == "a"
    drafter.commit(len(block), -1)
    forwards = writer.forwards
    empty = drafter.draft(5)
    assert (len(empty), empty.escalate, empty.tokens.shape) == (0, True, (1, 0))
    assert writer.forwards == forwards
    drafter.commit(0, encode("sad")[0])
    own, theirs = own_tokens(drafter, writer), [*block.token_ids, *encode("sad")[:1]]
    assert codec("byte_bpe").decode(own) == codec("unigram").decode(theirs)


def test_a_character_waits_for_its_bytes() -> None:
    writer = Writer("bytes", "高兴")
    drafter = open_drafter(writer, "byte_bpe")
    block = drafter.draft(1)  # one byte is no character: two more are drafted
    assert writer.forwards == 3
    assert tokenizers.build("byte_bpe").decode(block.token_ids).rstrip("\ufffd") in ("", "高")
    assert len(block) == 1


@pytest.mark.parametrize("verifier", ["bytes", "metaspace"])
def test_final_text_that_ends_within_a_character(verifier: str) -> None:
    """Only a draft that goes on with the bytes begun is taken, and it begins behind them."""
    ids = codec(verifier).encode("a兴")
    begun = next(count for count in range(len(ids)) if codec(verifier).decode(ids[:count]).endswith("\ufffd"))
    for text, continues in (("a兴b", True), ("a高b", False), ("abc", False)):
        writer = Writer("byte_bpe", text)
        drafter = open_drafter(writer, verifier)
        for token in ids[: begun + 1]:  # two bytes of the character: 兴 is E5 85 B4, 高 is E9 AB 98
            drafter.commit(0, token)
        block = drafter.draft(4)
        if continues:
            assert block.token_ids[0] == ids[begun + 1]
        else:
            assert not len(block)


def test_blocks_cut_within_a_character_continue_there() -> None:
    writer = Writer("byte_bpe", "高兴，高兴")
    drafter = open_drafter(writer, "bytes")
    tokens: list[int] = []
    while len(tokens) < 15:
        block = drafter.draft(2)
        assert len(block) == 2 or len(tokens) == 14
        tokens += block.token_ids
        drafter.commit(len(block), -1)
    assert tokens[:15] == codec("bytes").encode("高兴，高兴")
    assert writer.fed <= len(own_tokens(drafter, writer)), "nothing was fed twice"


def test_nothing_is_computed_again_where_texts_agree() -> None:
    text = "The speaker sounds happy and excited, talking quickly"
    writer = Writer("byte_bpe", text)
    drafter = open_drafter(writer, "metaspace")
    canonical = codec("metaspace").encode(text)
    final: list[int] = []
    rounds = 0
    while len(final) < len(canonical):
        block = drafter.draft(4)
        # The verifier writes the same text in tokens of its own.
        agreeing = [ours == theirs for ours, theirs in zip(block.token_ids, canonical[len(final) :], strict=False)]
        accepted = [*agreeing, False].index(False)
        final += block.token_ids[:accepted]
        correction = canonical[len(final)] if len(final) < len(canonical) else -1
        if len(final) < len(canonical):
            final.append(correction)
        drafter.commit(accepted, correction)
        rounds += 1
    own = own_tokens(drafter, writer)
    # Corrections confirm the text that the drafter has: its tokens stay, but for one that they end within.
    assert writer.fed <= len(own) + rounds
    assert writer.forwards <= len(own)


# Whole runs


class WritingModel(AudioLM):
    """An `AudioLM` whose sequences are `Writer`s."""

    def __init__(self, kind: str, text: str, **kwargs: Any):
        self.processor = tokenizers.build(kind)
        self.kind, self.text, self.kwargs = kind, text, {"end": True, **kwargs}
        self.family = None
        self.opened: list[Writer] = []

    device = property(lambda self: torch.device("cpu"))  # type: ignore[assignment]
    vocab_size = property(lambda self: len(table(self.kind)))  # type: ignore[assignment]
    eos_token_ids = property(lambda self: frozenset({self.processor.eos_token_id}))  # type: ignore[assignment]

    def open(self, inputs: Any) -> Any:
        self.opened.append(Writer(self.kind, self.text, **self.kwargs))
        return self.opened[-1]


def tiny(kind: str, seed: int, *, width: int = 16) -> AudioLM:
    """A random text model over a tokenizer's vocabulary, padded."""
    tokenizer = tokenizers.build(kind)
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer) + 5,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.Qwen2ForCausalLM(config)
    return AudioLM(model, tokenizer)


def prompt(model: AudioLM, text: str = "The speaker sounds") -> dict[str, Tensor]:
    return dict(model.tokenizer(text, return_tensors="pt", add_special_tokens=False))


def generate(model: AudioLM, tokens: int, text: str = "The speaker sounds") -> list[int]:
    inputs = prompt(model, text)
    output = model.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("draft", "verifier"), [*PAIRS, ("unigram", "bytes"), ("byte_bpe", "wordpiece")])
def test_lossless_greedy_is_the_verifiers_own_generate(draft: str, verifier: str, seed: int) -> None:
    drafter, model = tiny(draft, seed), tiny(verifier, seed + 10)
    config = UGSDConfig(always_escalate=True, rule="greedy")
    decoder = Decoder(drafter, LocalVerifier(model), config)
    result = decoder.generate(inputs=prompt(drafter), verifier_inputs=prompt(model), max_new_tokens=48)
    assert result.tokens == generate(model, 48)
    text = model.decode(result.tokens)
    assert (
        result.text == text or "\ufffd" in text
    )  # what bytes that make no character look like depends on those behind
    assert result.metrics.drafter_forwards <= 48 * 8


NOTHING: dict[str, Tensor] = {"input_ids": torch.zeros(1, 3, dtype=torch.long)}
SPEECH = "The naïve café owner klingt fröhlich 🎉 很高兴, and smiles 🙂."


def write(
    draft: str, verifier: str, config: UGSDConfig, *, said: str = SPEECH, heard: str = SPEECH, **kwargs: Any
) -> tuple[Any, Writer, Writer]:
    """A run of two writers: the drafter writes `said`, the verifier `heard` in its longest tokens."""
    drafter, model = WritingModel(draft, said), WritingModel(verifier, heard, longest=True)
    decoder = Decoder(drafter, LocalVerifier(model), config)
    result = decoder.generate(inputs=NOTHING, verifier_inputs=NOTHING, **kwargs)
    return result, drafter.opened[0], model.opened[0] if model.opened else None  # type: ignore[return-value]


@pytest.mark.parametrize(("draft", "verifier"), PAIRS)
def test_who_writes_the_same_text_is_accepted(draft: str, verifier: str) -> None:
    greedy = UGSDConfig(always_escalate=True, rule="greedy")
    alone = Decoder(None, LocalVerifier(WritingModel(verifier, SPEECH, longest=True)), greedy)
    own = alone.generate(verifier_inputs=NOTHING)
    result, writer, _ = write(draft, verifier, greedy)
    assert result.tokens == own.tokens
    assert result.text == SPEECH
    assert result.metrics.verifier_forwards < 0.7 * own.metrics.verifier_forwards
    assert writer.fed <= len(writer.ids) + len(result.trace.blocks), "the drafter's tokens stay where texts agree"
    # One that goes another way half way through changes nothing but the cost.
    other, _, _ = write(draft, verifier, greedy, said=SPEECH[:20] + "but sad and slow")
    assert other.tokens == own.tokens


@pytest.mark.parametrize(("draft", "verifier"), PAIRS)
@pytest.mark.parametrize("rule", ["rank", "typical", "relaxed"])
def test_the_other_rules_and_edge_acceptance(draft: str, verifier: str, rule: Any) -> None:
    result, writer, _ = write(draft, verifier, UGSDConfig(entropy_threshold=1.0, rule=rule, rank=1))
    assert result.text == SPEECH
    blocks = result.trace.blocks
    assert {block.escalated for block in blocks} == {True, False}
    for block in blocks:
        assert block.escalated == (block.uncertainty > 1.0 or not block.draft_tokens)
        assert block.uncertainty == max(block.entropy, default=0.0)
    edge, writer, session = write(draft, verifier, UGSDConfig(entropy_threshold=100.0), said="Sad 很 🙂.")
    assert (edge.text, session) == ("Sad 很 🙂.", None)
    assert edge.tokens[-1] == tokenizers.build(verifier).eos_token_id
    # Without corrections every token is drafted once.
    assert writer.forwards == len(writer.ids) + 1


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8])
def test_an_end_of_one_side_is_the_other_sides(length: int) -> None:
    end = tokenizers.build("metaspace").eos_token_id
    assert end != tokenizers.build("byte_bpe").eos_token_id
    config = UGSDConfig(block_size=length, entropy_threshold=100.0)
    result, writer, _ = write("byte_bpe", "metaspace", config, said="so sad")
    assert result.text == "so sad"
    assert result.tokens.index(end) == len(result.tokens) - 1
    position = [*writer.ids, writer.end].index(writer.end)
    assert result.trace.blocks[-1].entropy[-1] == pytest.approx(writer.entropy[position], abs=1e-5)


@pytest.mark.parametrize("max_new_tokens", [1, 2, 7, 8, 9])
def test_never_more_than_max_new_tokens(max_new_tokens: int) -> None:
    greedy = UGSDConfig(always_escalate=True, rule="greedy")
    own, _, _ = write("byte_bpe", "bytes", greedy)
    cut, _, _ = write("byte_bpe", "bytes", greedy, max_new_tokens=max_new_tokens)
    assert cut.tokens == own.tokens[:max_new_tokens]


def test_an_end_that_the_caller_names() -> None:
    text = "a sad ca t"
    config = UGSDConfig(eos_token_id=codec("metaspace").encode(text)[3], entropy_threshold=100.0)
    result, _, _ = write("bytes", "metaspace", config, said=text)
    assert result.tokens[-1] == config.eos_token_id
    assert config.eos_token_id not in result.tokens[:-1]
    assert text.startswith(result.text)


def test_events_tell_the_verifiers_text() -> None:
    drafter, model = WritingModel("bytes", SPEECH), WritingModel("metaspace", SPEECH, longest=True)
    decoder = Decoder(drafter, LocalVerifier(model), UGSDConfig(entropy_threshold=1.0, rank=1))
    events = list(decoder.stream(inputs=NOTHING, verifier_inputs=NOTHING))
    assert "".join(event.text for event in events) == SPEECH
    assert {token.source for event in events for token in event.tokens} >= {"edge", "accepted"}


@pytest.mark.parametrize(("draft", "verifier"), PAIRS[:4])
def test_a_batch_is_its_requests_one_by_one(draft: str, verifier: str) -> None:
    drafter, model = tiny(draft, 3), tiny(verifier, 4)
    config = UGSDConfig(entropy_threshold=2.0, rank=5)
    decoder = Decoder(drafter, LocalVerifier(model), config)
    texts = ["The speaker", "A", "Die Sprecherin klingt"]
    several = decoder.generate(
        inputs=[prompt(drafter, text) for text in texts],
        verifier_inputs=[prompt(model, text) for text in texts],
        max_new_tokens=24,
    )
    for text, result in zip(texts, several, strict=True):
        one = decoder.generate(inputs=prompt(drafter, text), verifier_inputs=prompt(model, text), max_new_tokens=24)
        assert result.tokens == one.tokens
        assert result.metrics.drafter_forwards == one.metrics.drafter_forwards


def test_audio_models_with_other_tokenizers(audio_lm: Callable[..., AudioLM], speech: Any) -> None:
    heard, verifier = audio_lm("qwen2_5_omni"), audio_lm("qwen2_audio")
    drafter = AudioLM(heard.model, tokenizers.build("byte_bpe"))  # 420 of its 512 columns
    config = UGSDConfig(always_escalate=True, rule="greedy")
    result = Decoder(drafter, LocalVerifier(verifier), config).generate(
        inputs=heard.prepare(speech), verifier_inputs=verifier.prepare(speech), max_new_tokens=32
    )
    alone = Decoder(None, LocalVerifier(verifier), config).generate(speech, max_new_tokens=32)
    assert result.tokens == alone.tokens


# Which pairs are translated


def test_what_needs_the_same_tokens_is_refused() -> None:
    drafter, model = tiny("byte_bpe", 0), tiny("bytes", 1)
    for rule in ("exact", "block"):
        with pytest.raises(ValueError, match=f"rule='{rule}' needs the drafter's probability of each of the verifier"):
            Decoder(drafter, LocalVerifier(model), UGSDConfig(rule=rule))
    with pytest.raises(VocabularyMismatchError, match="differ in .* graph=True drafts in the verifier's tokens"):
        Decoder(drafter, LocalVerifier(model), UGSDConfig(graph=True))
    Decoder(drafter, None, UGSDConfig(rule="exact"))


def test_the_same_tokens_are_not_translated() -> None:
    narrow, wide = tiny("bytes", 0), tiny("bytes", 1, width=32)
    wide.model.resize_token_embeddings(300)
    config = UGSDConfig(rule="exact")
    assert translation_between(narrow, LocalVerifier(wide), config, wide.eos_token_ids) is None
    unnamed = AudioLM(tiny("byte_bpe", 1).model)
    assert translation_between(narrow, LocalVerifier(unnamed), config, frozenset()) is None
    other = translation_between(narrow, LocalVerifier(tiny("byte_bpe", 1)), UGSDConfig(), frozenset({1}))
    assert other is not None
    assert (other.drafter.end, other.verifier.end) == (narrow.tokenizer.eos_token_id, 1)
