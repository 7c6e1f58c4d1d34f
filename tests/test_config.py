"""PruneConfig and options: strict, one sentence for every mistake, a lossless round trip."""

from __future__ import annotations

import pytest
import torch

from itprune import PruneConfig, attach
from itprune.config import Draw, Schedule
from itprune.methods import methods, register_method
from itprune.methods.base import Method
from itprune.methods.budget import split_keep
from tests.models import batch, tiny_llava


def test_round_trip() -> None:
    flat = {
        "method": "itprune",
        "keep": {"from": 1.0, "to": 0.22, "shape": "cosine", "until": 0.5},
        "stage1": {"rule": "chord", "min_keep": 4},
        "stage2": None,
        "layout": "padded",
    }
    config = PruneConfig.from_dict(flat)
    assert PruneConfig.from_dict(config.to_dict()) == config
    assert config.to_dict()["stage2"] is None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"keep": 0}, ["prune.keep", "(0, 1]"]),
        ({"keep": 1.5}, ["prune.keep"]),
        ({"keep": "many"}, ["prune.keep", "many"]),
        ({"keep": {"from": 1.0}}, ["schedule"]),
        ({"keep": {"from": 1.0, "to": 0.2, "shap": "linear"}}, ["shape"]),
        ({"layout": "paked"}, ["packed"]),
        ({"method": "itprun"}, ["itprune"]),
        ({"kep": 0.2}, ["kep", "did you mean"]),
        ({"stage1": {"rule": "chrod"}}, ["chord"]),
        ({"stage1": {"score": "atention"}}, ["attention"]),
        ({"stage1": {"rul": "mean"}}, ["rule"]),
        ({"stage1": {"keep": 64}}, ["topk"]),
        ({"stage1": {"min_keep": 9, "max_keep": 3}}, ["min_keep"]),
        ({"stage2": {"layers": [5]}}, ["0..4", "6 LLM layers"]),
        ({"stage2": {"layers": [3, 1]}}, ["ascending"]),
        ({"stage2": {"layers": "1"}}, ["stage2.layers"]),
        ({"stage1": "mean"}, ["stage1"]),
    ],
)
def test_every_mistake_gets_one_sentence(values: dict, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        attach(tiny_llava(), PruneConfig.from_dict(values))
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_numbers_written_as_text_are_numbers() -> None:
    assert PruneConfig.from_dict({"keep": "2.2e-1"}).keep == 0.22


def test_a_schedule_moves_and_ends() -> None:
    config = PruneConfig(keep=Schedule(to=0.2, start=1.0, until=0.5))
    assert config.keep_at(0, 8) == 1.0
    assert config.keep_at(2, 8) == pytest.approx(0.6)
    assert config.keep_at(4, 8) == config.keep_at(8, 8) == config.final_keep == 0.2
    cosine = PruneConfig(keep=Schedule(to=0.2, shape="cosine"))
    assert cosine.keep_at(5, 10) == pytest.approx(0.6)
    assert cosine.keep_at(1, 10) > 0.97


def test_a_list_is_drawn_from_by_step_and_seed() -> None:
    values = [0.22, 0.11, "4.4e-1", 1.0]
    config = PruneConfig.from_dict({"keep": values})
    assert config.keep == Draw((0.22, 0.11, 0.44, 1.0))
    assert config.to_dict()["keep"] == [0.22, 0.11, 0.44, 1.0]
    assert PruneConfig.from_dict(config.to_dict()) == config
    drawn = [config.keep_at(step, 400, seed=3) for step in range(400)]
    assert all(80 <= drawn.count(value) <= 120 for value in config.budgets)
    assert drawn[100:] == [config.keep_at(step, 900, seed=3) for step in range(100, 400)]
    assert drawn != [config.keep_at(step, 400, seed=4) for step in range(400)]
    assert config.final_keep == config.keep_at(400, 400) == 0.22


def test_every_value_of_a_list_is_checked_at_once() -> None:
    for keep, message in (
        ([], r"prune.keep: the list is empty"),
        ([0.2, 1.5], r"prune.keep\[1\]: must be a fraction in \(0, 1\], got 1.5"),
        ([None], r"prune.keep\[0\]: must be a fraction in \(0, 1\], got null"),
        ([0.2, "much"], r"prune.keep\[1\]: must be a fraction in \(0, 1\], got 'much'"),
    ):
        with pytest.raises(ValueError, match=message):
            PruneConfig.from_dict({"keep": keep})
    model = tiny_llava()
    for values, message in (
        ({"method": "fastv", "keep": [1.0, 0.9, 0.01]}, r"prune.keep: 0.01 is out of reach"),
        ({"method": "quecc", "keep": [0.25, 0.05]}, r"prune.keep: .* but the weights are for"),
        ({"stage1": {"keep": 0.5}, "keep": [0.3, 0.9]}, r"cannot average keep=0.9"),
    ):
        with pytest.raises(ValueError, match=message):
            attach(model, PruneConfig.from_dict(values))


def test_a_step_at_the_whole_budget_is_the_dense_forward() -> None:
    model = tiny_llava().train()
    dense = model(**batch())
    config = PruneConfig(keep=Draw((0.3, 1.0)))
    seed = next(s for s in range(20) if config.keep_at(0, 9, s) == 1.0)
    with attach(model, config) as attached:
        attached.set_step(0, 9, seed)
        assert attached.keep == 1.0
        whole = model(**batch())
        attached.set_step(9, 9)
        assert attached.keep == 0.3
        assert not torch.equal(model(**batch()).loss, dense.loss)
    assert torch.equal(whole.loss, dense.loss)
    assert torch.equal(whole.logits, dense.logits)


def test_the_default_split_is_two_thirds_and_averages_to_keep() -> None:
    assert split_keep(0.22, 8, (3,), (None, None)) == pytest.approx((0.264, 0.176))
    first, second = split_keep(0.22, 32, (10,), (None, None))
    assert (first * 11 + second * 21) / 32 == pytest.approx(0.22)
    assert split_keep(0.22, 8, (), (None,)) == pytest.approx((0.22,))


@pytest.mark.parametrize("keep", [0.05, 0.3, 0.6, 0.9, 0.99])
def test_every_budget_can_be_split(keep: float) -> None:
    for layers in ((2,), (1, 4)):
        edges = (0, *(k + 1 for k in layers), 8)
        shares = split_keep(keep, 8, layers, (None,) * (len(layers) + 1))
        spent = sum(f * (b - a) for f, a, b in zip(shares, edges, edges[1:], strict=False))
        assert spent / 8 == pytest.approx(keep)
        assert list(shares) == sorted(shares, reverse=True)
        assert max(shares) <= 1


def test_named_shares_that_cannot_meet_keep_are_refused() -> None:
    with pytest.raises(ValueError, match="leave one of them out"):
        split_keep(0.9, 8, (3,), (0.5, None))
    with pytest.raises(ValueError, match="already spend"):
        split_keep(0.1, 8, (3,), (0.5, None))


def test_methods_register_from_outside_and_refuse_bad_names() -> None:
    assert {"itprune", "random", "uniform", "topk_cls", "dense"} <= set(methods())
    with pytest.raises(ValueError, match="lower-case"):
        register_method("No-Good")(Method)
    with pytest.raises(ValueError, match="already taken"):
        register_method("itprune")(Method)
    model = tiny_llava()
    with (
        attach(model, PruneConfig("uniform", keep=None)),  # it has no rule of its own
        pytest.raises(ValueError, match="needs a fraction"),
    ):
        model(**batch())
