"""Settings are checked when they are written down."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ugsd_fast import UGSDConfig


def test_defaults_are_the_papers() -> None:
    config = UGSDConfig()
    assert (config.block_size, config.entropy_threshold, config.rule, config.rank) == (5, 1.5, "rank", 20)
    assert (config.gate, config.temperature, config.always_escalate) == ("max", 0.0, False)
    assert not config.lossless
    assert not config.appends_bonus


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_size", 0),
        ("block_size", 2.0),
        ("block_size", True),
        ("entropy_threshold", -0.1),
        ("entropy_threshold", float("nan")),
        ("rule", "best"),
        ("rank", 0),
        ("gate", "median"),
        ("epsilon", 1.5),
        ("delta", -1.0),
        ("top_n", 0),
        ("relax_delta", 2.0),
        ("temperature", -1.0),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 1.0),
        ("seed", -1),
        ("seed", 2**64),
        ("adaptive", "always"),
        ("on_verifier_failure", "ignore"),
    ],
)
def test_a_setting_out_of_range_is_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"UGSDConfig: {field} is .*expected"):
        UGSDConfig(**{field: value})


def test_greedy_does_not_sample() -> None:
    with pytest.raises(ValueError, match="temperature=0.7, expected temperature 0"):
        UGSDConfig(rule="greedy", temperature=0.7)


@pytest.mark.parametrize("rule", ["greedy", "exact", "block"])
def test_lossless_needs_rule_and_escalation(rule: Any) -> None:
    assert UGSDConfig(rule=rule, always_escalate=True).lossless
    assert not UGSDConfig(rule=rule).lossless
    assert UGSDConfig(rule=rule).appends_bonus
    assert not UGSDConfig(rule=rule, bonus=False).appends_bonus
    assert not UGSDConfig(rule="rank", always_escalate=True).lossless
    assert UGSDConfig(rule="rank", bonus=True).appends_bonus


def test_eos_is_one_or_many() -> None:
    assert UGSDConfig().eos_token_ids is None
    assert UGSDConfig(eos_token_id=3).eos_token_ids == {3}
    assert UGSDConfig(eos_token_id=[3, 4]).eos_token_ids == {3, 4}


def test_config_goes_through_json() -> None:
    config = UGSDConfig(block_size=3, rule="exact", temperature=0.5, eos_token_id=7)
    assert UGSDConfig(**json.loads(json.dumps(config.to_dict()))) == config
