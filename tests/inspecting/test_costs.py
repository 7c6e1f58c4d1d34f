"""The formula of FLOPs against torch's counter."""

from __future__ import annotations

import pytest
import torch

from itprune import load_pretrained
from itprune.bench.counting import measure_flops
from itprune.families import find_family
from itprune.inspecting.costs import LayerCost, layer_costs, mean_flops
from tests.inspecting.conftest import MODEL


@pytest.mark.parametrize("tokens", [7, 160])
def test_the_formula_is_what_is_counted(tokens: int) -> None:
    family = find_family(load_pretrained(MODEL, device="cpu").model)
    costs = layer_costs(family)
    width = family.text_model.config.hidden_size
    hidden = torch.zeros(1, tokens, width)
    with torch.no_grad():
        counted = measure_flops(lambda: family.text_model(inputs_embeds=hidden, use_cache=False))
    # What is counted beside the layers are the rotary tables.
    assert sum(cost.flops(tokens) for cost in costs) == pytest.approx(counted.seen, rel=1e-3)
    assert len(costs) == family.host.depth


def test_means_are_over_prompts() -> None:
    costs = [LayerCost(100, 4), LayerCost(10, 4)]
    assert mean_flops(costs, [[3, 2], [5, 2]]) == [
        (2 * 3 * 100 + 8 * 3 * 4 + 2 * 5 * 100 + 8 * 5 * 6) / 2,
        2 * 2 * 10 + 8 * 2 * 3,
    ]
