"""Asking a verifier for verdicts, one or several at a time."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any, NamedTuple

from ugsd_fast.decoding.ahead import AheadDrafter, draft_ahead
from ugsd_fast.decoding.block import Block
from ugsd_fast.errors import attempt

if TYPE_CHECKING:
    from ugsd_fast.verifier.base import Verdict


class VerifyCall(NamedTuple):
    """What `VerifierSession.verify` is asked: the session, and its arguments."""

    session: Any
    committed: Sequence[int]
    block: Block
    bonus: bool


def verify_ahead(
    calls: Sequence[VerifyCall], drafters: Sequence[AheadDrafter], rooms: Sequence[int]
) -> list[Verdict | Exception]:
    """Verdicts as `verify_calls` gives them; while they are on their way, up to `rooms` tokens are drafted ahead.

    All that is drafted ahead shares its forward passes, the branches of one request too.
    """
    futures: list[Future[Verdict]] = [
        session.submit(committed, block, bonus=bonus) for session, committed, block, bonus in calls
    ]
    try:
        return _wait_drafting(calls, drafters, rooms, futures)
    except BaseException:
        for future in futures:
            future.cancel()  # nobody will hear of it
        raise


def _wait_drafting(
    calls: Sequence[VerifyCall],
    drafters: Sequence[AheadDrafter],
    rooms: Sequence[int],
    futures: Sequence[Future[Verdict]],
) -> list[Verdict | Exception]:
    failed: dict[int, Exception] = {}
    while waiting := [index for index, future in enumerate(futures) if index not in failed and not future.done()]:
        able = [(index, line) for index in waiting for line in drafters[index].lines(rooms[index], calls[index].block)]
        if able:
            for (index, line), error in zip(able, draft_ahead([line for _, line in able]), strict=True):
                given_up = None if error is None else attempt(drafters[index].give_up, line, error)
                if given_up is not None:
                    failed[index] = given_up
                    futures[index].cancel()
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
