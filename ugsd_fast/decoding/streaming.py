"""Final tokens on their way to a streamer of transformers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from ugsd_fast.decoding.trace import Result, StreamEvent


class Streamer(Protocol):
    """What transformers' ``BaseStreamer`` is: ``TextStreamer``, ``TextIteratorStreamer`` and their like."""

    def put(self, value: Tensor) -> None:
        """Take token ids [1, n] on the host: the prompt's first, then those that became final."""
        ...

    def end(self) -> None:
        """Hand out what was held back."""
        ...


def stream_to(streamer: Streamer, events: Iterable[StreamEvent]) -> Result:
    """Put the tokens of `events` into a streamer, and return the result that the last of them carries.

    The streamer is ended whatever happens: who iterates over it in another thread is not left waiting.
    """
    result = None
    try:
        for event in events:
            streamer.put(torch.tensor([[one.token for one in event.tokens]]))
            result = event.result
    finally:
        streamer.end()
    assert result is not None
    return result
