"""Which attention implementation a model runs, and what kind of mask that takes."""

from __future__ import annotations

from typing import Any

# Name under which `ugsd_fast.models.packed` puts itself before an implementation.
PACKED_PREFIX = "ugsd|"


def attention_of(config: Any) -> str:
    """Name of the attention implementation that a model's attention modules, given their config, compute with."""
    return (vars(config).get("_attn_implementation_internal") or "eager").removeprefix(PACKED_PREFIX)
