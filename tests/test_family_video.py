"""Videos in every family that has them: budgets of frames and of clips, clips of one frame, clips
beside images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from itprune import PruneConfig
from tests.family_configs import IMAGE, VIDEO
from tests.family_models import CLIPS, VIDEO_FAMILIES, batch, build, prompts
from tests.family_oracle import (
    attached,
    hashed,
    masked_text,
    rounding,
    text_calls,
    visual_counts,
)
from tests.oracle import drops_of, recorded_rows

ROWS = ((5, "video", 6), (2, "image", 3, "video", 4, "video", 6), (7,))
METHODS = ["itprune", "topk_cls", "vtc_cls", "fastv", "pyramiddrop", "random", "uniform"]
METHODS += ["downsample", "divprune", "cdpruner"]
video_family = pytest.mark.parametrize("name", VIDEO_FAMILIES)


def kept_by_frame(name: str, config: PruneConfig, seed: int) -> tuple[list[int], int]:
    """Tokens that each frame of a clip keeps, and how many a frame has."""
    with attached(name, config) as (model, _), torch.no_grad():
        data = prompts(batch(name, model, ((5, "video", 6),), seed=seed))
        with recorded_rows(model) as rows:
            model(**data)
    place = (data["input_ids"][0] == VIDEO).nonzero()[:, 0]
    alive = torch.isin(place, rows["rows"][0].token)
    each = len(place) // CLIPS["video"]
    frames = alive[: each * CLIPS["video"]].view(CLIPS["video"], each)  # behind them a newline
    return frames.sum(1).tolist(), each


@video_family
def test_every_frame_has_its_budget(name: str) -> None:
    for seed in range(3):
        kept, each = kept_by_frame(name, PruneConfig("topk_cls", keep=0.5), seed)
        assert len(set(kept)) == 1
        assert abs(kept[0] - each / 2) <= 0.5


@video_family
def test_a_clip_shares_its_budget(name: str) -> None:
    """The total is that of the clip; which frame it goes to is up to the scores."""
    found = []
    for seed in range(3):
        kept, each = kept_by_frame(name, PruneConfig("topk_cls", keep=0.5, video="clip"), seed)
        assert abs(sum(kept) - each * len(kept) / 2) <= 0.5
        found.append(kept)
    assert any(len(set(kept)) > 1 for kept in found)


@video_family
@pytest.mark.parametrize("budget", ["frame", "clip"])
@pytest.mark.parametrize("method", METHODS)
def test_clips_beside_images_lose_what_is_dropped(name: str, method: str, budget: str) -> None:
    """Both kinds of visual tokens are pruned, and dropping is masking."""
    config = PruneConfig(method, keep=0.4, positions="original", video=budget)
    with attached(name, config) as (model, pruner), torch.no_grad():
        data = prompts(batch(name, model, ROWS, "left"))
        with recorded_rows(model) as rows, text_calls(model) as calls:
            model(**data, use_cache=False)
        report, (kwargs, found) = pruner.report, calls[-1]
    assert report.visual_in == visual_counts(data)
    last = rows["rows"][-1].token
    alive = torch.zeros(data["input_ids"].numel(), dtype=torch.bool)
    alive[last] = True
    alive = alive.view_as(data["input_ids"])
    for runs in _shown(data["input_ids"]):
        assert 0 < int(alive[runs].sum()) < int(runs.sum())
    expected = masked_text(build(name), kwargs, drops_of(rows))
    assert (found - expected).flatten(0, 1)[last].abs().max() < rounding(expected)


def _shown(ids: Tensor) -> list[Tensor]:
    """(B, S) bool for the images, and for the clips, of each row."""
    kinds = torch.stack([ids == IMAGE, ids == VIDEO])
    rows = torch.eye(len(ids), dtype=torch.bool)[:, :, None]
    each = (kinds[:, None] & rows).flatten(0, 1)
    return [where for where in each if where.any()]


@video_family
@pytest.mark.parametrize("budget", ["frame", "clip"])
def test_a_video_may_have_one_frame(name: str, budget: str) -> None:
    with attached(name, PruneConfig(keep=0.4, video=budget), train=True) as (model, pruner):
        data = batch(name, model, ((5, "frame", 6, "answer"), (2, "frame", 3, "answer")))
        loss = model(**data).loss
        loss.backward()
        assert loss.isfinite()
        report = pruner.report
        assert all(
            0 < kept < n for kept, n in zip(report.visual_stage1, report.visual_in, strict=True)
        )
        out = model.eval().generate(**prompts(data), max_new_tokens=2, do_sample=False)
    assert out.shape[1] == data["input_ids"].shape[1] + 2


@video_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_with_clips_is_its_rows(name: str, side: str) -> None:
    config = PruneConfig("itprune", keep=0.4, video="clip")
    with attached(name, config) as (model, pruner), torch.no_grad():
        rows = tuple((*row, "answer") for row in ROWS)
        data = batch(name, model, rows, side)
        together, entries = model(**data).logits, pruner.report.kv_entries
        for index in range(len(rows)):
            one = batch(name, model, rows, side, order=(index,))
            alone = model(**one).logits[0]
            length = len(alone)
            place = slice(-length, None) if side == "left" else slice(0, length)
            spoken = one["labels"][0] != -100
            apart = (together[index, place][spoken] - alone[spoken]).abs().max()
            assert apart < 2 * rounding(together)  # rotary phases differ, too
            if visual_counts(one)[0]:
                assert pruner.report.kv_entries == [entries[index]]


@video_family
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.7])
def test_frames_are_made_smaller_one_by_one(name: str, keep: float) -> None:
    """No token of a smaller clip is made of two frames, and none is made larger again."""
    found = []
    for budget in ("frame", "clip"):
        config = PruneConfig("downsample", keep=keep, video=budget)
        with attached(name, config) as (model, _), torch.no_grad():
            found.append(model(**prompts(batch(name, model, ROWS))).logits)
    assert torch.equal(*found)


@video_family
def test_stages_differ_in_nothing_else(name: str) -> None:
    """A choice that looks at nothing keeps the same with both budgets where no budget is asked."""
    found = []
    for budget in ("frame", "clip"):
        with attached(name, hashed("stage2", video=budget)) as (model, _), torch.no_grad():
            data = prompts(batch(name, model, ROWS))
            found.append(model(**data).logits)
    assert torch.equal(*found)
