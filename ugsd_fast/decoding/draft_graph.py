"""The draft step at fixed addresses: a CUDA graph replays it on a GPU, and the drafter never waits within a block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from ugsd_fast import ops
from ugsd_fast.decoding.block import DraftBlock, UnreadBlock, gate
from ugsd_fast.decoding.config import UGSDConfig
from ugsd_fast.decoding.sampling import RULES_WITH_DRAFT_LOGITS, draw, filter_logits
from ugsd_fast.decoding.unread import UnreadVerdict, behind_unread
from ugsd_fast.models import AudioLM
from ugsd_fast.models.static_sequence import StaticSequence

_CAPACITY_STEP = 256  # tokens: requests of about the same length share a cache
_OF_TWO = -2  # feeds of a step that is given two tokens, one or both of which stand


class Replayed:
    """A call on fixed tensors: made as it is the first time, then captured in a CUDA graph and replayed.

    On other devices than a GPU it is always made as it is.
    """

    def __init__(self, call: Callable[[], Tensor | None], device: torch.device):
        self._call = call
        self._device = device
        self._warm = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Tensor | None = None

    @property
    def captured(self) -> bool:
        """Whether calls are replays of a graph."""
        return self._graph is not None

    def __call__(self) -> Tensor | None:
        if self._device.type != "cuda":
            return self._call()
        if not self._warm:  # libraries set themselves up in the first call, which a capture would not allow
            self._warm = True
            side, current = torch.cuda.Stream(self._device), torch.cuda.current_stream(self._device)
            side.wait_stream(current)
            with torch.cuda.stream(side):
                result = self._call()
            current.wait_stream(side)
            return result
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._result = self._call()
            self._graph = graph
        self._graph.replay()
        return self._result


class DraftGraph:
    """Drafts the continuation of one request after another in one static cache; takes the place of a `Drafter`.

    A step is a forward pass, a draw and the notes of both; the gate closes the block. All of it stays on the device,
    and a block takes one copy to the host, whatever its length.

    Parameters
    ----------
    model : AudioLM
        The edge model.
    config : UGSDConfig
        Sampling, gate and threshold.
    eos_token_ids : frozenset of int
        Tokens that end a caption.
    capacity : int
        Tokens that prompt and caption may have together.
    """

    def __init__(self, model: AudioLM, config: UGSDConfig, *, eos_token_ids: frozenset[int], capacity: int):
        device, width = model.device, config.longest_block
        self.capacity = -(-capacity // _CAPACITY_STEP) * _CAPACITY_STEP
        self._config = config
        self._last_token = model.vocab_size - 1
        self._ends = eos_token_ids
        self._sequence = StaticSequence(model.model, self.capacity, model.family)
        self._eos = torch.tensor(sorted(eos_token_ids), dtype=torch.long, device=device)
        self._fed = torch.zeros(1, 2, dtype=torch.long, device=device)  # what the next step appends: the last, or both
        self._feeds = 0  # of them; 0: the prompt comes first
        self._new = torch.ones(1, dtype=torch.long, device=device)  # of both, how many stand behind an unread verdict
        self._unread: UnreadVerdict | None = None
        self._slot = torch.zeros(1, dtype=torch.long, device=device)
        self._draws = torch.zeros(1, dtype=torch.long, device=device)
        self._tokens = torch.zeros(1, width, dtype=torch.long, device=device)
        self._entropy = torch.zeros(1, width, dtype=torch.float32, device=device)
        self._logits: Tensor | None = None  # [1, K, V], made by the first step where the rule wants them
        self._inputs: Mapping[str, Tensor] = {}
        self._drafted = 0
        self._steps = {feeds: Replayed(partial(self._step, feeds), device) for feeds in (1, 2, _OF_TWO)}
        self._gates: dict[int, Replayed] = {}
        self._device = device

    @property
    def forwards(self) -> int:
        """Forward passes of the current request."""
        return self._sequence.forwards

    @property
    def steps(self) -> tuple[Replayed, ...]:
        """The draft step on one token, on two, and on as many of two as the device says."""
        return tuple(self._steps.values())

    def start(self, inputs: Mapping[str, Tensor]) -> DraftGraph:
        """Begin a request on prepared inputs of the edge model; the last one is forgotten."""
        self._inputs = inputs
        self._feeds, self._unread = 0, None
        self._draws.zero_()
        return self

    @property
    def device(self) -> torch.device:
        """Where it drafts."""
        return self._device

    @property
    def ahead(self) -> int:
        """Tokens drafted ahead of the last verdict."""
        return self._drafted if self._unread else 0

    def draft(self, length: int) -> DraftBlock:
        """Draft `length` tokens, at most ``config.longest_block``, in as many forward passes."""
        return self.draft_unread(length).read()

    @torch.inference_mode()
    def draft_unread(self, length: int) -> UnreadBlock:
        """What `draft` returns, with nothing read by the host."""
        self._slot.zero_()
        if not self._feeds:
            self._take(self._sequence.prefill(self._inputs)[:, 0])
            self._inputs = {}
        else:
            self._run(self._feeds)
        for _ in range(length - 1):
            self._run(1)
        self._drafted = length
        if length not in self._gates:
            self._gates[length] = Replayed(
                lambda: gate(self._tokens[:, :length], self._entropy[:, :length], self._config, self._eos), self._device
            )
        record = self._gates[length]()
        assert record is not None
        logits = None if self._logits is None else self._logits[:, :length].clone()
        # Drawn from nothing finite, a token is negative; a verifier cannot be fed it.
        tokens = self._tokens[:, :length].clamp(min=0)
        return UnreadBlock(tokens, logits, record[0].clone(), self._ends)

    @torch.inference_mode()
    def commit(self, num_accepted: int, next_token: int) -> None:
        """Keep `num_accepted` tokens of the last block and append `next_token` (-1: none)."""
        if self._unread is not None:
            self._sequence.close(self._unread.cached(num_accepted, next_token) + self._drafted - 1)
            self._unread = None
            return
        cached = self._drafted - 1
        if num_accepted < cached:
            self._sequence.rollback(cached - num_accepted)
        self._feeds = max(num_accepted - cached, 0) + (next_token >= 0)
        if next_token >= 0:
            self._fed[:, 0] = self._fed[:, 1]
            self._fed[:, 1] = min(next_token, self._last_token)

    def can_commit_unread(self, length: int) -> bool:
        """Whether a block can be drafted behind the last one before its verdict is known: always."""
        return True

    @torch.inference_mode()
    def commit_unread(self, accepted: ops.Acceptance) -> None:
        """Go on behind a verdict that nobody has read; see `Drafter.commit_unread`."""
        behind = behind_unread(accepted, self._fed[:, 1], self._drafted, self._last_token)
        self._sequence.rollback_unread(behind.rejected)
        self._fed.copy_(behind.fed)
        self._new.copy_(behind.new)
        self._feeds = _OF_TWO
        self._unread = UnreadVerdict(self._sequence.length - self._drafted + 1, self._drafted)
        self._drafted = 0

    def _run(self, feeds: int) -> None:
        self._steps[feeds]()
        self._sequence.appended(abs(feeds))

    def _step(self, feeds: int) -> None:
        new = self._new if feeds == _OF_TWO else None
        self._take(self._sequence.forward(self._fed[:, -abs(feeds) :], new)[:, 0])

    def _take(self, z: Tensor) -> None:
        """Draw from the logits `z` [1, V], note token and entropy in the next slot, and feed the token."""
        token, entropy = draw(z, self._config, self._draws)
        self._draws.add_(1)
        self._fed[:, 1] = token.clamp(min=0)  # a row with nothing finite draws -1
        self._tokens.index_copy_(1, self._slot, token[:, None])
        self._entropy.index_copy_(1, self._slot, entropy[:, None])
        if self._config.rule in RULES_WITH_DRAFT_LOGITS:
            filtered = filter_logits(z, self._config)
            if self._logits is None:
                self._logits = filtered.new_zeros(1, self._config.longest_block, filtered.shape[-1])
            self._logits.index_copy_(1, self._slot, filtered[:, None])
        self._slot.add_(1)
