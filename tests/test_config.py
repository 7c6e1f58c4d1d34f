"""PruneConfig and options: strict, one sentence for every mistake, a lossless round trip."""

from __future__ import annotations

import pytest

from itprune import PruneConfig, attach
from itprune.config import Schedule
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
    assert config.keep_at(0.0) == 1.0
    assert config.keep_at(0.25) == pytest.approx(0.6)
    assert config.keep_at(0.5) == config.keep_at(1.0) == pytest.approx(0.2)
    cosine = PruneConfig(keep=Schedule(to=0.2, shape="cosine"))
    assert cosine.keep_at(0.5) == pytest.approx(0.6)
    assert cosine.keep_at(0.1) > 0.97


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
