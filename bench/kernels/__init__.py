"""Microbenchmarks, one module an op: ``python -m bench.kernels.token_stats [--quick] [--threads N]``."""
