"""Loading a family's processor with the parts that speech needs."""

from __future__ import annotations

import inspect
from functools import cache
from types import SimpleNamespace
from typing import Any

import transformers
from transformers.processing_utils import ProcessorMixin

from ugsd_fast.models.families import Family

_VISION = ("image_processor", "video_processor")


def load_processor(family: Family, name: str, **hub: Any) -> Any:
    """Load the processor of a checkpoint; one of several modalities without its image and video parts.

    The full processors of those families need torchvision, for inputs that a caption of speech never has.
    """
    return processor_class(family).from_pretrained(name, **hub)


def processor_class(family: Family) -> Any:
    """The class of a family's processor, without image and video parts."""
    full = getattr(transformers, family.processor_class)
    return _without_vision(full) if family.has_vision else full


@cache
def _without_vision(full: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """`full` with the parts that hear and write only, behind its own constructor."""
    names: list[str] = full.get_attributes()
    heard = [name for name in names if name not in _VISION]
    settings = inspect.signature(full.__init__).parameters

    class Parts(ProcessorMixin):
        """Stands between `full` and its base, which would ask for all parts."""

        def __init__(self, *args: Any, **kwargs: Any):
            parts = {**dict(zip(names, args, strict=False)), **kwargs}
            super().__init__(**{name: part for name, part in parts.items() if name not in _VISION})

        @classmethod
        def get_attributes(cls) -> list[str]:
            return heard

    class SpeechProcessor(full, Parts):  # type: ignore[misc,valid-type]
        # transformers 5.17 reads these at every call, images or not.
        image_processor = video_processor = SimpleNamespace(merge_size=2, model_input_names=[])

        # transformers gives the parts by position, and the settings that it finds named here.
        def __init__(self, ear: Any, tokenizer: Any, chat_template: Any = None, audio_seq_length: int | None = None):
            wanted = {"chat_template": chat_template}
            if audio_seq_length is not None and "audio_seq_length" in settings:
                wanted["audio_seq_length"] = audio_seq_length
            parts = dict(zip(heard, (ear, tokenizer), strict=True))
            full.__init__(self, **{name: parts.get(name) for name in names}, **wanted)

    SpeechProcessor.__name__ = SpeechProcessor.__qualname__ = full.__name__
    return SpeechProcessor
