"""No kernel touches a byte outside its tensors: run between forbidden pages, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.ops import cases


@pytest.mark.skipif(cases.extension is None or sys.platform != "linux", reason="needs the extension, and mprotect")
def test_no_read_or_write_outside_a_tensor() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.ops.guard_pages"], capture_output=True, text=True, check=False, timeout=600
    )
    last = result.stdout.strip().rpartition("\n")[2]
    assert result.returncode == 0, f"{last}: ended with {result.returncode}\n{result.stderr}"
    assert last == "finished"
