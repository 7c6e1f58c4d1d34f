"""Which methods ZeRO-3 takes beside batches of text, told without a launcher."""

from __future__ import annotations

import pytest
import torch

from itprune import PruneConfig, attach
from tests.models import tiny_llava
from train.blank import BlankImage, check_ranks

TEXT = torch.tensor([[1, 5, 6, 7]])


def test_routers_that_decide_are_refused_alone_and_combined() -> None:
    for method, options in (
        ("dyvte", {"hidden": 8}),
        ("visionzip+dyvte", {"dyvte": {"hidden": 8}}),
    ):
        with (
            attach(tiny_llava(), PruneConfig(method, None, options=options)) as attached,
            pytest.raises(ValueError, match="decide inside the language model which of them run"),
        ):
            check_ranks(attached.method)


@pytest.mark.parametrize(
    ("method", "keep", "options"),
    [
        ("dyvte", None, {"exit_layer": 2}),
        ("quecc", 0.25, {}),
        ("quecc+pyramiddrop", None, {}),
        ("itprune", 0.4, {}),
    ],
)
def test_trained_parts_before_the_language_model_are_not(
    method: str, keep: float | None, options: dict[str, object]
) -> None:
    with attach(tiny_llava(), PruneConfig(method, keep, options=options)) as attached:
        check_ranks(attached.method)


def test_text_under_a_method_that_looks_ahead_is_refused() -> None:
    model = tiny_llava().train()
    with attach(model, PruneConfig("pyramiddrop", 0.5)) as attached:
        BlankImage(model, training=False, alike=attached.method)
        with pytest.raises(ValueError, match="leave text-only samples out"):
            model(input_ids=TEXT)
        attached.set_keep(1.0)  # nothing is scored, nothing is run ahead
        model(input_ids=TEXT)
