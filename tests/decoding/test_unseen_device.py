"""The loop on a device that nobody can look at: every read but those that are planned raises, and so does a mixed op.

Tensors on "meta" have shapes and no values: `item`, `bool` and copies to the host raise, as do operations between them
and the host's. What the loop reads is scripted, so every read is seen; all else runs as on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from ugsd_fast import AudioLM, Decoder, LocalVerifier, UGSDConfig
from ugsd_fast.decoding import drafter as drafter_module

ACCEPTED, FOLLOWING, DRAFTED = 1, 7, 5
BLOCK, LAST = 4, 2  # tokens of a block; of the last, which has no room for more
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
PROMPT = {"input_ids": torch.ones(1, 7, dtype=torch.long, device="meta")}


def record(width: int) -> list[float]:
    """What a drafted block notes: all of it, uncertain, to be escalated."""
    return [width, 2.0, 1.0, *[DRAFTED] * width, *[2.0] * width]


class Reads:
    """Copies to the host of tensors on "meta", whose values are scripted, for a number of requests in step."""

    def __init__(self) -> None:
        self.count = 0
        self.rows, self.together = 1, True

    def of(self, tensor: Tensor) -> list[Any]:
        self.count += 1
        if tensor.dim() == 2:  # blocks [rows, 3 + 2·K]
            return [record((tensor.shape[1] - 3) // 2)] * self.rows
        verdict, numbers = [ACCEPTED, FOLLOWING], tensor.numel() // self.rows
        if numbers == 2:
            return verdict * self.rows
        if numbers in (3 + 2 * BLOCK, 3 + 2 * LAST):
            return record((numbers - 3) // 2)
        blocks = record((numbers - 5) // 2)
        return verdict * self.rows + blocks * self.rows if self.together else (verdict + blocks) * self.rows


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    made, original = Reads(), Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: made.of(self) if self.device.type == "meta" else original(self))
    # Of the prompt's mask, whether nothing is padding: once a request and model.
    monkeypatch.setattr(transformers.masking_utils, "fast_all", lambda mask: True)
    return made


@pytest.mark.parametrize(
    ("rows", "graph", "attention"),
    [(1, False, "sdpa"), (3, False, "sdpa"), (3, False, "eager"), (1, True, "sdpa")],
    ids=["1", "3", "3 eager", "graph"],
)
@pytest.mark.parametrize("kind", ["edge", "always", "gated", "at once"])
def test_reads_of_a_caption(kind: str, rows: int, graph: bool, attention: str, reads: Reads) -> None:
    """Two tokens a block: one read a block, whoever is asked, or two of a gated one with less than 2K tokens left."""
    config = transformers.Qwen2Config(vocab_size=64, num_key_value_heads=1, pad_token_id=None, **SIZES)
    config._attn_implementation = attention
    draft, verifier = (AudioLM(transformers.Qwen2ForCausalLM(config).to("meta")) for _ in range(2))
    settings = {
        "edge": {},
        "always": {"always_escalate": True},
        "gated": {},  # deferred by default, as the drafter is not on a CPU
        "at once": {"defer_verdicts": False},
    }[kind]
    ugsd = UGSDConfig(block_size=BLOCK, bonus=False, rule="rank", eos_token_id=-1, graph=graph, **settings)
    reads.rows, reads.together = rows, kind != "always"
    decoder = Decoder(draft, None if kind == "edge" else LocalVerifier(verifier), ugsd)
    prompts: dict[str, Any] = {"inputs": [PROMPT] * rows}
    if kind != "edge":
        prompts["verifier_inputs"] = [PROMPT] * rows
    results = decoder.generate(**prompts, max_new_tokens=16)
    blocks = [len(result.trace.blocks) for result in results]
    assert [len(result.tokens) for result in results] == [16] * rows
    assert blocks == [4 if kind == "edge" else 8] * rows
    more = {"edge": 0, "always": 0, "gated": 3, "at once": blocks[0]}[kind]
    assert reads.count == blocks[0] + more


def test_a_look_at_the_device_is_noticed(reads: Reads, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = drafter_module._forward

    def looks(drafters: Any) -> Tensor:
        z = forward(drafters)
        assert bool(z.any())
        return z

    monkeypatch.setattr(drafter_module, "_forward", looks)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        test_reads_of_a_caption("gated", 1, False, "sdpa", reads)
