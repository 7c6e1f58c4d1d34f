"""VTC-CLS, PruMerge, PruMerge+ and VisionZip from the outside, on a tower of 36 patches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from itprune.maths.patches import patch_attention, patch_keys
from itprune.methods import build_method
from itprune.methods.prumerge import PruMerge
from itprune.methods.prumerge_plus import even_grid, even_others
from itprune.methods.visionzip import VisionZip
from itprune.tokens import Block, Images, Kept
from tests.towers import host_of, images_of, method_of, tiny_tower

TOWER = tiny_tower()
PIXELS = torch.randn(5, 3, 24, 24, generator=torch.Generator().manual_seed(7))
PATCHES = 36

VARIANTS = [
    ("vtc_cls", {}),
    ("vtc_cls", {"start_block": 0}),
    ("prumerge", {}),
    ("prumerge", {"order": "raster", "normalise": True, "score": "attention", "neighbours": 5}),
    ("prumerge_plus", {}),
    ("prumerge_plus", {"order": "raster"}),
    ("prumerge_plus", {"branch": "fixed"}),
    ("prumerge_plus", {"branch": "fixed", "repeats": True, "order": "raster"}),
    ("visionzip", {"dominant": 8, "contextual": 4}),
    ("visionzip", {"dominant": 8, "contextual": 4, "cls_token": False, "order": "raster"}),
    ("visionzip", {"dominant": 8, "contextual": 4, "merge": "mean", "order": "raster"}),
]
each_variant = pytest.mark.parametrize(("name", "options"), VARIANTS)
each_keep = pytest.mark.parametrize("keep", [None, 0.3, 0.9])


def per_image(images: Images, kept: Kept) -> list[Tensor]:
    """What enters the language model, image by image."""
    held = images.features if kept.features is None else kept.features
    slots = images.slots.tolist()
    parts = zip(kept.keep.split(slots), held.split(slots), strict=True)
    return [rows[keep] for keep, rows in parts]


def answer(name: str, options: dict, keep: float | None, pixels: Tensor) -> list[Tensor]:
    images = images_of(TOWER, pixels)
    return per_image(images, method_of(TOWER, name, keep, **options)(images))


# ---------------------------------------------------------------------------- every method
@each_variant
@each_keep
def test_batch_agrees_with_its_rows_in_any_order(
    name: str, options: dict, keep: float | None
) -> None:
    together = answer(name, options, keep, PIXELS)
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = answer(name, options, keep, PIXELS[order])
    for row, pixels in enumerate(PIXELS):
        (alone,) = answer(name, options, keep, pixels[None])
        torch.testing.assert_close(together[row], alone)
        torch.testing.assert_close(shuffled[order.tolist().index(row)], alone)


@each_variant
@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5, 0.9, 0.999])
def test_uncalibrated_target_is_the_share_of_every_image(
    name: str, options: dict, keep: float
) -> None:
    for rows in answer(name, options, keep, PIXELS):
        assert len(rows) == round(keep * PATCHES)


@each_variant
def test_new_contents_are_differentiable(name: str, options: dict) -> None:
    images = images_of(TOWER, PIXELS)
    features = images.features.clone().requires_grad_()
    kept = method_of(TOWER, name, 0.3, **options)(replace(images, features=features))
    if name == "vtc_cls":
        assert kept.features is None
        return
    assert kept.features is not None
    kept.features[kept.keep].sum().backward()
    assert features.grad is not None
    assert int((features.grad.abs().sum(1) > 0).sum()) > int(kept.keep.sum())


@each_variant
def test_half_precision_features_stay_half(name: str, options: dict) -> None:
    images = images_of(TOWER, PIXELS)
    images = replace(images, features=images.features.bfloat16())
    kept = method_of(TOWER, name, 0.3, **options)(images)
    assert kept.features is None or kept.features.dtype == torch.bfloat16


@each_variant
def test_encoder_without_cls(name: str, options: dict) -> None:
    images = images_of(TOWER, PIXELS)

    def block(index: int) -> Block:
        seen = images.block(index)
        query, key = seen.query[:, :, 1:], seen.key[:, :, 1:]
        return Block(query, key, seen.scale, seen.hidden[:, 1:])

    headless = replace(images, has_cls=False, block=block)
    kept = method_of(TOWER, name, 0.3, **options)(headless)
    assert [len(rows) for rows in per_image(headless, kept)] == [11] * 5


@each_variant
@each_keep
def test_cls_among_the_visual_tokens(name: str, options: dict, keep: float | None) -> None:
    images = images_of(TOWER, PIXELS, cls_in_features=True)
    for image, rows in enumerate(
        per_image(images, method_of(TOWER, name, keep, **options)(images))
    ):
        cls = images.features[image * (PATCHES + 1)]
        wanted = options.get("cls_token", True)
        assert torch.equal(rows[0], cls) == wanted
        if keep is not None:
            assert len(rows) == round(keep * (PATCHES + 1))


@pytest.mark.parametrize("name", ["prumerge", "prumerge_plus", "visionzip"])
def test_encoder_that_pools_its_patches_is_refused(name: str) -> None:
    images = images_of(TOWER, PIXELS)
    pooled = replace(images, features=images.features[::4], lens=images.lens // 4)
    with pytest.raises(ValueError, match="36 patches became 9 tokens"):
        method_of(TOWER, name, 0.3)(pooled)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vtc_cls", {"start_block": 5}, r"prune\.start_block: must lie in 0\.\.4"),
        ("vtc_cls", {"tokens": 0}, r"prune\.tokens: must be at least 1"),
        ("prumerge", {"order": "random"}, r"prune\.order: unknown value"),
        ("prumerge", {"score": "cosine"}, r"prune\.score: unknown value"),
        ("prumerge", {"neighbours": -1}, r"prune\.neighbours: must not be negative"),
        ("prumerge", {"branch": "fixed"}, r"unknown option 'branch'"),
        ("prumerge_plus", {"branch": "static"}, r"prune\.branch: unknown value"),
        ("prumerge_plus", {"repeats": True}, r"prune\.repeats: only the fixed branch"),
        ("visionzip", {"dominant": 0}, r"prune\.dominant and prune\.contextual"),
        ("visionzip", {"dominant": 10**30}, r"prune\.dominant: must be int"),
        ("visionzip", {"merge": "sum"}, r"prune\.merge: unknown value"),
        ("visionzip", {"order": "rank"}, r"prune\.order: unknown value"),
    ],
)
def test_options_are_checked(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build_method(name, options, host_of(TOWER))
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------- VTC-CLS
def test_vtc_cls_keeps_the_highest_sum_where_it_stands() -> None:
    images = images_of(TOWER, PIXELS)
    method = method_of(TOWER, "vtc_cls", 0.25)
    assert method.vision_blocks() == (4,)
    method = method_of(TOWER, "vtc_cls", 0.25, start_block=2)
    assert method.vision_blocks() == (2, 3, 4)
    total = sum(patch_attention(images, block) for block in (2, 3, 4))
    assert isinstance(total, Tensor)
    for scores, keep in zip(total, method(images).keep.view(5, PATCHES), strict=True):
        assert set(keep.nonzero()[:, 0].tolist()) == set(scores.topk(9).indices.tolist())


def test_vtc_cls_without_a_target_keeps_its_published_number() -> None:
    images = images_of(TOWER, PIXELS)
    assert bool(method_of(TOWER, "vtc_cls")(images).keep.all())
    assert int(method_of(TOWER, "vtc_cls", tokens=5)(images).keep.sum()) == 25


# ---------------------------------------------------------------------------- PruMerge
def merged_by_loop(
    content: Tensor, score: Tensor, key: Tensor, chosen: list[int], neighbours: int
) -> Iterator[Tensor]:
    """The published arithmetic, patch by patch; the last one is the token of the rest."""
    for patch in chosen:
        alike = F.cosine_similarity(key, key[patch, None])
        others = [p for p in alike.argsort(descending=True).tolist() if p != patch]
        yield content[patch] + sum(score[p] * content[p] for p in others[:neighbours])
    yield sum(score[p] * content[p] for p in range(len(score)) if p not in chosen)  # type: ignore[misc]


def outliers_by_hand(score: Tensor) -> list[int]:
    low, high = score.quantile(0.25), score.quantile(0.75)
    count = max(1, int((score > high + 1.5 * (high - low)).sum()))
    return score.argsort(descending=True)[:count].tolist()


@pytest.mark.parametrize("neighbours", [0, 3, 32, 100])
def test_prumerge_agrees_with_a_loop(neighbours: int) -> None:
    images = images_of(TOWER, PIXELS)
    score = patch_attention(images, 5, "full_width")
    key = patch_keys(images, 5).transpose(1, 2).flatten(2)
    content = images.features.view(5, PATCHES, -1)
    found = answer("prumerge", {"neighbours": neighbours}, None, PIXELS)
    assert len({len(rows) for rows in found}) > 1  # the counts are ragged
    for image in range(5):
        chosen = outliers_by_hand(score[image])
        expected = merged_by_loop(content[image], score[image], key[image], chosen, neighbours)
        torch.testing.assert_close(found[image], torch.stack(list(expected)))


def test_prumerge_in_raster_order_uses_own_slots() -> None:
    images = images_of(TOWER, PIXELS)
    ranked = answer("prumerge", {}, 0.3, PIXELS)
    method = method_of(TOWER, "prumerge", 0.3, order="raster")
    kept = method(images)
    assert isinstance(method, PruMerge)
    top, _ = method.choose(patch_attention(images, 5, "full_width"), images.lens)
    for image, keep in enumerate(kept.keep.view(5, PATCHES)):
        extra = int((~top[image]).nonzero().max())
        expected = top[image].clone()
        expected[extra] = True
        assert torch.equal(keep, expected)
        rows = per_image(images, kept)[image]
        torch.testing.assert_close(rows[-1], ranked[image][-1])
        torch.testing.assert_close(rows.sum(0), ranked[image].sum(0))


def test_normalised_weights_are_means() -> None:
    images = images_of(TOWER, PIXELS)
    images = replace(images, features=torch.ones_like(images.features))
    kept = method_of(TOWER, "prumerge", 0.3, normalise=True)(images)
    assert kept.features is not None
    torch.testing.assert_close(kept.features[kept.keep], torch.ones(55, 32))


def with_attention(images: Images, score: Tensor) -> Images:
    """The same images, CLS attending by `score` (P,) > 0 in every block."""
    width = 32
    query, key = torch.zeros(5, 1, PATCHES + 1, width), torch.zeros(5, 1, PATCHES + 1, width)
    query[:, :, 0, 0] = 1.0
    key[:, :, 1:, 0] = score.log() * width**0.5
    block = Block(query, key, width**-0.5, torch.zeros(5, PATCHES + 1, width))
    return replace(images, block=lambda _: block)


@pytest.mark.parametrize("name", ["prumerge", "prumerge_plus"])
@pytest.mark.filterwarnings("ignore:a score curve is constant")
def test_constant_attention_keeps_every_patch(name: str) -> None:
    images = with_attention(images_of(TOWER, PIXELS), torch.ones(PATCHES))
    kept = method_of(TOWER, name)(images)
    assert bool(kept.keep.all())
    assert bool((kept.features.abs().sum(1) > 0).all())


@pytest.mark.parametrize("name", ["prumerge", "prumerge_plus"])
@pytest.mark.parametrize("keep", [None, 0.01, 0.999])
@pytest.mark.filterwarnings("ignore:a score curve is constant")
def test_a_single_patch_stays_as_it_is(name: str, keep: float | None) -> None:
    built = method_of(TOWER, name, keep)
    top, besides = built.choose(torch.full((2, 1), 0.3), torch.ones(2, dtype=torch.long))
    assert bool(top.all())
    assert not bool(besides.any())


@pytest.mark.parametrize(("name", "tokens"), [("prumerge", 2), ("prumerge_plus", 4)])
def test_no_outlier_counts_as_one(name: str, tokens: int) -> None:
    """PruMerge+: the step is 36 / 3 = 12; patch 0 is the best one and on the grid 0, 12, 24."""
    images = with_attention(images_of(TOWER, PIXELS), torch.arange(PATCHES, 0, -1).float())
    assert int(method_of(TOWER, name)(images).keep.sum()) == 5 * tokens


def test_many_outliers_leave_no_room_for_a_grid() -> None:
    """8 outliers of 36: 36 / 8 / 3 is 1."""
    score = torch.ones(PATCHES) + torch.arange(PATCHES) * 1e-3
    score[4:12] = 50.0
    images = with_attention(images_of(TOWER, PIXELS), score)
    assert bool(method_of(TOWER, "prumerge_plus")(images).keep.all())


# ---------------------------------------------------------------------------- calibration
class Rerun:
    """A calibration run over the test's images."""

    def __init__(self, method: PruMerge) -> None:
        self.method = method

    def run(self) -> None:
        self.method(images_of(TOWER, PIXELS))

    def fidelity(self) -> float:
        raise AssertionError("PruMerge asks for no fidelity")


@pytest.mark.parametrize("name", ["prumerge", "prumerge_plus"])
def test_calibrated_target_holds_on_average_and_follows_the_rule(name: str) -> None:
    method = method_of(TOWER, name, 0.4)
    assert isinstance(method, PruMerge)
    assert method.calibrates
    method.use(method.calibrate(Rerun(method)))
    images = images_of(TOWER, PIXELS)
    counts = [len(rows) for rows in per_image(images, method(images))]
    by_rule = [len(rows) for rows in answer(name, {}, None, PIXELS)]
    assert len(set(counts)) > 1
    assert counts.index(max(counts)) in [i for i, n in enumerate(by_rule) if n == max(by_rule)]
    assert abs(sum(counts) / (5 * PATCHES) - 0.4) < 0.02


def test_fixed_branch_has_nothing_to_calibrate() -> None:
    method = method_of(TOWER, "prumerge_plus", 0.4, branch="fixed")
    assert not method.calibrates
    with pytest.raises(ValueError, match="nothing to calibrate"):
        method.calibrate(Rerun(method))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------- PruMerge+
def test_fixed_grid_is_the_published_one() -> None:
    none = torch.zeros(2, 576, dtype=torch.bool)
    grid = even_grid(torch.tensor([72, 5]), none)
    assert grid[0].nonzero()[:, 0].tolist() == list(range(4, 576, 8))
    assert grid[1].nonzero()[:, 0].tolist() == [(2 * i + 1) * 576 // 10 for i in range(5)]


def test_even_others_avoids_what_is_chosen() -> None:
    top = torch.rand(4, PATCHES, generator=torch.Generator().manual_seed(0)) < 0.4
    count = torch.minimum((~top).sum(1), torch.tensor([0, 1, 7, 99]))
    others = even_others(count, top)
    assert torch.equal(others.sum(1), count)
    assert not bool((others & top).any())


def test_repeats_are_two_equal_tokens() -> None:
    """A repeated patch takes itself in once: its copy is a candidate, and the nearest one."""
    options = {"branch": "fixed", "repeats": True}
    repeated = [
        len(rows) - len(rows.unique(dim=0))
        for rows in answer("prumerge_plus", options, 0.7, PIXELS)
    ]
    assert sum(repeated) > 0
    distinct = answer("prumerge_plus", {"branch": "fixed"}, 0.7, PIXELS)
    assert all(len(rows) == len(rows.unique(dim=0)) for rows in distinct)


# ---------------------------------------------------------------------------- VisionZip
def zipped(**options: object) -> tuple[Images, list[Tensor], list[int]]:
    images = images_of(TOWER, PIXELS)
    method = method_of(TOWER, "visionzip", dominant=6, contextual=3, **options)
    best = patch_attention(images, 4)[0].argsort(descending=True).tolist()
    return images, per_image(images, method(images)), best


def test_visionzip_dominant_tokens_come_first_unchanged() -> None:
    images, rows, best = zipped()
    assert torch.equal(rows[0][0], images.block(4).hidden[0, 0])
    assert torch.equal(rows[0][1:6], images.features[sorted(best[:5])])
    _, rows, best = zipped(cls_token=False)
    assert torch.equal(rows[0][:6], images.features[sorted(best[:6])])


@pytest.mark.parametrize("merge", ["add", "mean"])
def test_visionzip_contextual_tokens_agree_with_a_loop(merge: str) -> None:
    images, rows, best = zipped(merge=merge)
    left = sorted(best[5:])
    targets = left[:: len(left) // 3][:3]
    key = patch_keys(images, 4).mean(1)[0]
    members: dict[int, list[Tensor]] = {target: [] for target in targets}
    for patch in set(left) - set(targets):
        alike = F.cosine_similarity(key[targets], key[patch, None])
        members[targets[int(alike.argmax())]].append(images.features[patch])
    for row, (target, joined) in zip(rows[0][6:], members.items(), strict=True):
        own = images.features[target]
        if merge == "mean":
            expected = torch.stack([own, *joined]).mean(0)
        else:
            expected = own + (torch.stack(joined).mean(0) if joined else 0)
        torch.testing.assert_close(row, expected)


def test_visionzip_in_raster_order_uses_own_slots() -> None:
    images = images_of(TOWER, PIXELS)
    options = {"dominant": 6, "contextual": 3, "order": "raster"}
    kept = method_of(TOWER, "visionzip", cls_token=False, **options)(images)
    assert kept.features is not None
    best = patch_attention(images, 4)[0].argsort(descending=True)[:6]
    assert bool(kept.keep[best].all())
    assert torch.equal(kept.features[best], images.features[best])
    with_cls = per_image(images, method_of(TOWER, "visionzip", **options)(images))
    assert torch.equal(with_cls[0][0], images.block(4).hidden[0, 0])


@pytest.mark.parametrize(
    ("total", "contextual"), [(64, 10), (128, 20), (192, 30), (1, 0), (576, 90)]
)
def test_visionzip_shares_a_target_as_published(total: int, contextual: int) -> None:
    method = method_of(TOWER, "visionzip", total / 576)
    assert isinstance(method, VisionZip)
    assert method.counts(576, 576) == (total - contextual, contextual)


@pytest.mark.parametrize("options", [{"contextual": 0}, {"dominant": 500}])
def test_visionzip_without_contextual_tokens(options: dict) -> None:
    """No target: what is not dominant is dropped."""
    images = images_of(TOWER, PIXELS)
    kept = method_of(TOWER, "visionzip", 0.25, **options)(images)
    assert int(kept.keep.sum()) == 5 * 9
