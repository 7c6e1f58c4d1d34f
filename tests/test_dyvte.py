"""DyVTE: what routers look at, who exits when, budgets, and the exit inside a real forward."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from itprune import PruneConfig, attach, calibrate
from itprune.attach import Attached
from itprune.calibration import Calibration
from itprune.host import Host
from itprune.methods import build_method
from itprune.methods.dyvte import Dyvte, router_features
from itprune.methods.exits import exit_table
from itprune.tokens import LayerTokens
from tests.models import batch, prompts, tiny_llava

WIDTH, DEPTH = 8, 6
HOST = dataclasses.replace(Host.example(), depth=DEPTH, width=WIDTH)
ROWS = ("tvvvaal", "tvvaaal", "ttttal", "tvvvl")
"""One row is one sample: text, visual, asking and last tokens; the third has no image."""


def dyvte(**options: Any) -> Dyvte:
    torch.manual_seed(0)
    method = build_method("dyvte", options, HOST)
    assert isinstance(method, Dyvte)
    method.share(None)
    return method


def tokens(layer: int = 0, rows: tuple[str, ...] = ROWS, seed: int = 0) -> LayerTokens:
    """Tokens alive after a layer, of random states."""
    text = "".join(rows)
    marks = {name: torch.tensor([c == name for c in text]) for name in "tval"}
    sample = torch.tensor([i for i, row in enumerate(rows) for _ in row])

    def unused(*_: Any) -> Any:
        raise AssertionError("DyVTE reads no attention")

    return LayerTokens(
        layer=layer,
        sample=sample,
        samples=len(rows),
        position=torch.tensor([j for row in rows for j in range(len(row))]),
        visual=marks["v"],
        entered=torch.tensor([row.count("v") for row in rows]),
        droppable_text=torch.zeros_like(marks["v"]),
        instruction_lens=torch.zeros(len(rows), dtype=torch.long),
        asks=marks["a"] | marks["l"],
        last=marks["l"],
        hidden=torch.randn(len(text), WIDTH, generator=torch.Generator().manual_seed(seed)),
        embedded=unused,
        heads=unused,
        logits=unused,
    )


class Fixed(torch.nn.Module):
    """A router with margins of its own choosing, one for each sample."""

    def __init__(self, *margins: float) -> None:
        super().__init__()
        self.margin = torch.nn.Parameter(torch.tensor(margins), requires_grad=False)

    def forward(self, features: Tensor) -> Tensor:
        assert features.shape == (len(self.margin), 2 * WIDTH)
        return torch.stack([torch.zeros_like(self.margin), self.margin], 1)


def exits(method: Dyvte, seen: LayerTokens) -> list[bool]:
    """Which samples lose all their visual tokens; nobody loses anything else."""
    keep = method(seen).keep
    assert bool(keep[~seen.visual].all())
    gone = [~keep[seen.visual & (seen.sample == i)] for i in range(seen.samples)]
    assert all(bool(g.all()) or not bool(g.any()) for g in gone)
    return [bool(g.any()) for g in gone]


def test_a_router_looks_at_the_text_behind_the_image() -> None:
    seen = tokens()
    found = router_features(seen)
    first = seen.hidden[seen.sample == 0]
    assert torch.allclose(found[0], torch.cat([first[4:6].mean(0), first[6]]))
    alone = seen.hidden[-1]  # a question of one token stands for both
    assert torch.allclose(found[3], torch.cat([alone, alone]))


def test_the_published_router() -> None:
    router = build_method("dyvte", {}, dataclasses.replace(Host.example(), depth=3)).routers[0]
    assert [tuple(p.shape) for p in router.parameters()] == [(2048, 8192), (2, 2048)]


def test_one_router_a_layer_unless_shared_and_small_where_asked() -> None:
    assert len(dyvte().routers) == DEPTH - 1
    assert len(dyvte(shared=True).routers) == 1
    assert [tuple(p.shape) for p in dyvte(rank=2, hidden=5).routers[0].parameters()] == [
        (2, 2 * WIDTH), (5, 2), (2, 5),
    ]  # fmt: skip
    assert not list(dyvte(exit_layer=2).parameters())


def test_every_sample_exits_on_its_own() -> None:
    method = dyvte()
    assert method.layers() == (0, 1, 2, 3, 4)
    method.routers[2] = Fixed(1.0, -1.0, 1.0, 0.0)
    assert exits(method, tokens(2)) == [True, False, False, False]


def test_a_batch_exits_when_all_agree() -> None:
    method = dyvte(batch="all")
    method.routers[1] = Fixed(1.0, -1.0, 1.0, 2.0)
    method.routers[2] = Fixed(1.0, 0.5, -1.0, 2.0)  # the sample without an image has no vote
    assert exits(method, tokens(1)) == [False] * 4
    assert exits(method, tokens(2)) == [True, True, False, True]


def test_text_alone_exits_nowhere() -> None:
    for agreement in ("sample", "all"):
        assert exits(dyvte(batch=agreement), tokens(rows=("tttl", "tl"))) == [False, False]


def test_a_fixed_exit_needs_no_router() -> None:
    method = dyvte(exit_layer=3)
    assert method.layers() == (3,)
    assert not method.calibrates
    assert exits(method, tokens(3)) == [True, True, False, True]


def test_an_exit_can_be_forced_and_its_features_seen() -> None:
    method = dyvte()
    method.routers[2] = Fixed(9.0, 9.0, 9.0, 9.0)
    method.share(1.0)
    assert method.idle
    with method.exit_after(None) as seen:
        assert not method.idle
        assert method.layers() == ()
        assert exits(method, tokens(2)) == [False] * 4
    assert seen.features is None
    with method.exit_after(1) as seen:
        assert method.layers() == (1,)
        assert exits(method, tokens(0)) == [False] * 4
        assert exits(method, tokens(1)) == [True, True, False, True]
    assert seen.features is not None
    assert torch.equal(seen.features, router_features(tokens()))
    assert seen.visual is not None
    assert seen.visual.tolist() == [3, 2, 0, 3]
    with pytest.raises(ValueError, match=r"layer 5 is not in 0\.\.4"), method.exit_after(5):
        pass


def test_all_routers_get_a_gradient_and_one_of_them_something() -> None:
    method = dyvte()
    assert not any(p.requires_grad for p in method.parameters())
    method.requires_grad_(True)
    logits = method.logits(router_features(tokens()), 3)
    assert torch.equal(logits, method.routers[3](router_features(tokens())))
    logits[:, 1].sum().backward()
    moved = [
        bool(p.grad.any()) for r in method.routers for p in r.parameters() if p.grad is not None
    ]
    assert moved == [False] * 6 + [True] * 2 + [False] * 2


# ----------------------------------------------------------------------------------- budgets
def test_the_table_of_exits_counts_right() -> None:
    margin = torch.tensor([[-1.0, 3.0, 2.0], [1.0, 0.0, 5.0]])
    share, bias = exit_table(margin, torch.tensor([3, 1]), first=1, depth=6)
    assert share[0] == 1.0
    assert share == sorted(share, reverse=True)
    assert bias == sorted(bias)
    for s, b in zip(share, bias, strict=True):
        left = [next((k + 2 for k in range(3) if row[k] + b > 0), 6) for row in margin]
        assert s == pytest.approx((3 * left[0] + left[1]) / 24, abs=1e-5)
    assert share[-1] == pytest.approx(2 / 6)  # everybody leaves at once


class Batches:
    """Forwards of a model with random states: every layer asks, nothing is dropped."""

    def __init__(self, method: Dyvte, count: int = 12) -> None:
        self.method, self.count = method, count

    def run(self) -> None:
        for i in range(self.count):
            for layer in self.method.layers():
                assert exits(self.method, tokens(layer, seed=97 * i + layer)) == [False] * 4

    def fidelity(self) -> float:
        raise AssertionError("not needed")

    def share(self) -> float:
        """Visual tokens left, averaged over the layers, when exits happen."""
        spent = total = 0
        for i in range(self.count):
            left = torch.full((4,), DEPTH)
            for layer in self.method.layers():
                gone = torch.tensor(exits(self.method, tokens(layer, seed=97 * i + layer)))
                left = torch.where(gone, left.clamp(max=layer + 1), left)
            spent += int((left * torch.tensor([3, 2, 0, 3])).sum())
            total += 8 * DEPTH
        return spent / total


@pytest.mark.parametrize("batch", ["sample", "all"])
@pytest.mark.parametrize("keep", [0.9, 0.5, 0.3])
def test_a_calibrated_bias_meets_the_target(batch: str, keep: float) -> None:
    method = dyvte(batch=batch)
    trial = Batches(method, count=24)
    method.share(keep)
    found = method.calibrate(trial)
    method.use(Calibration.from_dict(found.to_dict()))
    assert found.samples == 72
    assert trial.share() == pytest.approx(keep, abs=0.03 if batch == "sample" else 0.06)


def test_without_calibration_the_routers_alone_decide() -> None:
    method = dyvte()
    plain = [exits(method, tokens(k)) for k in method.layers()]
    method.share(0.4)
    with pytest.warns(UserWarning, match="keep=0.4 is set but the routers are not calibrated"):
        assert [exits(method, tokens(k)) for k in method.layers()] == plain
    method.share(None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exits(method, tokens())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": "row"}, r"prune.batch: unknown value 'row'"),
        ({"rank": 0}, r"prune.rank: must be at least 1"),
        ({"exit_layer": 5}, r"prune.exit_layer: 5 to 5 must ascend within 0..4"),
        ({"first": 3, "last": 2}, r"prune.first and prune.last: 3 to 2"),
    ],
)
def test_what_cannot_be_is_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dyvte(**options)


def test_a_target_below_the_first_exit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"prune.keep: 0.4 is less than 0.500"):
        dyvte(first=2).share(0.4)
    with pytest.raises(ValueError, match="found none"):
        dyvte().calibrate(Batches(dyvte(), count=0))


# ----------------------------------------------------------------------------------- in a model
def attached(**options: Any) -> tuple[torch.nn.Module, Attached]:
    model = tiny_llava()
    torch.manual_seed(0)
    return model, attach(model, PruneConfig("dyvte", None, options=options))


def test_routers_see_the_same_in_training_and_at_work() -> None:
    model, pruner = attached()
    taught = batch(((5, "image", 9, "answer"),))
    start = int((taught["labels"][0] != -100).int().argmax())
    asked = {k: v[:, :start] if v.ndim == 2 else v for k, v in prompts(taught).items()}
    method = pruner.method
    assert isinstance(method, Dyvte)
    with method.exit_after(2) as alone:
        model.generate(**asked, max_new_tokens=2, do_sample=False)
    with method.exit_after(2) as seen, torch.no_grad():
        model.train()(**taught)
    assert alone.features is not None
    assert seen.features is not None
    assert torch.allclose(alone.features, seen.features, atol=1e-5)


def test_a_forced_exit_is_a_fixed_exit() -> None:
    data = batch()
    model, pruner = attached()
    assert isinstance(pruner.method, Dyvte)
    with pruner.method.exit_after(1), torch.no_grad():
        forced = model(**data).logits
    assert pruner.report is not None
    assert pruner.report.visual_drops == {0: [36, 36, 72, 0], 2: [0, 0, 0, 0]}
    with pruner.method.exit_after(None), torch.no_grad():
        whole = model(**data).logits
    pruner.detach()
    real = data["attention_mask"].bool()
    with torch.no_grad():
        assert torch.allclose(whole[real], model(**data).logits[real], atol=1e-5)
    model, _ = attached(exit_layer=1)
    with torch.no_grad():
        fixed = model(**data).logits
    answers = torch.nn.functional.pad(data["labels"], (0, 1), value=-100)[:, 1:] != -100
    assert torch.equal(fixed[answers], forced[answers])
    assert not torch.allclose(fixed[answers], whole[answers], atol=1e-3)


def test_calibration_meets_the_target_in_a_model() -> None:
    model, pruner = attached()
    rows = ((4, "image", 7, "answer"), (6, "image", 3, "answer"))
    data = [batch(rows, seed=seed) for seed in range(8)]
    pruner.set_keep(0.5)
    calibrate(pruner, [prompts(each) for each in data])
    pruner.totals.reset()
    with torch.no_grad():
        for each in data:
            model(**prompts(each))
    totals = pruner.totals
    assert totals.visual_layer_tokens / (6 * totals.visual_in) == pytest.approx(0.5, abs=0.05)
