"""METRICS against their definitions, on traces written by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ugsd_fast.decoding.trace import BlockRecord, Result, Trace, Traffic

EDGE = BlockRecord(0, (1, 2, 3), (0.1, 0.2, 0.3), 0.3, False, 3, (1, 2, 3), 0.01, 0.0, True)
REJECTED = BlockRecord(3, (4, 5, 6), (0.1, 2.0, 0.3), 2.0, True, 1, (4, 9), 0.01, 0.02, True)
BONUS = BlockRecord(5, (7, 8), (0.4, 1.9), 1.9, True, 2, (7, 8, 10), 0.01, 0.02, True)
FAILED = BlockRecord(8, (11, 12), (0.4, 1.7), 1.7, True, 2, (11, 12), 0.01, 0.5, False)


def test_metrics_follow_their_definitions() -> None:
    trace = Trace([EDGE, REJECTED, BONUS, FAILED])
    metrics = trace.metrics(
        latency=2.0,
        time_to_first_token=0.1,
        verifier_forwards=2,
        drafter_forwards=10,
        traffic=Traffic(uplink_bytes=5, downlink_bytes=6, audio_bytes=7),
    )
    assert metrics.acceptance_rate == pytest.approx(3 / 5)
    assert metrics.acceptance_length == pytest.approx((2 + 3) / 2)
    assert metrics.escalated_share == pytest.approx(7 / 10)
    assert metrics.position_histogram == (2, 1, 0)
    assert metrics.tokens_per_second == pytest.approx(10 / 2.0)
    assert (metrics.uplink_bytes, metrics.downlink_bytes, metrics.audio_bytes) == (5, 6, 7)
    assert (metrics.verifier_forwards, metrics.drafter_forwards) == (2, 10)
    assert (metrics.latency, metrics.time_to_first_token) == (2.0, 0.1)


def test_each_token_has_its_source() -> None:
    tokens = Trace([EDGE, REJECTED, BONUS, FAILED]).tokens()
    assert [token.token for token in tokens] == [1, 2, 3, 4, 9, 7, 8, 10, 11, 12]
    assert [token.source for token in tokens] == [
        *["edge"] * 3,
        *["accepted", "corrected"],
        *["accepted", "accepted", "bonus"],
        *["edge"] * 2,
    ]
    assert [token.entropy for token in tokens][3:8] == [0.1, None, 0.4, 1.9, None]


def test_nothing_verified_or_drafted_gives_zeros() -> None:
    alone = replace(EDGE, draft_tokens=(), entropy=(), escalated=True, num_accepted=0, emitted=(5,))
    for trace in (Trace(), Trace([EDGE]), Trace([alone])):
        metrics = trace.metrics(latency=1.0, time_to_first_token=1.0, verifier_forwards=0, drafter_forwards=0)
        assert metrics.acceptance_rate == metrics.acceptance_length == metrics.escalated_share == 0.0
        assert metrics.position_histogram == ()
    assert [token.source for token in alone.tokens()] == ["verifier"]


def test_result_is_json() -> None:
    trace = Trace([EDGE, REJECTED])
    metrics = trace.metrics(latency=1.0, time_to_first_token=0.5, verifier_forwards=1, drafter_forwards=6)
    result = json.loads(json.dumps(Result("text", [1, 2, 3, 4, 9], trace, metrics).to_dict()))
    assert list(result) == ["text", "tokens", "blocks", "metrics"]
    assert result["blocks"][1]["emitted"] == [4, 9]
    assert result["blocks"][0]["verified"] is True
