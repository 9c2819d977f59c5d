"""A verifier behind a network."""

from __future__ import annotations

import asyncio
import http.client
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from types import TracebackType
from typing import Any, TypeVar

from torch import Tensor

from ugsd_fast.audio import Audio, load_audio
from ugsd_fast.decoding.block import DraftBlock
from ugsd_fast.decoding.config import UGSDConfig
from ugsd_fast.decoding.trace import Traffic
from ugsd_fast.decoding.verification import VerifyCall
from ugsd_fast.errors import VerifierRefused, VerifierUnavailable, attempt
from ugsd_fast.models import AudioLM
from ugsd_fast.serving import protocol
from ugsd_fast.serving.client import ClientSession, Endpoint, Patience
from ugsd_fast.serving.front_end import LogMel, encode_embeddings, encode_flac, pack_draft_logits
from ugsd_fast.serving.link import Connector, Link, LinkLost
from ugsd_fast.serving.protocol import Model, Open, Rules, Uplink
from ugsd_fast.serving.quantize import quantize
from ugsd_fast.verifier.base import Verdict

Result = TypeVar("Result")


class RemoteVerifier:
    """Verifies blocks with a model behind ``ugsd-fast serve``.

    Parameters
    ----------
    url : str or sequence of str
        ``wss://host:port`` (``ws://`` without TLS), or several servers of one model: where one fails, sessions go on
        at the next.
    token : str, optional
        Bearer token.
    uplink : {"none", "embeddings", "features", "audio"}, optional
        What may leave the device of the audio: nothing; the output of the verifier's audio encoder or its log-mel
        features, in int8; or the sound. By default the least that the verifier accepts. Never more than what is given
        here: a verifier that does not accept it is refused.
    encoder : AudioLM, optional
        The verifier's model on this device, for the level ``embeddings``; only its audio encoder is used.
    tokenizer : optional
        The verifier's, to decode without a drafter; fetched from the server if it is needed and not given.
    patience : Patience, optional
        Deadline of a block, retries, circuit breaker.
    tls : ssl.SSLContext, optional
        Authorities to trust instead of the system's, or a certificate of the device's own (mTLS).

    Raises
    ------
    VerifierRefused
        Where trying again is of no use: the server does not take the token or the uplink level.

    Notes
    -----
    A session connects when it is opened and sends nothing of the request until it is certain that a block will be
    escalated (`RemoteSession.begin`). Sequence numbers make every block idempotent: lost replies and connections are
    repeated until the deadline, and a server that has forgotten the session gets its audio and ids again. What happens
    behind the deadline is the decoder's choice: `UGSDConfig.on_verifier_failure`.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        token: str | None = None,
        uplink: Uplink | None = None,
        encoder: AudioLM | None = None,
        tokenizer: Any = None,
        patience: Patience | None = None,
        tls: ssl.SSLContext | None = None,
        connect: Callable[[str], Awaitable[Link]] | None = None,
    ):
        if uplink is not None and uplink not in protocol.UPLINKS:
            raise ValueError(f"RemoteVerifier: uplink is {uplink!r}, expected one of {', '.join(protocol.UPLINKS)}")
        self.uplink = uplink
        self._encoder = encoder
        self._tokenizer = tokenizer
        self._token, self._tls = token, tls
        urls = [url] if isinstance(url, str) else list(url)
        self._endpoint = Endpoint(urls, connect or Connector(token, tls), patience or Patience())
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ugsd-remote", daemon=True)
        self._thread.start()

    def __enter__(self) -> RemoteVerifier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the background thread; sessions that are open cannot go on."""
        if self._loop.is_running():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            for task in asyncio.all_tasks(self._loop):
                task.cancel()
            self._loop.run_until_complete(asyncio.sleep(0))
            self._loop.close()

    @property
    def model(self) -> Model:
        """What the server says of its model; asks it the first time.

        Raises
        ------
        VerifierUnavailable
            If it does not answer.
        """
        try:
            return self._endpoint.model or self.run(self._endpoint.greeting()).result()
        except LinkLost as error:
            raise VerifierUnavailable(f"verifier {self._endpoint.url}: {error}") from None

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a caption."""
        return frozenset(self.model.eos)

    @property
    def max_audio_seconds(self) -> float | None:
        """Longest audio, None where there is no limit or the server does not answer."""
        try:
            return self.model.max_audio_seconds or None
        except VerifierUnavailable:
            return None

    @property
    def tokenizer(self) -> Any:
        """The verifier's tokenizer, fetched when it is first asked for; None where it has none."""
        if self._tokenizer is None and self.model.vocabulary:
            self._tokenizer = self._fetch_tokenizer()
        return self._tokenizer

    def expect_vocabulary(self, fingerprint: str) -> bool:
        """Whether the verifier's text tokens have this fingerprint; checked later where it does not answer now."""
        self._endpoint.expected_vocabulary = fingerprint
        try:
            if self.model.vocabulary in ("", fingerprint):
                return True
            self._endpoint.expected_vocabulary = ""  # the caller knows now
            return False
        except VerifierUnavailable:
            return True

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of generated tokens, special tokens left out."""
        tokenizer = self.tokenizer
        if tokenizer is None:
            return ""
        return tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def open(
        self,
        config: UGSDConfig,
        *,
        audio: Any = None,
        prompt: str | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        logits_processor: Any = None,
    ) -> RemoteSession:
        """Start a session on audio and prompt.

        Raises
        ------
        ValueError
            If `inputs` or `logits_processor` is given: tensors for a model in this process and Python objects do not
            travel.
        VerifierRefused
            If the uplink level is not accepted.
        """
        if inputs is not None:
            raise ValueError(
                "RemoteVerifier: inputs are given, expected audio and a prompt "
                "(prepared inputs belong to a model in this process; the server prepares its own)"
            )
        if logits_processor is not None:
            raise ValueError(
                f"RemoteVerifier: logits_processor is a {type(logits_processor).__name__}, expected None "
                "(Python objects do not travel to the server)"
            )
        if self._endpoint.model is not None:
            self._level(self._endpoint.model)
        return RemoteSession(self, config, None if audio is None else load_audio(audio), prompt)

    def verify_batch(self, calls: Sequence[VerifyCall]) -> list[Verdict | Exception]:
        """Verdicts of several sessions, asked for at the same time; one that cannot be had is an exception."""
        futures = [call.session.submit(call.committed, call.block, bonus=call.bonus) for call in calls]
        return [attempt(future.result) for future in futures]

    def run(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        """Run a coroutine on the background thread."""
        if not self._loop.is_running():
            work.close()
            raise RuntimeError("RemoteVerifier: it is closed, expected an open one")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _level(self, model: Model) -> Uplink:
        """The uplink level of a session."""
        level = self.uplink or min(model.uplinks, key=protocol.UPLINKS.index)
        if level not in model.uplinks:
            raise VerifierRefused(
                f"verifier {self._endpoint.url}: accepts uplink level {' or '.join(model.uplinks)}, expected {level} "
                "(more than what was allowed is never sent)"
            )
        if level == "embeddings" and self._encoder is None:
            raise VerifierRefused(
                f"verifier {self._endpoint.url}: uplink level embeddings needs the verifier's audio encoder on this "
                f"device, expected RemoteVerifier(encoder=…), or uplink={' or '.join(model.uplinks[1:]) or 'none'!r}"
            )
        return level

    async def _opening(self, model: Model, config: UGSDConfig, audio: Audio | None, prompt: str | None) -> Open:
        """The frame that opens a session; the only place where audio leaves the device."""
        level = self._level(model)
        rules = Rules(**{name: getattr(config, name) for name in Rules.__struct_fields__})
        if level == "none":
            return Open(protocol.VERSION, level, rules, prompt)
        if audio is None:
            raise VerifierRefused(f"verifier {self._endpoint.url}: uplink level {level} needs audio, got none")
        clip = audio.resampled(model.sampling_rate)
        matrix = flac = None
        if level == "audio":
            flac = await asyncio.to_thread(encode_flac, clip)
        elif level == "features":
            matrix = quantize(await asyncio.to_thread(LogMel(model.front_end), clip.samples))
        else:
            assert self._encoder is not None
            matrix = await asyncio.to_thread(encode_embeddings, self._encoder, clip)
        return Open(protocol.VERSION, level, rules, prompt, len(clip.samples), matrix, flac)

    def _fetch_tokenizer(self) -> Any:
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast

        url = "http" + self._endpoint.url.rstrip("/").removeprefix("ws") + "/v1/tokenizer"
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        request = urllib.request.Request(url, headers=headers)
        patience = self._endpoint.patience
        end = time.monotonic() + patience.deadline
        while True:
            try:
                with urllib.request.urlopen(request, timeout=patience.deadline, context=self._tls) as reply:
                    text = reply.read().decode()
                return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text))
            except urllib.error.HTTPError as error:
                raise VerifierRefused(f"verifier {self._endpoint.url}: no tokenizer ({error})") from None
            except (OSError, ValueError, http.client.HTTPException) as error:
                if time.monotonic() > end:
                    raise VerifierUnavailable(f"verifier {self._endpoint.url}: no tokenizer ({error})") from None
            time.sleep(patience.first_delay)


class RemoteSession:
    """One request at a `RemoteVerifier`; see `VerifierSession`."""

    def __init__(self, verifier: RemoteVerifier, config: UGSDConfig, audio: Audio | None, prompt: str | None):
        self._verifier = verifier
        opening: Open | None = None

        async def open_frame(model: Model) -> Open:
            nonlocal opening
            opening = opening or await verifier._opening(model, config, audio, prompt)
            return opening

        self._client = ClientSession(verifier._endpoint, open_frame, eos=config.eos_token_ids)
        verifier.run(self._connect_early())

    @property
    def forwards(self) -> int:
        """Verdicts so far, each of one forward pass."""
        return self._client.verdicts

    @property
    def traffic(self) -> Traffic:
        """Bytes sent and received so far, as WebSocket payloads, with what they were."""
        ledger = dict(self._client.sent)
        audio = sum(ledger.get(level, 0) for level in protocol.UPLINKS)
        return Traffic(sum(ledger.values()) - audio, self._client.received, audio, ledger)

    def verify(self, committed: Sequence[int], block: DraftBlock, *, bonus: bool) -> Verdict:
        """Judge a block; see `VerifierSession.verify`."""
        return self.submit(committed, block, bonus=bonus).result()

    def submit(self, committed: Sequence[int], block: DraftBlock, *, bonus: bool, top_k: int = 0) -> Future[Verdict]:
        """Ask for a verdict without waiting for it; one at a time."""
        logits = pack_draft_logits(block.logits) if block.logits is not None else b""
        return self._verifier.run(self._judge(list(committed), list(block.token_ids), bonus, top_k, logits))

    def begin(self) -> None:
        """Send prompt and audio now, as a block is going to follow; does not wait."""
        self._verifier.run(self._begin())

    def close(self) -> None:
        """End the session; does not wait."""
        with suppress(RuntimeError):  # the verifier was closed before
            self._verifier.run(self._client.close())

    async def _connect_early(self) -> None:
        self._client.connect_early()

    async def _begin(self) -> None:
        self._client.begin()

    async def _judge(self, committed: list[int], draft: list[int], bonus: bool, top_k: int, logits: bytes) -> Verdict:
        verdict = await self._client.verify(committed, draft, bonus=bonus, top_k=top_k, logits=logits)
        return Verdict(verdict.num_accepted, verdict.next_token)
