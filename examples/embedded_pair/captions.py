"""Captions as tokens: the pair's one tokenizer, its chat template and processor."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2AudioProcessor

from examples.embedded_pair.dataset import feature_extractor

PROMPT = "Describe the voice."
VOCAB_SIZE = 800
MAX_NEW_TOKENS = 56

PAD, END, START = "<|endoftext|>", "<|im_end|>", "<|im_start|>"
AUDIO, AUDIO_BOS, AUDIO_EOS = "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"

# Shorter than Qwen2-Audio's: the models are trained on one turn, and prefill is part of the latency.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'audio' %}" + AUDIO_BOS + AUDIO + AUDIO_EOS + "{% endif %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}" + END + "{% endfor %}"
    "{% if add_generation_prompt %}" + START + "{% endif %}"
)


def build_tokenizer(captions: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose pieces never cross a space, so that a word and its punctuation can be one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?[^ ]+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, END, START, AUDIO, AUDIO_BOS, AUDIO_EOS]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*captions, PROMPT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START, AUDIO, AUDIO_BOS, AUDIO_EOS],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> Qwen2AudioProcessor:
    """The processor that both models are saved with."""
    return Qwen2AudioProcessor(
        feature_extractor=feature_extractor(), tokenizer=tokenizer, chat_template=CHAT_TEMPLATE, audio_token=AUDIO,
        audio_bos_token=AUDIO_BOS, audio_eos_token=AUDIO_EOS,
    )  # fmt: skip


def audio_tokens(frames: int) -> int:
    """Audio placeholders that the processor writes for a clip of ``frames`` mel frames."""
    return ((frames - 1) // 2 + 1 - 2) // 2 + 1


def prompt_ids(tokenizer: PreTrainedTokenizerFast, frames: int) -> list[int]:
    """The processor's prompt for one clip, as ids."""
    text = AUDIO_BOS + AUDIO * audio_tokens(frames) + AUDIO_EOS + PROMPT + END + START
    return tokenizer(text, add_special_tokens=False)["input_ids"]
