"""Loading a family's processor with the parts that speech needs."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import transformers
from transformers.processing_utils import ProcessorMixin

from ugsd_fast.models.families import Family

_TOKENS = (
    "image_token",
    "audio_token",
    "video_token",
    "vision_bos_token",
    "vision_eos_token",
    "audio_bos_token",
    "audio_eos_token",
)


def load_processor(family: Family, name: str, **hub: Any) -> Any:
    """Load the processor of a checkpoint; an omni model's without its image and video parts.

    The full processors of the omni families need torchvision, for inputs that a caption of speech never has. Of a
    family whose inputs are prepared elsewhere only the tokenizer is loaded, to decode with.
    """
    if not family.prepares:
        return transformers.AutoTokenizer.from_pretrained(name, **hub)
    processor_class = getattr(transformers, family.processor_class)
    if family.has_vision:
        processor_class = _without_vision(processor_class)
    return processor_class.from_pretrained(name, **hub)


@cache
def _without_vision(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """`processor_class` with feature extractor and tokenizer only: transformers reads the parts off the signature."""

    class SpeechProcessor(processor_class):  # type: ignore[misc,valid-type]
        # transformers 5.17 reads these at every call, images or not.
        image_processor = video_processor = SimpleNamespace(merge_size=2, model_input_names=[])

        def __init__(self, feature_extractor: Any = None, tokenizer: Any = None, chat_template: str | None = None):
            ProcessorMixin.__init__(self, feature_extractor, tokenizer, chat_template=chat_template)
            for name in _TOKENS:
                setattr(self, name, getattr(tokenizer, name))
            for modality in ("image", "audio", "video"):
                setattr(self, f"{modality}_token_id", getattr(tokenizer, f"{modality}_token_id"))

    SpeechProcessor.__name__ = SpeechProcessor.__qualname__ = processor_class.__name__
    return SpeechProcessor
