"""Benchmarks: ``bench.kernels`` (one module an op), ``bench.decoding``, and ``bench.run``, which runs them all."""
