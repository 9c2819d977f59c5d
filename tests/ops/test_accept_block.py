"""`accept_block` on every backend: the oracle's decisions, and each edge case of the contract."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ops import cases
from ugsd_fast import ops

pytestmark = cases.on_backends("accept_block")

RULES = ("greedy", "rank", "exact", "block", "typical", "relaxed")
SAMPLING_RULES = ("exact", "block")
ARGMAX_RULES = ("greedy", "rank", "typical", "relaxed")
ANYTHING = {"rank": 10**9, "epsilon": 0.0, "delta": 0.0, "top_n": 10**9, "relax_delta": 1.0}
"""Numbers under which rank, typical and relaxed accept every possible token."""


def one_hot(tokens: list[list[int]], vocabulary: int, high: float = 9.0) -> Tensor:
    """Logits ``[B, K, V]`` whose largest is at each token."""
    index = torch.tensor(tokens)
    return torch.zeros(*index.shape, vocabulary).scatter(-1, index.unsqueeze(-1), high)


def drafted(
    batch: int, block: int, vocabulary: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens drawn from a drafter near the verifier, and the logits of both."""
    target = cases.random_logits(batch, block + 1, vocabulary, dtype=dtype, seed=seed, scale=2.0)
    noise = cases.random_logits(batch, block, vocabulary, seed=seed + 1, scale=0.5)
    draft = (target[:, :block].float() + noise).to(dtype)
    tokens = torch.multinomial(
        draft.double().softmax(-1).reshape(-1, vocabulary), 1, generator=cases.generator(seed + 2)
    ).view(batch, block)
    return tokens, target, draft


@cache
def oracle(rule: str, vocabulary: int, dtype: torch.dtype) -> tuple[dict[str, Any], ops.Acceptance]:
    """Arguments of ragged blocks and the oracle's verdict on them."""
    batch, block = (8, 4) if vocabulary < 5000 else (4, 2)
    tokens, target, draft = drafted(batch, block, vocabulary, seed=vocabulary, dtype=dtype)
    arguments = {
        "draft_tokens": tokens,
        "target_logits": target,
        "draft_logits": draft,
        "rule": rule,
        "draft_lengths": torch.arange(batch) % (block + 1),
        "seed": 3,
        "offset": 1,
    }
    with ops.use_backend("reference"):
        return arguments, ops.accept_block(**arguments)


class TestSameDecisionsEverywhere:
    @cases.by_dtype()
    @pytest.mark.parametrize("vocabulary", [1, 63, 1000, 4097, 32000], ids=lambda v: f"V{v}")
    @pytest.mark.parametrize("rule", RULES)
    def test_matches_the_oracle(self, rule: str, vocabulary: int, dtype: torch.dtype) -> None:
        arguments, expected = oracle(rule, vocabulary, dtype)
        got = ops.accept_block(**arguments)
        assert torch.equal(got.num_accepted, expected.num_accepted)
        assert torch.equal(got.next_token, expected.next_token)
        cases.assert_close(got.accept_prob, expected.accept_prob, 1e-5, 2e-6)

    @pytest.mark.parametrize("rule", SAMPLING_RULES)
    def test_given_draft_logsumexp(self, rule: str) -> None:
        tokens, target, draft = drafted(30, 3, 5000, seed=1)
        own = ops.accept_block(tokens, target, draft, rule=rule, seed=4)
        logsumexp = draft.double().logsumexp(-1).float()
        got = ops.accept_block(tokens, target, draft, rule=rule, seed=4, draft_logsumexp=logsumexp)
        assert torch.equal(got.num_accepted, own.num_accepted)
        assert torch.equal(got.next_token, own.next_token)
        cases.assert_close(got.accept_prob, own.accept_prob, 5e-6, 5e-6)
        strided = logsumexp.T.contiguous().T
        assert torch.equal(
            ops.accept_block(tokens, target, draft, rule=rule, seed=4, draft_logsumexp=strided).accept_prob,
            got.accept_prob,
        )

    def test_given_draft_logsumexp_is_used(self) -> None:
        """A logsumexp larger by a makes q smaller and p/q larger by e^a."""
        tokens, target, draft = drafted(50, 1, 100, seed=2)
        logsumexp = draft.double().logsumexp(-1).float()
        once = ops.accept_block(tokens, target, draft, rule="exact", draft_logsumexp=logsumexp).accept_prob
        twice = ops.accept_block(tokens, target, draft, rule="exact", draft_logsumexp=logsumexp + 0.5).accept_prob
        below = once < 1
        cases.assert_close(twice[below], (once[below].double() * np.exp(0.5)).clamp(max=1), 1e-5, 0)

    @pytest.mark.parametrize("rule", SAMPLING_RULES)
    def test_models_of_two_dtypes(self, rule: str) -> None:
        tokens, target, draft = drafted(20, 2, 1000, seed=3, dtype=torch.bfloat16)
        expected = ops.accept_block(tokens, target.float(), draft.float(), rule=rule, seed=1)
        for t, d in ((target, draft.float()), (target.float(), draft), (target, draft)):
            got = ops.accept_block(tokens, t, d, rule=rule, seed=1)
            assert torch.equal(got.num_accepted, expected.num_accepted)
            assert torch.equal(got.next_token, expected.next_token)

    @pytest.mark.parametrize("shape", [(1, cases.LARGEST), (9, 4097)], ids=str)
    @pytest.mark.parametrize("rule", RULES)
    def test_thread_count_changes_no_bit(self, rule: str, shape: tuple[int, int]) -> None:
        tokens, target, draft = drafted(shape[0], 2, shape[1], seed=4)
        results = []
        for count in (1, 2, 3):
            with cases.threads(count):
                results.append(ops.accept_block(tokens, target, draft, rule=rule, seed=1))
        assert all(cases.same_bits(a, b) for result in results for a, b in zip(result, results[0], strict=True))


class TestEdgeCases:
    @pytest.mark.parametrize("token", [-1, -(2**40), 7, 2**40])
    @pytest.mark.parametrize("rule", RULES)
    def test_token_outside_the_vocabulary_is_rejected(self, rule: str, token: int) -> None:
        target, draft = cases.random_logits(1, 4, 7), cases.random_logits(1, 3, 7, seed=1)
        tokens = target[:, :3].argmax(-1)
        tokens[0, 1] = token
        with_poison = [cases.embedded(x) for x in (target, draft)]
        for draft_logits in (None, with_poison[1]):
            # A drafter that gave the first token next to nothing makes its acceptance sure.
            if draft_logits is not None:
                draft_logits[0, 0] = -20.0
                draft_logits[0, 0, (int(tokens[0, 0]) + 1) % 7] = 0.0
            for seed in range(20):
                verdict = ops.accept_block(tokens, with_poison[0], draft_logits, rule=rule, seed=seed, **ANYTHING)
                assert verdict.num_accepted.item() <= 1
                assert verdict.accept_prob[0, 1] == 0
                assert 0 <= verdict.next_token.item() < 7

    @pytest.mark.parametrize("rule", SAMPLING_RULES)
    def test_token_that_the_drafter_could_not_draw_is_rejected(self, rule: str) -> None:
        target = torch.zeros(1, 3, 4)
        draft = torch.zeros(1, 2, 4)
        draft[0, 1, 2] = -torch.inf  # q(x) = 0 for the second token
        for seed in range(30):
            verdict = ops.accept_block(torch.tensor([[1, 2]]), target, draft, rule=rule, seed=seed)
            assert verdict.num_accepted.item() == 1
            assert verdict.accept_prob[0, 1] == 0

    @pytest.mark.parametrize("rule", RULES)
    def test_token_without_probability_is_never_accepted(self, rule: str) -> None:
        """p(x) = 0, by -inf or NaN, even under limits that let everything through."""
        for masked in (-torch.inf, torch.nan):
            target = torch.zeros(1, 2, 5)
            target[0, 0, 3] = masked
            for draft in (None, torch.zeros(1, 1, 5)):
                for seed in range(10):
                    verdict = ops.accept_block(torch.tensor([[3]]), target, draft, rule=rule, seed=seed, **ANYTHING)
                    assert verdict.num_accepted.item() == 0
                    assert verdict.accept_prob.item() == 0
                    assert verdict.next_token.item() in {0, 1, 2, 4}

    @pytest.mark.parametrize("rule", SAMPLING_RULES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    def test_equal_models_accept_everything(self, rule: str, dtype: torch.dtype) -> None:
        """p = q: p >= q at every token, so no uniform can reject, and the residual is never needed."""
        tokens, target, _ = drafted(200, 3, 500, seed=1, dtype=dtype)
        verdict = ops.accept_block(tokens, target, target[:, :3].clone(), rule=rule, seed=1)
        assert (verdict.num_accepted == 3).all()
        assert (verdict.accept_prob == 1).all()

    @pytest.mark.parametrize("rule", SAMPLING_RULES)
    @pytest.mark.parametrize("rounding", [-1e-6, 0.0, 1e-6])
    def test_zero_residual(self, rule: str, rounding: float) -> None:
        """A rejection that p = q cannot explain, forced by an impossible token, still gives a token of p's."""
        target = cases.random_logits(64, 2, 50)
        target[:, :, ::2] = -torch.inf
        draft = target[:, :1].clone()
        logsumexp = (draft.double().logsumexp(-1) + rounding).float()
        tokens = torch.full((64, 1), -1)
        for given in (None, logsumexp):
            verdict = ops.accept_block(tokens, target, draft, rule=rule, draft_logsumexp=given, seed=3)
            assert (verdict.num_accepted == 0).all()
            assert (verdict.next_token % 2 == 1).all()
            assert (verdict.next_token < 50).all()

    @pytest.mark.parametrize("rule", SAMPLING_RULES)
    def test_draft_probability_rounded_above_one(self, rule: str) -> None:
        """A certain drafter whose logsumexp lies just under its logit: q(x) = 1 + 1e-6."""
        target = torch.full((300, 2, 9), -torch.inf)
        target[:, :, 4] = 10.0
        draft = target[:, :1].clone()
        logsumexp = torch.full((300, 1), 10.0 - 1e-6)
        verdict = ops.accept_block(
            torch.full((300, 1), 4), target, draft, rule=rule, draft_logsumexp=logsumexp, seed=torch.arange(300)
        )
        assert (verdict.accept_prob > 1 - 1e-5).all()
        assert (verdict.accept_prob <= 1).all()
        assert (verdict.next_token == 4).all()

    @pytest.mark.parametrize("rule", RULES)
    def test_verifier_row_with_nothing_finite(self, rule: str) -> None:
        """Nothing can be accepted there and nothing can follow; -1 is no match for argmax -1."""
        target = cases.random_logits(2, 2, 6)
        target[:, 0] = torch.tensor([-torch.inf, torch.nan])[:, None]
        for draft in (None, torch.zeros(2, 1, 6)):
            for token in (-1, 2):
                verdict = ops.accept_block(torch.full((2, 1), token), target, draft, rule=rule, **ANYTHING)
                assert verdict.num_accepted.tolist() == [0, 0]
                assert verdict.next_token.tolist() == [-1, -1]
                assert verdict.accept_prob.tolist() == [[0.0], [0.0]]

    @pytest.mark.parametrize("rule", RULES)
    def test_bonus_row_with_nothing_finite(self, rule: str) -> None:
        target = one_hot([[1, 0]], 4)
        target[0, 1] = -torch.inf
        verdict = ops.accept_block(torch.tensor([[1]]), target, one_hot([[1]], 4), rule=rule)
        assert verdict.num_accepted.item() == 1
        assert verdict.next_token.item() == -1

    @pytest.mark.parametrize("rule", SAMPLING_RULES)
    def test_drafter_row_with_nothing_finite(self, rule: str) -> None:
        draft = torch.full((20, 1, 6), -torch.inf)
        target = cases.random_logits(20, 2, 6)
        verdict = ops.accept_block(torch.full((20, 1), 2), target, draft, rule=rule)
        assert (verdict.num_accepted == 0).all()
        assert ((verdict.next_token >= 0) & (verdict.next_token < 6)).all()

    @pytest.mark.parametrize("bonus", [True, False])
    @pytest.mark.parametrize("rule", RULES)
    def test_empty_block(self, rule: str, bonus: bool) -> None:
        """K = 0: the round is the bonus token alone."""
        target = one_hot([[3], [1]], 5, high=60.0)
        for draft in (None, torch.empty(2, 0, 5)):
            verdict = ops.accept_block(torch.empty(2, 0, dtype=torch.int64), target, draft, rule=rule, bonus=bonus)
            assert verdict.num_accepted.tolist() == [0, 0]
            assert verdict.next_token.tolist() == ([3, 1] if bonus else [-1, -1])
            assert verdict.accept_prob.shape == (2, 0)

    @pytest.mark.parametrize("rule", RULES)
    def test_block_of_one(self, rule: str) -> None:
        target = one_hot([[3, 2]], 5, high=60.0)
        for token, expected in ((3, (1, 2)), (0, (0, 3))):
            draft = one_hot([[token]], 5)
            verdict = ops.accept_block(torch.tensor([[token]]), target, draft, rule=rule, rank=1, relax_delta=0.0)
            assert (verdict.num_accepted.item(), verdict.next_token.item()) == expected

    @pytest.mark.parametrize("rule", RULES)
    def test_empty_batch(self, rule: str) -> None:
        verdict = ops.accept_block(
            torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 3, 5), torch.empty(0, 2, 5), rule=rule
        )
        assert [field.shape for field in verdict] == [(0,), (0,), (0, 2)]

    @pytest.mark.parametrize("rule", RULES)
    def test_vocabulary_of_one(self, rule: str) -> None:
        verdict = ops.accept_block(torch.tensor([[0, 0]]), torch.zeros(1, 3, 1), torch.zeros(1, 2, 1), rule=rule)
        assert verdict.num_accepted.item() == 2
        assert verdict.next_token.item() == 0
        assert verdict.accept_prob.tolist() == [[1.0, 1.0]]

    @pytest.mark.parametrize("bonus", [True, False])
    @pytest.mark.parametrize("rule", RULES)
    def test_ragged_lengths(self, rule: str, bonus: bool) -> None:
        """Tokens and draft rows past a length are not looked at; a fully accepted block is one of its own length."""
        path = [2, 0, 3, 1]
        target = one_hot([path] * 6, 5, high=60.0)
        draft = target[:, :3].clone()
        tokens = torch.tensor([path[:3]] * 6)
        lengths = torch.tensor([0, 1, 2, 3, -5, 99], dtype=torch.int32)
        kept = lengths.clamp(0, 3).long()
        past = torch.arange(3) >= kept[:, None]
        tokens = tokens.masked_fill(past, -1)
        draft = draft.masked_fill(past[..., None], torch.nan)
        verdict = ops.accept_block(tokens, target, draft, rule=rule, draft_lengths=lengths, bonus=bonus)
        assert torch.equal(verdict.num_accepted, kept)
        assert verdict.next_token.tolist() == ([path[n] for n in kept] if bonus else [-1] * 6)
        assert torch.equal(verdict.accept_prob, (~past).float())

    @pytest.mark.parametrize("rule", RULES)
    def test_without_bonus_a_rejection_is_still_corrected(self, rule: str) -> None:
        target = one_hot([[2, 0, 3]], 5, high=60.0)
        draft = one_hot([[2, 4]], 5, high=60.0)
        verdict = ops.accept_block(torch.tensor([[2, 4]]), target, draft, rule=rule, bonus=False, rank=1, relax_delta=0)
        assert verdict.num_accepted.item() == 1
        assert verdict.next_token.item() == 0

    @pytest.mark.parametrize("rule", ARGMAX_RULES)
    def test_next_token_ties_take_the_lowest_index(self, rule: str) -> None:
        target = torch.zeros(1, 1, 5000)
        target[0, 0, [4097, 70, 4999]] = 2.0
        verdict = ops.accept_block(torch.empty(1, 0, dtype=torch.int64), target, rule=rule)
        assert verdict.next_token.item() == 70

    def test_greedy_accepts_the_lowest_of_tied_tokens_alone(self) -> None:
        target = torch.zeros(2, 2, 9)
        target[:, :, [3, 6]] = 1.0
        assert ops.accept_block(torch.tensor([[3], [6]]), target).num_accepted.tolist() == [1, 0]

    def test_rank_accepts_ties_up_to_the_limit(self) -> None:
        target = torch.tensor([5.0, 4.0, 4.0, 3.0]).expand(4, 2, 4)
        tokens = torch.tensor([[0], [1], [2], [3]])
        for rank, accepted in (
            (0, [0, 0, 0, 0]),
            (1, [1, 0, 0, 0]),
            (2, [1, 1, 1, 0]),
            (3, [1, 1, 1, 0]),
            (4, [1] * 4),
        ):
            assert ops.accept_block(tokens, target, rule="rank", rank=rank).num_accepted.tolist() == accepted, rank

    def test_rank_default_is_the_papers(self) -> None:
        target = torch.arange(30.0, 0, -1).expand(2, 2, 30)
        verdict = ops.accept_block(torch.tensor([[19], [20]]), target, rule="rank")
        assert verdict.num_accepted.tolist() == [1, 0]

    def test_typical_threshold(self) -> None:
        """p = (0.5, 0.3, 0.15, 0.05), H = 1.142: min(epsilon, delta e^-H) = min(epsilon, 0.3192 delta)."""
        target = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(4, 2, 4)
        tokens = torch.arange(4)[:, None]
        for epsilon, delta, accepted in (
            (0.09, 0.3, [1, 1, 1, 0]),
            (0.04, 9.0, [1, 1, 1, 1]),
            (0.16, 9.0, [1, 1, 0, 0]),
            (0.9, 0.9, [1, 1, 0, 0]),
            (0.9, 1.0, [1, 0, 0, 0]),
        ):
            verdict = ops.accept_block(tokens, target, rule="typical", epsilon=epsilon, delta=delta)
            assert verdict.num_accepted.tolist() == accepted, (epsilon, delta)

    def test_relaxed_needs_both_the_top_and_the_distance(self) -> None:
        target = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(4, 2, 4)
        tokens = torch.arange(4)[:, None]
        for top_n, slack, accepted in (
            (10, 0.6, [1, 1, 1, 1]),
            (10, 0.4, [1, 1, 1, 0]),
            (2, 0.4, [1, 1, 0, 0]),
            (10, 0.1, [1, 0, 0, 0]),
            (10, 0.0, [1, 0, 0, 0]),
            (0, 1.0, [0, 0, 0, 0]),
        ):
            verdict = ops.accept_block(tokens, target, rule="relaxed", top_n=top_n, relax_delta=slack)
            assert verdict.num_accepted.tolist() == accepted, (top_n, slack)

    def test_relaxed_always_takes_the_top_token(self) -> None:
        target = cases.random_logits(50, 2, 3000)
        verdict = ops.accept_block(target[:, :1].argmax(-1), target, rule="relaxed", top_n=1, relax_delta=0.0)
        assert (verdict.num_accepted == 1).all()

    @pytest.mark.parametrize("scale", [1e-4, 1e4 / 3, 1e4])
    @pytest.mark.parametrize("rule", RULES)
    def test_huge_and_tiny_logits(self, rule: str, scale: float) -> None:
        target = cases.random_logits(20, 3, 500, scale=scale).clamp(-1e4, 1e4)
        draft = cases.random_logits(20, 2, 500, scale=scale, seed=1).clamp(-1e4, 1e4)
        tokens = draft.argmax(-1)
        with ops.use_backend("reference"):
            expected = ops.accept_block(tokens, target, draft, rule=rule, seed=1)
        got = ops.accept_block(tokens, target, draft, rule=rule, seed=1)
        assert torch.equal(got.num_accepted, expected.num_accepted)
        assert torch.equal(got.next_token, expected.next_token)

    def test_residual_of_logits_far_from_zero(self) -> None:
        """Where float32 steps by 1/32, the rows' logsumexp has digits that no float32 holds."""
        far = 3e5
        target = cases.random_logits(400, 3, 40, scale=1.0).round() + far
        draft = cases.random_logits(400, 2, 40, scale=1.0, seed=1).round() + far
        law = draft.sub(far).softmax(-1).flatten(0, 1)
        tokens = torch.multinomial(law, 1, generator=cases.generator(2)).view(400, 2)
        with ops.use_backend("reference"):
            expected = ops.accept_block(tokens, target, draft, rule="block", seed=1)
        got = ops.accept_block(tokens, target, draft, rule="block", seed=1)
        assert torch.equal(got.num_accepted, expected.num_accepted)
        cases.assert_close(got.accept_prob, expected.accept_prob, 1e-4, 1e-5)

    def test_float16_range(self) -> None:
        target = torch.full((1, 2, 5), -65504.0, dtype=torch.float16)
        target[0, :, 3] = 65504.0
        for rule in RULES:
            verdict = ops.accept_block(torch.tensor([[3]]), target, target[:, :1], rule=rule)
            assert (verdict.num_accepted.item(), verdict.next_token.item()) == (1, 3), rule

    @cases.by_dtype()
    @pytest.mark.parametrize("layout", cases.LAYOUTS)
    @pytest.mark.parametrize("rule", RULES)
    def test_strided_rows_read_nothing_around_them(self, rule: str, layout: str, dtype: torch.dtype) -> None:
        for vocabulary in (1, 63, 4097):
            tokens, target, draft = drafted(5, 3, vocabulary, seed=6, dtype=dtype)
            expected = ops.accept_block(tokens, target, draft, rule=rule, seed=2)
            strided = [cases.LAYOUTS[layout](x) for x in (target, draft)]
            wide = torch.full((5, 6), -1)
            wide[:, ::2] = tokens
            got = ops.accept_block(wide[:, ::2], *strided, rule=rule, seed=2)
            assert all(map(cases.same_bits, got, expected))

    def test_tokens_int32(self) -> None:
        tokens, target, draft = drafted(5, 3, 100)
        expected = ops.accept_block(tokens, target, draft, rule="block", seed=2)
        assert all(map(torch.equal, ops.accept_block(tokens.int(), target, draft, rule="block", seed=2), expected))

    @pytest.mark.parametrize("rule", SAMPLING_RULES)
    def test_seeds_and_offsets_per_row(self, rule: str) -> None:
        tokens, target, draft = drafted(1, 3, 100, seed=9)
        inputs = [x.expand(30, *x.shape[1:]) for x in (tokens, target, draft)]
        seeds, offsets = torch.arange(30) * 5, torch.arange(30, dtype=torch.int32) - 10
        got = ops.accept_block(*inputs, rule=rule, seed=seeds, offset=offsets)
        assert got.num_accepted.unique().numel() > 1
        for i in range(30):
            one = ops.accept_block(*inputs, rule=rule, seed=int(seeds[i]), offset=int(offsets[i]))
            assert got.num_accepted[i] == one.num_accepted[i]
            assert got.next_token[i] == one.next_token[i]
        low = torch.tensor(-1)
        assert torch.equal(
            ops.accept_block(*inputs, rule=rule, seed=2**64 - 1).next_token,
            ops.accept_block(*inputs, rule=rule, seed=low).next_token,
        )

    @pytest.mark.parametrize(
        ("rule", "numbers"),
        [
            ("rank", {"rank": [1.0, 2.0, 3.0, 4.0]}),
            ("typical", {"epsilon": [0.0, 0.1, 0.5, 0.02], "delta": [0.5, 0.1, 1.0, 0.3]}),
            ("relaxed", {"top_n": [1.0, 2.0, 3.0, 4.0], "relax_delta": [0.0, 0.1, 0.5, 1.0]}),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_limits_per_row(self, rule: str, numbers: dict[str, list[float]]) -> None:
        target = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(4, 2, 4)
        for token in range(4):
            tokens = torch.full((4, 1), token)
            tensors = {name: torch.tensor(values) for name, values in numbers.items()}
            got = ops.accept_block(tokens, target, rule=rule, **tensors).num_accepted
            for i in range(4):
                one = {name: values[i] for name, values in numbers.items()}
                assert got[i] == ops.accept_block(tokens, target, rule=rule, **one).num_accepted[i], (token, one)

    def test_lossless_rules_are_named(self) -> None:
        assert {"greedy", "exact", "block"} == ops.LOSSLESS_RULES


VALID = {
    "draft_tokens": torch.zeros(2, 3, dtype=torch.int64),
    "target_logits": torch.zeros(2, 4, 5),
    "draft_logits": torch.zeros(2, 3, 5),
    "rule": "exact",
}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "magic"}, "rule is 'magic', expected one of 'greedy'"),
        ({"draft_tokens": torch.zeros(2, 3)}, "draft_tokens has dtype torch.float32, expected int64 or int32"),
        ({"draft_tokens": torch.zeros(3).long()}, r"draft_tokens has shape \(3,\), expected 2 dimensions"),
        ({"draft_tokens": torch.zeros(2, 3, device="meta").long()}, "draft_tokens is on meta, expected cpu"),
        (
            {"target_logits": torch.zeros(2, 3, 5)},
            r"target_logits has shape \(2, 3, 5\), expected \(2, 4, 5\) \(K\+1 rows for K=3",
        ),
        ({"target_logits": torch.zeros(4, 5)}, r"target_logits has shape \(4, 5\), expected 3 dimensions"),
        ({"target_logits": torch.zeros(2, 4, 5).double()}, "target_logits has dtype torch.float64, expected float32"),
        ({"target_logits": torch.zeros(2, 4, 10)[..., ::2]}, "target_logits has stride 2 in its last dimension"),
        ({"draft_logits": torch.zeros(2, 3, 6)}, r"draft_logits has shape \(2, 3, 6\), expected \(2, 3, 5\)"),
        ({"draft_logits": torch.zeros(2, 4, 5)}, r"draft_logits has shape \(2, 4, 5\), expected \(2, 3, 5\)"),
        ({"draft_logits": torch.zeros(2, 3, 5, device="meta")}, "draft_logits is on meta, expected cpu"),
        ({"draft_lengths": torch.zeros(3).long()}, r"draft_lengths has shape \(3,\), expected \(2,\)"),
        ({"draft_lengths": torch.zeros(2)}, "draft_lengths has dtype torch.float32, expected int64 or int32"),
        ({"draft_logsumexp": torch.zeros(2, 4)}, r"draft_logsumexp has shape \(2, 4\), expected \(2, 3\)"),
        (
            {"draft_logits": None, "draft_logsumexp": torch.zeros(2, 3)},
            "draft_logsumexp was given without draft_logits, expected",
        ),
        ({"rule": "rank", "rank": -1}, "the limit of rank is -1, expected a finite number of at least 0"),
        ({"rule": "typical", "epsilon": float("nan")}, "the limit of typical is nan, expected a finite number"),
        ({"rule": "relaxed", "relax_delta": torch.ones(3)}, r"the slack of relaxed has shape \(3,\), expected"),
        ({"seed": 0.5}, "seed is 0.5, expected an integer or an integer tensor"),
        ({"offset": torch.ones(3).long()}, r"offset has shape \(3,\), expected one that broadcasts to \(2,\)"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_errors_name_what_was_got_and_expected(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^accept_block: {message}"):
        ops.accept_block(**{**VALID, **arguments})
