"""The model called without its head, as trainers with a loss of their own do."""

from __future__ import annotations

import pytest
import torch

from itprune import PromptFormat, PruneConfig, attach
from tests.family_models import NAMES, batch, build, prompts
from tests.family_oracle import rows_of
from tests.models import ASSISTANT

PROMPT = PromptFormat((0, 1, 2, *ASSISTANT), ASSISTANT)


@pytest.mark.parametrize("name", NAMES)
def test_the_model_without_its_head_is_pruned_alike(name: str) -> None:
    model = build(name)
    data = prompts(batch(name, model, rows_of(name)))
    with attach(model, PruneConfig(keep=0.4), prompt=PROMPT) as pruner, torch.no_grad():
        seen: list[torch.Tensor] = []
        handle = model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(**data)
        handle.remove()
        report = pruner.report
        assert report is not None
        hidden = model.base_model(**data).last_hidden_state
        assert pruner.report is not report
        assert pruner.report.drops == report.drops
        assert torch.equal(hidden, seen[0])
        assert pruner._engine._request is None


def test_text_stays_where_nobody_says_what_is_learnt() -> None:
    model = build("llava").train()
    data = prompts(batch("llava", model, ((3, "image", 40),)))
    options = {"stage2": {"min_text": 1}}
    with attach(model, PruneConfig(keep=0.3, options=options)) as pruner:
        model.base_model(**data)
        text = pruner.report.valid - pruner.report.visual
        for segment in pruner.report.segments:
            assert torch.equal(segment.tokens - segment.visual, text)
        model.eval().base_model(**data)
        last = pruner.report.segments[-1]
        assert int(last.tokens - last.visual) < int(text)
