"""Two terminals: ``ugsd-fast serve`` and ``ugsd-fast caption --verifier``."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from ugsd_fast.cli import app
from ugsd_fast.demo import clips

TOKEN = "a-token-of-twenty-letters"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with subprocess.Popen(
        [sys.executable, "-m", "ugsd_fast.cli", "serve", "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "UGSD_TOKEN": TOKEN, "COLUMNS": "200"},
    ) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"serving embedded-verifier at (ws://127\.0\.0\.1:\d+)", line)
        assert found, line
        yield found[1]
        process.terminate()


def test_caption_with_a_served_verifier(url: str) -> None:
    clip = str(clips()[0].path)
    local = json.loads(CliRunner().invoke(app, ["caption", clip, "--json"]).stdout)
    network = ["--verifier", url, "--token", TOKEN, "--uplink", "audio", "--on-failure", "raise"]
    run = CliRunner().invoke(app, ["caption", clip, "--json", *network])
    assert run.exit_code == 0, run.output
    remote = json.loads(run.stdout)
    assert remote["text"] == local["text"]
    assert remote["ledger"]["audio"] == remote["metrics"]["audio_bytes"] > 0
    bare = CliRunner().invoke(app, ["caption", clip, "--verifier", url, "--token", TOKEN])
    assert bare.exit_code == 0
    assert bare.stdout.strip()


def test_a_token_that_is_not_accepted(url: str) -> None:
    run = CliRunner().invoke(app, ["caption", str(clips()[0].path), "--verifier", url])
    assert run.exit_code == 4
    assert "the bearer token is not accepted" in run.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--host", "0.0.0.0"], "0.0.0.0 can be reached from other machines"),
        (["serve", "--cert", "c.pem"], "--cert and --key belong together"),
        (["serve", "--client-ca", "c.pem"], "--client-ca has no meaning without --cert"),
        (["serve", "--token", "short"], "expected at least 16"),
        (["serve", "--token-file", "missing"], "missing"),
        (["caption", "x.wav", "--uplink", "audio"], "--uplink has no meaning without --verifier wss://"),
    ],
)
def test_usage(arguments: list[str], message: str) -> None:
    run = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert run.exit_code == 2
    assert message in run.stderr
