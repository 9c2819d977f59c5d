"""Every family behind a server, at every level that it can be served at."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch

from tests.models.test_families import FAMILIES, _torchaudio
from tests.models.tiny import build, processor
from tests.serving.fakes import block
from ugsd_fast import AudioLM, Decoder, LocalVerifier, RemoteVerifier, UGSDConfig
from ugsd_fast.audio import Audio
from ugsd_fast.errors import ModelError, VerifierRefused
from ugsd_fast.serving import protocol
from ugsd_fast.serving.engine import ModelBackend, ServedSession
from ugsd_fast.serving.front_end import LogMel, encode_embeddings, encode_flac
from ugsd_fast.serving.memory import cache_bytes
from ugsd_fast.serving.quantize import quantize
from ugsd_fast.serving.server import serve_model
from ugsd_fast.serving.sessions import Call

__all__ = ["_torchaudio"]

GREEDY = UGSDConfig(rule="greedy", always_escalate=True)
# Where not all three. The text part is given more than embeddings; the features are the samples, or depend on more than
# the extractor's settings: on the processor's padding, on the whole clip beyond its window.
LEVELS = {
    "qwen3_asr": {"embeddings", "audio"},
    "voxtral": {"embeddings", "audio"},
    "granite_speech": {"embeddings", "audio"},
    "phi4_multimodal": {"features", "audio"},
    "gemma3n": {"audio"},
    "gemma4": {"features", "audio"},
    "vibevoice_asr": {"embeddings", "audio"},
    "whisper": {"features", "audio"},
    "moonshine": {"audio"},
}


def noise(model: AudioLM, seconds: float = 0.75) -> Audio:
    """A clip whose samples 24 bits hold."""
    samples = np.random.default_rng(1).normal(0, 3000, int(seconds * model.sampling_rate)).round()
    return Audio((samples / 32768).astype(np.float32), model.sampling_rate, "noise")


def opening(backend: ModelBackend, model: AudioLM, level: protocol.Uplink, clip: Audio, prompt: str | None) -> Any:
    """What a device sends."""
    matrix = flac = None
    if level == "audio":
        flac = encode_flac(clip)
    elif level == "features":
        matrix = quantize(LogMel(backend.model.front_end)(clip.samples))
    else:
        matrix = encode_embeddings(model, clip)
    rules = protocol.Rules(rule="greedy")
    return protocol.Open(protocol.VERSION, level, rules, prompt, len(clip.samples), matrix, flac)


@pytest.mark.usefixtures("_torchaudio")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_served(family: str) -> None:
    model = AudioLM(build(family).model, processor(family))
    prompt = None if family in ("whisper", "moonshine") else "w7 w8"
    clip = noise(model)
    local = model.prepare(clip, prompt)
    expected = model.open(dict(local)).forward(torch.zeros(1, 0, dtype=torch.long), keep=1)
    backend = ModelBackend(model, name=family)
    try:
        assert set(backend._maker.levels) == LEVELS.get(family, {"embeddings", "features", "audio"})
        assert backend.model.uplinks == [level for level in backend._maker.levels if level != "embeddings"]
        for level in backend._maker.levels:
            request = opening(backend, model, level, clip, prompt)
            state = asyncio.run(backend.prepare(request))
            judged = asyncio.run(backend.judge(state, Call([], [], True, 0)))
            assert isinstance(state, ServedSession)
            assert state._prompt_logits is not None
            # int8 rounds; features in the few mels of a tiny model by much
            torch.testing.assert_close(state._prompt_logits, expected, rtol=0, atol=1e-4 if level == "audio" else 1.0)
            assert judged.next_token == int(state._prompt_logits.argmax())
            if level == "audio":
                assert judged.next_token == int(expected.argmax())
            final = [judged.next_token]
            for draft in ([1, 2, 3], list(range(60))):  # the second one has the cache grow
                call = Call(final, draft, True, 1)
                asyncio.run(backend.judge(state, call))
                assert cache_bytes(state.sequence.cache) <= backend._scheduler._judge.kv_bytes(state, call)
            backend.release(state)
    finally:
        backend.close()


@pytest.mark.usefixtures("_torchaudio")
@pytest.mark.parametrize("family", ["whisper", "moonshine"])
def test_encoder_decoders_are_served_up_to_their_last_position(family: str) -> None:
    """And one token more is refused where positions are learned; the session and the server live on."""
    model, other = (AudioLM(build(family, noise=noise).model, processor(family)) for noise in (0.0, 0.3))
    clip, end = noise(model), UGSDConfig(rule="greedy", always_escalate=True, eos_token_id=-1)
    config = model.model.config
    positions = config.max_target_positions if family == "whisper" else config.max_position_embeddings
    room = positions - model.prompt_ids(model.prepare(clip)).shape[1]
    # The verifier's own: its last token need not be fed.
    tokens = Decoder(None, LocalVerifier(model), end).generate(clip, max_new_tokens=room + 1).tokens
    with (
        serve_model(model, name=family, port=0).running() as server,
        RemoteVerifier(server.url, uplink="audio") as verifier,
    ):
        assert Decoder(None, verifier, end).generate(clip, max_new_tokens=room + 1).tokens == tokens
        result = Decoder(other, verifier, end).generate(clip, max_new_tokens=room)
        assert result.tokens == tokens[:room]
        assert 0 < result.metrics.acceptance_rate < 1
        final, last = tokens[: room - 3], tokens[room - 3 : room]
        session, beside = (verifier.open(end, audio=clip) for _ in range(2))
        for draft in ([*last, 7], list(range(100))) if family == "whisper" else ():
            refused, judged = (one.submit(final, block(d), bonus=True) for one, d in ((session, draft), (beside, [7])))
            with pytest.raises(VerifierRefused, match=rf"would hold {93 + len(draft)} tokens, expected at most 96"):
                refused.result()
            assert judged.result().num_accepted == (last[0] == 7)
            beside.close()
            beside = verifier.open(end, audio=clip)
        for one in (session, beside):
            verdict = one.verify(final, block(last), bonus=True)
            assert (verdict.num_accepted, verdict.next_token) == (3, tokens[room])
        if family == "whisper":
            with pytest.raises(VerifierRefused, match="would hold 97 tokens"):
                session.verify([], block([]), bonus=True)
            with pytest.raises(VerifierRefused, match="would hold 97 tokens"):
                Decoder(None, verifier, end).generate(clip, max_new_tokens=room + 2)
        assert Decoder(other, verifier, end).generate(clip, max_new_tokens=9).tokens == tokens[:9]


def test_what_cannot_be_served_is_refused_at_the_start() -> None:
    with pytest.raises(ModelError, match="no level: it has no processor to prepare audio with"):
        ModelBackend(AudioLM(build("voxtral").model), name="bare")
    moonshine = AudioLM(build("moonshine").model, processor("moonshine"))
    with pytest.raises(ModelError, match="cannot take uplink level features, expected of audio"):
        ModelBackend(moonshine, name="moonshine", uplinks=["features"])
    broken = AudioLM(build("glmasr").model, processor("whisper"))
    with pytest.raises(ModelError, match="no level: its processor prepares no audio"):
        ModelBackend(broken, name="mixed up")
