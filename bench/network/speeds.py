"""How fast the stand-ins are made to be: seconds a token on a device, seconds a forward in a data centre.

No such device is here to measure, so the constants are computed: a decoding step reads the weights once, at a share of
the memory bandwidth that decoders reach.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

_REACHED = 0.7  # of the bandwidth


@dataclass(frozen=True)
class Speeds:
    """Of a pair: seconds."""

    name: str
    draft_step: float
    verify_forward: float
    verify_prompt: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


def _step(gigabytes: float, bandwidth: float) -> float:
    return gigabytes / bandwidth / _REACHED


DENSE = Speeds(
    "3B drafter in 4 bits (1.9 GB) on a Jetson AGX Orin (205 GB/s); dense 30B verifier in bf16 (61 GB) on an A100 "
    "(2039 GB/s), its prompt of 300 tokens at half of 312 TFLOP/s",
    draft_step=_step(1.9, 204.8),
    verify_forward=_step(61, 2039),
    verify_prompt=2 * 30.5e9 * 300 / 156e12,
)
MIXTURE = Speeds(
    "the same drafter; a 30B-A3B mixture of experts in bf16 on an H100 (3350 GB/s): 6.6 GB of active weights a token, "
    "three times as much for a block, and 5 ms of launches a forward",
    draft_step=_step(1.9, 204.8),
    verify_forward=_step(3 * 6.6, 3350) + 0.005,
    verify_prompt=0.04,
)
SPEEDS = {"dense": DENSE, "mixture": MIXTURE}


def slowed(call: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    """`call`, taking at least so long; the processor is free meanwhile."""

    def wait(*args: Any, **kwargs: Any) -> Any:
        end = time.perf_counter() + seconds
        result = call(*args, **kwargs)
        time.sleep(max(end - time.perf_counter(), 0))
        return result

    return wait
