"""YOPO's choices: heads by calibration, the cut by keep, options in one sentence."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from itprune import PruneConfig, attach
from itprune.calibrating import calibrate
from itprune.calibration import Calibration
from itprune.host import Host
from itprune.methods import build_method
from tests.models import ASSISTANT, DEPTH, IMAGE, PATCHES, ROWS, batch, prompts, tiny_llava
from tests.yopo import CUT, HEADS, PROMPT, rows_of


def test_calibration_finds_heads_that_look_at_images() -> None:
    model, data = tiny_llava(), prompts(batch())
    one = attach(model, PruneConfig("yopo", keep=None, options={"cut": CUT}), prompt=PROMPT)
    record = calibrate(one, [data, prompts(batch(ROWS[:1], seed=4))])
    scores = torch.tensor(record.found["heads"])
    assert scores.shape == (DEPTH - 1, HEADS)
    assert record.samples == 4
    # The second highest of four ratios: more than 40 % of the samples are two.
    expected = torch.stack([ratios(model, ids, p, layer=2) for _, ids, p in images_of(data)])
    again = prompts(batch(ROWS[:1], seed=4))
    last = [ratios(model, ids, p, layer=2) for _, ids, p in images_of(again)]
    expected = torch.cat([expected, torch.stack(last)]).sort(0, descending=True).values[1]
    torch.testing.assert_close(scores[2], expected, atol=1e-5, rtol=1e-4)
    active = [one.method.sparsity(layer).heads for layer in range(CUT)]
    assert active[0] is active[1] is None
    assert int(active[2].sum() + active[3].sum()) == round(0.75 * HEADS * CUT) - 2 * HEADS
    assert Calibration.from_dict(record.to_dict()) == record


def images_of(data: dict[str, Tensor]):
    return [row for row in rows_of(data) if row[2] is not None]


def ratios(model: torch.nn.Module, ids: Tensor, pixels: Tensor, layer: int) -> Tensor:
    """(H,) attention of the prompt's last token to visual over text keys, by an eager model."""
    eager = tiny_llava()
    eager.set_attn_implementation("eager")
    end = int((ids == ASSISTANT[1]).nonzero()[0]) + 1  # the first answer is predicted here
    with torch.no_grad():
        weights = eager(
            input_ids=ids[None, :end], pixel_values=pixels, output_attentions=True
        ).attentions[layer][0, :, -1]
    visual = ids[:end] == IMAGE
    return weights[:, visual].sum(1) / weights[:, ~visual].sum(1)


def test_without_calibration_all_heads_stay_and_say_so_once() -> None:
    model, data = tiny_llava(), batch()
    attach(model, PruneConfig("yopo", keep=None), prompt=PROMPT)
    with pytest.warns(UserWarning, match=r"prune\.heads: not calibrated") as seen:
        model(**data)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**data)


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.8])
def test_keep_is_the_layer_average_of_visual_tokens(keep: float) -> None:
    model, data = tiny_llava(), batch(ROWS[:2])
    one = attach(model, PruneConfig("yopo", keep=keep, options={"heads": None}), prompt=PROMPT)
    model(**data)
    cut = one.method.cut
    assert abs(cut / DEPTH - keep) <= 0.5 / DEPTH
    assert [s.visual.tolist() for s in one.report.segments] == [[PATCHES] * 2, [0, 0]]
    assert one.report.segments[-1].start == cut


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"window": 4}, "prune.window: must be odd and positive, got 4"),
        ({"mode": "zero"}, "prune.mode: unknown value 'zero'"),
        ({"heads": 1.5}, "prune.heads: must be a fraction"),
        ({"ffn_keep": 0.0}, "prune.ffn_keep: must be a fraction"),
        ({"cut": 0}, "prune.cut: must be a layer from 1 to 32 of this model, got 0"),
        ({"cut": 33}, "prune.cut: must be a layer from 1 to 32 of this model, got 33"),
    ],
)
def test_bad_options_are_one_sentence(options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence.replace(".", r"\.")) as error:
        build_method("yopo", options, Host.example())
    assert "\n" not in str(error.value)


def test_a_keep_below_one_layer_names_the_lowest() -> None:
    method = build_method("yopo", {}, Host.example())
    with pytest.raises(ValueError, match=r"prune\.keep: 0\.01 .* lowest .* 0\.031"):
        method.share(0.01)
