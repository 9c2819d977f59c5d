"""A verifier hears of a request as soon as a block of it is certain to be escalated, and never before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from ugsd_fast import Decoder, RemoteVerifier, UGSDConfig
from ugsd_fast.decoding.block import DraftBlock
from ugsd_fast.demo import EmbeddedPair, clips, load_pair
from ugsd_fast.serving.server import serve_model
from ugsd_fast.verifier import Verdict

LENGTH = 30


@pytest.fixture(scope="module")
def pair() -> EmbeddedPair:
    return load_pair(threads=1)


class Foretold:
    """A verifier in this process that takes down how many tokens were drafted when it was told to begin."""

    def __init__(self, pair: EmbeddedPair):
        self._verifier = pair.verifier
        self.drafted = 0
        self.begun: list[int] = []
        self.asked: list[int] = []
        self.tokenizer, self.max_audio_seconds = pair.verifier.tokenizer, pair.verifier.max_audio_seconds
        self.eos_token_ids = pair.verifier.eos_token_ids
        self.decode = pair.verifier.decode

    def open(self, config: UGSDConfig, **request: Any) -> Any:
        session = self._verifier.open(config, **request)
        verify = session.verify

        def judge(committed: Sequence[int], block: DraftBlock, *, bonus: bool) -> Verdict:
            self.asked.append(self.drafted)
            return verify(committed, block, bonus=bonus)

        session.begin = lambda: self.begun.append(self.drafted)  # type: ignore[attr-defined]
        session.verify = judge  # type: ignore[method-assign]
        return session

    def count(self, *_: Any) -> None:
        self.drafted += 1


def foretold(pair: EmbeddedPair, config: UGSDConfig, clip: int = 0) -> tuple[Foretold, Any]:
    verifier = Foretold(pair)
    hook = pair.draft.model.register_forward_hook(verifier.count)
    try:
        result = Decoder(pair.draft, verifier, config).generate(
            clips()[clip].path, prompt=pair.prompt, max_new_tokens=LENGTH
        )
    finally:
        hook.remove()
    plain = Decoder(pair.draft, pair.verifier, config).generate(
        clips()[clip].path, prompt=pair.prompt, max_new_tokens=LENGTH
    )
    assert result.tokens == plain.tokens
    return verifier, result


@pytest.mark.parametrize("clip", range(3))
def test_with_the_first_uncertain_token(clip: int, pair: EmbeddedPair) -> None:
    verifier, result = foretold(pair, replace(pair.config, block_size=10), clip)
    first = next(block for block in result.trace.blocks if block.escalated)
    at = next(k for k, nats in enumerate(first.entropy) if nats > pair.config.entropy_threshold)
    assert at + 1 < len(first.draft_tokens)
    assert verifier.begun == [first.start + at + 1]
    assert verifier.asked[0] == first.start + len(first.draft_tokens)


def test_with_the_first_token_of_a_block_where_that_decides(pair: EmbeddedPair) -> None:
    verifier, result = foretold(pair, replace(pair.config, gate="first", block_size=3, entropy_threshold=0.5))
    first = next(block for block in result.trace.blocks if block.escalated)
    assert verifier.begun == [first.start + 1]


def test_before_the_draft_where_every_block_is_escalated(pair: EmbeddedPair) -> None:
    assert foretold(pair, replace(pair.config, always_escalate=True, rule="greedy"))[0].begun == [0]


def test_not_where_only_a_whole_block_decides(pair: EmbeddedPair) -> None:
    """A mean can fall again; and where an uncertain token ends its block, the block itself comes at once."""
    for changes in ({"gate": "mean", "entropy_threshold": 0.2}, {"adaptive": "entropy"}):
        verifier, _ = foretold(pair, replace(pair.config, **changes))
        assert verifier.begun == []
        assert verifier.asked


def test_an_uncertain_token_behind_the_end_does_not_count(pair: EmbeddedPair) -> None:
    """It is drafted, as a block's tokens are not looked at one by one, but is in no block."""
    edge = Decoder(pair.draft, None, pair.config).generate(clips()[0].path, prompt=pair.prompt)
    entropy = [token.entropy for token in edge.trace.tokens()]
    at = next(k for k, nats in enumerate(entropy) if nats > pair.config.entropy_threshold)  # type: ignore[operator]
    assert edge.tokens.index(edge.tokens[at - 1]) == at - 1
    config = replace(pair.config, eos_token_id=edge.tokens[at - 1], block_size=at + 2)
    verifier, result = foretold(pair, config)
    assert result.tokens == edge.tokens[:at]
    assert verifier.drafted == at + 2
    assert verifier.begun == verifier.asked == []


def test_captions_of_the_edge_alone_send_nothing(pair: EmbeddedPair) -> None:
    """Over a server: bytes leave the device if, and only if, a block was escalated."""
    with serve_model(pair.verifier.model, name="embedded", port=0).running() as server:
        frames = server.hub.metrics.frames
        local = 0
        for threshold in (0.7, 1.0, 1.4):
            for gate in ("max", "mean", "first"):
                with RemoteVerifier(server.url, uplink="features") as verifier:
                    config = replace(pair.config, entropy_threshold=threshold, gate=gate)  # type: ignore[arg-type]
                    results = [
                        Decoder(pair.draft, verifier, config).generate(
                            clip.path, prompt=pair.prompt, max_new_tokens=LENGTH
                        )
                        for clip in clips()[:3]
                    ]
                for result in results:
                    asked = any(block.escalated for block in result.trace.blocks)
                    assert bool(result.ledger) == bool(result.metrics.uplink_bytes) == asked
                    assert ("features" in result.ledger) == asked
                    local += not asked
        opened = frames.labels("Open")._value.get()
        assert 3 < local == 27 - opened < 27
