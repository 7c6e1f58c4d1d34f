"""Labels as callers leave them: placeholders of images among them protect no image."""

from __future__ import annotations

import pytest
import torch

from itprune import PruneConfig, attach
from itprune.families import find_family
from tests.family_models import batch, build

ROWS = ((5, "image", 9), (3, "image", 4))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "smolvlm"])
@pytest.mark.parametrize("training", [True, False])
def test_a_wholly_supervised_text_prunes_as_if_images_were_not(name: str, training: bool) -> None:
    model = build(name).train(training)
    data = batch(name, model, ROWS)
    labels = data["input_ids"].masked_fill(data["attention_mask"] == 0, -100)
    visual = torch.isin(labels, torch.tensor(find_family(model).visual_token_ids))
    assert visual.any()
    with attach(model, PruneConfig(keep=0.4)) as attached:
        expected = model(**{**data, "labels": labels.masked_fill(visual, -100)}).loss
        wanted = attached.report
        found = model(**{**data, "labels": labels}).loss
        assert torch.equal(found, expected)
        assert attached.report.drops == wanted.drops
        assert sum(wanted.visual_stage1) < sum(wanted.visual_in)


def test_what_keeps_everything_leaves_labels_alone() -> None:
    """`keep: 1.0` is the dense model, its loss on image tokens included."""
    model = build("llava").train()
    data = batch("llava", model, ROWS)
    data["labels"] = data["input_ids"].masked_fill(data["attention_mask"] == 0, -100)
    dense = model(**data).loss
    with attach(model, PruneConfig(keep=1.0)):
        assert torch.equal(model(**data).loss, dense)
