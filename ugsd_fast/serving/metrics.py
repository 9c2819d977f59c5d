"""What ``/metrics`` shows."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_SESSIONS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.sessions = Gauge("ugsd_sessions", "Open sessions", registry=registry)
        self.connections = Gauge("ugsd_connections", "Open connections", registry=registry)
        self.frames = Counter("ugsd_frames", "Frames received", ["type"], registry=registry)
        self.errors = Counter("ugsd_errors", "Frames answered by an error", ["code"], registry=registry)
        self.denied = Counter("ugsd_denied", "Connections refused", ["reason"], registry=registry)
        self.repeats = Counter("ugsd_repeated_frames", "Frames that got their first reply again", registry=registry)
        self.resumes = Counter("ugsd_resumes", "Sessions taken up again", registry=registry)
        self.evictions = Counter("ugsd_evictions", "Caches of idle sessions freed", registry=registry)
        self.rebuilds = Counter("ugsd_rebuilds", "Evicted caches computed again", registry=registry)
        self.draft_tokens = Counter("ugsd_draft_tokens", "Draft tokens judged", registry=registry)
        self.accepted_tokens = Counter("ugsd_accepted_tokens", "Draft tokens accepted", registry=registry)
        self.kv_bytes = Gauge("ugsd_kv_bytes", "Keys and values in memory", registry=registry)
        self.waiting = Gauge("ugsd_waiting_frames", "Frames that wait for the model", registry=registry)
        self.verify_seconds = Histogram(
            "ugsd_verify_seconds", "From a frame to its verdict", buckets=_SECONDS, registry=registry
        )
        self.forward_seconds = Histogram("ugsd_forward_seconds", "Forward passes", buckets=_SECONDS, registry=registry)
        self.batch_sessions = Histogram(
            "ugsd_batch_sessions", "Sessions in a forward pass", buckets=_SESSIONS, registry=registry
        )
        self.prompt_seconds = Histogram(
            "ugsd_prompt_seconds", "Turns of prompts, pieces of them included", buckets=_SECONDS, registry=registry
        )
        self.batch_prompts = Histogram("ugsd_batch_prompts", "Prompts in a turn", buckets=_SESSIONS, registry=registry)

    def text(self) -> bytes:
        """The Prometheus exposition."""
        return generate_latest(self.registry)
