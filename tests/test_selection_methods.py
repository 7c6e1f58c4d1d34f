"""Bipartite merging, diverse selection, and the methods built on them, against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from itprune import PromptFormat, PruneConfig, attach
from itprune.maths.bipartite import ORDERS, bipartite_merging, merges_per_round
from itprune.maths.diversity import determinant_points, farthest_points, relevance_quality
from itprune.methods.aim import Aim, AimOptions, importance
from itprune.methods.base import Host
from itprune.methods.cdpruner import CDPruner, CDPrunerOptions
from itprune.methods.divprune import DivPrune, DivPruneOptions
from itprune.ragged import group_ids
from itprune.tokens import Block, Images, LayerTokens
from itprune.trace import Trace
from tests.models import ASSISTANT, DEPTH, IMAGE, batch, tiny_llava

LENS = torch.tensor([9, 16, 1, 12])
COUNT = torch.tensor([3, 7, 1, 12])
WIDTH = 6


@pytest.fixture
def features() -> Tensor:
    return torch.randn(int(LENS.sum()), WIDTH, generator=torch.Generator().manual_seed(0))


def rows(values: Tensor, lens: Tensor) -> tuple[Tensor, ...]:
    return values.split(lens.tolist())


def cosines(x: Tensor) -> Tensor:
    return F.cosine_similarity(x[:, None], x[None], dim=-1)


# -------------------------------------------------------------------------------- merging
def merged_by_hand(x: Tensor, count: int, order: str, weighted: bool) -> list[tuple[Tensor, set]]:
    """Merges one image with plain lists: the output tokens, and which inputs each is made of."""
    tokens = [(x[i], {i}, i) for i in range(len(x))]
    while (r := min(len(tokens) // 2, len(tokens) - count)) > 0:
        a, b = tokens[0::2], tokens[1::2]
        best = [
            max((float(F.cosine_similarity(va, vb, dim=0)), -j) for j, (vb, *_) in enumerate(b))
            for va, *_ in a
        ]
        ranked = sorted(range(len(a)), key=lambda i: -best[i][0])
        joined = [[token] for token in b]
        for i in ranked[:r]:
            joined[-best[i][1]].append(a[i])
        tokens = [a[i] for i in ranked[r:]]
        for members in joined:
            mass = [float(len(made)) if weighted else 1.0 for _, made, _ in members]
            value = sum(m * v for m, (v, *_) in zip(mass, members, strict=True)) / sum(mass)
            tokens.append((value, set().union(*(m[1] for m in members)), members[0][2]))
        if order == "raster":
            tokens.sort(key=lambda token: token[2])
    return [(value, made) for value, made, _ in tokens]


@pytest.mark.parametrize(("order", "weighted"), list(itertools.product(ORDERS, (False, True))))
def test_merging_is_the_definition(features: Tensor, order: str, weighted: bool) -> None:
    found = bipartite_merging(features, LENS, COUNT, order=order, weighted=weighted)
    outputs = rows(found.apply(features), COUNT)
    start = rows(found.row, LENS)
    first = 0
    for x, count, output, row in zip(
        rows(features, LENS), COUNT.tolist(), outputs, start, strict=True
    ):
        expected = merged_by_hand(x, count, order, weighted)
        assert torch.allclose(output, torch.stack([value for value, _ in expected]), atol=1e-5)
        for j, (_, made) in enumerate(expected):
            assert set((row == first + j).nonzero()[:, 0].tolist()) == made
        first += count


def test_merging_a_batch_is_merging_each_image(features: Tensor) -> None:
    together = bipartite_merging(features, LENS, COUNT)
    alone = [
        bipartite_merging(x, lens[None], count[None])
        for x, lens, count in zip(rows(features, LENS), LENS, COUNT, strict=True)
    ]
    apart = [m.apply(x) for m, x in zip(alone, rows(features, LENS), strict=True)]
    assert torch.equal(together.keep, torch.cat([m.keep for m in alone]))
    assert torch.allclose(together.apply(features), torch.cat(apart), atol=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
def test_merging_keeps_the_mass(features: Tensor, weighted: bool) -> None:
    found = bipartite_merging(features, LENS, COUNT, weighted=weighted)
    kept = [int(keep.sum()) for keep in rows(found.keep, LENS)]
    assert kept == COUNT.tolist()
    assert found.rows == COUNT.sum()
    share = torch.zeros(found.rows).index_add(0, found.row, found.weight)
    assert torch.allclose(share, torch.ones(found.rows))


def test_weighted_means_are_means_of_all_members(features: Tensor) -> None:
    found = bipartite_merging(features, LENS, COUNT, weighted=True)
    members = torch.bincount(found.row)
    assert torch.allclose(found.weight, 1 / members[found.row].float())


def test_an_image_at_its_count_is_untouched(features: Tensor) -> None:
    found = bipartite_merging(features, LENS, COUNT)
    assert torch.equal(rows(found.apply(features), COUNT)[3], rows(features, LENS)[3])


def test_merging_passes_gradients(features: Tensor) -> None:
    x = features.clone().requires_grad_()
    found = bipartite_merging(x, LENS, COUNT)
    found.apply(x).sum().backward()
    assert torch.allclose(x.grad, found.weight[:, None].expand_as(x))


def test_merging_identical_tokens() -> None:
    x = torch.ones(8, WIDTH)
    found = bipartite_merging(x, torch.tensor([8]), torch.tensor([3]))
    assert torch.allclose(found.apply(x), torch.ones(3, WIDTH))


def test_rounds_halve_and_then_hit_the_count() -> None:
    found = merges_per_round(torch.tensor([576, 9, 1]), torch.tensor([252, 2, 1]))
    assert [r.tolist() for r in found] == [[288, 4, 0], [36, 2, 0], [0, 1, 0]]


# -------------------------------------------------------------------------------- diversity
def farthest_by_hand(x: Tensor, count: int) -> set[int]:
    distance = 1 - cosines(x)
    others = [distance[i][torch.arange(len(x)) != i] for i in range(len(x))]
    picks = [max(range(len(x)), key=lambda i: (float(others[i].min()) if len(x) > 1 else 0, -i))]
    while len(picks) < count:
        left = [i for i in range(len(x)) if i not in picks]
        picks.append(max(left, key=lambda i: (float(distance[i][picks].min()), -i)))
    return set(picks)


def determinant_by_hand(x: Tensor, count: int, quality: Tensor) -> set[int]:
    kernel = (quality[:, None] * cosines(x) * quality[None]).double()
    picks: list[int] = []
    while len(picks) < count:
        left = [i for i in range(len(x)) if i not in picks]
        volume = [float(torch.det(kernel[[*picks, i]][:, [*picks, i]])) for i in left]
        picks.append(left[volume.index(max(volume))])
    return set(picks)


def chosen(keep: Tensor, lens: Tensor = LENS) -> list[set[int]]:
    return [set(k.nonzero()[:, 0].tolist()) for k in rows(keep, lens)]


def test_farthest_points_are_the_definition(features: Tensor) -> None:
    expected = [
        farthest_by_hand(x, n) for x, n in zip(rows(features, LENS), COUNT.tolist(), strict=True)
    ]
    assert chosen(farthest_points(features, LENS, COUNT)) == expected


def test_determinant_points_are_the_definition(features: Tensor) -> None:
    count = COUNT.clamp(max=WIDTH - 1)  # beyond the dimension all determinants are zero
    quality = torch.rand(len(features), generator=torch.Generator().manual_seed(1)) + 0.1
    parts = zip(rows(features, LENS), count.tolist(), rows(quality, LENS), strict=True)
    expected = [determinant_by_hand(x, n, q) for x, n, q in parts]
    assert chosen(determinant_points(features, LENS, count, quality)) == expected


@pytest.mark.parametrize("select", [farthest_points, determinant_points])
def test_selection_of_a_batch_is_that_of_each_image(select, features: Tensor) -> None:
    parts = zip(rows(features, LENS), LENS, COUNT, strict=True)
    alone = torch.cat([select(x, lens[None], count[None]) for x, lens, count in parts])
    assert torch.equal(select(features, LENS, COUNT), alone)


def test_selection_follows_a_permutation() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(20, 8, generator=generator)
    quality = torch.rand(20, generator=generator)
    order = torch.randperm(20, generator=generator)
    lens, count = torch.tensor([20]), torch.tensor([7])
    found = farthest_points(x[order], lens, count)
    assert torch.equal(found, farthest_points(x, lens, count)[order])
    found = determinant_points(x[order], lens, count, quality[order])
    assert torch.equal(found, determinant_points(x, lens, count, quality)[order])


@pytest.mark.parametrize("select", [farthest_points, determinant_points])
@pytest.mark.parametrize("tokens", [1, 5])
def test_selection_of_identical_tokens(select, tokens: int) -> None:
    lens = torch.tensor([tokens])
    for count in range(1, tokens + 1):
        keep = select(torch.ones(tokens, WIDTH), lens, torch.tensor([count]))
        assert keep.tolist() == [True] * count + [False] * (tokens - count)


def test_more_picks_than_dimensions_go_by_quality() -> None:
    x = torch.eye(2).repeat(4, 1)
    quality = torch.tensor([0.1, 0.2, 0.9, 0.8, 0.7, 0.3, 0.4, 0.6])
    keep = determinant_points(x, torch.tensor([8]), torch.tensor([4]), quality)
    assert chosen(keep, torch.tensor([8])) == [{2, 3, 4, 7}]


def test_relevance_is_stretched_over_its_group() -> None:
    relevance = torch.tensor([0.2, 0.4, 0.3, -1.0, 1.0, 0.5])
    image = torch.tensor([0, 0, 0, 1, 1, 2])
    found = relevance_quality(relevance, image, 3)
    assert torch.allclose(found, torch.tensor([0.0, 1.0, 0.5, 0.0, 1.0, 1.0]), atol=1e-5)
    assert (found > 0).all()


# -------------------------------------------------------------------------------- the walk
def causal_logits(lens: list[int], heads: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    size = max(lens)
    logits = torch.randn(len(lens), heads, size, size, generator=generator)
    filled = torch.arange(size) < torch.tensor(lens)[:, None]
    seen = torch.ones(size, size, dtype=torch.bool).tril() & filled[:, None] & filled[:, :, None]
    return logits.masked_fill(~seen[:, None], -torch.inf), filled


def walked_by_hand(logits: Tensor, temperature: float, steps: int, damping: float) -> Tensor:
    n, heads = logits.shape[-1], []
    for move in torch.softmax(logits / temperature, -1):
        mass = torch.full((n,), 1 / n)
        for _ in range(steps):
            mass = (1 - damping) * (move * mass[:, None]).sum(0) + damping / n
        heads.append(mass**2)
    return torch.stack(heads).mean(0).sqrt()


@pytest.mark.parametrize("damping", [0.0, 0.15])
def test_importance_is_the_definition_for_each_row(damping: float) -> None:
    lens = [11, 7, 1]
    logits, filled = causal_logits(lens)
    found = importance(logits, filled, 0.1, 5, damping)
    for b, n in enumerate(lens):
        expected = walked_by_hand(logits[b, :, :n, :n], 0.1, 5, damping)
        assert torch.allclose(found[b, :n], expected, atol=1e-6)
        assert (found[b, n:] == 0).all()


# -------------------------------------------------------------------------------- methods
def make_images(features: Tensor, lens: Tensor, key: Tensor | None = None) -> Images:
    n = len(lens)
    generator = torch.Generator().manual_seed(4)
    mix = torch.randn(features.shape[1], 8, generator=generator)
    words = torch.randn(3 * n, 8, generator=generator)

    def block(index: int) -> Block:
        assert index == Host.example().vision_blocks - 1
        assert key is not None
        return Block(key, key, 1.0, torch.empty(0))

    def unused() -> Tensor:
        raise AssertionError("no method here asks for the question's state")

    return Images(
        features=features,
        lens=lens,
        pixels=torch.zeros(n, 3, 2, 2),
        slots=lens,
        grid=torch.stack([torch.ones_like(lens), lens], 1),
        slot_grid=torch.stack([torch.ones_like(lens), lens], 1),
        sample=torch.arange(n),
        feature_block=22,
        has_cls=True,
        block=block,
        projected=lambda: features @ mix,
        question=unused,
        instruction=lambda: (words, torch.arange(n).repeat_interleave(3)),
    )


def make_aim(keep: float | None = None, **options) -> Aim:
    method = Aim(AimOptions(**options), Host.example())
    method.share(keep)
    return method


def make_tokens(
    layer: int, visual_lens: list[int], text: int = 4, entered: list[int] | None = None
) -> LayerTokens:
    lens = [n + text for n in visual_lens]
    logits, filled = causal_logits(lens)
    sample = group_ids(torch.tensor(lens))
    place = filled.nonzero()[:, 1]
    visual = (place >= 1) & (place < 1 + torch.tensor(visual_lens)[sample])

    def unused(rows: Tensor, rope: bool) -> Tensor:
        raise AssertionError("the walk reads the logits")

    nothing = torch.zeros(len(sample), dtype=torch.bool)
    return LayerTokens(
        layer=layer,
        sample=sample,
        samples=len(lens),
        position=place,
        visual=visual,
        entered=torch.tensor(visual_lens if entered is None else entered),
        droppable_text=nothing,
        instruction_lens=torch.zeros(len(lens), dtype=torch.long),
        asks=nothing.index_fill(0, torch.tensor(lens).cumsum(0) - 1, True),
        last=nothing,
        hidden=torch.zeros(len(sample), 4),
        embedded=lambda: torch.zeros(len(sample), 4),
        heads=unused,
        logits=lambda: (logits, filled),
    )


def test_aim_merges_by_the_keys_of_the_last_block() -> None:
    generator = torch.Generator().manual_seed(5)
    lens = torch.tensor([10, 10])
    features = torch.randn(20, WIDTH, generator=generator)
    key = torch.randn(2, 3, 11, 4, generator=generator)
    method = make_aim(merge=0.3)
    found = method.before_llm(make_images(features, lens, key))
    metric = key[:, :, 1:].permute(0, 2, 1, 3).reshape(20, 12)
    expected = bipartite_merging(metric, lens, torch.tensor([3, 3]))
    assert torch.equal(found.keep, expected.keep)
    assert torch.allclose(found.features[found.keep], expected.apply(features))


def test_aim_on_ragged_images_needs_the_features(features: Tensor) -> None:
    found = make_aim(keep=0.2, metric="features").before_llm(make_images(features, LENS))
    share = 0.2 / make_aim()._average
    assert [int(k.sum()) for k in rows(found.keep, LENS)] == [
        max(1, round(n * share)) for n in LENS.tolist()
    ]
    with pytest.raises(ValueError, match=r"prune\.metric.*metric: features"):
        make_aim(keep=0.2).before_llm(make_images(features, LENS, torch.zeros(4, 1, 17, 2)))


def test_aim_gives_gradients_to_merged_features(features: Tensor) -> None:
    x = features.clone().requires_grad_()
    found = make_aim(keep=0.2, metric="features").before_llm(make_images(x, LENS))
    found.features[found.keep].sum().backward()
    assert (x.grad > 0).all()


def lives_through(method: Aim, entering: int) -> list[int]:
    """Visual tokens each LLM layer runs on."""
    alive, lives = entering, []
    for layer in range(method.depth):
        lives.append(alive)
        if layer in method.layers():
            tokens = make_tokens(layer, [alive], 2, [entering])
            alive = int(method.after_layer(tokens).keep[tokens.visual].sum())
    return lives


def test_aim_falls_as_published() -> None:
    method = make_aim()
    assert method.layers() == tuple(range(13, 21))
    fall = [int(252 * (1 - k / 8)) for k in range(9)]
    assert lives_through(method, 252)[13:22] == fall


@pytest.mark.parametrize("keep", [0.1, 0.22, 0.5, 0.7, 0.95])
def test_aim_meets_the_layer_average(keep: float) -> None:
    method = make_aim(keep)
    lives = lives_through(method, round(200 * method._split()[0]))
    assert sum(lives) / 32 / 200 == pytest.approx(keep, abs=0.004)


def test_aim_drops_the_least_important_visual_tokens() -> None:
    method = make_aim()
    tokens = make_tokens(13, [8, 4, 0])
    keep = method.after_layer(tokens).keep
    table, filled = tokens.logits()
    score = importance(table, filled, 0.1, 5, 0.0)[filled]
    assert keep[~tokens.visual].all()
    for sample, count in enumerate([7, 3, 0]):
        mine = tokens.visual & (tokens.sample == sample)
        assert int(keep[mine].sum()) == count
        if count:
            assert score[mine & keep].min() >= score[mine & ~keep].max()
    assert (
        not method.after_layer(make_tokens(20, [3, 1])).keep[make_tokens(20, [3, 1]).visual].any()
    )


def test_aim_claims_only_places_where_it_acts() -> None:
    assert make_aim().places == ("before_llm", "layers")
    assert make_aim(merge=1.0).places == ("layers",)
    assert make_aim(l1=32).places == ("before_llm",)
    assert make_aim().positions_at("before_llm") == "contiguous"
    assert make_aim().positions_at("layers") == "original"


@pytest.mark.parametrize(
    ("keep", "options", "message"),
    [
        (0.3, {"merge": 1.0}, r"0\.3 is out of reach.*0\.547\.\.1\.000"),
        (0.6, {"merge": 0.5}, r"0\.6 is out of reach.*0\.273\.\.0\.500"),
        (None, {"l1": 9, "l2": 9}, r"0 <= l1 < l2"),
        (None, {"merge": 1.5}, r"prune\.merge.*fraction"),
        (None, {"order": "random"}, r"prune\.order.*published"),
        (None, {"damping": 1.0}, "damping"),
    ],
)
def test_aim_refuses_what_it_cannot_do(keep, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_aim(keep, **options)


@pytest.mark.parametrize("depth", [1, 2, 3, 6, 28, 80])
def test_aim_fits_any_depth(depth: int) -> None:
    host = Host(depth, 64, 4, 4, 32, 4, 2, True, (4, 4))
    method = Aim(AimOptions(), host)
    assert all(0 <= layer < depth - 1 for layer in method.layers())
    for keep in (0.2, 0.9):
        method.share(keep)
        merge, fall = method._split()
        assert 0 < merge <= 1
        assert 0 <= fall <= 1


@pytest.mark.parametrize("metric", ["projected", "features"])
def test_divprune_measures_what_it_is_told(features: Tensor, metric: str) -> None:
    images = make_images(features, LENS)
    method = DivPrune(DivPruneOptions(metric=metric), Host.example())
    method.share(0.4)
    values = features if metric == "features" else images.projected()
    count = (LENS * 0.4).round().long().clamp(min=1)
    assert torch.equal(method.before_llm(images).keep, farthest_points(values, LENS, count))


def test_cdpruner_weighs_by_the_question(features: Tensor) -> None:
    images = make_images(features, LENS)
    method = CDPruner(CDPrunerOptions(), Host.example())
    assert method.needs_question
    method.share(0.4)
    words, image = images.instruction()
    quality = []
    for i, x in enumerate(rows(images.projected(), LENS)):
        near = F.cosine_similarity(x, words[image == i].mean(0)[None])
        span = near.max() - near.min()
        quality.append((near - near.min() + 1e-6) / span if span > 0 else torch.ones(len(x)))
    count = (LENS * 0.4).round().long().clamp(min=1)
    expected = determinant_points(images.projected(), LENS, count, torch.cat(quality))
    assert torch.equal(method.before_llm(images).keep, expected)


def test_cdpruner_without_a_question_is_pure_diversity(features: Tensor) -> None:
    images = make_images(features, LENS)
    method = CDPruner(CDPrunerOptions(relevance="none"), Host.example())
    assert not method.needs_question
    method.share(0.4)
    count = (LENS * 0.4).round().long().clamp(min=1)
    expected = determinant_points(images.projected(), LENS, count)
    assert torch.equal(method.before_llm(images).keep, expected)


def test_only_the_published_range_lets_images_meet(features: Tensor) -> None:
    """Normalised over the batch, an image's choice depends on its neighbours; by default not."""
    one = make_images(features[:9], LENS[:1])
    all_of_them = make_images(features, LENS)
    words, image = all_of_them.instruction()
    one = Images(**{**one.__dict__, "instruction": lambda: (words[:3], image[:3])})
    host = Host.example()
    for scope, same in (("image", True), ("batch", False)):
        method = CDPruner(CDPrunerOptions(normalise=scope), host)
        method.share(0.4)
        found = method.before_llm(all_of_them).keep[:9]
        assert torch.equal(found, method.before_llm(one).keep) is same


# -------------------------------------------------------------------------------- in a model
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("aim", {}),
        ("aim", {"order": "raster", "weighted": True, "damping": 0.15}),
        ("divprune", {}),
        ("cdpruner", {}),
        ("divprune+aim", {"aim": {"merge": 1.0}}),
    ],
)
def test_a_batch_is_its_rows(method: str, options: dict) -> None:
    prompt = PromptFormat((0, 1, 2, *ASSISTANT), ASSISTANT)
    data = batch(((5, "image", 9, "answer"), (2, "image", 3, "image", 6, "answer")))
    model = tiny_llava()
    config = PruneConfig(method, keep=0.4, options=options)
    with attach(model, config, prompt=prompt) as attached, torch.no_grad():
        with attached.tracing() as trace:
            together = model(**data).logits
        assert kept_of(trace, data) == pytest.approx(0.4, abs=0.03)
        for row, pixels in ((0, slice(0, 1)), (1, slice(1, 3))):
            real = data["attention_mask"][row].bool()
            alone = {k: data[k][row : row + 1, real] for k in ("input_ids", "attention_mask")}
            found = model(**alone, pixel_values=data["pixel_values"][pixels]).logits[0]
            assert torch.allclose(found, together[row, real], atol=1e-5)


def kept_of(trace: Trace, data: dict[str, Tensor]) -> float:
    """Fraction of the visual tokens alive, averaged over the layers."""
    visual = data["input_ids"] == IMAGE
    starts = [max(first for first in trace.alive if first <= layer) for layer in range(DEPTH)]
    spent = sum(int((trace.alive[first] & visual).sum()) for first in starts)
    return spent / DEPTH / int(visual.sum())
