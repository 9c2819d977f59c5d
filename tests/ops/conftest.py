"""Runs a test on the implementation that `cases.on_backends` names; Triton's between guard zones."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from hypothesis import HealthCheck, settings

from bench.interpreter import quick_calls
from tests.ops.cases import Backend
from tests.ops.guard_zones import guard_zones
from tests.ops.interpreted import chosen as interpreted

settings.register_profile(
    "ops",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under the interpreter, keep the tests of the kernels that it runs."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        items[:] = interpreted(items)


@pytest.fixture(autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend | None]:
    """The implementation in use; None in tests that choose their own."""
    chosen: Backend | None = getattr(request, "param", None)
    if chosen is None:
        yield None
        return
    with ExitStack() as stack:
        stack.enter_context(chosen.use())
        if chosen.name == "triton":
            stack.enter_context(quick_calls())
            stack.enter_context(guard_zones())
        yield chosen
