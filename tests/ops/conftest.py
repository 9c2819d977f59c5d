"""Runs a test on the implementation that `cases.on_backends` names; Triton's between guard zones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
from hypothesis import HealthCheck, settings

from tests.ops.cases import Backend
from tests.ops.guard_zones import guard_zones

settings.register_profile(
    "ops",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend | None]:
    """The implementation in use; None in tests that choose their own."""
    chosen: Backend | None = getattr(request, "param", None)
    if chosen is None:
        yield None
        return
    with chosen.use(), guard_zones() if chosen.name == "triton" else nullcontext():
        yield chosen
