"""The command ``ugsd-fast``.

Results go to standard output, everything else to standard error. torch and transformers are imported only once they
are needed: help, usage errors and unreadable audio do not wait for them.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ugsd_fast.errors import AudioError, UGSDError, attempt

if TYPE_CHECKING:
    from rich.console import Console

    from ugsd_fast import AudioLM, Decoder, LocalVerifier, RemoteVerifier, Result, UGSDConfig
    from ugsd_fast.audio import Audio
    from ugsd_fast.demo import Clip, EmbeddedPair
    from ugsd_fast.demo.run import Comparer, Comparison

OK, SOME_FAILED, USAGE, BAD_AUDIO, BAD_MODEL, NOT_WRITABLE = range(6)


class Rule(str, Enum):
    """As in UGSDConfig, whose module imports torch; so is `Gate`."""

    greedy = "greedy"
    rank = "rank"
    exact = "exact"
    block = "block"
    typical = "typical"
    relaxed = "relaxed"


class Gate(str, Enum):
    """How the entropies of a block's tokens become its uncertainty."""

    max = "max"
    mean = "mean"
    first = "first"


class Dtype(str, Enum):
    """Of the weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Uplink(str, Enum):
    """What may leave the device of the audio; as in RemoteVerifier."""

    none = "none"
    embeddings = "embeddings"
    features = "features"
    audio = "audio"


class OnFailure(str, Enum):
    """What becomes of a block that the verifier does not judge."""

    accept = "accept"
    wait = "wait"
    raise_ = "raise"


class Only(str, Enum):
    """A model that is to caption alone."""

    edge = "edge"
    verifier = "verifier"


EXIT_CODES = """
Exit codes:

- 0: every file was captioned
- 1: some files were captioned, others were not
- 2: wrong usage
- 3: no usable audio: missing, not audio, empty, silent, not finite, too long
- 4: a model cannot be loaded or used, or the two models' vocabularies differ
- 5: the report cannot be written
"""

app = typer.Typer(
    name="ugsd-fast",
    help="Uncertainty-guided speculative decoding for audio-language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of the ``ugsd-fast`` script."""
    if isinstance(sys.stdout, TextIOWrapper):  # a caption or file name that the terminal has no letters for
        sys.stdout.reconfigure(errors="replace")
    app()


def _version(wanted: bool) -> None:
    if wanted:
        from ugsd_fast import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _option(panel: str, text: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **settings)


_model, _decode, _output = (partial(_option, panel) for panel in ("Models", "Decoding", "Output"))
_network, _capacity = (partial(_option, panel) for panel in ("Network", "Capacity"))
_FILES = typer.Argument(metavar="FILE", help="Audio that libsndfile reads, any rate; - is a WAV on standard input.")


@app.command(epilog=EXIT_CODES)
def caption(
    files: Annotated[list[str], _FILES],
    draft: Annotated[str | None, _model("Hub id or folder of the edge model.", metavar="MODEL")] = None,
    verifier: Annotated[
        str | None, _model("Hub id or folder of the verifier, or wss://… of ugsd-fast serve.", metavar="MODEL|URL")
    ] = None,
    only: Annotated[Only | None, _model("Let one model caption alone: the baselines.")] = None,
    dtype: Annotated[Dtype | None, _model("Of the weights; by default the checkpoint's own.")] = None,
    device: Annotated[str | None, _model("Such as cpu or cuda:0; by default a GPU if there is one.")] = None,
    threads: Annotated[int | None, _model("CPU threads; by default 1 for the embedded pair.", min=1)] = None,
    prompt: Annotated[str | None, _decode("The instruction to both models.")] = None,
    max_new_tokens: Annotated[int | None, _decode("Longest caption, tokens.", min=1)] = None,
    threshold: Annotated[float | None, _decode("Escalate blocks less certain than this, nats.", min=0)] = None,
    block_size: Annotated[int | None, _decode("Tokens drafted at a time.", min=1)] = None,
    rule: Annotated[Rule | None, _decode("How the verifier accepts draft tokens.")] = None,
    rank: Annotated[int | None, _decode("Rule rank: accept the verifier's RANK best.", min=1)] = None,
    gate: Annotated[Gate | None, _decode("How entropies become a block's uncertainty.")] = None,
    always_escalate: Annotated[
        bool, _decode("No gate: lossless with rule greedy, exact or block.", "--always-escalate")
    ] = False,
    temperature: Annotated[float | None, _decode("0 is greedy.", min=0)] = None,
    seed: Annotated[int | None, _decode("Of the sampling.", min=0)] = None,
    batch: Annotated[
        int, _decode("Files captioned together: more a second, each later; draws go by the place.", min=1)
    ] = 1,
    token: Annotated[str | None, _network("Bearer token of a remote verifier.", envvar="UGSD_TOKEN")] = None,
    uplink: Annotated[
        Uplink | None, _network("Most that may leave this device of the audio; by default the verifier's least.")
    ] = None,
    ca: Annotated[Path | None, _network("Authority to trust instead of the system's.", metavar="PEM")] = None,
    on_failure: Annotated[
        OnFailure | None, _network("When the verifier does not answer: accept the draft, wait, or raise.")
    ] = None,
    as_json: Annotated[bool, _output("One JSON object a file: file, text, tokens, blocks, metrics.", "--json")] = False,
    report: Annotated[
        Path | None, _output("Caption by each model alone too, and write a comparison.", metavar="HTML")
    ] = None,
) -> None:
    """Caption speech: a small model drafts, a large one checks what is uncertain.

    Without `--draft` and `--verifier`, the pair of small models that is part of this package captions English speech
    of up to four seconds, with settings of its own (rank 1 and a threshold tuned for it). With them, the settings are
    the paper's: blocks of 5, threshold 1.5 nats, rule rank with rank 20.

    One file's caption is printed bare; several are printed as file, tab, caption, in order.
    """
    _quieten()
    if files.count("-") > 1:
        _fail("standard input can be read once: - is given more than once", USAGE)
    chosen = {
        "entropy_threshold": threshold,
        "block_size": block_size,
        "rule": rule and rule.value,
        "rank": rank,
        "gate": gate and gate.value,
        "always_escalate": always_escalate or None,
        "temperature": temperature,
        "seed": seed,
        "on_verifier_failure": on_failure and on_failure.value,
    }
    choice = _choose_models(draft, verifier, only and only.value, dtype and dtype.value, device, threads)
    choice = replace(choice, network=_Network(token, uplink and uplink.value, ca))
    if not choice.remote and (uplink or ca):
        _fail(f"--{'uplink' if uplink else 'ca'} has no meaning without --verifier wss://…", USAGE)
    if report is not None:
        if batch > 1:
            _fail("--batch has no meaning with --report, which compares files one by one", USAGE)
        _check_writable(report)
    job = _CaptionJob(
        choice,
        {name: value for name, value in chosen.items() if value is not None},
        prompt,
        max_new_tokens,
        batch=batch,
        as_json=as_json,
        report=report,
    )
    raise typer.Exit(job.run(files))


@app.command(epilog=EXIT_CODES)
def demo(
    report: Annotated[Path, typer.Option(metavar="HTML", help="Where the report goes.")] = Path("demo-report.html"),
    clips: Annotated[int, typer.Option(min=1, help="How many of the embedded clips, from the first.")] = 24,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
) -> None:
    """Caption the embedded clips with the embedded pair, three ways, and write a report.

    The clips are part of the package: synthetic emotional speech, of voices and sentences that the models were not
    trained on. Nothing is downloaded.
    """
    _quieten()
    _check_writable(report)
    with _model_errors():
        from ugsd_fast import demo as embedded

        listed = embedded.clips()
        _no_loading_bars()
        with _status("loading the embedded pair"):
            pair = embedded.load_pair(threads=threads)
    with _model_errors():
        comparison = _compare_clips(pair, listed[:clips])
    _write_report(report, comparison, "Speech emotion captions, three ways")


@app.command()
def serve(
    model: Annotated[str | None, _model("Hub id or folder; by default the embedded verifier.", metavar="MODEL")] = None,
    dtype: Annotated[Dtype | None, _model("Of the weights; by default the checkpoint's own.")] = None,
    device: Annotated[str | None, _model("Such as cpu or cuda:0; by default a GPU if there is one.")] = None,
    threads: Annotated[int | None, _model("CPU threads; by default 1 for the embedded pair.", min=1)] = None,
    host: Annotated[str, _network("Address; others than this machine's own need --cert and a token.")] = "127.0.0.1",
    port: Annotated[int, _network("0 takes a free one.", min=0, max=65535)] = 8765,
    token: Annotated[str | None, _network("Bearer token that clients need.", envvar="UGSD_TOKEN")] = None,
    token_file: Annotated[Path | None, _network("Lines of a name and a token each.", metavar="FILE")] = None,
    cert: Annotated[Path | None, _network("Certificate chain.", metavar="PEM")] = None,
    key: Annotated[Path | None, _network("Its private key.", metavar="PEM")] = None,
    client_ca: Annotated[Path | None, _network("Authority that clients' certificates need.", metavar="PEM")] = None,
    uplink: Annotated[
        list[Uplink] | None,
        _network("Level to accept, may be repeated; by default features and audio, or none for a text model."),
    ] = None,
    max_sessions: Annotated[int, _capacity("Open sessions.", min=1)] = 256,
    kv_mib: Annotated[int, _capacity("Memory of keys and values, MiB; idle sessions are evicted.", min=1)] = 1024,
    max_audio_seconds: Annotated[float, _capacity("Longest audio of a session.", min=0.1)] = 300.0,
) -> None:
    """Serve a verifier to devices that caption with `--verifier wss://…`.

    Listens on this machine only unless told otherwise; an address that others can reach is refused without TLS and a
    token. Audio and text are kept in memory, never in files or logs.
    """
    _quieten()
    with _model_errors():
        try:
            from ugsd_fast.serving.security import TLS, Tokens, UnsafeServer, check_binding
            from ugsd_fast.serving.server import serve_model
        except ImportError as error:
            _fail(f"{error.name} is not installed: pip install 'ugsd-fast[serve]'", USAGE)
        from ugsd_fast import AudioLM
        from ugsd_fast.demo import PAIR_FOLDER
        from ugsd_fast.serving import Limits

        if (cert is None) != (key is None):
            _fail("--cert and --key belong together", USAGE)
        if client_ca is not None and cert is None:
            _fail("--client-ca has no meaning without --cert", USAGE)
        tls = TLS(cert, key, client_ca) if cert and key else None
        try:
            tokens = Tokens.read(token_file) if token_file else Tokens({"default": token} if token else None)
            check_binding(host, tls=tls, tokens=tokens)
        except (UnsafeServer, ValueError, OSError) as error:
            _fail(str(error), USAGE)
        choice = _ModelChoice(model, model, "verifier", dtype and dtype.value, device, threads)
        with _status("loading the verifier"):
            settings = choice.settings()
            audio_lm = AudioLM.from_pretrained(model or PAIR_FOLDER / "verifier", **settings)
            try:
                server = serve_model(
                    audio_lm,
                    name=model or "embedded-verifier",
                    uplinks=[level.value for level in uplink] if uplink else None,  # type: ignore[misc]
                    limits=Limits(
                        max_sessions=max_sessions, kv_bytes=kv_mib << 20, max_audio_seconds=max_audio_seconds
                    ),
                    host=host,
                    port=port,
                    tokens=tokens,
                    tls=tls,
                )
            except OSError as error:
                _fail(f"cannot listen on {host}:{port} ({error.strerror or error})", USAGE)
    _stderr().print(f"serving {server.hub.backend.model.name} at {server.url}", markup=False, soft_wrap=True)
    server.run()


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="The same as one JSON object.")] = False,
) -> None:
    """Say what this installation can do on this machine.

    Exits with 1 if something that captioning needs is missing.
    """
    _quieten()
    from ugsd_fast import doctor as examination

    found = examination.examine()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        examination.show(found, _console())
    raise typer.Exit(OK if not found["problems"] else 1)


@dataclass(frozen=True)
class _Network:
    """How a remote verifier is reached."""

    token: str | None = None
    uplink: str | None = None
    ca: Path | None = None


@dataclass(frozen=True)
class _ModelChoice:
    """Which models to load: the embedded pair where both names are None; a verifier may be the URL of one."""

    draft: str | None
    verifier: str | None
    only: str | None
    dtype: str | None
    device: str | None
    threads: int | None
    network: _Network = _Network()

    @property
    def remote(self) -> bool:
        return _is_url(self.verifier)

    @property
    def embedded(self) -> bool:
        return self.draft is None and (self.verifier is None or self.remote)

    def defaults(self) -> tuple[UGSDConfig, str | None, int]:
        """Settings, prompt and longest caption that go with the models."""
        from ugsd_fast import UGSDConfig

        if not self.embedded:
            return UGSDConfig(), None, 128
        from ugsd_fast.demo import pair_settings

        settings = pair_settings()
        return settings.config, settings.prompt, settings.max_new_tokens

    def settings(self) -> dict[str, Any]:
        """Arguments of ``AudioLM.from_pretrained``; sets the number of threads."""
        import torch

        _no_loading_bars()
        threads = self.threads or (1 if self.embedded else None)
        if threads is not None:
            torch.set_num_threads(threads)
        settings: dict[str, Any] = {"device": _checked_device(self.device) or ("cpu" if self.embedded else None)}
        if self.dtype is not None:
            settings["dtype"] = getattr(torch, self.dtype)
        return settings

    def load(self) -> tuple[AudioLM | None, LocalVerifier | RemoteVerifier | None]:
        from ugsd_fast import AudioLM, LocalVerifier
        from ugsd_fast.demo import PAIR_FOLDER

        settings = self.settings()
        draft: AudioLM | None = None
        verifier: LocalVerifier | RemoteVerifier | None = None
        if self.only != "verifier":
            draft = AudioLM.from_pretrained(self.draft or PAIR_FOLDER / "draft", **settings)
        if self.only != "edge" and self.remote:
            verifier = self._connect()
        elif self.only != "edge":
            verifier = LocalVerifier(AudioLM.from_pretrained(self.verifier or PAIR_FOLDER / "verifier", **settings))
        return draft, verifier

    def _connect(self) -> RemoteVerifier:
        import ssl

        from ugsd_fast import RemoteVerifier

        network, tls = self.network, None
        assert self.verifier is not None
        if network.ca is not None:
            try:
                tls = ssl.create_default_context(cafile=network.ca)
            except OSError as error:
                _fail(f"--ca {network.ca} cannot be used ({error.strerror or error})", USAGE)
        return RemoteVerifier(self.verifier, token=network.token, uplink=network.uplink, tls=tls)  # type: ignore[arg-type]

    def names(self) -> dict[str, str]:
        """For the report."""
        names = {}
        if self.only != "verifier":
            names["Drafter"] = self.draft or "embedded pair"
        if self.only != "edge":
            names["Verifier"] = self.verifier or "embedded pair"
        return names


def _checked_device(name: str | None) -> str | None:
    import torch

    if name is None:
        return None
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        _fail(f"--device {name} cannot be used here ({str(error).splitlines()[0]})", USAGE)
    return name


def _choose_models(
    draft: str | None,
    verifier: str | None,
    only: str | None,
    dtype: str | None,
    device: str | None,
    threads: int | None,
) -> _ModelChoice:
    if only is None and (draft is None) != (verifier is None) and not _is_url(verifier):
        missing = "--verifier" if verifier is None else "--draft"
        _fail(f"{missing} is missing: give both models, none for the embedded pair, or --only", USAGE)
    if only == "edge" and verifier is not None:
        _fail("--verifier has no meaning with --only edge", USAGE)
    if only == "verifier" and draft is not None:
        _fail("--draft has no meaning with --only verifier", USAGE)
    return _ModelChoice(draft, verifier, only, dtype, device, threads)


def _is_url(verifier: str | None) -> bool:
    return verifier is not None and verifier.startswith(("ws://", "wss://"))


class _CaptionJob:
    """Captions files, some at a time; what is wrong with one of them does not touch the others."""

    def __init__(
        self,
        choice: _ModelChoice,
        chosen: dict[str, Any],
        prompt: str | None,
        max_new_tokens: int | None,
        *,
        batch: int,
        as_json: bool,
        report: Path | None,
    ):
        self._choice, self._chosen = choice, chosen
        self._batch = batch
        self._prompt, self._max_new_tokens = prompt, max_new_tokens
        self._as_json, self._report = as_json, report
        self._console = _console()
        self._decoder: Decoder | None = None
        self._comparer: Comparer | None = None
        self._codes: list[int] = []
        self._failures: dict[str, str] = {}
        self._alone = True

    def run(self, files: Sequence[str]) -> int:
        """Caption all files; the exit code."""
        self._alone = len(files) == 1
        with _progress(files, self._console) as advance:
            for start in range(0, len(files), self._batch):
                advance(start)
                group = files[start : start + self._batch]
                self._codes += map(self._deliver, group, self._attempt(group))
        if self._comparer is not None and self._report is not None and OK in self._codes:
            self._comparer.comparison.failures = self._failures
            _write_report(self._report, self._comparer.comparison, "Speech emotion captions")
        return self._codes[0] if len(set(self._codes)) == 1 else SOME_FAILED

    def _attempt(self, files: Sequence[str]) -> list[Result | Exception]:
        """Captions of files that are decoded together; an exception for one that cannot be captioned."""
        from ugsd_fast.audio import load_audio

        outcomes: dict[int, Any] = {index: attempt(load_audio, file) for index, file in enumerate(files)}
        read = {index: audio for index, audio in outcomes.items() if not isinstance(audio, Exception)}
        if read:
            decoder = self._ready()
            if self._batch == 1:
                captions = [attempt(self._caption, decoder, files[index], audio) for index, audio in read.items()]
            else:
                settings = {**self._request, "max_batch_size": self._batch, "return_exceptions": True}
                captions = decoder.generate(list(read.values()), **settings)
            outcomes |= zip(read, captions, strict=True)
        return list(outcomes.values())

    def _deliver(self, file: str, outcome: Result | Exception) -> int:
        """Print a caption, or why there is none; the exit code."""
        if isinstance(outcome, Exception):
            message, code = _explain(outcome)
            self._failures[file] = message if file in message else f"{file}: {message}"
            _complain(self._failures[file])
            return code
        if self._as_json:
            plain = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
            print(json.dumps({"file": file, **outcome.to_dict()}, ensure_ascii=plain), flush=True)
        elif not self._console.is_terminal:
            print(outcome.text if self._alone else f"{file}\t{outcome.text}", flush=True)
        elif self._batch > 1:
            from rich.text import Text

            self._console.print(Text(file, style="bold"), Text(outcome.text), sep="\n")
            self._console.print(Text(_summary_line(outcome), style="dim"))
        return OK

    def _ready(self) -> Decoder:
        """The decoder, loaded when the first readable file asks for it: trouble with it ends the whole run."""
        if self._decoder is None:
            with _model_errors():
                from ugsd_fast import Decoder

                defaults, prompt, max_new_tokens = self._choice.defaults()
                try:
                    config = replace(defaults, **self._chosen)
                except ValueError as error:
                    _fail(str(error).removeprefix("UGSDConfig: "), USAGE)
                self._prompt = prompt if self._prompt is None else self._prompt
                self._max_new_tokens = self._max_new_tokens or max_new_tokens
                with _status("loading models", shown=self._alone):
                    draft, verifier = self._choice.load()
                self._decoder = Decoder(draft, verifier, config)
                if self._report is not None:
                    from ugsd_fast.demo.run import Comparer

                    self._comparer = Comparer(draft, verifier, config, **self._request)
                    self._comparer.comparison.settings = _settings(self._choice.names(), self._request)
        return self._decoder

    @property
    def _request(self) -> dict[str, Any]:
        return {"prompt": self._prompt, "max_new_tokens": self._max_new_tokens}

    def _caption(self, decoder: Decoder, file: str, audio: Audio) -> Result:
        if self._comparer is None:
            return self._decode(decoder, file, audio)
        from ugsd_fast.demo.run import Utterance

        method = {None: "ugsd", "edge": "edge", "verifier": "verifier"}[self._choice.only]
        utterance = Utterance(audio.name if file == "-" else Path(file).name, audio)
        if not self._comparer.comparison.utterances:
            self._comparer.warm_up(utterance)
        result = self._decode(decoder, file, audio)
        with _status("comparing with each model alone", shown=self._alone):
            self._comparer.add(utterance, {method: result})  # type: ignore[dict-item]
        return result

    def _decode(self, decoder: Decoder, file: str, audio: Audio) -> Result:
        """Decode; on a terminal show one file's text while it grows, those of several whole above the progress bar."""
        if self._as_json or not self._console.is_terminal:
            return decoder.generate(audio, **self._request)
        from rich.text import Text

        result = None
        text = Text("" if self._alone else f"{file}\n", style="" if self._alone else "bold")
        try:
            for event in decoder.stream(audio, **self._request):
                checked = event.block.escalated and event.block.draft_tokens
                style = "not bold cyan" if checked else "not bold"
                text.append(event.text, style)
                if self._alone:
                    self._console.print(Text(event.text, style=style), end="")
                result = event.result
        finally:
            if self._alone:
                self._console.print()
        assert result is not None
        if not self._alone:
            self._console.print(text)
        self._console.print(Text(_summary_line(result), style="dim"))
        return result


def _summary_line(result: Result) -> str:
    metrics = result.metrics
    parts = [f"{len(result.tokens)} tokens in {1e3 * metrics.latency:.0f} ms"]
    if metrics.drafter_forwards and metrics.verifier_forwards:
        parts.append(f"{100 * metrics.escalated_share:.0f}% escalated")
        parts.append(f"{metrics.verifier_forwards} verifier forwards")
    return " · ".join(parts)


def _compare_clips(pair: EmbeddedPair, clips: Sequence[Clip]) -> Comparison:
    """Caption the clips by every method, showing the captions as they come, then sweep the threshold."""
    from ugsd_fast.audio import load_audio
    from ugsd_fast.demo.attributes import matches
    from ugsd_fast.demo.run import FOUR_WAYS, Comparer, Utterance
    from ugsd_fast.demo.terminal import show_clip, show_summary

    console = _console()
    request = {"prompt": pair.prompt, "max_new_tokens": pair.max_new_tokens}
    comparer = Comparer(pair.draft, pair.verifier, pair.config, **request, methods=FOUR_WAYS, matches=matches)  # type: ignore[arg-type]
    names = {"Drafter": "embedded pair, draft", "Verifier": "embedded pair, verifier"}
    comparer.comparison.settings = _settings(names, request)
    for index, clip in enumerate(clips):
        details = {"voice": clip.voice, "spoken": clip.sentence}
        utterance = Utterance(
            clip.path.name, load_audio(clip.path), clip.caption, {k: v for k, v in details.items() if v}
        )
        if not index:
            comparer.warm_up(utterance)
        comparer.add(utterance)
        show_clip(console, comparer.comparison, index)
    with _status("sweeping the threshold"):
        for _ in comparer.sweep():
            pass
    show_summary(console, comparer.comparison)
    return comparer.comparison


def _settings(names: dict[str, str], request: dict[str, Any]) -> dict[str, str]:
    from ugsd_fast.demo.run import machine
    from ugsd_fast.models import DEFAULT_PROMPT

    return {
        **names,
        "Prompt": request["prompt"] or DEFAULT_PROMPT,
        "Longest caption": f"{request['max_new_tokens']} tokens",
        **machine(),
    }


def _write_report(path: Path, comparison: Comparison, title: str) -> None:
    from ugsd_fast.demo.report import render, write

    html = render(comparison, title=title)
    try:
        write(path, html)
    except OSError as error:
        _fail(f"report {error}", NOT_WRITABLE)
    _stderr().print(f"report: {path}", markup=False)


def _check_writable(path: Path) -> None:
    from ugsd_fast.demo.report import check_writable

    try:
        check_writable(path)
    except OSError as error:
        _fail(f"report {error}", NOT_WRITABLE)


@contextmanager
def _model_errors() -> Iterator[None]:
    """End the run on a model that cannot be used."""
    try:
        yield
    except (UGSDError, MemoryError, RuntimeError) as error:
        _fail(*_explain(error))


def _explain(error: BaseException) -> tuple[str, int]:
    """Message and exit code of what a user can do something about; a bug is raised on."""
    if isinstance(error, AudioError):
        return str(error), BAD_AUDIO
    if isinstance(error, UGSDError):
        return str(error), BAD_MODEL
    if isinstance(error, MemoryError) or "out of memory" in str(error):
        return "out of memory: try a smaller model, --dtype bfloat16 or another --device", BAD_MODEL
    raise error


@contextmanager
def _status(doing: str, *, shown: bool = True) -> Iterator[None]:
    """A spinner on standard error, if anybody looks at it."""
    console = _stderr()
    if not (shown and console.is_terminal):
        yield
        return
    with console.status(doing):
        yield


@contextmanager
def _progress(files: Sequence[str], output: Console) -> Iterator[Callable[[int], None]]:
    """A bar over several files, if anybody looks at standard error; yields what is told how many are done.

    Where both streams are the terminal, the bar is drawn by the console of the captions, below them. Otherwise nothing
    but the bar may go to standard error: rich would by default lead standard output there, too.
    """
    if len(files) == 1 or not _stderr().is_terminal:
        yield lambda done: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[file]}", markup=False),
    )
    console = output if output.is_terminal else _stderr()
    with (
        Progress(
            *columns,
            console=console,
            transient=True,
            redirect_stdout=output.is_terminal,
            redirect_stderr=False,
        ) as progress,
        _messages_through(console),
    ):
        task = progress.add_task("", total=len(files), file="")
        yield lambda done: progress.update(task, completed=done, file=files[done])


def _complain(message: str) -> None:
    from rich.text import Text

    text = Text.assemble(("error: ", "bold red"), message.replace("\n", " "))
    _stderr().print(text, soft_wrap=True)


def _fail(message: str, code: int) -> NoReturn:
    _complain(message)
    raise typer.Exit(code)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


_live_console: Console | None = None


def _stderr() -> Console:
    """Where messages go: standard error, through the console that draws a progress bar while there is one."""
    from rich.console import Console

    return _live_console or Console(stderr=True, highlight=False)


@contextmanager
def _messages_through(console: Console) -> Iterator[None]:
    global _live_console
    _live_console = console
    try:
        yield
    finally:
        _live_console = None


def _quieten() -> None:
    """Keep transformers' notes and bars off the terminal; a download still shows its progress there."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.simplefilter("ignore")


def _no_loading_bars() -> None:
    import huggingface_hub.utils
    import transformers

    transformers.logging.disable_progress_bar()
    if sys.stderr.isatty():
        huggingface_hub.utils.enable_progress_bars()


if __name__ == "__main__":
    main()
