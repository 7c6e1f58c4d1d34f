"""The question-conditioned compressor, block by block against the published order of work."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from itprune.maths.grids import block_order
from itprune.maths.querying import QuestionCompressor
from itprune.methods import build_method
from itprune.methods.base import Host, Method
from tests.handmade import (
    HOST,
    TEXT,
    WIDTH,
    built,
    contents,
    image,
    images_of,
    shaken,
)


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
