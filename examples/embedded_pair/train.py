"""Training of the drafter and the verifier.

Both are trained alike: first the audio tower alone learns to hear the attributes (linear heads on the pooled audio,
dropped afterwards), then the whole model learns to write captions, the heads staying as an auxiliary loss. The first
stage costs a fraction of the second a clip and does most of the listening. The verifier is grown afterwards: text
layers that start as the identity are put between its own, and training goes on: less work than training all of them
from the start. Length is set in steps.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

from examples.embedded_pair.captions import AUDIO, MAX_NEW_TOKENS, build_tokenizer, prompt_ids
from examples.embedded_pair.dataset import MEL_FRAMES, Split, load_split
from ugsd_fast.demo import attributes as grammar

VALUES = {
    "emotion": grammar.EMOTIONS,
    "intensity": grammar.INTENSITIES,
    "gender": grammar.GENDERS,
    "pitch": grammar.PITCHES,
    "pace": grammar.PACES,
    "loudness": grammar.LOUDNESSES,
    "melody": grammar.MELODIES,
}
IGNORED = -100
AUXILIARY_WEIGHT, CAPTION_WEIGHT = 0.2, 5.0

CHECKPOINT_STEPS = 250
WARMUP_STEPS = 200


@dataclass(frozen=True)
class Recipe:
    """Size and schedule of one model."""

    audio_width: int
    audio_layers: int
    text_width: int
    text_layers: int
    text_feedforward: int
    text_heads: int
    listening_steps: int
    writing_steps: int
    learning_rate: float
    grown_layers: int = 0
    growing_steps: int = 0
    batch_size: int = 32
    dropout: float = 0.1
    seed: int = 0

    @property
    def stages(self) -> dict[str, tuple[int, int]]:
        """First step of each stage, and the step after its last."""
        listened = self.listening_steps
        written = listened + self.writing_steps
        return {
            "listening": (0, listened),
            "writing": (listened, written),
            "growing": (written, written + self.growing_steps),
        }


RECIPES = {
    "draft": Recipe(64, 2, 128, 1, 256, 4, 500, 800, 2e-3),
    "verifier": Recipe(192, 4, 128, 10, 320, 4, 2400, 2200, 1e-3, grown_layers=8, growing_steps=500),
}


def build_model(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, *, grown: bool = False
) -> Qwen2AudioForConditionalGeneration:
    """A freshly initialised model with the audio tower's fixed sinusoids in place, before or after it is grown."""
    torch.manual_seed(recipe.seed)
    config = Qwen2AudioConfig(
        audio_config={
            "d_model": recipe.audio_width,
            "encoder_layers": recipe.audio_layers,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 4 * recipe.audio_width,
            "num_mel_bins": 80,
            "max_source_positions": MEL_FRAMES // 2,
            "dropout": recipe.dropout,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": recipe.text_width,
            "intermediate_size": recipe.text_feedforward,
            "num_hidden_layers": recipe.text_layers + (recipe.grown_layers if grown else 0),
            "num_attention_heads": recipe.text_heads,
            "num_key_value_heads": recipe.text_heads,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        audio_token_index=tokenizer.convert_tokens_to_ids(AUDIO),
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2AudioForConditionalGeneration(config)
    positions = model.get_submodule("model.audio_tower").embed_positions.weight
    half = recipe.audio_width // 2
    inverse = torch.exp(-math.log(10_000) / (half - 1) * torch.arange(half))
    angles = torch.arange(positions.shape[0])[:, None] * inverse
    with torch.no_grad():
        positions.copy_(torch.cat([angles.sin(), angles.cos()], dim=1))
    scale_weights(model)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def scale_weights(model: nn.Module) -> None:
    """Initialise by fan-in: the library's fixed deviation of 0.02 is far too small for layers as narrow as these.

    The audio front end comes out at the size of the position sinusoids that are added to it and would drown it.
    """
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv1d):
                fan_in = module.in_channels * module.kernel_size[0]
                module.weight.normal_(0.0, (3.0 if name.endswith("conv1") else 2.0) / fan_in**0.5)
            elif isinstance(module, nn.Linear) and not name.endswith("lm_head"):
                module.weight.normal_(0.0, 0.7 / module.in_features**0.5)


def grow(
    model: Qwen2AudioForConditionalGeneration, recipe: Recipe, tokenizer: PreTrainedTokenizerFast
) -> Qwen2AudioForConditionalGeneration:
    """The same function with more text layers: one that adds nothing yet after each of the first."""
    deep = build_model(recipe, tokenizer, grown=True)
    shallow_layers = model.get_submodule("model.language_model").layers
    deep_layers = deep.get_submodule("model.language_model").layers
    kept = {
        name: value for name, value in model.state_dict().items() if ".layers." not in name or "audio_tower" in name
    }
    deep.load_state_dict(kept, strict=False)
    position = 0
    with torch.no_grad():
        for index, layer in enumerate(shallow_layers):
            deep_layers[position].load_state_dict(layer.state_dict())
            position += 1
            if index < recipe.grown_layers:
                deep_layers[position].self_attn.o_proj.weight.zero_()
                deep_layers[position].mlp.down_proj.weight.zero_()
                position += 1
    return deep


class Heads(nn.Module):
    """Linear attribute classifiers on the audio tower's mean output."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.classifiers = nn.ModuleDict({name: nn.Linear(2 * width, len(values)) for name, values in VALUES.items()})

    def loss(self, audio: torch.Tensor, mask: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of the attributes' cross entropies, and which were right.

        Parameters
        ----------
        audio : torch.Tensor
            [B, T, D] output of the audio tower.
        mask : torch.Tensor
            [B, T], true on real audio.
        targets : torch.Tensor
            [B, A] value indices, ``IGNORED`` where the attribute is undefined.
        """
        weights = mask[..., None].to(audio.dtype)
        mean = (audio * weights).sum(1) / weights.sum(1)
        spread = ((audio - mean[:, None]).square() * weights).sum(1).div(weights.sum(1)).add(1e-5).sqrt()
        pooled = torch.cat([mean, spread], dim=1)
        logits = [classifier(pooled) for classifier in self.classifiers.values()]
        losses = [
            functional.cross_entropy(row.float(), targets[:, i], ignore_index=IGNORED) for i, row in enumerate(logits)
        ]
        right = torch.stack([(row.argmax(-1) == targets[:, i]) for i, row in enumerate(logits)], 1)
        return torch.stack(losses).sum(), right


@dataclass
class Batch:
    """One training batch; sequences are padded on the right."""

    features: torch.Tensor  # [B, 80, 200]
    feature_mask: torch.Tensor  # [B, 200]
    input_ids: torch.Tensor  # [B, L]
    attention_mask: torch.Tensor  # [B, L]
    labels: torch.Tensor  # [B, L], IGNORED outside the caption
    targets: torch.Tensor  # [B, A]

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "input_features": self.features,
            "feature_attention_mask": self.feature_mask,
        }


class Corpus:
    """A split, tokenised, with attribute targets."""

    def __init__(self, split: Split, tokenizer: PreTrainedTokenizerFast) -> None:
        self.split = split
        self.pad = tokenizer.pad_token_id
        end = tokenizer.eos_token_id
        prompts = {frames: prompt_ids(tokenizer, frames) for frames in sorted(set(split.frames.tolist()))}
        self.prompts = [prompts[frames] for frames in split.frames.tolist()]
        self.captions = [[*ids, end] for ids in tokenizer(split.captions, add_special_tokens=False)["input_ids"]]
        self.targets = torch.tensor(
            [
                [IGNORED if r["attributes"][n] is None else v.index(r["attributes"][n]) for n, v in VALUES.items()]
                for r in split.records
            ]
        )

    def __len__(self) -> int:
        return len(self.captions)

    def batch(self, rows: list[int]) -> Batch:
        """Collate the given clips."""
        sequences = [self.prompts[row] + self.captions[row] for row in rows]
        longest = max(map(len, sequences))
        ids = torch.full((len(rows), longest), self.pad)
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        labels = torch.full((len(rows), longest), IGNORED)
        for i, (row, sequence) in enumerate(zip(rows, sequences, strict=True)):
            ids[i, : len(sequence)] = torch.tensor(sequence)
            mask[i, : len(sequence)] = 1
            labels[i, len(self.prompts[row]) : len(sequence)] = torch.tensor(self.captions[row])
        frames = torch.from_numpy(self.split.frames[rows]).long()
        return Batch(
            features=torch.from_numpy(self.split.features[rows]).float(),
            feature_mask=(torch.arange(MEL_FRAMES) < frames[:, None]).long(),
            input_ids=ids,
            attention_mask=mask,
            labels=labels,
            targets=self.targets[rows],
        )

    def batches(self, size: int, seed: int, start: int = 0) -> Iterator[list[int]]:
        """Endless shuffled batches (clip numbers) of clips of similar length, beginning at batch number ``start``."""
        per_epoch = len(self) // size
        number = start
        while True:
            generator = torch.Generator().manual_seed(seed * 10_007 + number // per_epoch)
            order = torch.randperm(len(self), generator=generator).tolist()
            pools = [order[i : i + 16 * size] for i in range(0, len(self), 16 * size)]
            alike = [sorted(pool, key=lambda row: self.split.frames[row]) for pool in pools]
            groups = [pool[i : i + size] for pool in alike for i in range(0, len(pool) - size + 1, size)]
            shuffled = torch.randperm(len(groups), generator=generator).tolist()[:per_epoch]
            for index in shuffled[number % per_epoch :]:
                yield groups[index]
                number += 1


def augment(features: torch.Tensor, mask: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """SpecAugment masks and a smooth random equaliser on log-mel features [B, 80, 200].

    Masks are filled with a constant: a clip's own floor would tell how loud it is, in training only.
    """
    size, bands, _ = features.shape
    knots = torch.randn(size, 1, 6, generator=generator) * 0.06  # one unit is 40 dB
    features = features + functional.interpolate(knots, bands, mode="linear", align_corners=True).transpose(1, 2)
    masked = torch.rand(size, 1, generator=generator) < 0.7
    for axis, extent, widest in ((1, torch.full((size,), bands), 10), (2, mask.sum(1), 14)):
        for _ in range(2):
            width = (torch.rand(size, generator=generator) * widest).long()
            first = (torch.rand(size, generator=generator) * (extent - width).clamp(min=1)).long()
            where = torch.arange(features.shape[axis])
            hidden = (where >= first[:, None]) & (where < (first + width)[:, None]) & masked
            features = features.masked_fill(hidden.unsqueeze(3 - axis), 0.0)
    return features


def hear(model: Qwen2AudioForConditionalGeneration, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The audio tower's output [B, T, D] and which of it is real audio.

    Computes what the tower's own forward computes, over the batch's longest clip instead of all 4 s: half the work.
    """
    tower = model.get_submodule("model.audio_tower")
    conv, pooled = tower._get_feat_extract_output_lengths(batch.feature_mask.sum(-1))
    frames = min(MEL_FRAMES, (int(batch.feature_mask.sum(-1).max()) // 4 + 2) * 4)
    hidden = functional.gelu(tower.conv1(batch.features[:, :, :frames]))
    hidden = functional.gelu(tower.conv2(hidden)).transpose(1, 2)
    length = hidden.shape[1]
    hidden = functional.dropout(
        hidden + tower.embed_positions.weight[:length], p=tower.dropout, training=tower.training
    )
    keep = torch.arange(length)[None] < conv[:, None]
    attention = torch.zeros(keep.shape).masked_fill(~keep, float("-inf"))[:, None, None, :]
    attention = attention.expand(-1, 1, length, -1)
    for layer in tower.layers:
        hidden = layer(hidden, attention)
    hidden = tower.layer_norm(tower.avg_pooler(hidden.transpose(1, 2)).transpose(1, 2))
    return hidden, torch.arange(hidden.shape[1])[None] < pooled[:, None]


def caption_logits(
    model: Qwen2AudioForConditionalGeneration, batch: Batch, audio: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Logits [B, L, V] from the audio tower's output, as the model's forward computes them."""
    embeds = model.get_input_embeddings()(batch.input_ids)
    spoken = model.get_submodule("model.multi_modal_projector")(audio)[mask].to(embeds.dtype)
    where = (batch.input_ids == model.config.audio_token_id)[..., None].expand_as(embeds)
    hidden = model.get_submodule("model.language_model")(
        inputs_embeds=embeds.masked_scatter(where, spoken), attention_mask=batch.attention_mask, use_cache=False
    ).last_hidden_state
    return model.lm_head(hidden)


def caption_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the caption tokens."""
    wanted = labels[:, 1:]
    where = wanted != IGNORED
    return functional.cross_entropy(logits[:, :-1][where].float(), wanted[where])


@torch.inference_mode()
def evaluate(model: Qwen2AudioForConditionalGeneration, heads: Heads, corpus: Corpus) -> dict[str, float]:
    """Teacher-forced caption loss and token accuracy, and attribute accuracy of the heads."""
    model.eval()
    order = sorted(range(len(corpus)), key=lambda row: corpus.split.frames[row])
    loss, right, tokens = 0.0, 0, 0
    heard = torch.zeros(len(VALUES))
    defined = torch.zeros(len(VALUES))
    for start in range(0, len(order), 50):
        batch = corpus.batch(order[start : start + 50])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            audio, mask = hear(model, batch)
            _, correct = heads.loss(audio, mask, batch.targets)
            logits = caption_logits(model, batch, audio, mask)
        wanted = batch.labels[:, 1:]
        where = wanted != IGNORED
        loss += functional.cross_entropy(logits[:, :-1][where].float(), wanted[where], reduction="sum").item()
        right += int((logits[:, :-1].argmax(-1) == wanted)[where].sum())
        tokens += int(where.sum())
        heard += (correct & (batch.targets != IGNORED)).sum(0)
        defined += (batch.targets != IGNORED).sum(0)
    model.train()
    shares = {name: round(share, 4) for name, share in zip(VALUES, (heard / defined).tolist(), strict=True)}
    return {"loss": round(loss / tokens, 5), "token_accuracy": round(right / tokens, 5), **shares}


@dataclass
class Checkpoint:
    """A training that was cut off: steps done, and tensors named ``model.*``, ``heads.*`` and ``optimizer.<i>.*``."""

    step: int
    tensors: dict[str, torch.Tensor]

    def part(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of one part, by the names that they have in it."""
        return {key.removeprefix(f"{name}."): t for key, t in self.tensors.items() if key.startswith(f"{name}.")}

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the optimizer's moments back."""
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in self.part("optimizer").items():
            index, name = key.split(".")
            state.setdefault(int(index), {})[name] = tensor
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def save_checkpoint(
    path: Path, step: int, model: nn.Module, heads: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Write a `Checkpoint`; the one before it stays until this one is whole."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"heads.{name}": tensor for name, tensor in heads.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
    unfinished = path.with_suffix(".tmp")
    # Tied weights share memory, which safetensors refuses.
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, unfinished, {"step": str(step)})
    unfinished.replace(path)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read what `save_checkpoint` wrote."""
    with safe_open(path, "pt") as file:
        return Checkpoint(int(file.metadata()["step"]), {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Mean of the gradients over the workers."""
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = gradient.view_as(parameter)


def train(
    name: str,
    recipe: Recipe,
    corpus: Corpus,
    watch: dict[str, Corpus],
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
) -> Qwen2AudioForConditionalGeneration:
    """Train one model; a run that was cut off continues from its last checkpoint.

    Parameters
    ----------
    name : str
        Names the checkpoint and the log in ``folder``.
    recipe : Recipe
    corpus : Corpus
        Training clips.
    watch : dict of str to Corpus
        Tuning splits, evaluated at every checkpoint (reported, not used for selection).
    tokenizer : PreTrainedTokenizerFast
    folder : pathlib.Path

    Returns
    -------
    Qwen2AudioForConditionalGeneration
        The trained model, in evaluation mode.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, log = folder / f"{name}.safetensors", folder / f"{name}.jsonl"
    saved = load_checkpoint(checkpoint) if checkpoint.exists() else None
    done = saved.step if saved else 0
    model = build_model(recipe, tokenizer, grown=done > recipe.stages["growing"][0])
    heads = Heads(recipe.audio_width)
    if saved:
        model.load_state_dict(saved.part("model"))
        heads.load_state_dict(saved.part("heads"))
    for stage, (first, last) in recipe.stages.items():
        if done >= last:
            continue
        if stage == "growing" and done <= first:
            model = grow(model, recipe, tokenizer)
        model.train()
        learning = model.get_submodule("model.audio_tower") if stage == "listening" else model
        trained = [p for p in [*learning.parameters(), *heads.parameters()] if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=0.02, betas=(0.9, 0.98))
        if saved and first < done < last:
            saved.restore(optimizer)
        batches = corpus.batches(recipe.batch_size, recipe.seed, start=max(first, done))
        rank, workers = dist.get_rank(), dist.get_world_size()
        begun, mean = time.perf_counter(), 0.0
        for step in range(max(first, done), last):
            torch.manual_seed((recipe.seed * 1_000_003 + step) * workers + rank)
            generator = torch.Generator().manual_seed((recipe.seed * 1_000_003 + step) * workers + rank)
            progress = (step - first) / (last - first)
            rate = min((step - first + 1) / WARMUP_STEPS, 0.5 * (1 + math.cos(math.pi * progress)) * 0.98 + 0.02)
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * rate
            batch = corpus.batch(next(batches)[rank::workers])
            batch.features = augment(batch.features, batch.feature_mask, generator)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                audio, mask = hear(model, batch)
                loss, _ = heads.loss(audio, mask, batch.targets)
                if stage != "listening":
                    written = caption_loss(caption_logits(model, batch, audio, mask), batch.labels)
                    loss = AUXILIARY_WEIGHT * loss + CAPTION_WEIGHT * written
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            average_gradients(trained)
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            mean += loss.item()
            if rank == 0 and ((step + 1) % CHECKPOINT_STEPS == 0 or step + 1 == last):
                save_checkpoint(checkpoint, step + 1, model, heads, optimizer)
                seconds = round(time.perf_counter() - begun, 1)
                report = {"stage": stage, "step": step + 1, "seconds": seconds, "loss": mean}
                report |= {split: evaluate(model, heads, held_out) for split, held_out in watch.items()}
                with log.open("a") as stream:
                    stream.write(json.dumps(report) + "\n")
                print(json.dumps(report), flush=True)
                mean = 0.0
    return model.eval()


def prepare(work: Path, shards: int) -> tuple[Corpus, dict[str, Corpus], PreTrainedTokenizerFast]:
    """Load the data and build the tokenizer (from the training captions)."""
    split = load_split(work / "data", [f"train-{i:02d}" for i in range(shards)])
    tokenizer = build_tokenizer(split.captions)
    watch = {name: Corpus(load_split(work / "data", [name]), tokenizer) for name in ("tune-seen", "tune-unseen")}
    return Corpus(split, tokenizer), watch, tokenizer


def _worker(rank: int, workers: int, name: str, recipe: Recipe, work: Path, shards: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(work / "training" / f"{name}.store"), workers)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=workers, timeout=timedelta(hours=1))
    corpus, watch, tokenizer = prepare(work, shards)
    train(name, recipe, corpus, watch, tokenizer, work / "training")
    dist.destroy_process_group()


def run(name: str, recipe: Recipe, work: Path, shards: int, workers: int = 2) -> None:
    """Train with one single-threaded process a core, each on its share of every batch.

    Parallel over clips and not inside each operation: a core that is busy elsewhere then stalls the other once a step
    and not once an operation.
    """
    (work / "training").mkdir(parents=True, exist_ok=True)
    (work / "training" / f"{name}.store").unlink(missing_ok=True)
    torch.multiprocessing.spawn(_worker, (workers, name, recipe, work, shards), nprocs=workers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=list(RECIPES))
    parser.add_argument("--work-dir", type=Path, default=Path("build/embedded_pair"))
    parser.add_argument("--shards", type=int, default=20)
    arguments = parser.parse_args()
    run(arguments.name, RECIPES[arguments.name], arguments.work_dir, arguments.shards)


if __name__ == "__main__":
    main()
