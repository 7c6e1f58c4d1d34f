"""Methods inside the LLM: what they plan, what they keep, what they refuse, and whole forwards."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from itprune import PromptFormat, PruneConfig, attach, calibrate
from itprune.calibration import Calibration
from itprune.host import Host
from itprune.maths.recycle import cluster_means
from itprune.maths.schedule import schedule_average
from itprune.methods import build_method
from itprune.methods.base import Method
from tests.layer_tokens import kept_visual, made
from tests.models import ASSISTANT, DEPTH, PATCHES, ROWS, batch, prompts, tiny_llava

NAMES = ("fastv", "pyramiddrop", "sparsevlm", "p_sigmoid", "gsearch")
PROMPT = PromptFormat((0, 1, 2, *ASSISTANT), ASSISTANT)
RAGGED = ((3, 24, 5), (4, 0, 2), (1, 40, 1), (2, 1, 3))


def method(name: str, depth: int = 32, keep: float | None = None, **options: Any) -> Method:
    built = build_method(name, options, dataclasses.replace(Host.example(), depth=depth))
    built.share(keep)
    return built


def averaged(plan: Mapping[int, float], depth: int) -> float:
    fraction, total = 1.0, 0.0
    for layer in range(depth):
        total += fraction
        fraction = plan.get(layer, fraction)
    return total / depth


def run(built: Method, *samples: tuple[int, int, int], seed: int = 0) -> dict[int, list[int]]:
    """Layer -> visual tokens of each sample after it, dropped physically on the way."""
    rows, out = made(*samples, seed=seed), {}
    for layer in built.layers():
        tokens = rows.at(layer)
        kept = built(tokens)
        out[layer] = kept_visual(kept, tokens)
        rows = rows.take(kept.keep)
    return out


# ------------------------------------------------------------------------------- plans
def test_published_plans() -> None:
    assert method("fastv").plan() == {1: 0.5}
    assert method("pyramiddrop").plan() == {7: 0.5, 15: 0.25, 23: 0.125}
    assert method("pyramiddrop", 8).plan() == {1: 0.5, 3: 0.25, 5: 0.125}
    assert method("sparsevlm").plan() == {2: 300 / 576, 6: 200 / 576, 15: 110 / 576}
    assert averaged(method("p_sigmoid").plan(), 32) == pytest.approx(0.125)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("depth", [6, 24, 32, 61])
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.9, 0.999])
def test_every_plan_averages_keep(name: str, depth: int, keep: float) -> None:
    plan = method(name, depth, keep).plan()
    assert averaged(plan, depth) == pytest.approx(keep, abs=1e-6)
    fractions = list(plan.values())
    assert fractions == sorted(fractions, reverse=True)


@pytest.mark.parametrize("depth", [2, 3, 4, 6, 8, 16, 40])
def test_defaults_fit_any_depth(depth: int) -> None:
    for name in NAMES:
        layers = method(name, depth).layers()
        assert layers[0] >= 0
        assert layers[-1] <= depth - 2


@pytest.mark.parametrize("name", NAMES)
def test_keep_out_of_reach_is_refused_and_the_old_one_stays(name: str) -> None:
    built = method(name, 6, 0.5)
    with pytest.raises(ValueError, match=rf"^prune.keep: 0.01 is out of reach of {name}.* is 0\.1"):
        built.share(0.01)
    assert built.keep == 0.5


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("fastv", {"layer": 31}, r"prune.layer: \[31\] must lie in 0..30"),
        ("fastv", {"fraction": 1.5}, "prune.fraction: must be a fraction in"),
        ("pyramiddrop", {"layers": [5, 2]}, "prune.layers: must be ascending"),
        ("pyramiddrop", {"fraction": -0.1}, "prune.fraction: must be a fraction in"),
        ("sparsevlm", {"fractions": [0.5]}, "prune.fractions: needs one for each of the layers"),
        ("sparsevlm", {"fractions": [0.2, 0.5, 0.1]}, "prune.fractions: must not rise"),
        ("sparsevlm", {"count": "ranks"}, "prune.count: unknown value 'ranks'"),
        ("sparsevlm", {"recycle": 2}, "prune.recycle: must be a fraction in"),
        ("sparsevlm", {"cluster": 0}, "prune.cluster: must be at least 1"),
        ("gsearch", {"query": "all"}, "prune.query: unknown value 'all'"),
        ("gsearch", {"schedule": [1.0, 0.5]}, "prune.schedule: needs one fraction for each"),
        ("gsearch", {"tolerance": 1}, "prune.tolerance: must be in"),
        ("gsearch", {"weight": 0}, "prune.weight: must be positive"),
        ("p_sigmoid", {"slope": 0}, "prune.slope: must be positive"),
        ("p_sigmoid", {"slope": float("inf")}, "prune.slope: must be float or null .finite"),
        ("p_sigmoid", {"seed": -1}, "prune.seed: must lie in"),
        (
            "gsearch",
            {"schedule": [1.0, float("nan")]},
            r"prune.schedule\[1\]: must be float .finite",
        ),
        ("sparsevlm", {"bias": float("nan")}, "prune.bias: must be float .finite"),
        ("fastv", {"fraction": 10**400}, "prune.fraction: must be float or null .finite"),
        ("p_sigmoid", {"trials": 0}, "prune.trials: must be at least 1"),
    ],
)
def test_bad_options_are_refused(name: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        method(name, **options)


# ------------------------------------------------------------------------------- choices
@pytest.mark.parametrize("name", NAMES)
def test_ragged_samples_keep_their_share(name: str) -> None:
    built = method(name, 6, 0.4)
    for layer, left in run(built, *RAGGED).items():
        for count, (_, visual, _) in zip(left, RAGGED, strict=True):
            assert abs(count - visual * built.plan()[layer]) <= 1


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_chooses_what_its_rows_choose(name: str) -> None:
    rows = made(*RAGGED)
    options = {"count": "rank", "scale": 4.0} if name == "sparsevlm" else {}
    built = method(name, 6, 0.4, **options)
    layer = built.layers()[0]
    together = built(rows.at(layer))
    for index in range(len(RAGGED)):
        own = rows.sample == index
        alone = built(rows.take(own).at(layer))
        assert torch.equal(together.keep[own], alone.keep)


def test_the_last_instruction_token_ranks_for_fastv() -> None:
    rows = made((3, 20, 4))
    kept = method("fastv", keep=None)(rows.at(1))
    expected = rows.attention.mean(0)[-1, 3:23].topk(10).indices.sort().values
    assert torch.equal(kept.keep[3:23].nonzero()[:, 0], expected)


def test_a_schedule_drops_one_token_at_a_time() -> None:
    """Counts refer to what entered, so a slow fall is not rounded away."""
    schedule = [1 - i / 100 for i in range(32)]
    left = run(method("gsearch", schedule=schedule), (2, 20, 3))
    assert list(left.values()) == [[round(20 * r)] for r in schedule[1:]]


def test_a_schedule_may_reach_zero() -> None:
    built = method("p_sigmoid", 4, schedule=[1, 0.5, 0, 0])
    assert run(built, (2, 9, 3), (1, 4, 1)) == {0: [4, 2], 1: [0, 0]}


def test_the_query_is_an_option() -> None:
    rows = made((3, 20, 6))
    schedule = [1, 0.5, 0.5, 0.5]
    attention = rows.attention.mean(0)[:, 3:23]
    for query, score in (("last", attention[-1]), ("instruction", attention[-6:].mean(0))):
        kept = method("gsearch", 4, schedule=schedule, query=query)(rows.at(0))
        expected = score.topk(10).indices.sort().values
        assert torch.equal(kept.keep[3:23].nonzero()[:, 0], expected)


# ------------------------------------------------------------------------------- recycling
def test_recycled_tokens_are_means_of_dropped_ones() -> None:
    rows = made((3, 200, 5), (2, 100, 4))
    built = method("sparsevlm", fractions=[0.5, 0.3, 0.2], layers=[2, 6, 15])
    tokens = rows.at(2)
    kept = built(tokens)
    assert kept_visual(kept, tokens) == [100, 50]
    assert kept.merge is not None
    source, target, weight = kept.merge.source, kept.merge.target, kept.merge.weight
    targets = target.unique()
    assert tokens.sample[targets].bincount().tolist() == [31 // 10 + 1, 16 // 10 + 1]
    assert tokens.sample[source].bincount().tolist() == [31, 16]  # int(0.3 * 100) + 1, of 50: 16
    assert torch.equal(tokens.sample[source], tokens.sample[target])
    sums = torch.zeros(len(tokens.sample)).index_add(0, target, weight)
    assert torch.allclose(sums[targets], torch.ones(len(targets)))
    assert bool(kept.keep[targets].all())
    assert bool(torch.isin(targets, source).all())  # a centre is part of its own mean
    assert not bool((kept.keep[source] & ~torch.isin(source, targets)).any())


def test_only_words_that_resemble_the_image_rate() -> None:
    rows = made((2, 20, 3))
    rows.hidden[2:22] = torch.tensor([1.0, *[0.0] * 7]) + 0.1 * rows.hidden[2:22]
    rows.hidden[22:] = torch.tensor([[0.0, 1.0, *[0.0] * 6], [5.0, *[0.0] * 7], [-1.0] * 8])
    kept = method("sparsevlm", fractions=[0.5, 0.5, 0.5], recycle=0)(rows.at(2))
    expected = rows.attention.mean(0)[23, 2:22].topk(10).indices.sort().values
    assert torch.equal(kept.keep[2:22].nonzero()[:, 0], expected)


def test_recycling_can_be_switched_off() -> None:
    tokens = made((3, 60, 5)).at(2)
    kept = method("sparsevlm", recycle=0)(tokens)
    assert kept.merge is None or len(kept.merge.source) == 0
    assert kept_visual(kept, tokens) == [round(60 * 300 / 576)]


def test_clusters_are_found() -> None:
    """Three tight heaps, three means; the other group has one."""
    corners = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    hidden = corners.repeat_interleave(5, 0) + torch.randn(15, 2) * 0.01
    hidden = torch.cat([hidden, hidden[:4] * 0 + 3])
    group = torch.tensor([0] * 15 + [1] * 4)
    merge = cluster_means(hidden, torch.ones(19, dtype=torch.bool), group, torch.tensor([3, 1]))
    heaps = [set((merge.source[merge.target == t] // 5).tolist()) for t in merge.target.unique()]
    assert sorted(map(tuple, heaps[:3])) == [(0,), (1,), (2,)]
    assert merge.weight[:15].tolist() == pytest.approx([0.2] * 15)
    assert merge.weight[15:].tolist() == [0.25] * 4


def test_the_rank_of_the_raters_map_decides() -> None:
    """With one rater the map has rank 1; two raters in a sample of two rows have rank 2."""
    built = method("sparsevlm", count="rank", scale=3, bias=2, recycle=0)
    tokens = made((2, 30, 1), (2, 3, 1), (1, 4, 1)).at(2)
    assert kept_visual(built(tokens), tokens) == [5, 2, 3]
    assert built.layers() == (2, 6, 15)


# ------------------------------------------------------------------------------- searching
class FallingTrial:
    """Agreement that depends on the schedule by a known law."""

    def __init__(self, built: Method, cost: list[float]) -> None:
        self.built, self.cost, self.calls = built, cost, 0

    def run(self) -> None:
        raise AssertionError("nothing is recorded")

    def fidelity(self) -> float:
        self.calls += 1
        schedule = self.built.schedule()
        return 1 - sum(c * (1 - r) for c, r in zip(self.cost, schedule, strict=True))


def test_gsearch_finds_the_least_each_layer_needs() -> None:
    built = method("gsearch", 4, tolerance=0.1, trials=20)
    trial = FallingTrial(built, [0.0, 0.2, 0.1, 0.0])
    found = built.calibrate(trial).found["schedule"]
    # Allowances .05, .075, .1: layers 1 and 2 first share .3 a token, then layer 2 goes on alone.
    assert found == pytest.approx([1.0, 1 - 0.05 / 0.3, 1 - (0.075 - 0.2 / 6) / 0.1, 0.0], abs=1e-4)
    built.use(Calibration(found={"schedule": found}))
    assert built.schedule() == tuple(found)
    built.share(0.3)
    assert schedule_average(built.schedule()) == pytest.approx(0.3)


def test_gsearch_shares_fractions_and_trades_off() -> None:
    built = method("gsearch", 7, every=3, trials=5)
    found = built.calibrate(FallingTrial(built, [0.0, *[0.01] * 6])).found["schedule"]
    assert found[1] == found[3]
    assert found[4] == found[6]
    built = method("gsearch", 3, weight=0.3, trials=8)
    cheap = built.calibrate(FallingTrial(built, [0.0, 0.05, 0.05])).found["schedule"]
    dear = built.calibrate(FallingTrial(built, [0.0, 0.5, 0.5])).found["schedule"]
    assert (cheap, dear) == ([1.0, 0.0, 0.0], [1.0, 1.0, 1.0])


def test_p_sigmoid_searches_the_slope() -> None:
    built = method("p_sigmoid", 16, 0.5, trials=12)
    trial = FallingTrial(built, [1 / (i + 1) for i in range(16)])  # early tokens matter most
    found = built.calibrate(trial)
    assert trial.calls == 12
    assert found == built.calibrate(FallingTrial(built, trial.cost))  # seeded
    default = trial.fidelity()
    built.use(found)
    assert trial.fidelity() >= default
    built.share(0.2)
    assert schedule_average(built.schedule()) == pytest.approx(0.2)


def test_searching_needs_optuna_and_something_to_search(monkeypatch: pytest.MonkeyPatch) -> None:
    built = method("p_sigmoid", 6, 1.0)
    with pytest.raises(ValueError, match=r"1\.0 keeps every token, so there is nothing"):
        built.calibrate(FallingTrial(built, [0.0] * 6))
    built.share(0.5)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match=r"run `pip install itprune\[search\]`"):
        built.calibrate(FallingTrial(built, [0.0] * 6))
    assert not method("p_sigmoid", slope=1.0).calibrates
    assert not method("gsearch", 2, schedule=[1, 0.5]).calibrates


def test_a_calibration_of_another_depth_is_refused() -> None:
    with pytest.raises(ValueError, match="calibration: needs one fraction for each of the 6"):
        method("gsearch", 6).use(Calibration(found={"schedule": [1.0, 0.5]}))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("gsearch", {"schedule": 5}),
        ("gsearch", {"schedule": [None] * 6}),
        ("p_sigmoid", {"slope": "steep"}),
        ("p_sigmoid", {"slope": -1.0}),
        ("dyvte", {"share": [1.0, 0.5]}),
        ("dyvte", {"share": ["a"], "bias": [0.0]}),
        ("yopo", {"heads": 3}),
        ("yopo", {"heads": [[1.0] * 31] * 5}),
        ("yopo", {"heads": [["a"] * 32] * 5}),
    ],
)
def test_a_spoilt_calibration_is_refused(name: str, found: dict[str, Any]) -> None:
    with torch.device("meta"):
        spoilt = method(name, 6)
    with pytest.raises(ValueError, match="calibration") as caught:
        spoilt.use(Calibration(found=found))
    assert "\n" not in str(caught.value)
    assert spoilt.calibration is None


def test_a_calibration_of_another_model_is_refused() -> None:
    for host in ({"depth": 3, "width": 8}, {"depth": 3}):
        with pytest.raises(ValueError, match=r"calibration: it was made with another model .3 LLM"):
            method("p_sigmoid", 6).use(Calibration(host=host))


def test_an_uncalibrated_gsearch_says_so() -> None:
    with pytest.warns(UserWarning, match="gsearch is not calibrated.*`itprune calibrate`"):
        run(method("gsearch", 6, 0.5), (2, 9, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(method("gsearch", 2, schedule=[1, 0.5]), (2, 9, 3))


# ------------------------------------------------------------------------------- whole forwards
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_forwards_meet_keep(name: str, layout: str) -> None:
    model = tiny_llava()
    attached = attach(model, PruneConfig(name, keep=0.4, layout=layout), prompt=PROMPT)
    model(**prompts(batch(ROWS)))
    assert attached.report.visual_layer_average == pytest.approx(0.4, abs=0.5 / PATCHES)


@pytest.mark.parametrize("name", NAMES)
def test_training_and_generating(name: str) -> None:
    model = tiny_llava().train()
    attached = attach(model, PruneConfig(name, keep=0.4), prompt=PROMPT)
    model(**batch(ROWS)).loss.backward()
    grad = model.model.multi_modal_projector.linear_1.weight.grad
    assert grad.isfinite().all()
    assert grad.abs().sum() > 0
    model.eval()
    out = model.generate(**prompts(batch(ROWS, side="left")), max_new_tokens=4, do_sample=False)
    width = batch(ROWS)["input_ids"].shape[1]
    assert out.shape == (len(ROWS), width + 4)
    assert attached.report.depth == DEPTH


@pytest.mark.parametrize("name", NAMES)
def test_keep_one_is_the_dense_model(name: str) -> None:
    model, data = tiny_llava(), prompts(batch(ROWS))
    dense = model(**data).logits
    attach(model, PruneConfig(name, keep=1.0), prompt=PROMPT)
    assert torch.equal(model(**data).logits, dense)


@pytest.mark.parametrize("name", ["p_sigmoid", "gsearch"])
def test_calibrating_a_model(name: str) -> None:
    options = {"trials": 3}
    if name == "gsearch":
        options["every"] = 2
    model = tiny_llava()
    attached = attach(model, PruneConfig(name, keep=0.4, options=options), prompt=PROMPT)
    found = calibrate(attached, [batch(ROWS)])
    assert Calibration.from_dict(found.to_dict()) == found
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(**prompts(batch(ROWS)))
    assert attached.report.visual_layer_average == pytest.approx(0.4, abs=0.5 / PATCHES)
