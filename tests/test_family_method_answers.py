"""Every method generates in every family: the cache holds what the report says, and the answer
starts from the logits of a forward."""

from __future__ import annotations

import pytest
import torch

from tests.family_configs import IMAGE, VIDEO
from tests.family_models import DEPTH, VIDEO_FAMILIES, batch, prompts
from tests.family_oracle import attached, rounding
from tests.test_family_methods import METHODS, WORKS, config

CASES = [*WORKS, *(("llava", method) for method in METHODS)]
ROWS = ((5, "image", 9), (3, "image", 2, "wide", 4), (6,))
CLIPS = ((5, "video", 9), (6,))
STEPS = 2


@pytest.mark.parametrize(("name", "method"), CASES)
def test_every_method_answers(name: str, method: str) -> None:
    rows = CLIPS if name in VIDEO_FAMILIES else ROWS
    with attached(name, config(name, method)) as (model, pruner), torch.no_grad():
        data = prompts(batch(name, model, rows, "left"))
        first = model(**data, use_cache=False).logits[:, -1]
        kept = pruner.report.kv_entries
        out = model.generate(
            **data,
            max_new_tokens=STEPS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            suppress_tokens=[IMAGE, VIDEO],
        )
        report = pruner.report
    assert (out.logits[0] - first).abs().max() < 10 * rounding(first)
    assert report.kv_entries == kept
    assert sum(kept) < DEPTH * sum(report.tokens_in)
    stored = 0
    for index, layer in enumerate(out.past_key_values.layers):
        start = max(start for start in report.drops if start <= index)
        if report.drops[start] != report.tokens_in:  # else the host's own layer
            assert (layer.entries() - (STEPS - 1)).tolist() == report.drops[start]
            stored += 1
    assert stored
