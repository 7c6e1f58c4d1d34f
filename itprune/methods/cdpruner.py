"""`cdpruner`: diverse tokens that bear on the question (after CDPruner, arXiv 2506.10967).

Greedy inference in a determinantal point process whose kernel is the tokens' cosine similarity,
weighted on both sides by their relevance to the question. The published relevance is *minus* the
mean cosine to the question's pieces in CLIP's joint space, stretched to 0..1 over the whole batch.
Such models carry neither CLIP's text tower nor its projections, so ours is the cosine to the
question's mean embedding in the LLM's input space, with a positive sign, stretched over each image
(`normalise: batch` is the published habit, which lets one sample change another's choice).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from itprune.maths.diversity import determinant_points, relevance_quality
from itprune.methods import register_method
from itprune.methods.base import Card, Host, Method
from itprune.methods.fixed import fixed_count
from itprune.options import check_choice
from itprune.tokens import Images, Kept

METRICS = ("projected", "features")
RELEVANCES = ("llm", "none")
SCOPES = ("image", "batch")
PUBLISHED_KEEP = 64 / 576
"""One of the published budgets."""


@dataclass(frozen=True)
class CDPrunerOptions:
    """Options of `cdpruner`."""

    relevance: str = "llm"
    """llm: cosine of the projected token and the question's mean input embedding; none: diversity
    alone, without the question."""
    normalise: str = "image"
    """Range the relevance is stretched over: image, or batch as published."""
    metric: str = "projected"
    """What similarity is measured on: projected, as published, or features."""

    def __post_init__(self) -> None:
        check_choice("prune.relevance", self.relevance, RELEVANCES)
        check_choice("prune.normalise", self.normalise, SCOPES)
        check_choice("prune.metric", self.metric, METRICS)


@register_method("cdpruner")
class CDPruner(Method):
    """Keeps tokens that are relevant and unlike each other."""

    Options = CDPrunerOptions
    card = Card(
        "determinantal diversity, weighted by relevance to the question",
        paper="2506.10967",
        needs=("question",),
        notes="The kernel and the selection are the published ones. The relevance is not: without "
        "CLIP's text tower it is the cosine of projected tokens and the question's mean embedding, "
        "with a positive sign (published: minus the mean cosine in CLIP's joint space).",
    )
    places = ("before_llm",)
    positions = "contiguous"
    needs_question = True

    def __init__(self, options: CDPrunerOptions, host: Host) -> None:
        super().__init__(options, host)
        self.needs_question = options.relevance == "llm"

    @torch.no_grad()
    def before_llm(self, images: Images) -> Kept:
        options = self.options
        count = fixed_count(PUBLISHED_KEEP if self.keep is None else self.keep, images.lens)
        asks, same = options.relevance == "llm", options.metric == "projected"
        projected = images.projected() if asks or same else images.features
        quality = None
        if asks:
            relevance = question_cosine(projected, images)
            quality = stretched(relevance, images.image, options.normalise)
        features = projected if same else images.features
        return Kept(determinant_points(features, images.lens, count, quality))


def question_cosine(projected: Tensor, images: Images) -> Tensor:
    """Cosine of each token and the mean embedding of its image's question.

    Args:
        projected: (V, W) the images' tokens in the LLM's input space.
        images: where `instruction` gives the embeddings.

    Returns:
        (V,) float32; zero where an image has no question.
    """
    words, image = images.instruction()
    mean = torch.zeros(len(images.lens), words.shape[1], device=words.device)
    mean = mean.index_add(0, image, words.float())
    return F.cosine_similarity(projected.float(), mean[images.image], dim=-1)


def stretched(relevance: Tensor, image: Tensor, scope: str) -> Tensor:
    """(V,) relevance of tokens of ascending images -> (V,) quality, over each image or the batch.

    `scope` is one of `SCOPES`.
    """
    group = image if scope == "image" else torch.zeros_like(image)
    return relevance_quality(relevance, group, int(image[-1]) + 1 if len(image) else 0)
