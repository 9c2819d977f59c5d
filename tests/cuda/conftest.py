"""Keeps what patches its process for the emulator out of collection, and the tests of patched processes from others."""

import sys

collect_ignore = ["emulated.py", "same_tokens.py"]
if "tests.cuda.emulated" not in sys.modules:
    collect_ignore.append("kernels")
