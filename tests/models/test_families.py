"""Every family through one loop: the verifier's own tokens, audio heard once, quirks as the entries say."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import transformers
from transformers.audio_utils import mel_filter_bank

from tests.decoding import tokenizers
from tests.models.reads import HostReads
from tests.models.tiny import AUDIO_ID, EXTRACTORS, FAMILIES, Tiny, build, processor, without_vision_tower
from ugsd_fast import AudioLM, Decoder, LocalVerifier, UGSDConfig
from ugsd_fast.decoding.translation import END, translation_between
from ugsd_fast.errors import AudioError, ModelError
from ugsd_fast.models.attention import best_attention
from ugsd_fast.models.families import FAMILIES as ENTRIES
from ugsd_fast.models.families import REFUSED, family_of
from ugsd_fast.models.processors import load_processor
from ugsd_fast.models.sequence import CachedSequence

TOKENS = 64
DRAFTERS: dict[str, dict[str, Any]] = {"copy": {}, "noisy": {"noise": 0.1}, "random": {"seed": 7}}
LOSSLESS = UGSDConfig(always_escalate=True, rule="greedy", eos_token_id=-1)  # no token has this id
PROMPTED = [name for name in FAMILIES if name not in ("whisper", "moonshine")]
NO_GRAPH = {
    **dict.fromkeys(("whisper", "moonshine", "granite_speech"), "is an encoder-decoder, has"),
    **dict.fromkeys(("gemma3n", "gemma4"), "expected a StaticLayer"),
}


@pytest.fixture(scope="module")
def verifiers() -> dict[str, Tiny]:
    return {family: build(family) for family in FAMILIES}


def greedy(tiny: Tiny, clip: int = 0) -> list[int]:
    """What transformers' own ``generate`` makes of the same inputs."""
    entry = family_of(tiny.model.config.model_type)
    assert entry is not None
    out = tiny.model.generate(**tiny.inputs(clip), **entry.forward_kwargs, max_new_tokens=TOKENS, do_sample=False)
    return out[0, -TOKENS:].tolist()


@contextmanager
def counted(*towers: torch.nn.Module) -> Iterator[list[int]]:
    calls = [0] * len(towers)

    def count(index: int) -> Any:
        def hook(*_: Any) -> None:
            calls[index] += 1

        return hook

    hooks = [tower.register_forward_pre_hook(count(index)) for index, tower in enumerate(towers)]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def test_every_entry_has_a_tiny_model() -> None:
    built_elsewhere = {"qwen2_audio", "qwen2_5_omni", "qwen3_omni_moe"}
    assert {entry.model_types[0] for entry in ENTRIES} == set(FAMILIES) | built_elsewhere
    for entry in ENTRIES:
        assert hasattr(transformers, entry.model_class)
        assert hasattr(transformers, entry.processor_class)


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_lossless_greedy_is_the_verifiers_own_generate(family: str, drafter: str, verifiers: dict[str, Tiny]) -> None:
    target, draft = verifiers[family], build(family, **DRAFTERS[drafter])
    decoder = Decoder(AudioLM(draft.model), LocalVerifier(AudioLM(target.model)), LOSSLESS)
    with counted(draft.tower, target.tower) as calls:
        result = decoder.generate(inputs=draft.inputs(), verifier_inputs=target.inputs(), max_new_tokens=TOKENS)
    assert calls == [1, 1]
    assert result.tokens == greedy(target)
    if drafter == "copy":
        assert result.metrics.acceptance_rate == 1.0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_every_requests_own_generate(family: str, verifiers: dict[str, Tiny]) -> None:
    """Four clips, each row with a prompt, an acceptance and an end of its own; three drafters of different quality."""
    target = verifiers[family]
    expected = [greedy(target, clip) for clip in range(4)]
    end = expected[1][20]
    cut = [row[: row.index(end) + 1] if end in row else row for row in expected]
    config = UGSDConfig(always_escalate=True, rule="greedy", eos_token_id=end)
    for drafter in DRAFTERS.values():
        draft = build(family, **drafter)
        decoder = Decoder(AudioLM(draft.model), LocalVerifier(AudioLM(target.model)), config)
        with counted(draft.tower, target.tower) as calls:
            results = decoder.generate(
                inputs=[draft.inputs(clip) for clip in range(4)],
                verifier_inputs=[target.inputs(clip) for clip in range(4)],
                max_new_tokens=TOKENS,
                max_batch_size=3,
            )
        assert calls == [2, 2]  # of three together, then of one
        assert [result.tokens for result in results] == cut


@pytest.mark.parametrize("settings", [None, {"entropy_threshold": 0.0}, {"always_escalate": True}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_waits_for_a_device_behind_the_prompt(
    family: str, settings: dict[str, Any] | None, verifiers: dict[str, Tiny]
) -> None:
    """Three more blocks and more read nothing in between: neither the models' forwards nor the loop around them."""
    target, draft = verifiers[family], build(family, noise=0.1)
    verifier = None if settings is None else LocalVerifier(AudioLM(target.model))
    decoder = Decoder(AudioLM(draft.model), verifier, UGSDConfig(eos_token_id=-1, **(settings or {})))
    given = {"inputs": draft.inputs()} | ({} if settings is None else {"verifier_inputs": target.inputs()})
    seen, blocks = [], []
    for tokens in (8, 32):
        with HostReads() as reads:
            blocks.append(len(decoder.generate(**given, max_new_tokens=tokens).trace.blocks))
        seen.append(reads.ops)
    assert seen[0] == seen[1]
    assert blocks[1] > blocks[0] + 2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_drafter_hears_the_audio(family: str, verifiers: dict[str, Tiny]) -> None:
    tiny = verifiers[family]
    decoder = Decoder(AudioLM(tiny.model), None, LOSSLESS)
    drafts = [decoder.generate(inputs=tiny.inputs(clip), max_new_tokens=TOKENS).tokens for clip in (0, 1)]
    assert drafts == [greedy(tiny, clip) for clip in (0, 1)]
    assert drafts[0] != drafts[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_after_a_rollback_equal_a_fresh_prefill(family: str, verifiers: dict[str, Tiny]) -> None:
    tiny = verifiers[family]
    generator = torch.Generator().manual_seed(3)
    audio_lm = AudioLM(tiny.model)
    sequence = audio_lm.open(tiny.inputs())
    final: list[int] = []
    for fed, rejected in [(0, 0), (5, 3), (1, 0), (7, 7), (4, 1)]:
        tokens = torch.randint(3, 80, (1, fed), generator=generator)
        sequence.forward(tokens)
        sequence.rollback(rejected)
        final += tokens[0, : fed - rejected].tolist()
    probe = torch.randint(3, 80, (1, 3), generator=generator)
    cached = sequence.forward(probe)
    fresh = audio_lm.open(tiny.inputs()).forward(torch.cat([torch.tensor([final]), probe], 1), keep=3)
    torch.testing.assert_close(cached, fresh, rtol=0, atol=1e-5 * float(fresh.abs().max()))


@pytest.mark.parametrize("family", PROMPTED)
@pytest.mark.parametrize("more", [-1, 1])
def test_placeholders_that_do_not_fit_the_audio_are_refused(family: str, more: int, verifiers: dict[str, Tiny]) -> None:
    tiny = verifiers[family]
    inputs = tiny.inputs()
    ids = inputs["input_ids"]
    first = int((ids == AUDIO_ID).int().argmax())
    ids = torch.cat(
        [ids[:, :first], ids[:, first + 1 :]] if more < 0 else [ids[:, :first], ids[:, first:][:, :1], ids[:, first:]],
        1,
    )
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    count = int((ids == AUDIO_ID).sum())
    with pytest.raises(ModelError, match=f"{count} audio placeholders, expected {count - more} for"):
        AudioLM(tiny.model).open(inputs)


@pytest.mark.parametrize("family", PROMPTED)
def test_a_drafted_placeholder_is_not_taken_for_audio(family: str, verifiers: dict[str, Tiny]) -> None:
    tiny = verifiers[family]
    drafted = torch.tensor([[7, AUDIO_ID, 9]])
    audio_lm = AudioLM(tiny.model)
    together = audio_lm.open(tiny.inputs()).forward(drafted)
    sequence = audio_lm.open(tiny.inputs())
    apart = [sequence.forward(drafted[:, :0]), *(sequence.forward(drafted[:, i : i + 1]) for i in range(3))]
    torch.testing.assert_close(together, torch.cat(apart, 1), rtol=0, atol=1e-3)


def test_text_only_requests_need_no_audio(verifiers: dict[str, Tiny]) -> None:
    logits = (
        AudioLM(verifiers["voxtral"].model).open({"input_ids": torch.tensor([[3, 4]])}).forward(torch.ones(1, 0).long())
    )
    assert logits.shape == (1, 1, 96)


def test_granites_adapter_is_on_for_audio_only(verifiers: dict[str, Tiny], monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = verifiers["granite_speech"]
    state: list[str] = []
    monkeypatch.setattr(tiny.model, "_hf_peft_config_loaded", True, raising=False)
    monkeypatch.setattr(tiny.model, "enable_adapters", lambda: state.append("on"))
    monkeypatch.setattr(tiny.model, "disable_adapters", lambda: state.append("off"))
    audio_lm = AudioLM(tiny.model)
    heard, read = audio_lm.open(tiny.inputs()), audio_lm.open({"input_ids": torch.tensor([[3, 4]])})
    for sequence in (heard, read, heard):
        sequence.forward(torch.ones(1, 1, dtype=torch.long))
    assert state == ["on", "off", "on"]


def test_phi4_is_stopped_where_its_rope_switches(verifiers: dict[str, Tiny]) -> None:
    entry = family_of("phi4_multimodal")
    assert entry is not None
    long = SimpleNamespace(rope_parameters={"rope_type": "longrope"}, original_max_position_embeddings=4096)
    assert entry.rope_switch(long) == 4096
    tiny = verifiers["phi4_multimodal"]
    assert entry.rope_switch(tiny.model.config) is None
    sequence = CachedSequence(tiny.model, tiny.inputs(), entry)
    sequence._rope_switch = 12
    sequence.forward(torch.ones(1, 2, dtype=torch.long))  # 9 of the prompt
    with pytest.raises(ModelError, match="grows from 11 to 13 tokens, expected at most 12"):
        sequence.forward(torch.ones(1, 2, dtype=torch.long))


def test_whisper_is_stopped_at_its_last_position(verifiers: dict[str, Tiny]) -> None:
    sequence = AudioLM(verifiers["whisper"].model).open(verifiers["whisper"].inputs())
    sequence.forward(torch.ones(1, 95, dtype=torch.long))
    with pytest.raises(ModelError, match="would hold 97 tokens, expected at most 96"):
        sequence.forward(torch.ones(1, 1, dtype=torch.long))


def test_a_decoder_prompt_of_ones_own(verifiers: dict[str, Tiny]) -> None:
    tiny = verifiers["moonshine"]
    prompt = torch.tensor([[1, 30, 31]])
    decoder = Decoder(None, LocalVerifier(AudioLM(tiny.model)), LOSSLESS)
    result = decoder.generate(verifier_inputs={**tiny.inputs(), "decoder_input_ids": prompt}, max_new_tokens=8)
    own = tiny.model.generate(**tiny.inputs(), decoder_input_ids=prompt, max_new_tokens=8, do_sample=False)
    assert result.tokens == own[0, -8:].tolist()


@pytest.mark.parametrize("family", ["whisper", "moonshine"])
def test_what_was_heard_can_be_handed_in_alone(family: str, verifiers: dict[str, Tiny]) -> None:
    model, inputs = verifiers[family].model, verifiers[family].inputs()
    decoder = Decoder(None, LocalVerifier(AudioLM(model)), LOSSLESS)
    heard = model.get_encoder()(**{name: value for name, value in inputs.items() if name != "decoder_input_ids"})
    whole, alone = (
        decoder.generate(verifier_inputs=given, max_new_tokens=8) for given in (inputs, {"encoder_outputs": heard})
    )
    assert alone.tokens == whole.tokens


@pytest.mark.parametrize("model_type", REFUSED)
def test_streaming_codecs_are_refused_with_the_reason(model_type: str) -> None:
    model = SimpleNamespace(config=SimpleNamespace(model_type=model_type))
    with pytest.raises(ModelError, match="is not supported: it (takes audio and text in step|writes audio codes)"):
        AudioLM(model)


def test_recurrent_text_models_are_refused(verifiers: dict[str, Tiny]) -> None:
    model = build("qwen3_asr").model
    model.config.text_config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ModelError, match="keeps a recurrent state"):
        AudioLM(model)


CLIP = (np.random.default_rng(0).normal(0, 0.1, 12_000).astype(np.float32), 16_000)


@pytest.fixture
def _torchaudio(monkeypatch: pytest.MonkeyPatch) -> None:
    """Granite-Speech's front end asks torchaudio for one thing, a mel spectrogram: one of torch's own stands in."""

    class MelSpectrogram(torch.nn.Module):
        def __init__(self, *, n_fft: int, win_length: int, hop_length: int, n_mels: int, sample_rate: int):
            super().__init__()
            self.sizes = (n_fft, hop_length, win_length)
            bank = mel_filter_bank(n_fft // 2 + 1, n_mels, 0.0, sample_rate / 2, sample_rate)
            self.bank = torch.from_numpy(bank).float()

        def forward(self, samples: torch.Tensor) -> torch.Tensor:
            n_fft, hop, window = self.sizes
            spectrum = torch.stft(samples, n_fft, hop, window, torch.hann_window(window), return_complex=True)
            return (spectrum.abs().square().transpose(-1, -2) @ self.bank).transpose(-1, -2)

    module = "transformers.models.granite_speech.feature_extraction_granite_speech"
    stand_in = SimpleNamespace(transforms=SimpleNamespace(MelSpectrogram=MelSpectrogram))
    monkeypatch.setattr(f"{module}.requires_backends", lambda *_: None)
    monkeypatch.setattr(f"{module}.torchaudio", stand_in, raising=False)


@pytest.mark.usefixtures("_torchaudio")
@pytest.mark.parametrize("family", FAMILIES)
def test_clips_go_through_processor_and_chat_template(family: str, verifiers: dict[str, Tiny]) -> None:
    model = AudioLM(verifiers[family].model, processor(family))
    prompt = None if family in ("whisper", "moonshine") else "w7 w8"
    inputs = model.prepare(CLIP, prompt)
    assert family_of(family).audio in inputs  # type: ignore[union-attr]
    if prompt is not None:
        text = inputs["input_ids"][inputs["input_ids"] < 88]
        assert text.tolist() == [7, 8, 5]
        assert AUDIO_ID in inputs["input_ids"]
    own = verifiers[family].model.generate(**inputs, **model.family.forward_kwargs, max_new_tokens=8, do_sample=False)  # type: ignore[union-attr]
    result = Decoder(model, LocalVerifier(model), LOSSLESS).generate(CLIP, prompt=prompt, max_new_tokens=8)
    assert result.tokens == own[0, -8:].tolist()
    assert result.text == model.decode(result.tokens)
    tone = (np.sin(np.arange(12_000) ** 2 / 4e4) * np.linspace(0, 1, 12_000)).astype(np.float32)
    other = Decoder(model, None, LOSSLESS).generate((tone, 16_000), prompt=prompt, max_new_tokens=24)
    same = Decoder(model, None, LOSSLESS).generate(CLIP, prompt=prompt, max_new_tokens=24)
    assert other.tokens != same.tokens, "what is heard decides"


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("granite_speech", "voxtral")])
def test_processors_come_back_from_a_checkpoint(family: str, tmp_path: Any, verifiers: dict[str, Tiny]) -> None:
    made = processor(family)
    made.save_pretrained(tmp_path)
    entry = family_of(family)
    assert entry is not None
    loaded = load_processor(entry, str(tmp_path))
    assert type(loaded).__name__ == entry.processor_class
    prompt = None if entry.is_encoder_decoder else "w7 w8"
    if family == "gemma3n":
        assert loaded.audio_seq_length == 8
        loaded.feature_extractor = made.feature_extractor  # which saves no hop but the default
    if family == "vibevoice_asr":
        loaded.audio_kwargs = made.audio_kwargs  # the tiny model's hop; checkpoints have the class's own
    before, after = (AudioLM(verifiers[family].model, one).prepare(CLIP, prompt) for one in (made, loaded))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_from_a_checkpoint(family: str, tmp_path: Any, verifiers: dict[str, Tiny]) -> None:
    tiny = verifiers[family]
    tiny.model.save_pretrained(tmp_path)
    with (
        patch("ugsd_fast.models.audio_lm.load_processor", lambda *_, **__: None),  # see above
        patch.object(transformers.AutoModel, "from_config", without_vision_tower),
    ):
        model = AudioLM.from_pretrained(tmp_path, device="cpu")
    decoder = Decoder(None, LocalVerifier(model), LOSSLESS)
    assert decoder.generate(verifier_inputs=tiny.inputs(), max_new_tokens=TOKENS).tokens == greedy(tiny)


def test_whispers_prompts(verifiers: dict[str, Tiny]) -> None:
    model = AudioLM(verifiers["whisper"].model, processor("whisper"))
    tokenizer = model.tokenizer
    names = ("startoftranscript", "startofprev", "en", "transcribe", "notimestamps")
    start, before, english, transcribe, plain = tokenizer.convert_tokens_to_ids([f"<|{name}|>" for name in names])
    assert model.prepare(CLIP)["decoder_input_ids"].tolist() == [[start, plain]]  # an English-only model's
    model.model.generation_config.is_multilingual = True
    assert model.prepare(CLIP)["decoder_input_ids"].tolist() == [[start]]
    tokenizer.set_prefix_tokens(language="english", task="transcribe")
    ids = model.prepare(CLIP)["decoder_input_ids"].tolist()[0]
    assert ids == [start, english, transcribe, plain]
    prompted = model.prepare(CLIP, "w7")["decoder_input_ids"].tolist()[0]
    assert prompted[0] == before
    assert prompted[-4:] == ids
    del model.model.generation_config.is_multilingual
    with pytest.raises(AudioError, match=r"expected at most 1 s"):
        model.prepare((np.tile(CLIP[0], 2), 16_000))


def test_a_model_without_prompts_refuses_one(verifiers: dict[str, Tiny]) -> None:
    model = AudioLM(verifiers["moonshine"].model, processor("moonshine"))
    with pytest.raises(ModelError, match="takes no prompt"):
        model.prepare(CLIP, "w7")


@pytest.mark.parametrize("family", ["gemma3n", "gemma4"])
def test_clips_that_a_front_end_would_cut_are_refused(family: str, verifiers: dict[str, Tiny]) -> None:
    model = AudioLM(verifiers[family].model, processor(family))
    with pytest.raises(AudioError, match=r"lasts 31.5\d s, expected at most 30 s"):
        model.prepare((np.tile(CLIP[0], 42), 16_000))


def test_mistrals_own_tokenizer(tmp_path: Any) -> None:
    """The messages are those that mistral-common takes, and its tokenizer can be translated to and from."""
    pytest.importorskip("mistral_common")
    from transformers.tokenization_mistral_common import MistralCommonBackend

    special = [f"<SPECIAL_{rank}>" for rank in range(32)]
    for rank, token in enumerate(["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]"]):
        special[rank] = token
    special[6:11] = ["[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]"]
    special[11:17] = ["<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]"]
    special[17:20] = ["[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"]
    special[24:27] = ["[AUDIO]", "[BEGIN_AUDIO]", "[TRANSCRIBE]"]
    tekken = {
        "config": {
            "pattern": r"[^\s]+|\s+",
            "num_vocab_tokens": 256,
            "default_vocab_size": 288,
            "default_num_special_tokens": 32,
            "version": "v7",
        },
        "vocab": [
            {"rank": byte, "token_bytes": base64.b64encode(bytes([byte])).decode(), "token_str": None}
            for byte in range(256)
        ],
        "special_tokens": [
            {"rank": rank, "token_str": token, "is_control": True} for rank, token in enumerate(special)
        ],
        "audio": {
            "sampling_rate": 16_000,
            "frame_rate": 6,
            "audio_encoding_config": {"num_mel_bins": 8, "hop_length": 333, "window_size": 400},
            "chunk_length_s": 1.0,
        },
    }
    (tmp_path / "tekken.json").write_text(json.dumps(tekken))
    tokenizer = MistralCommonBackend.from_pretrained(tmp_path)
    made = transformers.VoxtralProcessor(EXTRACTORS["voxtral"](), tokenizer)
    made.audio_kwargs = {**made.audio_kwargs, "pad_to_multiple_of": 16_000, "max_source_positions": 48}
    config = build("voxtral").model.config
    config.audio_token_id, config.text_config.vocab_size = 24, 288
    model = AudioLM(transformers.VoxtralForConditionalGeneration(config), made)
    inputs = model.prepare(CLIP, "hä")
    assert inputs["input_ids"][0].tolist() == [1, 3, 25, *[24] * 6, *(32 + byte for byte in "hä".encode()), 4]
    other = tokenizers.build("byte_bpe")
    translation = translation_between(
        SimpleNamespace(tokenizer=other, eos_token_ids=frozenset({1})),  # type: ignore[arg-type]
        LocalVerifier(model),
        UGSDConfig(),
        frozenset({2}),
    )
    assert translation is not None
    assert translation.verifier.decode([*translation.verifier.encode("hä</s>"), 2]) == f"hä</s>{END}"


def test_flash_attention_where_installed_and_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "ugsd_fast.models.attention"
    voxtral, granite = (getattr(transformers, FAMILIES[name][1]) for name in ("voxtral", "granite_speech"))
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(f"{module}.is_flash_attn_3_available", lambda: False)
    monkeypatch.setattr(f"{module}.is_flash_attn_2_available", lambda: True)
    assert best_attention(voxtral, {"dtype": "bfloat16"}, None, gpu) == "flash_attention_2"
    assert best_attention(voxtral, {"dtype": "bfloat16"}, torch.float32, gpu) == "sdpa"
    assert best_attention(voxtral, {"dtype": "bfloat16"}, None, cpu) == "sdpa"
    assert best_attention(granite, {}, torch.float16, gpu) == "sdpa"
    monkeypatch.setattr(f"{module}.is_flash_attn_3_available", lambda: True)
    assert best_attention(voxtral, {}, "bfloat16", gpu) == "flash_attention_3"
    monkeypatch.setattr(voxtral, "_supports_sdpa", False)
    assert best_attention(voxtral, {}, None, cpu) == "eager"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_draft_graph_drafts_the_same_or_refuses(family: str, verifiers: dict[str, Tiny]) -> None:
    model, inputs = AudioLM(verifiers[family].model), verifiers[family].inputs(0)

    def draft(graph: bool) -> list[int]:
        config = UGSDConfig(eos_token_id=-1, graph=graph)
        return Decoder(model, None, config).generate(inputs=inputs, max_new_tokens=12).tokens

    if family in NO_GRAPH:
        with pytest.raises(ModelError, match=NO_GRAPH[family]):
            draft(graph=True)
    else:
        assert draft(graph=True) == draft(graph=False)
