"""VTC-CLS, PruMerge, PruMerge+ and VisionZip on the 24-block tower."""

from __future__ import annotations

import torch
from torch import Tensor

from itprune.maths.patches import ranked
from itprune.methods.vtc_cls import VtcCls
from tests.golden import Golden, case
from tests.towers import images_of, method_of

Data = dict[str, Tensor]
LENGTH = 576


def _tokens(data: Data, golden: Golden, name: str, **options: object) -> Tensor:
    """The new tokens in the order of their slots."""
    images = images_of(golden.clip, data["pixel_values"])
    kept = method_of(golden.clip, name, **options)(images)
    assert kept.features is not None
    return kept.features[kept.keep]


@case("vision", "features")
def features(data: Data, golden: Golden) -> Tensor:
    return images_of(golden.clip, data["pixel_values"]).features


@case("vision", "cls_attention_block22_headmean")
def salience(data: Data, golden: Golden) -> Tensor:
    return images_of(golden.clip, data["pixel_values"]).salience("attention")


@case("vision", "vtc_cls.scores")
def vtc_cls_scores(data: Data, golden: Golden) -> Tensor:
    method = method_of(golden.clip, "vtc_cls")
    assert isinstance(method, VtcCls)
    assert method.start == 16
    images = images_of(golden.clip, data["pixel_values"])
    return method.score(images)[: int(images.lens[0])]


def _vtc_cls(data: Data, golden: Golden, tokens: int) -> Tensor:
    images = images_of(golden.clip, data["pixel_values"])
    by_number = method_of(golden.clip, "vtc_cls", tokens=tokens)(images).keep
    by_share = method_of(golden.clip, "vtc_cls", keep=tokens / LENGTH)(images).keep
    assert torch.equal(by_number, by_share)
    return by_share.nonzero()[:, 0]


@case("vision", "vtc_cls.indices_64")
def vtc_cls_64(data: Data, golden: Golden) -> Tensor:
    return _vtc_cls(data, golden, 64)


@case("vision", "vtc_cls.indices_128")
def vtc_cls_128(data: Data, golden: Golden) -> Tensor:
    return _vtc_cls(data, golden, 128)


@case("vision", "prumerge.tokens")
def prumerge(data: Data, golden: Golden) -> Tensor:
    return _tokens(data, golden, "prumerge")


@case("vision", "prumerge_plus.tokens")
def prumerge_plus(data: Data, golden: Golden) -> Tensor:
    return _tokens(data, golden, "prumerge_plus")


@case("vision", "prumerge_plus_train.tokens")
def prumerge_plus_train(data: Data, golden: Golden) -> Tensor:
    return _tokens(data, golden, "prumerge_plus", branch="fixed", repeats=True)


@case("vision", "visionzip.tokens_54_10")
def visionzip_64(data: Data, golden: Golden) -> Tensor:
    return _tokens(data, golden, "visionzip")


@case("vision", "visionzip.tokens_108_20")
def visionzip_128(data: Data, golden: Golden) -> Tensor:
    return _tokens(data, golden, "visionzip", keep=128 / LENGTH)


def _dominant(data: Data, golden: Golden, count: int) -> Tensor:
    """Places in the encoder's sequence, CLS first, then by attention."""
    score = images_of(golden.clip, data["pixel_values"]).salience("attention")[None]
    return torch.cat([torch.zeros(1, dtype=torch.long), ranked(score, count - 1)[0] + 1])


@case("vision", "visionzip.kept_54_10")
def visionzip_dominant_54(data: Data, golden: Golden) -> Tensor:
    return _dominant(data, golden, 54)


@case("vision", "visionzip.kept_108_20")
def visionzip_dominant_108(data: Data, golden: Golden) -> Tensor:
    return _dominant(data, golden, 108)
