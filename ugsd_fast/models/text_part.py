"""The text decoder and LM head of an audio model, for the forwards behind the audio.

What a conditional-generation model does around them (looking for audio, merging, wrapping outputs) takes some 60 µs a
forward, a fifth of a small model's step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn


class TextPart(NamedTuple):
    """What writes text.

    Attributes
    ----------
    decoder, head : nn.Module
        Hidden states of token ids, and logits of these.
    around : tuple of nn.Module
        The modules that a forward of the whole model passes on its way to the decoder, but for the model itself.
    decoder_path, head_path : tuple of str
        Their names, a module at a time.
    decorated, forward : callable
        The decoder's own, with and without decorators: they fill in settings and collect outputs that nobody asks for
        here. Where somebody has replaced it, or looks at the decoder, it is called as ever.
    takes_masks : bool
        Whether the decoder takes ready masks, by kind of layer, and has full attention only: then it need not find out
        that one token needs none, or that one of 4 dimensions is to be handed on.
    """

    decoder: nn.Module
    head: nn.Module
    around: tuple[nn.Module, ...]
    decoder_path: tuple[str, ...]
    head_path: tuple[str, ...]
    decorated: Callable[..., Any]
    forward: Callable[..., Any]
    takes_masks: bool

    def __call__(self, arguments: Mapping[str, Any], cache: Any, kept: Tensor | None = None) -> Tensor:
        """Logits [B, q, V] of a forward, or of its positions `kept`."""
        arguments = dict(arguments, past_key_values=cache, use_cache=True)
        mask = arguments["attention_mask"]
        if self.takes_masks and (arguments["input_ids"].shape[1] == 1 if mask is None else mask.dim() == 4):
            arguments["attention_mask"] = {_FULL: mask}
        decoder = self.decoder
        plain = type(decoder).forward is self.decorated and not _watched(decoder)
        output = self.forward(decoder, **arguments) if plain else decoder(**arguments)
        hidden: Tensor = output.last_hidden_state
        logits: Tensor = self.head(hidden if kept is None else hidden[:, kept])
        return logits


_FULL = "full_attention"
_TAKES_MASKS = "isinstance(causal_mask_mapping := attention_mask, dict)"  # in transformers' decoders that do

_parts: WeakKeyDictionary[nn.Module, TextPart] = WeakKeyDictionary()  # that do not refer to their key


def text_part(model: Any) -> TextPart | None:
    """The text part of a model of a family whose `Family.text_alone` is set.

    None where somebody counts on the modules around it: hooks, a forward replaced by another (device placement,
    offloading, a profiler), a compiled call.
    """
    part = _parts.get(model)
    if part is None or _at(model, part.head_path) is not part.head or _at(model, part.decoder_path) is not part.decoder:
        part = _parts[model] = _find(model)
    return None if any(map(_watched, (model, *part.around))) else part


def _find(model: Any) -> TextPart:
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    names = {module: tuple(name.split(".")) for name, module in model.named_modules()}
    path = names[decoder]
    around = tuple(_at(model, path[:depth]) for depth in range(1, len(path)))
    decorated = type(decoder).forward
    forward = inspect.unwrap(decorated)
    try:
        takes_masks = _TAKES_MASKS in inspect.getsource(forward)
    except (OSError, TypeError):  # without its source nobody knows
        takes_masks = False
    kinds = set(getattr(decoder.config, "layer_types", None) or ())
    takes_masks = takes_masks and kinds == {_FULL}
    return TextPart(decoder, head, around, path, names[head], decorated, forward, takes_masks)


def _at(module: Any, path: tuple[str, ...]) -> Any:
    """The module of that name, None where there is none; `get_decoder` and its like take ten times as long."""
    for name in path:
        module = module and module._modules.get(name)
    return module


def _watched(module: nn.Module) -> bool:
    state = vars(module)
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or "forward" in state
        or state.get("_compiled_call_impl") is not None
    )
