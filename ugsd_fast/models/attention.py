"""Which attention implementation a model is loaded with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

_HALF = frozenset({"float16", "bfloat16"})


def best_attention(
    model_class: Any, config: Mapping[str, Any], dtype: str | torch.dtype | None, device: torch.device
) -> str:
    """FlashAttention 3 or 2 where it is installed and model, device and dtype allow it, then SDPA, then eager.

    Parameters
    ----------
    model_class : type
        A transformers model class; it says what it supports.
    config : mapping
        The checkpoint's config; its dtype counts where `dtype` is None or ``"auto"``.
    """
    if dtype in (None, "auto"):
        dtype = config.get("dtype") or config.get("torch_dtype")
    half = str(dtype).removeprefix("torch.") in _HALF
    if device.type == "cuda" and half and getattr(model_class, "_supports_flash_attn", False):
        if is_flash_attn_3_available():
            return "flash_attention_3"
        if is_flash_attn_2_available():
            return "flash_attention_2"
    return "sdpa" if getattr(model_class, "_supports_sdpa", False) else "eager"
