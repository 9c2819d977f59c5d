"""Asking a verifier for verdicts, one or several at a time."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any, NamedTuple

from ugsd_fast.decoding.drafter import DraftBlock, Drafter, draft_ahead
from ugsd_fast.errors import attempt

if TYPE_CHECKING:
    from ugsd_fast.verifier.base import Verdict


class VerifyCall(NamedTuple):
    """What `VerifierSession.verify` is asked: the session, and its arguments."""

    session: Any
    committed: Sequence[int]
    block: DraftBlock
    bonus: bool


def verify_ahead(
    calls: Sequence[VerifyCall], drafters: Sequence[Drafter], rooms: Sequence[int]
) -> list[Verdict | Exception]:
    """Verdicts as `verify_calls` gives them; while they are on their way, up to `rooms` tokens are drafted ahead."""
    futures: list[Future[Verdict]] = [
        session.submit(committed, block, bonus=bonus) for session, committed, block, bonus in calls
    ]
    failed: dict[int, Exception] = {}
    while waiting := [index for index, future in enumerate(futures) if index not in failed and not future.done()]:
        able = [
            index
            for index in waiting
            if len(drafters[index].buffer) < rooms[index] and drafters[index].goes_on(calls[index].block)
        ]
        if able:
            errors = draft_ahead([drafters[index] for index in able])
            failed |= {index: error for index, error in zip(able, errors, strict=True) if error is not None}
        else:
            wait([futures[index] for index in waiting])
    return [failed[index] if index in failed else attempt(future.result) for index, future in enumerate(futures)]


def verify_calls(verifier: Any, calls: Sequence[VerifyCall]) -> list[Verdict | Exception]:
    """Verdicts of several sessions of one verifier, in the order of the calls; one that cannot be had is an exception.

    A verifier with a ``verify_batch`` is asked once.
    """
    if len(calls) > 1 and hasattr(verifier, "verify_batch"):
        return verifier.verify_batch(calls)
    return [attempt(session.verify, committed, block, bonus=bonus) for session, committed, block, bonus in calls]
