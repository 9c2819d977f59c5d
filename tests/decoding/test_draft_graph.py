"""The draft step at fixed addresses drafts as the ordinary drafter does, and takes one host read a block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ugsd_fast import AudioLM, Decoder, LocalVerifier, UGSDConfig
from ugsd_fast.decoding.draft_graph import DraftGraph
from ugsd_fast.errors import ModelError

NEVER_ENDS = -1
HOST_READS = {
    "aten._local_scalar_dense.default",
    "aten.nonzero.default",
    "aten.equal.default",
    "aten.is_nonzero.default",
}

LoadModel = Callable[..., AudioLM]
Speech = tuple[np.ndarray, int]


class HostReads(TorchDispatchMode):
    """Counts the ops that wait for the device, and copies of a whole tensor to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func) in HOST_READS:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["qwen2_audio", "qwen2_5_omni", "qwen3_omni"])
@pytest.mark.parametrize(
    "settings",
    [
        {"always_escalate": True, "rule": "greedy"},
        {"rule": "rank", "rank": 3, "entropy_threshold": 6.0, "bonus": True},
        {"always_escalate": True, "rule": "exact", "temperature": 0.7, "top_k": 20, "seed": 5},
        {"always_escalate": True, "rule": "block", "temperature": 1.0, "top_p": 0.9, "block_size": 3},
    ],
    ids=["greedy", "rank", "exact", "block"],
)
def test_drafts_as_the_ordinary_drafter(
    family: str, settings: dict[str, Any], audio_lm: LoadModel, speech: Speech
) -> None:
    draft, verifier = audio_lm(family, noise=0.05), audio_lm(family)
    decoders = [
        Decoder(draft, LocalVerifier(verifier), UGSDConfig(eos_token_id=NEVER_ENDS, graph=graph, **settings))
        for graph in (False, True)
    ]
    for tokens in (1, 23, 12):  # the second and third request run in the first one's cache
        plain, graph = (decoder.generate(speech, max_new_tokens=tokens) for decoder in decoders)
        assert graph.tokens == plain.tokens
        assert graph.metrics.drafter_forwards == plain.metrics.drafter_forwards
        assert [b.num_accepted for b in graph.trace.blocks] == [b.num_accepted for b in plain.trace.blocks]
        for one, other in zip(graph.trace.blocks, plain.trace.blocks, strict=True):
            assert one.entropy == pytest.approx(other.entropy, abs=1e-4)
    assert len(decoders[1]._idle_graphs) == 1


def test_one_host_read_a_block(audio_lm: LoadModel, speech: Speech) -> None:
    model = audio_lm("qwen2_audio")
    config = UGSDConfig(eos_token_id=NEVER_ENDS, temperature=0.8, rule="exact", graph=True)
    graph = DraftGraph(model, config, eos_token_ids=frozenset({NEVER_ENDS}), capacity=400)
    graph.start(model.prepare(speech))
    graph.draft(5)
    graph.commit(5, 7)
    for accepted, following in ((2, 9), (5, -1), (5, 3)):
        with HostReads() as reads:
            block = graph.draft(5)
        assert len(block) == 5
        # `tolist` of the record is one copy from a device; on CPU tensors it reads their memory without an op
        assert not reads.counts, reads.counts
        with HostReads() as reads:
            graph.commit(accepted, following)
        assert not reads.counts, reads.counts


def test_eos_ends_the_caption_inside_a_block(audio_lm: LoadModel, speech: Speech) -> None:
    model = audio_lm("qwen2_audio")
    free = Decoder(model, None, UGSDConfig(eos_token_id=NEVER_ENDS)).generate(speech, max_new_tokens=8)
    config = UGSDConfig(eos_token_id=free.tokens[6], graph=True)
    first = free.tokens.index(free.tokens[6])
    assert Decoder(model, None, config).generate(speech, max_new_tokens=8).tokens == free.tokens[: first + 1]


def test_a_prompt_of_several_rows_is_refused(audio_lm: LoadModel, speech: Speech) -> None:
    model = audio_lm("qwen2_audio")
    inputs = {name: tensor.repeat(2, *[1] * (tensor.dim() - 1)) for name, tensor in model.prepare(speech).items()}
    with pytest.raises(ModelError, match="expected one whole row"):
        Decoder(model, None, UGSDConfig(graph=True)).generate(inputs=inputs, max_new_tokens=2)


def test_a_setting_that_is_no_truth_value_is_refused() -> None:
    with pytest.raises(ValueError, match="graph is 1, expected True or False"):
        UGSDConfig(graph=1)  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: nothing can be captured")
def test_captured_steps_draft_as_uncaptured_ones(audio_lm: LoadModel, speech: Speech) -> None:
    model = audio_lm("qwen2_audio")
    on_cpu = Decoder(model, None, UGSDConfig(eos_token_id=NEVER_ENDS)).generate(speech, max_new_tokens=40).tokens
    model.model.to("cuda")
    try:
        decoder = Decoder(model, None, UGSDConfig(eos_token_id=NEVER_ENDS, graph=True))
        for _ in range(2):
            assert decoder.generate(speech, max_new_tokens=40).tokens == on_cpu
    finally:
        model.model.to("cpu")
