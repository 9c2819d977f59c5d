"""Operations whose result the host waits for."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# For a value, or for a size that depends on values.
_READS = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "bincount"),
    *("_unique", "_unique2", "unique_consecutive", "unique_dim", "unique_dim_consecutive"),
}


class HostReads(TorchDispatchMode):
    """Counts, while active, the operations that would hold up the host on a GPU; copies to the host are not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in _READS or str(func) == "aten.repeat_interleave.Tensor" or _looks_for_indices(name, args):
            self.ops[name] += 1
        return func(*args, **(kwargs or {}))


def _looks_for_indices(name: str, args: Any) -> bool:
    """Whether a mask is made to indices first; where one value is put at all of them, it is not."""
    if not name.startswith(("index", "_index")) or ("put" in name and args[2].numel() == 1):
        return False
    indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
    return any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in indices)
