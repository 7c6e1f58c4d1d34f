"""A picture that stands several times in a call goes through the tower once, and nothing behind it
can tell."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from itprune import PruneConfig, attach
from itprune.engine.repeats import Repeats
from itprune.families import find_family
from tests.family_models import NAMES, batch, build
from tests.family_oracle import PROMPT, rounding

PACKED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Their towers take the patches of all pictures in one sequence."""
CONFIGS = (
    PruneConfig(keep=1.0),
    PruneConfig(keep=0.5),
    PruneConfig("random", keep=0.5),
    PruneConfig("topk_cls", keep=0.5),
    PruneConfig("prumerge", keep=0.5),
    PruneConfig("downsample", keep=0.5),
    PruneConfig("quecc", keep=0.5),
)
ONE = ("image", 4, "answer")
ROWS = (ONE, ("image", 3, "image", 5, "answer"), (6, "answer"), ("image", 2, "answer"))
ORDER = (0, 1, 0, 2, 3, 1, 0)


@contextmanager
def tower_rows(model: nn.Module) -> Iterator[list[int]]:
    """Rows of each call of the tower's first block."""
    rows: list[int] = []

    def count(module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, object]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        rows.append(len(hidden))

    block = find_family(model).blocks[0]
    handle = block.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.method}-{c.keep}")
@pytest.mark.parametrize("name", NAMES)
def test_what_comes_out_is_the_same(name: str, config: PruneConfig) -> None:
    model = build(name).eval()
    data = batch(name, model, ROWS, order=ORDER)
    try:
        attached = attach(model, config, prompt=PROMPT)
    except ValueError as refusal:
        pytest.skip(f"not for this family: {refusal}")
    with attached, tower_rows(model) as rows:
        with attached.tracing() as apart:
            expected = model(**data)
        every = rows.pop()
        with torch.no_grad(), attached.tracing() as shared:
            found = model(**data)
        apart_by = (found.logits - expected.logits).abs().max()
        assert apart_by <= rounding(expected.logits)
        if config.keep != 1.0:
            assert torch.equal(shared.keep, apart.keep)
        assert rows == [every if name in PACKED else every // len(data_pictures()) * 4]


def data_pictures() -> list[int]:
    """Which picture stands at each place of the batch: four different ones at eight places."""
    of_row = {0: [0], 1: [1, 2], 2: [], 3: [3]}
    return [picture for row in ORDER for picture in of_row[row]]


def test_gradients_see_every_row() -> None:
    """While learning nothing is shared."""
    model = build("llava").train()
    data = batch("llava", model, ROWS, order=ORDER)
    with attach(model, PruneConfig(keep=0.5), prompt=PROMPT), tower_rows(model) as rows:
        model(**data).loss.backward()
    assert rows == [8]


def test_rows_are_compared_number_by_number() -> None:
    """Equal sums are not enough, nor are equal pixels beside other arguments."""
    pixels = torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0]]).view(3, 1, 1, 2)
    mask = torch.tensor([[True, False], [True, True], [True, True]])
    with torch.no_grad():
        found = Repeats.among(pixels, [pixels])
        assert found is not None
        assert found.first.tolist() == [0, 1]
        assert found.rows.tolist() == [0, 1, 0]
        assert Repeats.among(pixels, [pixels, mask]) is None
        assert Repeats.among(pixels[:, 0], [pixels[:, 0]]) is None
        assert Repeats.among(pixels * torch.nan, [pixels * torch.nan]) is None
        assert Repeats.among(pixels, [pixels, torch.ones(2)]) is None
    assert Repeats.among(pixels, [pixels]) is None
