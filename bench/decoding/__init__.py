"""Benchmarks of the decoding loop."""
