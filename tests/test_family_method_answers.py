"""Every method generates in every family: the cache holds what the report says, and the answer
starts from the logits of a forward."""

from __future__ import annotations

import pytest
import torch

from itprune import PruneConfig
from tests.family_configs import IMAGE, VIDEO
from tests.family_models import DEPTH, NAMES, VIDEO_FAMILIES, batch, prompts
from tests.family_oracle import attached, rounding
from tests.test_family_methods import METHODS, WORKS, config

CASES = [*WORKS, *(("llava", method) for method in METHODS)]
ROWS = ((5, "image", 9), (3, "image", 2, "wide", 4), (6,))
CLIPS = ((5, "video", 9), (6,))
STEPS = 2


def generate(model: torch.nn.Module, data: dict[str, torch.Tensor]):
    return model.generate(
        **data,
        max_new_tokens=STEPS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        suppress_tokens=[IMAGE, VIDEO],
    )


@pytest.mark.parametrize(("name", "method"), CASES)
def test_every_method_answers(name: str, method: str) -> None:
    rows = CLIPS if name in VIDEO_FAMILIES else ROWS
    with attached(name, config(name, method)) as (model, pruner), torch.no_grad():
        data = prompts(batch(name, model, rows, "left"))
        first = model(**data, use_cache=False).logits[:, -1]
        kept = pruner.report.kv_entries
        out = generate(model, data)
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


@pytest.mark.parametrize("name", NAMES)
def test_dense_changes_nothing(name: str) -> None:
    """The control: the bare model, bit for bit."""
    with attached(name, PruneConfig("dense", keep=None)) as (model, pruner), torch.no_grad():
        data = prompts(batch(name, model, ROWS, "left"))
        found = generate(model, data)
        pruner.detach()
        expected = generate(model, data)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits, strict=True))
