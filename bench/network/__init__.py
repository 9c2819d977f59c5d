"""A verifier behind real conditions: latency over a shaped link, and one server under load."""
