"""Keeps the modules that patch their process for the emulator out of collection."""

collect_ignore = ["emulated.py", "same_tokens.py"]
