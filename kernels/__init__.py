"""Triton kernels, one file per op; installed as ``ugsd_fast.kernels``."""
