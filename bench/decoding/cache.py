"""What a decode step's cache costs: `GrowingCache` against transformers' ``DynamicCache``, without a model around it.

A step appends one token's keys and values to every layer and takes what attention would read; every fifth step rolls
five tokens back, so that the context stays as long as it is. The floor writes the same bytes into flat memory, one
layer at a time. A ragged rollback lets each row of a batch forget its own number of tokens and appends the next token.

``python -m bench.decoding.cache [--quick] [--threads N] [--json FILE]``
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache

from bench.harness import SCHEMA, Row, Settings, begin, interleave, machine, ratios, spread
from ugsd_fast.cache import GrowingCache, compact, rollback

TARGET_US = 100  # a step of all layers
LAYERS, HEADS, WIDTH = 28, 2, 128
ROUND = 5  # steps until the context is cut back to its length
OURS, THEIRS, FLOOR = "GrowingCache", "DynamicCache", "floor: bytes written"
IN_PLACE, HOLES, COMPACTED = "GrowingCache, rows of a length each", "DynamicCache, holes", "DynamicCache, kv_compact"

States = list[tuple[Tensor, Tensor]]


def states(batch: int, tokens: int, seed: int) -> States:
    """Keys and values of every layer, as attention makes them: rotated keys contiguous, values transposed."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(LAYERS):
        keys = torch.randn(batch, HEADS, tokens, WIDTH, generator=generator).bfloat16()
        values = torch.randn(batch, tokens, HEADS, WIDTH, generator=generator).bfloat16().transpose(1, 2)
        made.append((keys, values))
    return made


def append(cache: DynamicCache, new: States) -> None:
    """Update every layer."""
    for layer, (keys, values) in enumerate(new):
        cache.update(keys, values, layer)


def measure_step(context: int, settings: Settings) -> Row:
    """Time one decode step at batch 1; microseconds."""
    new, caches = states(1, 1, 1), {OURS: GrowingCache(), THEIRS: DynamicCache()}
    for cache in caches.values():
        append(cache, states(1, context, 0))
    flat = [torch.empty(2, HEADS * WIDTH, dtype=torch.bfloat16) for _ in range(LAYERS)]
    sources = [torch.stack([keys.flatten(), values.flatten()]) for keys, values in new]

    def write() -> None:
        for target, source in zip(flat, sources, strict=True):
            target.copy_(source)

    def step(cache: DynamicCache) -> Callable[[], None]:
        def run() -> None:
            append(cache, new)
            if cache.get_seq_length() == context + ROUND:
                cache.crop(-ROUND)

        return run

    calls = {OURS: step(caches[OURS]), THEIRS: step(caches[THEIRS]), FLOOR: write}
    samples, _ = interleave(calls, settings)
    ours = spread(samples[OURS], 1e6)
    return {
        "context": context,
        "bytes": 2 * LAYERS * HEADS * WIDTH * 2,
        "step_us": {name: spread(values, 1e6) for name, values in samples.items()},
        "faster": spread(ratios(samples[THEIRS], samples[OURS])),
        "target": {"at_most": TARGET_US, "met": ours["median"] <= TARGET_US},
    }


def measure_ragged(batch: int, context: int, settings: Settings) -> Row:
    """Time a block of 5 tokens appended, then 0 to 4 of them rolled back in each row; microseconds."""
    block, rejected = states(batch, 5, 1), torch.arange(batch) % 5
    start = states(batch, context, 0)

    def fresh(cache: DynamicCache) -> DynamicCache:
        append(cache, start)
        return cache

    own = fresh(GrowingCache(capacity=2 * context))
    holes, compacted = fresh(DynamicCache()), fresh(DynamicCache())
    rollback(own, torch.arange(batch))  # from here on every append is a ragged one
    kept = 5 - rejected

    def in_place() -> None:
        append(own, block)
        rollback(own, rejected)
        rollback(own, kept)  # as long as before

    def with_holes() -> None:
        append(holes, block)
        mask = torch.ones(batch, context + 5, dtype=torch.long)
        rollback(holes, rejected, mask=mask)
        holes.crop(context - holes.get_seq_length())

    def with_compact() -> None:
        append(compacted, block)
        mask = torch.ones(batch, context + 5, dtype=torch.long)
        rollback(compacted, rejected, mask=mask)
        compact(compacted, mask[:, : compacted.get_seq_length()])
        compacted.crop(context - compacted.get_seq_length())

    samples, _ = interleave({IN_PLACE: in_place, HOLES: with_holes, COMPACTED: with_compact}, settings)
    return {"batch": batch, "context": context, "block_us": {name: spread(v, 1e6) for name, v in samples.items()}}


@torch.inference_mode()
def main() -> None:
    """Run from the command line."""
    session = begin("bench.decoding.cache", "Cost of the key/value cache in a decode step.")
    quick = session.conditions["quick"]
    step = measure_step(64 if quick else 2048, session.settings)
    ragged = measure_ragged(4, 64 if quick else 1024, session.settings)
    for name, us in (step["step_us"] | ragged["block_us"]).items():
        print(f"{name:36} {us['median']:10.1f} µs [{us['p10']:.1f}, {us['p90']:.1f}]")
    target = step["target"]
    print(f"target ≤ {target['at_most']} µs a step: {'met' if target['met'] else 'MISSED'}")
    shape = f"{LAYERS} layers, {HEADS} KV heads × {WIDTH}, bfloat16"
    session.write({"schema": SCHEMA, "machine": machine(), "shape": shape, "step": step, "ragged": ragged})


if __name__ == "__main__":
    main()
