"""The loop against the verifier's own ``generate``, against a plain re-implementation, and its forwards counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from ugsd_fast import AudioLM, Decoder, LocalVerifier, UGSDConfig
from ugsd_fast.decoding.block import DraftBlock
from ugsd_fast.decoding.trace import Traffic
from ugsd_fast.errors import AudioError, ModelError, VerifierUnavailable
from ugsd_fast.verifier import Verdict

FAMILIES = ("qwen2_audio", "qwen2_5_omni", "qwen3_omni")
PAIRS = {  # drafter, verifier: same family and across, as Qwen2.5-Omni drafts for Qwen3-Omni
    **{family: (family, family) for family in FAMILIES},
    "qwen2_5_omni-qwen3_omni": ("qwen2_5_omni", "qwen3_omni"),
    "qwen3_omni-qwen2_audio": ("qwen3_omni", "qwen2_audio"),
}
DRAFTERS = {"copy": {"noise": 0.0}, "noisy": {"noise": 0.05}, "random": {"seed": 7}}
NEVER_ENDS = -1  # no token has this id: every caption runs to max_new_tokens

LoadModel = Callable[..., AudioLM]
Speech = tuple[np.ndarray, int]


def greedy(model: AudioLM, audio: Any, tokens: int, *, prompt: str | None = None) -> list[int]:
    """What transformers' own ``generate`` makes of the same inputs."""
    inputs = model.prepare(audio, prompt)
    output = model.model.generate(
        **inputs,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
    )
    return output[0, inputs["input_ids"].shape[1] :].tolist()


@contextmanager
def counted_forwards(**models: AudioLM) -> Iterator[Counter[str]]:
    """Counts forwards of each model and of its audio tower, and the tokens that the former was fed."""
    counts: Counter[str] = Counter()
    hooks = []
    for name, lm in models.items():

        def count_text(_: Any, args: Any, kwargs: dict[str, Any], name: str = name) -> None:
            counts[name] += 1
            counts[f"{name}_tokens"] += kwargs["input_ids"].shape[1]

        def count_audio(_: Any, args: Any, name: str = name) -> None:
            counts[f"{name}_audio"] += 1

        tower = next(module for path, module in lm.model.named_modules() if path.endswith("audio_tower"))
        hooks.append(lm.model.register_forward_pre_hook(count_text, with_kwargs=True))
        hooks.append(tower.register_forward_pre_hook(count_audio))
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("pair", PAIRS)
def test_lossless_greedy_is_the_verifiers_own_generate(
    pair: str, drafter: str, audio_lm: LoadModel, speech: Speech
) -> None:
    draft_family, verifier_family = PAIRS[pair]
    draft, verifier = audio_lm(draft_family, **DRAFTERS[drafter]), audio_lm(verifier_family)
    config = UGSDConfig(always_escalate=True, rule="greedy", eos_token_id=NEVER_ENDS)
    result = Decoder(draft, LocalVerifier(verifier), config).generate(speech, max_new_tokens=32)
    assert result.tokens == greedy(verifier, speech, 32)
    if drafter == "copy" and draft_family == verifier_family:
        assert result.metrics.acceptance_rate == 1.0
        assert result.metrics.verifier_forwards == 6  # 5 blocks of 5 + bonus, then 2 tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_verifier_only_and_edge_only_are_plain_decoding(family: str, audio_lm: LoadModel, speech: Speech) -> None:
    model = audio_lm(family)
    config = UGSDConfig(eos_token_id=NEVER_ENDS)
    expected = greedy(model, speech, 13)
    alone = Decoder(None, LocalVerifier(model), config).generate(speech, max_new_tokens=13)
    edge = Decoder(model, None, config).generate(speech, max_new_tokens=13)
    assert alone.tokens == edge.tokens == expected
    assert {token.source for token in alone.trace.tokens()} == {"verifier"}
    assert {token.source for token in edge.trace.tokens()} == {"edge"}
    assert (alone.metrics.verifier_forwards, alone.metrics.drafter_forwards) == (13, 0)
    assert (edge.metrics.verifier_forwards, edge.metrics.drafter_forwards) == (0, 13)
    assert edge.metrics.escalated_share == alone.metrics.escalated_share == 0.0


def reference_ugsd(
    draft: AudioLM, verifier: AudioLM, audio: Any, config: UGSDConfig, max_new_tokens: int
) -> tuple[list[int], list[bool]]:
    """The paper's algorithm without caches: every distribution from a fresh forward over the whole prefix."""

    def logits(model: AudioLM, tokens: Sequence[int]) -> torch.Tensor:
        inputs = model.prepare(audio)
        ids = torch.cat([inputs.pop("input_ids"), torch.tensor([list(tokens)], dtype=torch.long)], 1)
        inputs["attention_mask"] = torch.ones_like(ids)
        with torch.inference_mode():
            return model.model(input_ids=ids, **inputs).logits[0, -1].double()

    tokens: list[int] = []
    escalated = []
    while len(tokens) < max_new_tokens:
        block: list[int] = []
        entropies = []
        for _ in range(min(config.block_size, max_new_tokens - len(tokens))):
            log_p = torch.log_softmax(logits(draft, tokens + block), -1)
            entropies.append(-(log_p.exp() * log_p).sum().item())
            block.append(int(log_p.argmax()))
        escalated.append(max(entropies) > config.entropy_threshold)
        if escalated[-1]:
            for index, token in enumerate(block):
                target = logits(verifier, tokens + block[:index])
                if int((target > target[token]).sum()) + 1 > config.rank:
                    block = [*block[:index], int(target.argmax())]
                    break
        tokens += block
    return tokens, escalated


@pytest.mark.parametrize("rank", [1, 3, 20])
@pytest.mark.parametrize("pair", ["qwen2_audio", "qwen2_5_omni-qwen3_omni"])
def test_ugsd_is_the_papers_algorithm(pair: str, rank: int, audio_lm: LoadModel, speech: Speech) -> None:
    draft, verifier = audio_lm(PAIRS[pair][0], seed=7), audio_lm(PAIRS[pair][1])
    edge = Decoder(draft, None, UGSDConfig(eos_token_id=NEVER_ENDS)).generate(speech, max_new_tokens=40)
    threshold = float(np.median([block.uncertainty for block in edge.trace.blocks]))
    config = UGSDConfig(entropy_threshold=threshold, rank=rank, eos_token_id=NEVER_ENDS)
    result = Decoder(draft, LocalVerifier(verifier), config).generate(speech, max_new_tokens=24)
    tokens, escalated = reference_ugsd(draft, verifier, speech, config, 24)
    assert result.tokens == tokens
    assert [block.escalated for block in result.trace.blocks] == escalated


def test_forwards_are_as_planned(audio_lm: LoadModel, speech: Speech) -> None:
    draft, verifier = audio_lm("qwen2_audio", noise=0.05), audio_lm("qwen2_5_omni")
    edge = Decoder(draft, None, UGSDConfig(eos_token_id=NEVER_ENDS)).generate(speech, max_new_tokens=40)
    threshold = float(np.median([block.uncertainty for block in edge.trace.blocks]))
    config = UGSDConfig(entropy_threshold=threshold, rank=5, eos_token_id=NEVER_ENDS)
    prompts = {"draft": draft.prepare(speech)["input_ids"], "verifier": verifier.prepare(speech)["input_ids"]}
    with counted_forwards(draft=draft, verifier=verifier) as counts:
        result = Decoder(draft, LocalVerifier(verifier), config).generate(speech, max_new_tokens=40)
    blocks = result.trace.blocks
    escalated = [block for block in blocks if block.escalated]
    assert 0 < len(escalated) < len(blocks)
    # K drafter steps a block, one verifier forward an escalated block, audio towers once a request.
    assert counts["draft"] == result.metrics.drafter_forwards == sum(len(block.draft_tokens) for block in blocks)
    assert counts["verifier"] == result.metrics.verifier_forwards == len(escalated)
    assert counts["draft_audio"] == counts["verifier_audio"] == 1
    # Each model sees the prompt once, every final token at most once, and besides only tokens that were rejected.
    rejected = sum(len(block.draft_tokens) - block.num_accepted for block in escalated)
    seen_by_verifier = max(block.start + len(block.emitted) for block in escalated)
    corrections = sum(block.num_accepted < len(block.emitted) for block in escalated[-1:])
    assert counts["verifier_tokens"] == prompts["verifier"].shape[1] + seen_by_verifier - corrections + rejected
    last_of_block = sum(block.num_accepted < len(block.draft_tokens) for block in blocks)
    assert counts["draft_tokens"] == prompts["draft"].shape[1] + len(result.tokens) - 1 + rejected - last_of_block


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_after_a_rollback_equal_a_fresh_forward(family: str, audio_lm: LoadModel, speech: Speech) -> None:
    model = audio_lm(family)
    inputs = model.prepare(speech)
    generator = torch.Generator().manual_seed(3)
    sequence = model.open(inputs)
    final: list[int] = []
    for fed, rejected in [(0, 0), (5, 3), (1, 0), (7, 7), (4, 1)]:
        tokens = torch.randint(0, 400, (1, fed), generator=generator)
        sequence.forward(tokens)
        sequence.rollback(rejected)
        final += tokens[0, : fed - rejected].tolist()
    probe = torch.randint(0, 400, (1, 3), generator=generator)
    cached = sequence.forward(probe)
    ids = torch.cat([inputs["input_ids"], torch.tensor([final]), probe], dim=1)
    with torch.inference_mode():
        fresh = model.model(**{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits[:, -3:]
    torch.testing.assert_close(cached, fresh, rtol=0, atol=1e-4)
    assert sequence.length == ids.shape[1]


def test_the_drafter_hears_the_audio(audio_lm: LoadModel, speech: Speech) -> None:
    model = audio_lm("qwen2_audio")
    samples, rate = speech
    other = (samples[::-1] * np.linspace(0.1, 2, len(samples))).astype(np.float32)
    decoder = Decoder(model, None, UGSDConfig(eos_token_id=NEVER_ENDS))
    first, second = (decoder.generate((x, rate), max_new_tokens=16).tokens for x in (samples, other))
    assert first != second


def test_prepared_inputs_need_no_processor(audio_lm: LoadModel, speech: Speech) -> None:
    draft, verifier = audio_lm("qwen2_audio", noise=0.05), audio_lm("qwen3_omni")
    config = UGSDConfig(always_escalate=True, rule="greedy", eos_token_id=NEVER_ENDS)
    bare = Decoder(AudioLM(draft.model), LocalVerifier(AudioLM(verifier.model)), config)
    result = bare.generate(inputs=draft.prepare(speech), verifier_inputs=verifier.prepare(speech), max_new_tokens=16)
    assert result.tokens == greedy(verifier, speech, 16)
    assert result.text == ""
    with pytest.raises(ValueError, match="verifier_inputs is None"):
        bare.generate(inputs=draft.prepare(speech))
    with pytest.raises(ValueError, match="both or neither"):
        bare.generate()
    with pytest.raises(ModelError, match="no processor"):
        bare.generate(speech)


def test_end_of_sequence_inside_a_block(audio_lm: LoadModel, speech: Speech) -> None:
    model = audio_lm("qwen2_audio")
    own = greedy(model, speech, 32)
    end = own[7]
    cut = own[: own.index(end) + 1]
    for decoder in (
        Decoder(None, LocalVerifier(model), UGSDConfig(eos_token_id=end)),
        Decoder(model, None, UGSDConfig(eos_token_id=[end, NEVER_ENDS])),
        Decoder(model, LocalVerifier(model), UGSDConfig(eos_token_id=end, always_escalate=True, rule="greedy")),
        Decoder(model, LocalVerifier(model), UGSDConfig(eos_token_id=end, always_escalate=True, bonus=True)),
    ):
        result = decoder.generate(speech, max_new_tokens=32)
        assert result.tokens == cut
        assert all(end not in block.draft_tokens[:-1] for block in result.trace.blocks)


@pytest.mark.parametrize("max_new_tokens", [1, 4, 5, 6, 11, 12])
@pytest.mark.parametrize("bonus", [True, False])
def test_never_more_than_max_new_tokens(max_new_tokens: int, bonus: bool, audio_lm: LoadModel, speech: Speech) -> None:
    model = audio_lm("qwen2_5_omni")
    config = UGSDConfig(always_escalate=True, rule="greedy", bonus=bonus, eos_token_id=NEVER_ENDS)
    result = Decoder(model, LocalVerifier(model), config).generate(speech, max_new_tokens=max_new_tokens)
    assert result.tokens == greedy(model, speech, 12)[:max_new_tokens]


@pytest.mark.parametrize("rule", ["exact", "block"])
def test_lossless_sampling_of_a_copy_accepts_everything(rule: Any, audio_lm: LoadModel, speech: Speech) -> None:
    model = audio_lm("qwen2_audio")
    config = UGSDConfig(
        always_escalate=True,
        rule=rule,
        temperature=0.8,
        top_k=50,
        top_p=0.95,
        seed=3,
        eos_token_id=NEVER_ENDS,
    )
    decoder = Decoder(model, LocalVerifier(model), config)
    result = decoder.generate(speech, max_new_tokens=24)
    assert result.metrics.acceptance_rate == 1.0
    assert result.tokens == decoder.generate(speech, max_new_tokens=24).tokens
    other = Decoder(model, LocalVerifier(model), UGSDConfig(**{**config.to_dict(), "seed": 4}))
    assert result.tokens != other.generate(speech, max_new_tokens=24).tokens


@pytest.mark.parametrize("rule", ["exact", "block"])
def test_lossless_sampling_at_temperature_zero_is_greedy(rule: Any, audio_lm: LoadModel, speech: Speech) -> None:
    draft, verifier = audio_lm("qwen2_5_omni", noise=0.05), audio_lm("qwen3_omni")
    config = UGSDConfig(always_escalate=True, rule=rule, eos_token_id=NEVER_ENDS)
    result = Decoder(draft, LocalVerifier(verifier), config).generate(speech, max_new_tokens=16)
    assert result.tokens == greedy(verifier, speech, 16)


def test_stream_is_generate_in_pieces(audio_lm: LoadModel, speech: Speech) -> None:
    draft, verifier = audio_lm("qwen2_audio", noise=0.05), audio_lm("qwen2_audio")
    decoder = Decoder(draft, LocalVerifier(verifier), UGSDConfig(entropy_threshold=0.5))
    result = decoder.generate(speech, max_new_tokens=20)
    events = list(decoder.stream(speech, max_new_tokens=20))
    assert [event.result is not None for event in events] == [False] * (len(events) - 1) + [True]
    assert "".join(event.text for event in events) == result.text == verifier.decode(result.tokens)
    assert [token.token for event in events for token in event.tokens] == result.tokens
    assert [event.block.emitted for event in events] == [block.emitted for block in result.trace.blocks]


def test_a_list_gives_a_list(audio_lm: LoadModel, speech: Speech) -> None:
    decoder = Decoder(audio_lm("qwen2_audio"), None)
    one = decoder.generate(speech, max_new_tokens=6)
    assert [result.tokens for result in decoder.generate([speech, speech], max_new_tokens=6)] == [one.tokens] * 2


class FlakyVerifier(LocalVerifier):
    """Fails the calls that it is told to."""

    def __init__(self, model: AudioLM, failures: set[int]):
        super().__init__(model)
        self._failures = failures
        self.calls = 0

    def open(self, config: UGSDConfig, **kwargs: Any) -> Any:
        verifier, session = self, super().open(config, **kwargs)

        class FlakySession:
            traffic = Traffic(uplink_bytes=10, downlink_bytes=20, audio_bytes=30)

            @property
            def forwards(self) -> int:
                return session.forwards

            def verify(self, committed: Sequence[int], block: DraftBlock, *, bonus: bool) -> Verdict:
                verifier.calls += 1
                if verifier.calls in verifier._failures:
                    raise VerifierUnavailable("scripted")
                return session.verify(committed, block, bonus=bonus)

            def close(self) -> None:
                session.close()

        return FlakySession()


def test_a_failing_verifier_is_accepted_waited_for_or_raised(audio_lm: LoadModel, speech: Speech) -> None:
    draft, model = audio_lm("qwen2_audio", noise=0.05), audio_lm("qwen2_audio")

    def decode(policy: Any, failures: set[int], **kwargs: Any) -> Any:
        config = UGSDConfig(
            always_escalate=True, rule="greedy", on_verifier_failure=policy, eos_token_id=NEVER_ENDS, **kwargs
        )
        return Decoder(draft, FlakyVerifier(model, failures), config).generate(speech, max_new_tokens=24)

    own = greedy(model, speech, 24)
    assert decode("wait", {1, 2, 4}).tokens == own
    with pytest.raises(VerifierUnavailable, match="scripted"):
        decode("raise", {2})
    result = decode("accept", {2})
    assert [block.verified for block in result.trace.blocks][:3] == [True, False, True]
    unverified = result.trace.blocks[1]
    assert unverified.emitted == unverified.draft_tokens
    assert {token.source for token in unverified.tokens()} == {"edge"}
    # What stood unverified is what the verifier goes on from.
    prefix = [*own[: unverified.start], *unverified.emitted]
    assert result.tokens[: len(prefix)] == prefix
    inputs = model.prepare(speech)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([prefix])], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    rest = model.model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert result.tokens[len(prefix) :][:4] == rest[0, -4:].tolist()
    assert (result.metrics.uplink_bytes, result.metrics.downlink_bytes, result.metrics.audio_bytes) == (
        10,
        20,
        30,
    )


def test_decoder_without_models_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Decoder(None, None)


def test_bad_max_new_tokens_and_audio_are_refused(audio_lm: LoadModel) -> None:
    decoder = Decoder(audio_lm("qwen2_audio"), None)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        decoder.generate((np.ones(16000, np.float32), 16000), max_new_tokens=0)
    with pytest.raises(AudioError, match="lasts 5.00 s, expected at most 4 s"):
        decoder.generate((np.random.default_rng(0).normal(0, 0.1, 5 * 16000).astype(np.float32), 16000))
