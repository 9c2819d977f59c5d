"""The device's process: the embedded drafter, slowed, captions clips by the methods it is told on standard input."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from typing import Any

from bench.network.speeds import SPEEDS, slowed
from ugsd_fast import Decoder, RemoteVerifier, UGSDConfig
from ugsd_fast.audio import load_audio
from ugsd_fast.demo import EmbeddedPair, clips, load_pair
from ugsd_fast.serving.client import Patience


def settings(pair: EmbeddedPair) -> dict[str, UGSDConfig]:
    """The methods; edge-only and cloud-only leave a model out."""
    ugsd = replace(pair.config, on_verifier_failure="raise")
    fixed = replace(ugsd, always_escalate=True, rule="greedy")
    return {
        "edge-only": ugsd,
        "cloud-only": fixed,
        "fixed block": fixed,
        "fixed block + ahead": replace(fixed, ahead=12),
        "UGSD": ugsd,
        "UGSD + ahead": replace(ugsd, ahead=12),
    }


def main() -> None:
    """Answer each line ``{"method": …, "clips": n}`` with one result a clip."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", required=True)
    parser.add_argument("--speeds", choices=SPEEDS, required=True)
    arguments = parser.parse_args()
    pair = load_pair(threads=1)
    model: Any = pair.draft.model
    model.forward = slowed(model.forward, SPEEDS[arguments.speeds].draft_step)
    methods = settings(pair)
    loaded = [load_audio(clip.path) for clip in clips()]
    patience, tokenizer = Patience(deadline=60, attempt=15), pair.draft.tokenizer
    verifier = RemoteVerifier(arguments.url, uplink="features", patience=patience, tokenizer=tokenizer)
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        method, config = asked["method"], methods[asked["method"]]
        results = []
        draft = None if method == "cloud-only" else pair.draft
        decoder = Decoder(draft, None if method == "edge-only" else verifier, config)
        for audio in loaded[: asked["clips"]]:
            result = decoder.generate(audio, prompt=pair.prompt, max_new_tokens=pair.max_new_tokens)
            blocks = result.trace.blocks
            results.append(
                {
                    "tokens": len(result.tokens),
                    "escalated": sum(len(block.draft_tokens) for block in blocks if block.escalated),
                    "drafted": sum(len(block.draft_tokens) for block in blocks),
                    "escalated_blocks": sum(block.escalated for block in blocks),
                    "blocks": len(blocks),
                    "wasted": result.metrics.wasted_drafts,
                    "latency": result.metrics.latency,
                    "first": result.metrics.time_to_first_token,
                    "uplink": result.metrics.uplink_bytes,
                    "audio": result.metrics.audio_bytes,
                    "downlink": result.metrics.downlink_bytes,
                    "ids": result.tokens,
                }
            )
        print(json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
