"""quecc, setok, vistog: maths on tensors made by hand, then whole models with the engine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from itprune import PromptFormat, PruneConfig, attach
from itprune.attending import Mixer, pad_rows
from itprune.density_peaks import density_peaks
from itprune.grids import block_order, sine_positions
from itprune.methods import build_method
from itprune.methods.base import Host, Method
from itprune.methods.vistog import Grouping
from itprune.querying import QuestionCompressor
from itprune.tokens import Block, Images, Kept
from tests.models import ASSISTANT, batch, prompts, tiny_llava

WIDTH, TEXT = 32, 48
HOST = replace(
    Host.example(),
    width=TEXT,
    vision_width=WIDTH,
    vision_heads=4,
    vision_blocks=6,
    feature_block=4,
    grid=(12, 12),
)
NAMES = ("quecc", "setok", "vistog")


def seeded(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def image(rows: int, columns: int, seed: int) -> dict[str, Tensor]:
    """One image's raw material: clumps in colour, so that clustering has something to find."""
    length = rows * columns
    colours = 3 * seeded(5, WIDTH, seed=seed)
    pick = torch.randint(5, (length,), generator=torch.Generator().manual_seed(seed))
    features = colours[pick] + 0.3 * seeded(length, WIDTH, seed=seed + 1)
    return {
        "features": features,
        "hidden": seeded(8, length + 1, WIDTH, seed=seed + 2),
        "question": seeded(TEXT, seed=seed + 3),
        "grid": torch.tensor([rows, columns]),
    }


def images_of(*parts: dict[str, Tensor], extra: Tensor | None = None) -> Images:
    """What a method is handed; the encoder's blocks are a table only where the grids agree."""
    grid = torch.stack([part["grid"] for part in parts])
    lens = grid.prod(1)

    def block(index: int) -> Block:
        hidden = torch.stack([part["hidden"][index] for part in parts])
        none = hidden.new_zeros(len(parts), 1, hidden.shape[1], 1)
        return Block(none, none, 1.0, hidden)

    def unused() -> tuple[Tensor, Tensor]:
        raise AssertionError("nobody asks for this")

    return Images(
        features=torch.cat([part["features"] for part in parts]),
        lens=lens,
        pixels=torch.zeros(len(parts), 1),
        slots=lens,
        grid=grid,
        slot_grid=grid,
        sample=torch.arange(len(parts)),
        feature_block=HOST.feature_block,
        has_cls=True,
        block=block,
        projected=unused,
        question=lambda: torch.stack([part["question"] for part in parts]),
        instruction=unused,
        extra=extra,
    )


def built(name: str, keep: float | None = None, host: Host = HOST, **options: object) -> Method:
    torch.manual_seed(0)
    method = build_method(name, options, host)
    method.share(keep)
    return method.eval()


def shaken(module: nn.Module, seed: int = 9) -> nn.Module:
    """Weights away from their start, so that no branch is silent."""
    generator = torch.Generator().manual_seed(seed)
    for weight in module.parameters():
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return module


def with_extra(method: Method, *parts: dict[str, Tensor]) -> Images:
    """The semantic tokens after an encoder that looks at them and the image."""
    tokens = method.tower_tokens()
    if tokens is None:
        return images_of(*parts)
    seen = [5 * tokens + part["features"].mean(0) for part in parts]
    return images_of(*parts, extra=torch.stack(seen))


def contents(kept: Kept) -> Tensor:
    assert kept.features is not None
    return kept.features[kept.keep]


# ------------------------------------------------------------------------------------ all three
@pytest.mark.parametrize("keep", [None, 0.25])
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_equals_its_rows(name: str, keep: float | None) -> None:
    method = shaken(built(name, keep))
    parts = [image(12, 12, seed) for seed in (0, 10, 20)]
    together = method(with_extra(method, *parts))
    alone = [method(with_extra(method, part)) for part in parts]
    assert torch.equal(together.keep, torch.cat([one.keep for one in alone]))
    expected = torch.cat([contents(one) for one in alone])
    assert torch.allclose(contents(together), expected, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_weight_and_the_features(name: str) -> None:
    method = shaken(built(name)).train()
    parts = [image(12, 12, seed) for seed in (0, 10)]
    features = [part["features"].requires_grad_() for part in parts]
    weight = seeded(len(contents(method(with_extra(method, *parts)))), WIDTH, seed=4)
    (contents(method(with_extra(method, *parts))) * weight).sum().backward()
    for found, weight in method.named_parameters():
        assert weight.grad is not None, found
        assert weight.grad.isfinite().all(), found
        assert weight.grad.any(), found
    assert all(one.grad is not None and one.grad.any() for one in features)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_features_meet_float_weights(name: str) -> None:
    method = built(name, 0.25)
    part = image(12, 12, 0)
    part = {key: x.bfloat16() if x.is_floating_point() else x for key, x in part.items()}
    kept = method(with_extra(method, part))
    assert contents(kept).dtype == torch.bfloat16
    assert contents(kept).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_class_token_among_the_visual_tokens_is_left_out(name: str) -> None:
    method = shaken(built(name, 0.25))
    parts = [image(12, 12, seed) for seed in (0, 10)]
    plain = with_extra(method, *parts)
    first = torch.full((1, WIDTH), 7.0)
    features = torch.cat([torch.cat([first, part["features"]]) for part in parts])
    more = replace(plain, features=features, lens=plain.lens + 1, slots=plain.slots + 1)
    assert torch.allclose(contents(method(more)), contents(method(plain)), atol=1e-5)


def test_visual_tokens_off_the_grid_are_refused() -> None:
    images = images_of(image(12, 12, 0))
    with pytest.raises(ValueError, match="form a grid"):
        built("setok")(replace(images, lens=images.lens - 5, features=images.features[5:]))


# ------------------------------------------------------------------------------------ quecc
def reference(module: QuestionCompressor, x: Tensor, multi: Tensor, text: Tensor) -> Tensor:
    """The published order of work on one square image: (R, C, D) grids, (W,) question."""
    rows, columns, width = x.shape
    kernel = module.kernel
    x = x + module.text_projection(text)
    query = module.q_downsample(module.q_proj(x).permute(2, 0, 1)[None])[0].flatten(1).T
    torch_attention = nn.MultiheadAttention(width, module.clip_attn.heads, batch_first=True)
    torch_attention.load_state_dict(module.clip_attn.state_dict())

    def blocks(grid: Tensor) -> Tensor:
        cut = grid.view(rows // kernel, kernel, columns // kernel, kernel, width)
        return cut.transpose(1, 2).reshape(-1, kernel**2, width)

    keys, values = blocks(module.k_proj(multi)), blocks(module.v_proj(multi))
    return torch_attention(query[:, None], keys, values)[0][:, 0]


@pytest.mark.parametrize("kernel", [2, 3, 6])
@pytest.mark.parametrize("shape", [(12, 12), (6, 18)])
def test_quecc_equals_the_work_on_a_whole_grid(kernel: int, shape: tuple[int, int]) -> None:
    method = shaken(built("quecc", kernel=kernel))
    part = image(*shape, 0)
    kept = method(images_of(part))
    assert method.levels == (2, 3, 4, 4)  # the last two are the feature block
    levels = torch.cat([part["hidden"][2, 1:], part["hidden"][3, 1:], *2 * [part["features"]]], 1)
    single, multi = (x.view(*shape, -1) for x in (part["features"], levels))
    expected = reference(method.compressor, single, multi, part["question"])
    assert int(kept.keep.sum()) == shape[0] * shape[1] // kernel**2
    assert torch.allclose(contents(kept), expected, atol=1e-5)


def test_quecc_mixes_grids() -> None:
    module = shaken(QuestionCompressor(WIDTH, WIDTH, TEXT, 8, 3))
    shapes = [(6, 9), (3, 3), (9, 6)]
    parts = [image(*shape, seed) for seed, shape in enumerate(shapes)]
    images = images_of(*parts)
    order = block_order(images.grid, 3)
    blocks = images.features[order].unflatten(0, (-1, 9))
    whose = torch.repeat_interleave(images.grid.prod(1) // 9)
    rows = module(blocks, blocks, images.question(), whose)
    for index, (shape, part) in enumerate(zip(shapes, parts, strict=True)):
        grid = part["features"].view(*shape, -1)
        expected = reference(module, grid, grid, part["question"])
        assert torch.allclose(rows[whose == index], expected, atol=1e-5)


def test_quecc_starts_near_the_block_mean() -> None:
    method = built("quecc", kernel=3)
    part = image(12, 12, 0)
    found = contents(method(images_of(part)))
    mean = nn.functional.layer_norm(part["features"], (WIDTH,))
    mean = mean.view(4, 3, 4, 3, WIDTH).mean((1, 3)).flatten(0, 1)
    assert nn.functional.cosine_similarity(found, mean).min() > 0.9


def test_quecc_without_a_question_adds_nothing() -> None:
    method = shaken(built("quecc", kernel=3))
    mute = {**image(12, 12, 0), "question": torch.zeros(TEXT)}
    asked = image(12, 12, 0)
    without = contents(method(images_of(mute)))
    other = contents(method(images_of(asked)))
    assert not torch.allclose(without, other, atol=1e-3)
    with torch.no_grad():
        for weight in method.compressor.text_projection.parameters():
            weight.zero_()
    assert torch.allclose(contents(method(images_of(asked))), without, atol=1e-5)


def test_quecc_reads_the_published_depths() -> None:
    assert build_on_meta("quecc", Host.example()).vision_blocks() == (11, 15, 21, 22)
    shallow = replace(HOST, vision_blocks=3, feature_block=1)
    assert built("quecc", host=shallow, kernel=3).vision_blocks() == (1,)


def build_on_meta(name: str, host: Host) -> Method:
    with torch.device("meta"):
        return build_method(name, {}, host)


@pytest.mark.parametrize(
    ("keep", "kernel"), [(0.22, 2), (0.1, 3), (0.06, 4), (None, 6), (0.001, 24), (0.9, 2)]
)
def test_quecc_takes_the_nearest_kernel(keep: float | None, kernel: int) -> None:
    method = build_on_meta("quecc", Host.example())
    method.share(keep)
    assert method.size == kernel
    assert method.compressor.q_downsample.kernel_size == (kernel, kernel)


def test_quecc_names_the_kernels_that_fit() -> None:
    with pytest.raises(ValueError, match=r"prune.kernel: 5 .* 1, 2, 3, 4, 6, 12"):
        built("quecc", kernel=5)
    method = built("quecc", kernel=6)
    with pytest.raises(ValueError, match=r"prune.kernel: 6 .* 10 x 12 .* 1, 2"):
        method(images_of(image(10, 12, 0)))
    with pytest.raises(ValueError, match=r"prune.heads: 5"):
        built("quecc", heads=5)
    with pytest.raises(ValueError, match="common divisor"):
        built("quecc", host=replace(HOST, grid=(16, 17)))


# ------------------------------------------------------------------------------------ setok
def clusters_of_one(x: Tensor, k: int, threshold: float) -> tuple[list[int], list[int]]:
    """Centres and assignment, token by token."""
    distance = ((x[:, None] - x[None]) ** 2).sum(-1).sqrt() / x.shape[1] ** 0.5
    density = (-(distance.sort(1).values[:, :k] ** 2).mean(1)).exp()
    reach, score = distance.amax(1), []
    for i in range(len(x)):
        away = [distance[i, j] if density[j] > density[i] else reach[j] for j in range(len(x))]
        score.append(float(density[i] * min(away)))
    centres = [i for i, s in enumerate(score) if s > threshold]
    return centres, [min(centres, key=lambda c: float(distance[i, c])) for i in range(len(x))]


def test_ragged_images_cluster_as_they_do_alone() -> None:
    rows = [image(9, 9, 0), image(4, 5, 3), image(1, 1, 6)]
    lens = torch.tensor([81, 20, 1])
    table, filled = pad_rows(torch.cat([row["features"] for row in rows]), lens)
    found = density_peaks(table, filled, 8, 0.5, 4)
    for index, row in enumerate(rows[:2]):
        centres, nearest = clusters_of_one(row["features"], 8, 0.5)
        assert found.centre[index].nonzero()[:, 0].tolist() == centres
        assert found.nearest[index, : lens[index]].tolist() == nearest
    assert found.centre[2].nonzero().tolist() == [[0]]
    assert (found.nearest[~filled] == -1).all()
    assert not found.score[~filled].any()


def test_the_fallback_and_the_count_take_the_best_scored() -> None:
    table, filled = pad_rows(torch.cat([image(9, 9, 0)["features"], image(3, 3, 3)["features"]]),
                             torch.tensor([81, 9]))  # fmt: skip
    none_above = density_peaks(table, filled, 8, 1e9, 12)
    assert none_above.centre.sum(1).tolist() == [12, 9]
    counted = density_peaks(table, filled, 8, 0.0, 1, count=torch.tensor([12, 3]))
    assert torch.equal(counted.centre[0], none_above.centre[0])
    assert counted.centre[1].sum() == 3
    low = counted.score[1][counted.centre[1]].min()
    assert (counted.score[1][~counted.centre[1] & filled[1]] <= low).all()


def test_copies_of_a_token_make_one_centre() -> None:
    colours = 4 * seeded(3, WIDTH, seed=0)
    table = colours.repeat_interleave(10, 0)[None]
    found = density_peaks(table, torch.ones(1, 30, dtype=torch.bool), 8, 0.5, 4)
    assert found.centre[0].nonzero()[:, 0].tolist() == [0, 10, 20]
    assert found.nearest[0].tolist() == [0] * 10 + [10] * 10 + [20] * 10


def test_densities_too_small_for_a_float_still_rank() -> None:
    table = 100 * image(9, 9, 0)["features"][None]
    filled = torch.ones(1, 81, dtype=torch.bool)
    found = density_peaks(table, filled, 40, 0.5, 5)
    assert not found.score.any()
    assert found.centre[0].nonzero()[:, 0].tolist() != [0, 1, 2, 3, 4]


def test_tie_noise_is_seeded_and_off_by_default() -> None:
    x = torch.zeros(2, 30, 4)
    filled = torch.arange(30) < torch.tensor([[30], [17]])
    quiet, again, noisy = (
        density_peaks(x, filled, 8, 0.5, 3, count=torch.tensor([3, 3]), seed=seed).centre
        for seed in (None, 5, 5)
    )
    assert torch.equal(again, noisy)
    assert quiet[0].nonzero()[:, 0].tolist() == [0, 1, 2]
    alone = density_peaks(x[1:, :17], filled[1:, :17], 8, 0.5, 3, torch.tensor([3]), seed=5)
    assert torch.equal(alone.centre[0], noisy[1, :17])


def test_setok_starts_at_the_cluster_means() -> None:
    method = built("setok")
    part = image(12, 12, 0)
    place = sine_positions(part["grid"][None], WIDTH)
    filled = torch.ones(1, 144, dtype=torch.bool)
    found = density_peaks((part["features"] + place)[None], filled, 64, 0.55, 64)
    kept = method(images_of(part))
    assert torch.equal(kept.keep, found.centre[0])
    for row, centre in zip(contents(kept), kept.keep.nonzero()[:, 0], strict=True):
        members = part["features"][found.nearest[0] == centre]
        assert torch.allclose(row, members.mean(0), atol=1e-5)


def test_setok_mixes_within_clusters_only() -> None:
    mixer = shaken(Mixer(WIDTH, 2, 2))
    x = seeded(1, 10, WIDTH, seed=0)
    group = torch.tensor([[0, 1, 0, 2, 1, 1, 0, 2, 2, 0]])
    mixed = mixer(x, group[:, :, None] == group[:, None, :])
    for number in range(3):
        own = x[:, group[0] == number]
        alone = mixer(own, torch.ones(1, own.shape[1], own.shape[1], dtype=torch.bool))
        assert torch.allclose(mixed[:, group[0] == number], alone, atol=1e-5)


@pytest.mark.parametrize("keep", [0.1, 0.3])
def test_setok_meets_a_target(keep: float) -> None:
    kept = built("setok", keep)(images_of(image(12, 12, 0), image(6, 10, 3)))
    assert [int(kept.keep[:144].sum()), int(kept.keep[144:].sum())] == [
        round(144 * keep),
        round(60 * keep),
    ]


def test_setok_mixes_grids_and_chooses_the_same_in_training() -> None:
    method = shaken(built("setok"))
    parts = [image(12, 12, 0), image(6, 10, 3), image(2, 3, 6)]
    together = method(images_of(*parts))
    alone = [method(images_of(part)) for part in parts]
    assert torch.equal(together.keep, torch.cat([one.keep for one in alone]))
    expected = torch.cat([contents(one) for one in alone])
    assert torch.allclose(contents(together), expected, atol=1e-5)
    trained = method.train()(images_of(*parts))
    assert torch.equal(trained.keep, together.keep)
    assert torch.equal(contents(trained), contents(together))


def test_sine_positions_are_the_usual_ones() -> None:
    place = sine_positions(torch.tensor([[2, 3]]), 8)
    row, column = 1, 2
    expected = [f(p * 10000 ** (-i / 4)) for p in (row, column) for i in (0, 2)
                for f in (torch.sin, torch.cos) for p in [torch.tensor(float(p))]]  # fmt: skip
    assert torch.allclose(place[row * 3 + column], torch.stack(expected), atol=1e-6)


# ------------------------------------------------------------------------------------ vistog
def test_vistog_groups_hard_and_averages() -> None:
    method = built("vistog", tokens=6)
    parts = [image(12, 12, 0), image(6, 10, 3)]
    images = with_extra(method, *parts)
    kept = method(images)
    assert int(kept.keep.sum()) == 12
    rows = contents(kept).view(2, 6, WIDTH)
    norm = nn.functional.layer_norm
    for index, part in enumerate(parts):
        tokens = images.extra[index]
        likeness = norm(tokens, (WIDTH,)) @ norm(part["features"], (WIDTH,)).T
        group = likeness.argmax(0)
        for number in range(6):
            members = part["features"][group == number]
            expected = members.mean(0) if len(members) else tokens[number]
            assert torch.allclose(rows[index, number], expected, atol=1e-5)


def test_an_empty_group_keeps_its_token_at_any_weights() -> None:
    grouping = shaken(Grouping(WIDTH, 1.0)).eval()
    tokens, patches = seeded(1, 40, WIDTH, seed=0), seeded(1, 3, WIDTH, seed=1)
    filled = torch.ones(1, 3, dtype=torch.bool)
    empty = grouping.assign(tokens, patches)[0].sum(1) == 0
    assert empty.sum() >= 37
    assert torch.equal(grouping(tokens, patches, filled)[0][empty], tokens[0][empty])


def test_vistog_in_training_is_a_straight_through_sample() -> None:
    grouping = shaken(Grouping(WIDTH, 0.7)).train()
    tokens, patches = seeded(2, 5, WIDTH, seed=0), seeded(2, 30, WIDTH, seed=1)
    torch.manual_seed(3)
    share = grouping.assign(tokens, patches)
    assert torch.equal(share.sum(1), torch.ones(2, 30))
    assert set(share.unique().tolist()) == {0.0, 1.0}
    torch.manual_seed(3)
    assert torch.equal(share, grouping.assign(tokens, patches))
    assert not torch.equal(share, grouping.assign(tokens, patches))
    weight = seeded(*share.shape, seed=2)
    found = torch.autograd.grad((share * weight).sum(), grouping.query.weight)[0]
    torch.manual_seed(3)
    query = grouping.query(grouping.norm_tokens(tokens))
    key = grouping.key(grouping.norm_patches(patches))
    logits = query @ key.transpose(1, 2) / WIDTH**0.5
    gumbel = -torch.empty_like(logits).exponential_().log()
    soft = ((logits + gumbel) / 0.7).softmax(1)
    expected = torch.autograd.grad((soft * weight).sum(), grouping.query.weight)[0]
    assert torch.allclose(found, expected, atol=1e-5)
    quiet = grouping.eval().assign(tokens, patches)
    assert torch.equal(quiet.argmax(1), logits.argmax(1))


def test_vistog_counts() -> None:
    assert len(built("vistog").tower_tokens()) == 64
    assert len(built("vistog", 0.25).tower_tokens()) == 36
    assert len(built("vistog", 0.25, tokens=10).tower_tokens()) == 10
    many = built("vistog")
    small = with_extra(many, image(6, 6, 0))
    with pytest.raises(ValueError, match=r"prune.tokens: 64 .* 36"):
        many(small)
    with pytest.raises(ValueError, match="takes tokens beside the patches"):
        built("vistog")(images_of(image(12, 12, 0)))
    with pytest.raises(ValueError, match=r"prune.temperature"):
        built("vistog", temperature=0)


# ------------------------------------------------------------------------------------ one size
@pytest.mark.parametrize("name", ["quecc", "vistog"])
def test_the_size_is_chosen_once(name: str) -> None:
    method = built(name, 0.1)
    size = method.size
    weights = [id(weight) for weight in method.parameters()]
    method.share(1.0)
    method.share(None)
    method.share(0.1)
    assert method.size == size
    assert weights == [id(weight) for weight in method.parameters()]
    with pytest.raises(ValueError, match=f"schedule, or name prune.{method.size_option}"):
        method.share(0.5)
    assert method.keep == 0.1
    named = built(name, 1.0, **{method.size_option: 3})
    for keep in (0.9, 0.5, 0.1):
        named.share(keep)
    assert named.size == 3


@pytest.mark.parametrize("name", ["quecc", "vistog"])
def test_a_checkpoint_runs_at_its_own_size(name: str) -> None:
    trained = shaken(built(name, 0.1))
    state = trained.state_dict()
    again = built(name, 0.1)
    again.load_state_dict(state)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in state.items())
    dense = built(name, 1.0)
    dense.load_state_dict(state)
    assert dense.size == trained.size
    dense.share(0.1)
    with pytest.raises(ValueError, match=f"trained with {trained.size}"):
        built(name, 0.5).load_state_dict(state)


# ------------------------------------------------------------------------------------ whole models
OPTIONS = {"quecc": {"kernel": 3, "heads": 4}, "setok": {}, "vistog": {"tokens": 4}}
KEPT = {"quecc": 4, "setok": 7, "vistog": 4}
PROMPT = PromptFormat((0, 1, 2, *ASSISTANT), ASSISTANT)


def attached_model(name: str) -> tuple[nn.Module, Method]:
    model = tiny_llava()
    torch.manual_seed(1)
    attached = attach(
        model, PruneConfig(name, KEPT[name] / 36, options=OPTIONS[name]), prompt=PROMPT
    )
    shaken(attached.method)
    return model, attached


@pytest.mark.parametrize("name", NAMES)
def test_the_language_loss_trains_them(name: str) -> None:
    model, attached = attached_model(name)
    model.train()
    found = []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(2)
        model(**batch()).loss.backward()
        found.append({key: x.grad.clone() for key, x in attached.method.named_parameters()})
    assert attached.report.visual_stage1[:3] == [KEPT[name], KEPT[name], 2 * KEPT[name]]
    for key, gradient in found[0].items():
        assert gradient.isfinite().all(), key
        assert gradient.any(), key
        assert torch.allclose(gradient, found[1][key], atol=1e-6), key


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_batch_do_not_meet_and_generate_starts_like_a_forward(name: str) -> None:
    model, _ = attached_model(name)
    data = prompts(batch(((5, "image", 9), (3, "image", 4), (7,)), side="left"))
    settings = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True}
    with torch.no_grad():
        together = model(**data).logits[:, -1]
        out = model.generate(**data, **settings, output_logits=True)
        assert torch.allclose(out.logits[0], together, atol=1e-5)
        for index in range(2):
            alone = {key: x[index : index + 1] for key, x in data.items()}
            assert torch.allclose(model(**alone).logits[0, -1], together[index], atol=1e-5)


def test_quecc_never_sees_an_answer() -> None:
    model, _ = attached_model("quecc")
    seen = []
    model.model.multi_modal_projector.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach().clone())
    )
    for row in ((5, "image", 9, "answer"), ("image", "answer")):
        data = batch((row,))
        answer = data["labels"] != -100
        asked = ~answer & (data["input_ids"] > 2) & (data["input_ids"] < 250)
        seen.clear()
        for change in (None, answer, asked):
            ids = data["input_ids"].clone()
            if change is not None:
                ids[change] = 3 + (ids[change] + 11) % 240
            model(**{**data, "input_ids": ids})
        first, other_answer, other_question = seen
        assert torch.equal(first, other_answer)
        assert torch.equal(first, other_question) == (not bool(asked.any()))
