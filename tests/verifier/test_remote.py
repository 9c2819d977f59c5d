"""A remote verifier over real sockets: the tokens of this process, what crosses the wire, and what is refused."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import soundfile
import trustme

from tests.serving.fakes import FakeBackend, block, greedy
from ugsd_fast import Decoder, RemoteVerifier, UGSDConfig
from ugsd_fast.audio import load_audio
from ugsd_fast.demo import EmbeddedPair, clips, load_pair
from ugsd_fast.errors import VerifierRefused, VerifierUnavailable
from ugsd_fast.serving import TLS, Limits, Tokens, protocol
from ugsd_fast.serving.client import Patience
from ugsd_fast.serving.engine import ModelBackend, ServedSession
from ugsd_fast.serving.link import Connector, LinkLost
from ugsd_fast.serving.metrics import Metrics
from ugsd_fast.serving.security import UnsafeServer, check_binding
from ugsd_fast.serving.server import Server, serve_model
from ugsd_fast.serving.sessions import Hub

TOKEN = "a-token-of-twenty-letters"
SOON = Patience(deadline=20.0, attempt=2.0, first_delay=0.01, longest_delay=0.1)


@pytest.fixture(scope="module")
def pair() -> EmbeddedPair:
    return load_pair(threads=1)


@pytest.fixture(scope="module")
def server(pair: EmbeddedPair) -> Iterator[Server]:
    levels: Any = ["embeddings", "features", "audio"]
    with serve_model(pair.verifier.model, name="embedded", uplinks=levels, port=0).running() as running:
        yield running


def lossless(pair: EmbeddedPair, **changes: Any) -> UGSDConfig:
    return replace(pair.config, always_escalate=True, rule="greedy", on_verifier_failure="raise", **changes)


@pytest.mark.parametrize("number", [0, 7])
@pytest.mark.parametrize("uplink", ["audio", "features", "embeddings"])
def test_lossless_over_the_network_is_the_verifier_in_this_process(
    uplink: Any, number: int, pair: EmbeddedPair, server: Server
) -> None:
    clip, model = clips()[number].path, pair.verifier.model
    request = {"prompt": pair.prompt, "max_new_tokens": pair.max_new_tokens}
    with RemoteVerifier(server.url, uplink=uplink, encoder=model, patience=SOON) as verifier:
        result = Decoder(pair.draft, verifier, lossless(pair)).generate(clip, **request)
        alone = Decoder(None, verifier, lossless(pair)).generate(clip, **request)
        opened = verifier.run(verifier._opening(verifier.model, lossless(pair), load_audio(clip), pair.prompt)).result()
    # In this process, on what the same uplink level leaves of the audio.
    inputs = server.hub.backend._maker.prepare(opened)  # type: ignore[attr-defined]
    expected = in_process(pair, inputs)
    assert result.tokens == alone.tokens == expected
    assert alone.text == result.text
    assert result.metrics.verifier_forwards < len(expected) / 2
    if uplink == "audio":
        local = Decoder(pair.draft, pair.verifier, lossless(pair)).generate(clip, **request)
        assert result.tokens == local.tokens
        assert result.metrics.verifier_forwards == local.metrics.verifier_forwards


def in_process(pair: EmbeddedPair, inputs: dict[str, Any]) -> list[int]:
    """The verifier's greedy caption, every token from a whole forward."""
    import torch

    model, tokens = pair.verifier.model.model, []
    with torch.inference_mode():
        while len(tokens) < pair.max_new_tokens and (not tokens or tokens[-1] not in pair.verifier.eos_token_ids):
            ids = torch.tensor([tokens], dtype=torch.long)
            if "inputs_embeds" in inputs:
                embeddings = torch.cat([inputs["inputs_embeds"], model.get_input_embeddings()(ids)], 1)
                logits = model(inputs_embeds=embeddings).logits
            else:
                ids = torch.cat([inputs["input_ids"], ids], 1)
                logits = model(**{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits
            tokens.append(int(logits[0, -1].argmax()))
    return tokens


def test_gated_decoding_is_the_same_too(pair: EmbeddedPair, server: Server) -> None:
    request = {"prompt": pair.prompt, "max_new_tokens": pair.max_new_tokens}
    with RemoteVerifier(server.url, uplink="audio", patience=SOON) as verifier:
        for clip in clips()[:4]:
            remote = Decoder(pair.draft, verifier, pair.config).generate(clip.path, **request)
            local = Decoder(pair.draft, pair.verifier, pair.config).generate(clip.path, **request)
            assert remote.tokens == local.tokens
            assert [b.escalated for b in remote.trace.blocks] == [b.escalated for b in local.trace.blocks]
        together = Decoder(pair.draft, verifier, pair.config).generate([c.path for c in clips()[:4]], **request)
        assert together[3].tokens == local.tokens


@pytest.mark.parametrize("rule", ["exact", "block"])
def test_sampling_rules_draw_the_same_tokens(rule: Any, pair: EmbeddedPair, server: Server) -> None:
    config = replace(lossless(pair), rule=rule, temperature=0.7, top_k=20, seed=5)
    request = {"prompt": pair.prompt, "max_new_tokens": 30}
    with RemoteVerifier(server.url, uplink="audio", patience=SOON) as verifier:
        remote = Decoder(pair.draft, verifier, config).generate(clips()[1].path, **request)
    local = Decoder(pair.draft, pair.verifier, config).generate(clips()[1].path, **request)
    assert remote.tokens == local.tokens


def test_evicted_sessions_come_back(pair: EmbeddedPair) -> None:
    """Two sessions where the memory holds one: each block of one evicts the other."""
    with (
        serve_model(
            pair.verifier.model, name="small", port=0, limits=Limits(kv_bytes=2_500_000, prefill_chunk=16)
        ).running() as server,
        RemoteVerifier(server.url, uplink="audio", patience=SOON) as verifier,
    ):
        sources = [clips()[3].path, clips()[11].path]  # more than 64 slots, 2.4 MB, from the second block on
        decoder = Decoder(pair.draft, verifier, lossless(pair))
        streams = [decoder.stream(source, prompt=pair.prompt, max_new_tokens=24) for source in sources]
        tokens: list[list[int]] = [[], []]
        for events in zip(*streams, strict=False):
            for own, event in zip(tokens, events, strict=True):
                own += [token.token for token in event.tokens]
        for own, source in zip(tokens, sources, strict=True):
            local = Decoder(pair.draft, pair.verifier, lossless(pair)).generate(
                source, prompt=pair.prompt, max_new_tokens=24
            )
            assert own == local.tokens[: len(own)]
            assert len(own) > 12
        assert server.hub.metrics.evictions._value.get() > 2
        assert server.hub.metrics.rebuilds._value.get() > 2


def test_a_prompt_in_pieces_is_the_prompt(pair: EmbeddedPair) -> None:
    import torch

    model = pair.verifier.model
    inputs = model.prepare(clips()[2].path, pair.prompt)
    whole = ServedSession(model, inputs, lossless(pair), lambda: None)
    pieces = ServedSession(model, inputs, lossless(pair), lambda: None)
    whole.advance(10**6)
    steps = 0
    while not pieces.ready:
        pieces.advance(7)
        steps += 1
    assert steps == -(-inputs["input_ids"].shape[1] // 7)
    reference = model.open(inputs).forward(torch.zeros(1, 0, dtype=torch.long), keep=1)
    for session in (whole, pieces):
        torch.testing.assert_close(session._prompt_logits, reference, rtol=1e-4, atol=1e-4)


@contextmanager
def recorded(port: int, *, cuts: Random | None = None) -> Iterator[tuple[str, list[bytes], list[bytes]]]:
    """A relay before a server that takes down the bytes of both directions as they are on the socket.

    With `cuts` it ends connections behind random bytes, within frames and handshakes alike.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    up: list[bytes] = []
    down: list[bytes] = []

    def relay(source: socket.socket, target: socket.socket, kept: list[bytes], budget: float) -> None:
        try:
            while data := source.recv(65536):
                data = data[: int(min(budget, len(data)))]
                budget -= len(data)
                kept.append(data)
                target.sendall(data)
                if not budget:
                    raise OSError("cut")
            target.shutdown(socket.SHUT_WR)
        except OSError:
            for end in (source, target):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            upstream = socket.create_connection(("127.0.0.1", port))
            for source, target, kept in ((client, upstream, up), (upstream, client, down)):
                budget = float("inf") if cuts is None else round(10 ** cuts.uniform(2.5, 5))
                threading.Thread(target=relay, args=(source, target, kept, budget), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    with closing(listener):
        yield f"ws://127.0.0.1:{listener.getsockname()[1]}", up, down


def messages(stream: bytes) -> list[bytes]:
    """Payloads of the binary WebSocket messages in a client's byte stream."""
    stream = stream.partition(b"\r\n\r\n")[2]
    found = []
    while len(stream) > 6:
        opcode, length, at = stream[0] & 15, stream[1] & 127, 2
        if length > 125:
            width = 2 if length == 126 else 8
            length, at = int.from_bytes(stream[2 : 2 + width], "big"), 2 + width
        mask, payload = stream[at : at + 4], stream[at + 4 : at + 4 + length]
        if opcode == 2:
            key = np.frombuffer((mask * (length // 4 + 1))[:length], np.uint8)
            found.append((np.frombuffer(payload, np.uint8) ^ key).tobytes())
        stream = stream[at + 4 + length :]
    return found


@pytest.mark.parametrize("seed", range(4))
def test_connections_cut_within_frames(seed: int, pair: EmbeddedPair, server: Server) -> None:
    config, request = lossless(pair), {"prompt": pair.prompt, "max_new_tokens": 40}
    clip = clips()[seed].path
    with (
        recorded(server.port, cuts=Random(seed)) as (url, up, _),
        RemoteVerifier(url, uplink="audio", patience=SOON) as verifier,
    ):
        while verifier._endpoint.model is None:
            with suppress(VerifierUnavailable):
                _ = verifier.model
        result = Decoder(pair.draft, verifier, config).generate(clip, **request)
        alone = Decoder(None, verifier, config).generate(clip, **request)
    local = Decoder(pair.draft, pair.verifier, config).generate(clip, **request)
    assert result.tokens == alone.tokens == local.tokens
    assert b"".join(up).count(b"GET /v1/session") > 3


@pytest.mark.parametrize("uplink", ["features", "audio", "embeddings", None])
def test_the_bytes_on_the_socket_are_the_ledgers(uplink: Any, pair: EmbeddedPair, server: Server) -> None:
    from ugsd_fast.serving import protocol

    clip = load_audio(clips()[3].path)
    encoder = pair.verifier.model if uplink != "features" else None
    with recorded(server.port) as (url, up, _), RemoteVerifier(url, uplink=uplink, encoder=encoder) as verifier:
        result = Decoder(pair.draft, verifier, lossless(pair)).generate(clip, prompt=pair.prompt, max_new_tokens=20)
        closed, deadline = protocol.encode(protocol.Close()), time.monotonic() + 5
        payloads: list[bytes] = []
        while payloads[-1:] != [closed]:  # the session ends in the background
            assert time.monotonic() < deadline
            time.sleep(0.01)
            # The connection that asked for the greeting carries nothing.
            payloads = [p for part in b"".join(up).split(b"GET /v1/session") for p in messages(part)]
    frames = [protocol.decode_client(payload) for payload in payloads]
    sent = sum(map(len, payloads[:-1]))  # without Close
    assert sum(result.ledger.values()) == sent
    assert result.metrics.uplink_bytes + result.metrics.audio_bytes == sent
    level = uplink or "embeddings"  # the least that this server accepts
    opened, *rest = frames
    assert isinstance(opened, protocol.Open)
    assert opened.uplink == level
    assert (opened.flac is not None) == (level == "audio")
    assert (opened.matrix is not None) == (level != "audio")
    assert all(isinstance(frame, (protocol.Verify, protocol.Close)) for frame in rest)
    assert set(result.ledger) == {level, "prompt", "tokens", "control"}
    # Neither samples nor a recognisable form of them are anywhere in what was sent.
    wire = b"".join(payloads)
    if level != "audio":
        for form in (clip.samples, (clip.samples * 32767).astype("<i2"), (clip.samples * 127).astype(np.int8)):
            assert form[4000:4032].tobytes() not in wire
        assert b"fLaC" not in wire
    else:
        assert result.metrics.audio_bytes < 2 * len(clip.samples)


def test_a_level_is_refused_rather_than_raised(pair: EmbeddedPair) -> None:
    with serve_model(pair.verifier.model, name="embedded", uplinks=["audio"], port=0).running() as server:
        with recorded(server.port) as (url, up, _):
            for uplink in ("none", "features", "embeddings"):
                with (
                    RemoteVerifier(url, uplink=uplink) as verifier,  # type: ignore[arg-type]
                    pytest.raises(VerifierRefused, match=f"accepts uplink level audio, expected {uplink}"),
                ):
                    Decoder(pair.draft, verifier, lossless(pair)).generate(clips()[0].path)
            assert not [m for part in b"".join(up).split(b"GET /v1/session") for m in messages(part)]
        with RemoteVerifier(server.url) as verifier:  # the least that it accepts
            result = Decoder(pair.draft, verifier, lossless(pair)).generate(clips()[0].path, max_new_tokens=5)
            assert "audio" in result.ledger


def test_embeddings_need_the_encoder(pair: EmbeddedPair, server: Server) -> None:
    with (
        RemoteVerifier(server.url) as verifier,
        pytest.raises(VerifierRefused, match="needs the verifier's audio encoder on this device"),
    ):
        Decoder(pair.draft, verifier, lossless(pair)).generate(clips()[0].path)


def test_a_text_verifier_takes_tokens_only(audio_lm: Callable[..., Any], pair: EmbeddedPair) -> None:
    import transformers

    from ugsd_fast import AudioLM

    config = transformers.Qwen2Config(
        vocab_size=800, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, eos_token_id=1, pad_token_id=0, bos_token_id=0,
    )  # fmt: skip
    text_model = AudioLM(transformers.Qwen2ForCausalLM(config), pair.draft.tokenizer)
    with serve_model(text_model, name="text", port=0).running() as server, RemoteVerifier(server.url) as verifier:
        result = Decoder(pair.draft, verifier, lossless(pair, eos_token_id=-1)).generate(
            clips()[0].path, prompt="Describe the voice.", max_new_tokens=12
        )
        assert verifier.model.uplinks == ["none"]
        assert set(result.ledger) == {"prompt", "tokens", "control"}
        assert result.metrics.audio_bytes == 0
    import torch

    ids = server.hub.backend._maker._text_prompt("Describe the voice.")["input_ids"]  # type: ignore[attr-defined]
    with torch.inference_mode():
        for _ in range(12):
            ids = torch.cat([ids, text_model.model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert result.tokens == ids[0, -12:].tolist()


def test_prepared_inputs_and_processors_stay_here(server: Server) -> None:
    with RemoteVerifier(server.url) as verifier:
        with pytest.raises(ValueError, match="inputs are given, expected audio and a prompt"):
            verifier.open(UGSDConfig(), inputs={})
        with pytest.raises(ValueError, match="logits_processor is a list, expected None"):
            verifier.open(UGSDConfig(), audio=clips()[0].path, logits_processor=[])


class TestFailures:
    def test_accept_goes_on_alone_and_says_so(self, pair: EmbeddedPair) -> None:
        """The server dies in the middle of a caption."""
        patience = Patience(deadline=2.0, attempt=1.5, first_delay=0.01, failures=1, pause=60)
        config = replace(lossless(pair), on_verifier_failure="accept")
        server = serve_model(pair.verifier.model, name="embedded", port=0)
        with server.running(), RemoteVerifier(server.url, uplink="audio", patience=patience) as verifier:
            decoder, text, tokens, records = Decoder(pair.draft, verifier, config), "", [], []
            began = time.monotonic()
            for event in decoder.stream(clips()[0].path, prompt=pair.prompt, max_new_tokens=30):
                text += event.text
                tokens += [token.token for token in event.tokens]
                records.append(event.block)
                if len(records) == 2:
                    server.stop()
                    while server.hub.metrics.connections._value.get():
                        time.sleep(0.01)
                    began = time.monotonic()
            assert [record.verified for record in records[:2]] == [True, True]
            assert not any(record.verified for record in records[2:])
            # The breaker spares every block but one the deadline.
            assert time.monotonic() - began < 2 * patience.deadline < (len(records) - 2) * patience.deadline
            assert event.result is not None
            assert (event.result.text, event.result.tokens) == (text, tokens)
            local = Decoder(pair.draft, pair.verifier, config).generate(
                clips()[0].path, prompt=pair.prompt, max_new_tokens=30
            )
            kept = sum(len(record.emitted) for record in records[:2])
            assert tokens[:kept] == local.tokens[:kept]

    def test_accept_works_without_any_server(self, pair: EmbeddedPair) -> None:
        with RemoteVerifier("ws://127.0.0.1:9", patience=Patience(deadline=0.2, attempt=0.1, failures=1)) as verifier:
            config = replace(lossless(pair), on_verifier_failure="accept")
            result = Decoder(pair.draft, verifier, config).generate(clips()[0].path, prompt=pair.prompt)
        edge = Decoder(pair.draft, None, config).generate(clips()[0].path, prompt=pair.prompt)
        assert result.tokens == edge.tokens
        assert not any(record.verified for record in result.trace.blocks)

    def test_raise_raises(self, pair: EmbeddedPair) -> None:
        with (
            RemoteVerifier("ws://127.0.0.1:9", patience=Patience(deadline=0.2, attempt=0.1)) as verifier,
            pytest.raises(VerifierUnavailable, match="127.0.0.1:9"),
        ):
            Decoder(pair.draft, verifier, lossless(pair)).generate(clips()[0].path)

    def test_wait_waits_for_a_server_that_was_killed(self, pair: EmbeddedPair) -> None:
        """Killed after the second block and started again at the same port: sessions are opened anew and replayed."""
        config = replace(lossless(pair), on_verifier_failure="wait")
        first = serve_model(pair.verifier.model, name="embedded", port=0)
        patience = Patience(deadline=2.0, attempt=1.5, first_delay=0.01, failures=100)
        tokens: list[int] = []
        with RemoteVerifier(first.url, uplink="audio", patience=patience) as verifier:
            with first.running():
                events = Decoder(pair.draft, verifier, config).stream(
                    clips()[0].path, prompt=pair.prompt, max_new_tokens=30
                )
                for _ in range(2):
                    tokens += [token.token for token in next(events).tokens]
            threading.Timer(0.5, lambda: again.append(self.start(pair, first.port))).start()
            again: list[Any] = []
            for event in events:
                tokens += [token.token for token in event.tokens]
        again[0].stop()
        local = Decoder(pair.draft, pair.verifier, config).generate(
            clips()[0].path, prompt=pair.prompt, max_new_tokens=30
        )
        assert tokens == local.tokens

    @staticmethod
    def start(pair: EmbeddedPair, port: int) -> Server:
        server = serve_model(pair.verifier.model, name="embedded", port=port)
        threading.Thread(target=server.run, daemon=True).start()
        return server

    def test_another_server_takes_over(self, pair: EmbeddedPair, server: Server) -> None:
        other = serve_model(pair.verifier.model, name="embedded", port=0)
        with RemoteVerifier([other.url, server.url], uplink="audio", patience=SOON) as verifier:
            tokens: list[int] = []
            with other.running():
                events = Decoder(pair.draft, verifier, lossless(pair)).stream(
                    clips()[5].path, prompt=pair.prompt, max_new_tokens=30
                )
                tokens += [token.token for token in next(events).tokens]
            for event in events:
                tokens += [token.token for token in event.tokens]
        local = Decoder(pair.draft, pair.verifier, lossless(pair)).generate(
            clips()[5].path, prompt=pair.prompt, max_new_tokens=30
        )
        assert tokens == local.tokens


class TestShutdown:
    """A server that ends while verdicts are waited for: connections close at once, and its threads end."""

    def test_whoever_waits_hears_of_it(self, pair: EmbeddedPair) -> None:
        server = serve_model(pair.verifier.model, name="embedded", port=0)
        scheduler = server.hub.backend._scheduler  # type: ignore[attr-defined]
        judge, inside, go_on = scheduler._judge.judge, threading.Event(), threading.Event()

        def slow(jobs: Any) -> Any:
            inside.set()
            assert go_on.wait(5)
            return judge(jobs)

        scheduler._judge.judge = slow
        patience = Patience(deadline=2.0, attempt=1.0, first_delay=0.01, longest_delay=0.1, failures=10)
        with RemoteVerifier(server.url, uplink="audio", patience=patience) as verifier:
            with server.running():
                sessions = [verifier.open(lossless(pair), audio=load_audio(clips()[0].path)) for _ in range(2)]
                computed = sessions[0].submit([], block([1]), bonus=True)
                assert inside.wait(5)
                waiting = sessions[1].submit([], block([1]), bonus=True)
                deadline = time.monotonic() + 1.9
                while not scheduler._jobs:
                    assert time.monotonic() < deadline
                    time.sleep(0.005)
                began = time.monotonic()
                threading.Timer(0.5, go_on.set).start()
            for future in (computed, waiting):
                error = future.exception(3)
                assert isinstance(error, VerifierUnavailable)
                assert "no verdict within 2 s" in str(error)
        assert time.monotonic() - began < 5
        assert not any(thread.is_alive() for thread in scheduler._threads)

    def test_the_connection_closes_within_a_second(self) -> None:
        server = fake_server()
        server.hub.backend.delay = 60.0  # type: ignore[attr-defined]

        async def wait_for_a_verdict() -> float:
            link = await Connector()(server.url)
            rules = protocol.Rules(rule="greedy")
            await link.send(protocol.encode(protocol.Open(protocol.VERSION, "none", rules, "p", 0)))
            await link.send(protocol.encode(protocol.Verify(0, 0, [], [1], True, 0, 0)))
            frames = [type(protocol.decode_server(await link.recv())) for _ in range(2)]
            assert frames == [protocol.Welcome, protocol.Opened]
            began = time.monotonic()
            server.stop()
            with pytest.raises(LinkLost):
                await link.recv()
            return time.monotonic() - began

        with server.running():
            assert asyncio.run(wait_for_a_verdict()) < 1.0
        assert server.hub.backend.closed  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def certificate(folder: Path, authority: trustme.CA, *names: str, **settings: Any) -> tuple[Path, Path]:
    issued = authority.issue_cert(*names, **settings)
    key, chain = folder / "key.pem", folder / "cert.pem"
    issued.private_key_pem.write_to_path(key)
    for number, part in enumerate(issued.cert_chain_pems):
        part.write_to_path(chain, append=number > 0)
    return chain, key


def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def fake_server(**settings: Any) -> Server:
    limits = settings.pop("limits", None)
    return Server(Hub(FakeBackend(), limits), port=0, **settings)


def caption(verifier: RemoteVerifier, prompt: str = "p", rounds: int = 3) -> list[int]:
    session = verifier.open(UGSDConfig(rule="greedy", always_escalate=True), prompt=prompt)
    tokens: list[int] = []
    for _ in range(rounds):
        right = greedy(prompt, len(tokens) + 2)[len(tokens) :]
        verdict = session.verify([], block(right), bonus=True)
        tokens += [*right[: verdict.num_accepted], verdict.next_token]
    session.close()
    return tokens


class TestSecurity:
    def test_tls_and_a_token(self, authority: trustme.CA, tmp_path: Path) -> None:
        chain, key = certificate(tmp_path, authority, "127.0.0.1")
        with fake_server(tls=TLS(chain, key), tokens=Tokens({"me": TOKEN})).running() as server:
            assert server.url.startswith("wss://")
            context = trusting(authority)
            with RemoteVerifier(server.url, token=TOKEN, tls=context) as verifier:
                assert caption(verifier) == greedy("p", 9)
            for wrong in ("another-token-altogether", TOKEN[:-1], "", None):
                with (
                    RemoteVerifier(server.url, token=wrong, tls=context) as verifier,
                    pytest.raises(VerifierRefused, match="the bearer token is not accepted"),
                ):
                    caption(verifier)
            with (
                RemoteVerifier(server.url, token=TOKEN) as verifier,
                pytest.raises(VerifierRefused, match="its certificate is not trusted"),
            ):
                caption(verifier)

    def test_an_expired_certificate_of_the_server(self, authority: trustme.CA, tmp_path: Path) -> None:
        past = datetime.now(timezone.utc) - timedelta(days=1)
        chain, key = certificate(tmp_path, authority, "127.0.0.1", not_after=past)
        with (
            fake_server(tls=TLS(chain, key), tokens=Tokens({"me": TOKEN})).running() as server,
            RemoteVerifier(server.url, token=TOKEN, tls=trusting(authority)) as verifier,
            pytest.raises(VerifierRefused, match="certificate has expired"),
        ):
            caption(verifier)

    def test_clients_without_a_valid_certificate(self, authority: trustme.CA, tmp_path: Path) -> None:
        (tmp_path / "server").mkdir()
        chain, key = certificate(tmp_path / "server", authority, "127.0.0.1")
        authority.cert_pem.write_to_path(tmp_path / "ca.pem")
        past = datetime.now(timezone.utc) - timedelta(days=1)
        good = authority.issue_cert("device")
        bad = {
            "none": None,
            "expired": authority.issue_cert("device", not_after=past),
            "another authority's": trustme.CA().issue_cert("device"),
        }
        tls = TLS(chain, key, tmp_path / "ca.pem")
        brief = Patience(deadline=0.5, attempt=0.4, first_delay=0.05)
        with fake_server(tls=tls, tokens=Tokens({"me": TOKEN})).running() as server:

            def connect(issued: Any) -> RemoteVerifier:
                context = trusting(authority)
                if issued is not None:
                    issued.configure_cert(context)
                return RemoteVerifier(server.url, token=TOKEN, tls=context, patience=brief)

            with connect(good) as unharmed:
                assert caption(unharmed) == greedy("p", 9)
                for issued in bad.values():
                    with connect(issued) as verifier, pytest.raises(VerifierUnavailable):
                        caption(verifier)
                assert caption(unharmed) == greedy("p", 9)

    def test_an_oversized_frame_is_refused_by_its_header(self) -> None:
        with (
            fake_server(limits=Limits(max_open_bytes=1 << 20)).running() as server,
            RemoteVerifier(server.url) as verifier,
        ):
            session = verifier.open(UGSDConfig(rule="greedy", always_escalate=True), prompt="p")
            right = greedy("p", 9)
            assert session.verify([], block(right[:2]), bonus=True).next_token == right[2]
            with socket.create_connection(("127.0.0.1", server.port)) as raw:
                raw.settimeout(5)
                raw.sendall(
                    b"GET /v1/session HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
                    b"Sec-WebSocket-Protocol: ugsd.v1\r\n\r\n"
                )
                raw.recv(65536)
                raw.sendall(b"\x82\xff" + (1 << 40).to_bytes(8, "big") + b"\0\0\0\0")  # a message of a terabyte
                received = b""
                while chunk := raw.recv(65536):
                    received += chunk
                assert (1009).to_bytes(2, "big") in received
            assert session.verify([], block(right[3:5]), bonus=True).next_token == right[5]

    def test_many_opens_a_second_are_refused_and_others_unharmed(self) -> None:
        """A token that opens as fast as it can, and 10,000 a second by the clock."""
        tokens = Tokens({"me": TOKEN, "flood": "another-token-altogether"})
        limits = Limits(opens_per_second=20, open_burst=10)
        with (
            fake_server(tokens=tokens, limits=limits).running() as server,
            RemoteVerifier(server.url, token=TOKEN) as verifier,
        ):
            session = verifier.open(UGSDConfig(rule="greedy", always_escalate=True), prompt="p")
            statuses: list[bytes] = []
            stop = threading.Event()

            def flood(authorization: bytes) -> None:
                while not stop.is_set():
                    with socket.create_connection(("127.0.0.1", server.port)) as raw:
                        raw.sendall(
                            b"GET /v1/session HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
                            b"Sec-WebSocket-Protocol: ugsd.v1\r\nAuthorization: " + authorization + b"\r\n\r\n"
                        )
                        statuses.append(raw.recv(64)[9:12])

            headers = [b"Bearer another-token-altogether", b"Bearer wrong"]
            threads = [threading.Thread(target=flood, args=(header,)) for header in headers]
            for thread in threads:
                thread.start()
            captions: list[int] = []
            slowest = 0.0
            for _ in range(20):
                began = time.monotonic()
                right = greedy("p", len(captions) + 2)[len(captions) :]
                captions += [*right, session.verify([], block(right), bonus=True).next_token]
                slowest = max(slowest, time.monotonic() - began)
                time.sleep(0.05)
            stop.set()
            for thread in threads:
                thread.join()
            assert captions == greedy("p", 60)
            assert slowest < 1.0
            assert set(statuses) == {b"101", b"401", b"429"}
            assert statuses.count(b"101") <= 10 + 20 * 3
            assert statuses.count(b"429") > len(statuses) / 2 > 100

    def test_ten_thousand_opens_in_a_second(self) -> None:
        from ugsd_fast.serving.limits import Rate

        now = [0.0]
        rate = Rate(20.0, 100, clock=lambda: now[0])
        granted = 0
        for _ in range(10_000):
            now[0] += 1e-4
            granted += not rate.take("flood")
        assert 119 <= granted <= 121
        assert not rate.take("another")

    def test_a_public_address_needs_tls_and_a_token(self, tmp_path: Path) -> None:
        tls, tokens = TLS(tmp_path, tmp_path), Tokens({"me": TOKEN})
        for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
            for settings in ({"tls": None, "tokens": tokens}, {"tls": tls, "tokens": Tokens()}):
                with pytest.raises(UnsafeServer, match="can be reached from other machines"):
                    check_binding(host, **settings)  # type: ignore[arg-type]
            check_binding(host, tls=tls, tokens=tokens)
        for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8"):
            check_binding(host, tls=None, tokens=Tokens())
        with pytest.raises(ValueError, match="5 characters, expected at least 16"):
            Tokens({"me": "short"})


def test_nothing_of_a_session_is_written_down(
    pair: EmbeddedPair, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file is opened for writing and no log has a word of the prompt or the caption, at the most talkative level."""
    import builtins
    import os

    written: list[Any] = []
    plain_open, plain_os_open = builtins.open, os.open

    def spy_open(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if set(mode) & set("wax+"):
            written.append(file)
        return plain_open(file, mode, *args, **kwargs)

    def spy_os_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            written.append(path)
        return plain_os_open(path, flags, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", spy_open)
    monkeypatch.setattr(os, "open", spy_os_open)
    caplog.set_level(logging.DEBUG)
    secret = "a prompt that nobody else may read"
    with (
        serve_model(pair.verifier.model, name="embedded", port=0).running() as server,
        RemoteVerifier(server.url, uplink="audio") as verifier,
    ):
        result = Decoder(pair.draft, verifier, lossless(pair)).generate(clips()[0].path, prompt=secret)
    assert not written
    server_logs = [r for r in caplog.records if not r.name.startswith("websockets.client")]
    text = "\n".join(record.getMessage() for record in server_logs)
    assert result.text
    for word in (secret, "prompt that", result.text[:20], "fLaC", str(result.tokens[:4])[1:-1]):
        assert word not in text
    assert not {"asyncio.debug"} & {r.name for r in server_logs}


def test_http(server: Server) -> None:
    import json
    import urllib.request

    base = server.url.replace("ws", "http")
    with urllib.request.urlopen(base + "/healthz") as reply:
        assert json.load(reply)["status"] == "ok"
    with urllib.request.urlopen(base + "/v1/models") as reply:
        (model,) = json.load(reply)["data"]
    assert (model["id"], model["uplinks"]) == ("embedded", ["embeddings", "features", "audio"])
    with urllib.request.urlopen(base + "/metrics") as reply:
        assert b"ugsd_verify_seconds_bucket" in reply.read()
    with fake_server(tokens=Tokens({"me": TOKEN})).running() as guarded:
        request = urllib.request.Request(guarded.url.replace("ws", "http") + "/metrics")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(request)
        request.add_header("Authorization", f"Bearer {TOKEN}")
        with urllib.request.urlopen(request) as reply:
            assert reply.status == 200


def test_sessions_that_wait_share_a_forward(pair: EmbeddedPair) -> None:
    """Eight captions at once: fewer forwards than blocks, and each caption as if it were alone."""
    metrics = Metrics()
    backend = ModelBackend(pair.verifier.model, name="embedded", limits=Limits(max_wait=0.02), metrics=metrics)
    with (
        Server(Hub(backend, backend.limits, metrics), port=0).running() as server,
        RemoteVerifier(server.url, uplink="audio", patience=SOON) as verifier,
    ):
        sources = [clip.path for clip in clips()[:8]]
        together = Decoder(pair.draft, verifier, lossless(pair)).generate(
            sources, prompt=pair.prompt, max_new_tokens=20
        )
    for source, result in zip(sources, together, strict=True):
        local = Decoder(pair.draft, pair.verifier, lossless(pair)).generate(
            source, prompt=pair.prompt, max_new_tokens=20
        )
        assert result.tokens == local.tokens
    blocks = sum(len(result.trace.blocks) for result in together)
    (forwards,) = [s.value for m in metrics.batch_sessions.collect() for s in m.samples if s.name.endswith("_count")]
    assert forwards < blocks / 2


def test_soundfile_keeps_16_bit_audio_exactly() -> None:
    import io

    from ugsd_fast.serving.front_end import encode_flac

    clip = load_audio(clips()[0].path)
    samples, rate = soundfile.read(io.BytesIO(encode_flac(clip)), dtype="float32")
    assert rate == clip.rate
    assert np.array_equal(samples, clip.samples)
