"""Which tests of the ops run on Triton's interpreter: it takes about a millisecond for each tile of a row.

``TRITON_INTERPRET=1 python -m pytest tests/ops`` runs the chosen ones, on the ``triton`` backend alone;
`tests.ops.test_triton` does so in a process of its own, since the interpreter must be asked for before triton loads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.ops import cases

LEFT_OUT = {
    "test_thread_count_changes_no_bit": "there are no threads",
    "test_errors_name_what_was_got_and_expected": "no kernel runs",
    "test_no_logits_in_memory": "the interpreter keeps what a GPU has in registers",
    "test_subnormal_float16_and_bfloat16_are_read": "the interpreter reads subnormal bfloat16 as 0",
    "test_tokens_follow_the_law": "thousands of rows",
    "test_draws_are_the_inverse_cdf_of_the_published_uniforms": "thousands of rows: test_triton draws its own",
    "test_all_temperature_draws_uniformly": "thousands of rows",
    "test_filtered_columns_are_never_drawn": "thousands of rows",
    "test_masked_and_nan_columns_are_never_drawn": "thousands of rows",
    "test_matches_float64_at_a_real_size": "a product of 32000 columns",
    "test_results_outlive_each_other": "thousands of rows",
}
ROWS = ("token_stats", "logprob_rank", "filter_logits", "sample", "lm_head_stats")
"""Ops whose tests are thinned out: one dtype a combination of other parameters, each dtype as often."""
REAL_SIZES = [(32000, "torch.float32"), (cases.LARGEST, "torch.bfloat16")]


def chosen(items: list[pytest.Item]) -> Iterator[pytest.Item]:
    """Yield the tests to run."""
    groups: dict[tuple[Any, ...], int] = {}
    for item in items:
        function = getattr(item, "originalname", item.name)
        parameters = dict(item.callspec.params) if hasattr(item, "callspec") else {}
        if str(parameters.get("backend")) != "triton" or function in LEFT_OUT:
            continue
        op = item.path.stem.removeprefix("test_")
        if op not in ROWS:
            yield item
            continue
        vocabulary, dtype = parameters.get("vocabulary", 0), parameters.pop("dtype", None)
        if vocabulary > max(cases.SMALL_SIZES) and vocabulary != 9000:
            if (vocabulary, str(dtype)) in REAL_SIZES and op == "token_stats":
                yield item
            continue
        if op == "lm_head_stats" and parameters.get("rows", 1) not in (1, 5, 13):  # the tiles are of 16
            continue
        group = (op, function, *map(str, parameters.values()))
        turn = groups.setdefault(group, len(groups)) % len(cases.DTYPES)
        if dtype is None or dtype == list(cases.DTYPES.values())[turn]:
            yield item
