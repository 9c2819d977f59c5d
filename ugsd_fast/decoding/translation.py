"""Drafts of a model that has another tokenizer than the verifier: its text, written again in the verifier's tokens.

Text is what both sides share. Of the drafter's text, what lies behind the final text is encoded with the verifier's
tokenizer; of the final text, what the drafter has not written itself is encoded with the drafter's. Tokens are aligned
by the characters that they complete when they are decoded in their context, so nothing is assumed about how a
tokenizer writes spaces or splits bytes:

- final tokens never change: a draft goes on exactly where their text ends. Where they end within a character, only a
  draft that completes the character with the bytes begun is taken;
- a character counts once all of its bytes are there. Until then, the drafter's tokens wait for those that follow;
- a draft token that is no text, or that the verifier's tokenizer cannot write, is where the block ends, if need be
  before its first token: an empty block lets the verifier write the next token itself;
- end-of-sequence tokens, which have no text, stand for each other; other special tokens are not translated.

Block and entropies are the verifier's tokens': the entropy of one is the largest of the drafter's tokens with which it
shares a character (a token that carries some bytes of a character has a share in it).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ugsd_fast import ops
from ugsd_fast.decoding.block import DraftBlock
from ugsd_fast.decoding.config import UGSDConfig
from ugsd_fast.decoding.drafter import Drafter, draft_blocks
from ugsd_fast.decoding.sampling import RULES_WITH_DRAFT_LOGITS
from ugsd_fast.decoding.vocabulary import check_vocabularies
from ugsd_fast.device import on_device
from ugsd_fast.errors import VocabularyMismatchError
from ugsd_fast.models import AudioLM

if TYPE_CHECKING:
    from ugsd_fast.verifier.base import Verifier

END = "\uffff"  # stands in a text for an end-of-sequence token; no text has this noncharacter
_PARTIAL = "\ufffd"  # what the bytes of an incomplete character are decoded to
_CONTEXT = 8  # tokens with which new ones are decoded and encoded: spaces and merges depend on what precedes
_LONGEST_CHARACTER = 4  # bytes
_MOST_WAITING = 64  # the drafter's tokens that make no character: behind so many of them the drafter stays silent


class Codec:
    """A tokenizer, and the tokens that end a sequence.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        Of the model.
    ends : frozenset of int
        End-of-sequence tokens: each decodes to `END`.
    end : int, optional
        The one that `END` is encoded to; None where there is none.
    """

    def __init__(self, tokenizer: Any, ends: frozenset[int], end: int | None):
        self.ends = ends
        self.end = end
        self._tokenizer = tokenizer
        # mistral-common never reads a special token in a text.
        self._as_text = {"split_special_tokens": True} if hasattr(tokenizer, "get_added_vocab") else {}

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens; of the special ones, only those that end a sequence show."""
        text, run = "", 0
        for index, token in enumerate(ids):
            if token in self.ends:
                text += self._decode(ids[run:index]) + END
                run = index + 1
        return text + self._decode(ids[run:])

    def encode(self, text: str) -> list[int]:
        """Tokens of a text; what looks like a special token in it is text all the same."""
        ids: list[int] = []
        for index, part in enumerate(text.split(END)):
            if index and self.end is not None:
                ids.append(self.end)
            if part:
                ids += self._tokenizer.encode(part, add_special_tokens=False, **self._as_text)
        return ids

    def _decode(self, ids: Sequence[int]) -> str:
        if not ids:
            return ""
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.replace(END, _PARTIAL)


class Transcript:
    """Tokens of one side and the text they make, character by character.

    Attributes
    ----------
    ids : list of int
        The tokens.
    text : str
        Their text, without a last character of which bytes are missing.
    ends : list of int
        ``ends[k]``: characters of `text` that the first k tokens complete.
    whole : list of bool
        ``whole[k]``: whether the first k tokens end with a complete character.

    Examples
    --------
    >>> class Bytes:
    ...     def encode(self, text, **_):
    ...         return list(text.encode())
    ...
    ...     def decode(self, ids, **_):
    ...         return bytes(ids).decode(errors="replace")
    >>> transcript = Transcript(Codec(Bytes(), frozenset(), None))
    >>> transcript.extend("hä".encode()[:2])
    >>> transcript.text, transcript.ends, transcript.whole
    ('h', [0, 1, 1], [True, True, False])
    """

    def __init__(self, codec: Codec):
        self._codec = codec
        self.ids: list[int] = []
        self.text = ""
        self.ends = [0]
        self.whole = [True]

    def extend(self, ids: Sequence[int]) -> None:
        """Append tokens."""
        if not ids:
            return
        base = self.last_whole()
        start = self._context(base)
        self.ids.extend(ids)
        skipped = len(self._codec.decode(self.ids[start:base]))
        texts = [self._codec.decode(self.ids[start:count])[skipped:] for count in range(base + 1, len(self.ids) + 1)]
        # Some decoders give up a whole run of bytes for one character that is not complete.
        unbroken = next((text for text in reversed(texts) if not text.endswith(_PARTIAL)), "")
        complete = max(unbroken, texts[-1].rstrip(_PARTIAL), key=len)
        at = self.ends[base]
        del self.ends[base + 1 :], self.whole[base + 1 :]
        for text in texts:
            agreeing = _agreeing(text, complete)
            self.ends.append(max(self.ends[-1], at + agreeing))
            self.whole.append(agreeing == len(text))
        self.text = self.text[:at] + complete

    def truncate(self, count: int) -> None:
        """Keep the first `count` tokens."""
        del self.ids[count:], self.ends[count + 1 :], self.whole[count + 1 :]
        self.text = self.text[: self.ends[count]]

    def span(self, index: int) -> tuple[int, int]:
        """First character that a token has a share in, and the one behind its last."""
        return self.ends[index], self.ends[index + 1] + (not self.whole[index + 1])

    def last_whole(self) -> int:
        """How many tokens end with the last complete character that begins behind a token."""
        count = len(self.ids)
        while not self.whole[count]:
            count -= 1
        return count

    def rewrites(self, counts: Sequence[int], text: str) -> Iterator[tuple[int, list[int]]]:
        """Ways of going on to another text: how many tokens stay, and the tokens behind them.

        Parameters
        ----------
        counts : sequence of int
            How many may stay, in order of preference, falling; complete characters end behind each.
        text : str
            What all the tokens shall make; the tokens that may stay make its beginning.

        Yields
        ------
        int, list of int
            First the encoding of the text in its context, where one of its tokens begins behind the tokens that stay;
            then, if it does not, that of the rest behind other characters.
        """
        most = counts[0]
        start = self._context(most)
        ids = self._codec.encode(text[self.ends[start] :])
        cuts = self._cuts(ids, len(text) - self.ends[counts[-1]])
        for count in counts:
            behind = None if count == start else cuts.get(len(text) - self.ends[count])
            if count == 0:
                yield 0, ids if start == 0 else self._codec.encode(text)
            elif behind is not None:
                yield count, ids[behind:]
        rest = text[self.ends[most] :]
        for before in (text[: self.ends[most]][-1:], "\n", "."):
            ids = self._codec.encode(before + rest)
            behind = self._cuts(ids, len(rest)).get(len(rest))
            if behind is not None:
                yield most, ids[behind:]
        ids = self._codec.encode(rest)
        yield most, ids[self._cuts(ids, len(rest)).get(len(rest), 0) :]

    def _cuts(self, ids: Sequence[int], most: int) -> dict[int, int]:
        """How many tokens stand before the last n characters of a text, for each n up to `most` where one ends."""
        cuts: dict[int, int] = {}
        text = self._codec.decode(ids)
        for count in range(len(ids), -1, -1):
            before = self._codec.decode(ids[:count])
            behind = len(text) - len(before)
            if behind > most:
                break
            if text.startswith(before):
                cuts.setdefault(behind, count)
        return cuts

    def _context(self, count: int) -> int:
        """A few tokens before the `count`-th, where a character begins."""
        start = max(count - _CONTEXT, 0)
        while not self.whole[start]:
            start -= 1
        return start


@dataclass(frozen=True)
class Translation:
    """What two models with tokenizers of their own need to draft for one another.

    Attributes
    ----------
    drafter, verifier : Codec
        The two tokenizers.
    ends : frozenset of int
        The verifier's tokens that end a caption.
    """

    drafter: Codec
    verifier: Codec
    ends: frozenset[int]


def translation_between(
    draft: AudioLM, verifier: Verifier, config: UGSDConfig, eos_token_ids: frozenset[int]
) -> Translation | None:
    """How a drafter's tokens become the verifier's; None where they are the same.

    Parameters
    ----------
    draft : AudioLM
        The edge model.
    verifier : Verifier
        Who judges. Where one of the two has no tokenizer, the ids are taken to mean the same.
    config : UGSDConfig
        Its rule must not need the drafter's distribution.
    eos_token_ids : frozenset of int
        Tokens of the verifier that end a caption.

    Raises
    ------
    VocabularyMismatchError
        If the tokens differ and ``rule`` or ``graph`` need them to be the same.
    """
    try:
        check_vocabularies(draft, verifier)
        return None
    except VocabularyMismatchError as mismatch:
        reason = None
        if config.rule in RULES_WITH_DRAFT_LOGITS:
            reason = (
                f"rule={config.rule!r} needs the drafter's probability of each of the verifier's tokens, which a "
                "drafter with other tokens does not have (use rule='greedy', 'rank', 'typical' or 'relaxed')"
            )
        elif config.graph:
            reason = "graph=True drafts in the verifier's tokens (use graph=False)"
        if reason is not None:
            raise VocabularyMismatchError(f"{mismatch}: {reason}") from None
    ours, theirs = draft.tokenizer, verifier.tokenizer
    own = draft.eos_token_ids
    # Whoever names an end of his own may name a token with text: that one stays text.
    ends = verifier.eos_token_ids | {
        token for token in eos_token_ids if token >= 0 and not theirs.decode([token], skip_special_tokens=True)
    }
    return Translation(
        Codec(ours, own, _end(ours, own, like=_names(theirs, ends))),
        Codec(theirs, ends, _end(theirs, ends & eos_token_ids or ends, like=_names(ours, own))),
        eos_token_ids,
    )


class TranslatingDrafter:
    """Drafts one request in the verifier's tokens with a model that has others; takes the place of a `Drafter`.

    A block has at most as many tokens as were asked for; what the drafter has written beyond them is the beginning of
    the next block, and so is what still stands of its text after a correction: nothing is drafted twice.

    Parameters
    ----------
    drafter : Drafter
        Drafts the request in the edge model's tokens.
    translation : Translation
        The two tokenizers.
    """

    def __init__(self, drafter: Drafter, translation: Translation):
        self.drafter = drafter
        self._ends = translation.ends
        self._own = Transcript(translation.drafter)  # the drafter's tokens behind its prompt
        self._entropy: list[float] = []  # of each, nats; 0 for those that it was fed
        self._written = 0  # characters of the drafter's text that stand for final text
        self._final = Transcript(translation.verifier)  # the verifier's tokens, and those of the block in flight
        self._settled = 0  # of them, those that are final
        self._tries = 0  # tokens that may still be drafted to complete the block's first character

    @property
    def forwards(self) -> int:
        """Forward passes so far."""
        return self.drafter.forwards

    def draft(self, length: int) -> DraftBlock:
        """Draft at most `length` of the verifier's tokens, in at most as many forward passes, or until a character is
        complete."""
        block = draft_translated([self], [length])[0]
        if isinstance(block, Exception):
            raise block
        return block

    def begin(self, length: int) -> int:
        """How many tokens the drafter has to draft for a block of `length`."""
        ahead = self._own.text[self._written :]
        if ahead:
            count = self._translate(length)
            self._final.truncate(self._settled)
            # What cannot be translated, or ends the caption, is not continued.
            return 0 if not count or ahead.endswith(END) else length - count
        self._tries = _LONGEST_CHARACTER - 1
        waiting = len(self._own.ids) - bisect_left(self._own.ends, self._written)
        return length if waiting < _MOST_WAITING else 0

    def ready(self) -> Drafter:
        """The drafter, with something to feed."""
        if not self.drafter.pending.shape[1] and self._own.ids:
            self.drafter.sequence.rollback(1)
            self._feed(self._own.ids[-1:])
        return self.drafter

    def take(self, block: DraftBlock) -> int:
        """Append what was drafted, and return how many tokens are missing to complete the first character."""
        self.drafter.commit(len(block), -1)
        self._own.extend(block.token_ids)
        self._entropy.extend(block.entropy)
        if len(self._own.text) > self._written or not self._tries:
            return 0
        self._tries -= 1
        return 1

    def block(self, length: int) -> DraftBlock:
        """What was drafted, in at most `length` of the verifier's tokens."""
        count = self._translate(length)
        tokens = self._final.ids[self._settled :]
        entropy = [self._entropy_of(index) for index in range(self._settled, self._settled + count)]
        config, device = self.drafter.config, self.drafter.pending.device
        uncertainty, escalate = 0.0, True
        if count:
            measured, certain = ops.gate_block(
                torch.tensor([entropy]), None, threshold=config.entropy_threshold, reduce=config.gate
            )
            uncertainty, escalate = float(measured), bool(certain)
        return DraftBlock(
            tokens=on_device([tokens], device, torch.long),
            logits=None,
            token_ids=tuple(tokens),
            entropy=tuple(entropy),
            uncertainty=uncertainty,
            escalate=escalate,
        )

    def commit(self, num_accepted: int, next_token: int) -> None:
        """Keep `num_accepted` tokens of the last block and append `next_token` (-1: none)."""
        final, own = self._final, self._own
        known = final.ends[self._settled]
        final.truncate(self._settled + num_accepted)
        if next_token >= 0:
            final.extend([next_token])
        self._settled = len(final.ids)
        new, ahead = final.text[known:], own.text[self._written :]
        if ahead.startswith(new):
            self._written += len(new)
        else:
            self._rewrite(_agreeing(ahead, new), new)

    def _translate(self, length: int) -> int:
        """Append the drafter's text to the final tokens, and return how many of the verifier's tokens it took."""
        final = self._final
        final.truncate(self._settled)
        # Bytes that make no character would come back as the replacement character's own bytes.
        wanted = final.text + self._own.text[self._written :].partition(_PARTIAL)[0]
        if wanted == final.text:
            return 0
        base = final.last_whole()
        begun = final.ids[base:]  # of a character that is not complete
        for _, ids in final.rewrites([base], wanted):
            if ids[: len(begun)] != begun:
                continue
            final.extend(ids[len(begun) :])
            count = min(self._exact(wanted), length)
            final.truncate(self._settled + count)
            if count:
                return count
        return 0

    def _exact(self, wanted: str) -> int:
        """How many of the tokens behind the final ones write what is wanted, up to one that ends the caption."""
        final = self._final
        known = final.ends[self._settled]
        agreeing = known + _agreeing(final.text[known:], wanted[known:])
        count = len(final.ids)
        while count > self._settled:
            first, last = final.span(count - 1)
            if first < last <= agreeing:
                break
            count -= 1
        ends = (k + 1 for k, token in enumerate(final.ids[self._settled : count]) if token in self._ends)
        return next(ends, count - self._settled)

    def _entropy_of(self, index: int) -> float:
        """Entropy of one of the verifier's tokens: the largest of the drafter's that share a character with it."""
        own, shift = self._own, self._written - self._final.ends[self._settled]
        first, last = (character + shift for character in self._final.span(index))
        last = max(last, first + 1)  # a word's mark without a space, at the very beginning, goes with its word
        entropy = 0.0
        for k in range(max(bisect_left(own.ends, first) - 1, 0), len(own.ids)):
            begin, end = own.span(k)
            if begin >= last:
                break
            if begin < end and end > first:
                entropy = max(entropy, self._entropy[k])
        return entropy

    def _rewrite(self, agreeing: int, new: str) -> None:
        """Have the drafter go on from other text than its own, of which the first `agreeing` characters stand."""
        own = self._own
        stands = self._written + agreeing
        wanted = own.text[:stands] + new[agreeing:]
        last = bisect_right(own.ends, stands) - 1
        counts: list[int] = []  # falling; of tokens that end with the same character, those without text go
        for count in range(last, -1, -1):
            if not own.whole[count]:
                continue
            if counts and own.ends[counts[-1]] == own.ends[count]:
                counts.pop()
            elif count < last - _CONTEXT and counts:
                break
            counts.append(count)
        count, ids = next(own.rewrites(counts, wanted))
        if not ids:  # a text without a token: the drafter's own first token stands in for it
            count = max(count, min(1, len(own.ids)))
        kept = count + _agreeing(own.ids[count:], ids)
        cached = len(own.ids) - self.drafter.pending.shape[1]
        if kept < cached:
            self.drafter.sequence.rollback(cached - kept)
        own.truncate(count)
        own.extend(ids)
        self._entropy[kept:] = [0.0] * (len(own.ids) - kept)
        self._written = len(own.text)
        self._feed(own.ids[min(cached, kept) :])

    def _feed(self, ids: Sequence[int]) -> None:
        tokens = [min(token, self.drafter.last_token) for token in ids]
        self.drafter.pending = on_device([tokens], self.drafter.pending.device, torch.long)


def draft_translated(drafters: Sequence[TranslatingDrafter], lengths: Sequence[int]) -> list[DraftBlock | Exception]:
    """Draft a block for each of several requests, as `draft_blocks` does."""
    missing = [drafter.begin(length) for drafter, length in zip(drafters, lengths, strict=True)]
    failed: dict[int, Exception] = {}
    while any(missing):
        rows = [row for row, count in enumerate(missing) if count]
        blocks = draft_blocks([drafters[row].ready() for row in rows], [missing[row] for row in rows])
        for row, block in zip(rows, blocks, strict=True):
            if isinstance(block, Exception):
                failed[row], missing[row] = block, 0
            else:
                missing[row] = drafters[row].take(block)
    return [failed[row] if row in failed else drafters[row].block(length) for row, length in enumerate(lengths)]


def _agreeing(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of the common beginning."""
    differing = (k for k, (ours, theirs) in enumerate(zip(one, other, strict=False)) if ours != theirs)
    return next(differing, min(len(one), len(other)))


def _names(tokenizer: Any, ids: frozenset[int]) -> frozenset[str]:
    return frozenset(tokenizer.convert_ids_to_tokens(sorted(ids)))


def _end(tokenizer: Any, ends: frozenset[int], *, like: frozenset[str]) -> int | None:
    """Of several tokens that end a sequence, the one to write: of the other side's name if there is one."""
    alike = {token for token in ends if tokenizer.convert_ids_to_tokens(token) in like} or ends
    return tokenizer.eos_token_id if tokenizer.eos_token_id in alike else min(alike, default=None)
