"""Several methods as one, and methods of other packages."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from itprune import PruneConfig, attach, calibrate, methods
from itprune.calibration import Calibration
from itprune.host import Host
from itprune.methods import build_method
from itprune.methods.prumerge import STAGE
from tests.models import batch, prompts, tiny_llava

HOST = Host.example()


def test_each_part_acts_at_its_own_place() -> None:
    config = PruneConfig.from_dict({"method": ["topk_cls", "fastv"], "keep": 0.36})
    assert config.method == "topk_cls+fastv"
    with attach(tiny_llava(), config) as pruner:
        pruner._engine.family.model(**prompts(batch(((5, "image", 9),))))
        report = pruner.report
        assert pruner.method.at("before_llm").keep == pytest.approx(0.6)
    assert report.visual_stage1 == [22]  # 0.6 of 36
    assert len(report.segments) == 2
    assert report.visual_layer_average == pytest.approx(0.36, abs=0.02)


def test_a_part_may_name_its_own_keep() -> None:
    options = {"topk_cls": {"keep": 0.5}, "fastv": {"layer": 3}}
    method = build_method("topk_cls+fastv", options, HOST)
    method.share(0.2)
    assert method.at("before_llm").keep == 0.5
    assert method.at("layers").keep == pytest.approx(0.4)
    assert method.layers() == (3,)
    method.share(1.0)
    assert method.idle


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("topk_cls+uniform", {}, "topk_cls and uniform both act at the place 'before llm'"),
        ("fastv+pyramiddrop", {}, "both act at the place 'layers'"),
        ("itprune+fastv", {}, "both act at the place 'layers'"),
        ("dense+fastv", {}, "dense drops nothing"),
        ("fastv+fastv", {}, "names a method twice"),
        ("topk_cls+fastw", {}, "fastv"),
        ("topk_cls+fastv", {"layer": 2}, "sections named topk_cls, fastv"),
        ("topk_cls+fastv", {"fastv": {"layr": 2}}, "prune.fastv: unknown option 'layr'"),
        ("topk_cls+fastv", {"fastv": 2}, "must be a mapping"),
        ("topk_cls+fastv", {"fastv": {"keep": 2.0}}, "prune.fastv.keep"),
    ],
)
def test_what_does_not_fit_together_is_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_method(name, options, HOST)


def test_a_stage_that_is_switched_off_leaves_its_place() -> None:
    method = build_method("itprune+fastv", {"itprune": {"stage2": None}}, HOST)
    assert method.owner == {"before_llm": "itprune", "layers": "fastv"}


@pytest.mark.parametrize("name", ["fastv", "sparsevlm", "dyvte", "gsearch", "yopo"])
def test_a_part_whose_share_is_everything_is_not_asked(name: str) -> None:
    """The other one spends the whole target: what is left to this one is 1.0."""
    config = PruneConfig(f"topk_cls+{name}", keep=0.6, options={"topk_cls": {"keep": 0.5}})
    with attach(model := tiny_llava(), config) as pruner:
        found = model(**prompts(batch())).logits
        assert pruner.method.parts[name].idle
        assert pruner.report.visual_layer_average == pytest.approx(0.5)
    with attach(model, PruneConfig("topk_cls", keep=0.5)):
        assert torch.equal(model(**prompts(batch())).logits, found)


@pytest.mark.parametrize("name", ["quecc", "vistog", "setok", "downsample"])
def test_a_compressor_whose_share_is_everything_compresses_nothing(name: str) -> None:
    config = PruneConfig(f"{name}+fastv", keep=0.6, options={"fastv": {"keep": 0.5}})
    with attach(model := tiny_llava(), config) as pruner:
        model(**prompts(batch(((5, "image", 9),))))
        assert pruner.report.visual_stage1 == [36]


def test_each_place_keeps_the_positions_of_its_part() -> None:
    method = build_method("topk_cls+pyramiddrop", {}, HOST)
    assert method.positions_at("before_llm") == "original"
    assert method.positions_at("layers") == "contiguous"


def test_a_combination_refuses_a_calibration_of_another_model() -> None:
    method = build_method("visionzip+fastv", {}, HOST)
    with pytest.raises(ValueError, match="another model"):
        method.use(Calibration(host={"depth": 3, "width": 5}))


def test_a_part_is_calibrated_behind_calibrated_ones() -> None:
    method = build_method("p_sigmoid+prumerge", {"p_sigmoid": {"trials": 1}}, HOST)
    seen: list[tuple[str, bool]] = []
    first, second = method.at("before_llm"), method.at("layers")

    class Trial:
        def run(self) -> None:
            seen.append(("run", first.calibration is not None))
            ones = torch.ones(1, dtype=torch.long)
            first.recorder.add(STAGE, first.rule, ones, 4 * ones)

        def fidelity(self) -> float:
            seen.append(("fidelity", first.calibration is not None))
            return 1.0

    method.share(0.3)
    method.use(method.calibrate(Trial()))
    assert seen == [("run", False), ("fidelity", True)]
    assert second.calibration.found["slope"] > 0


OUTSIDE = """
from itprune.methods import register_method
from itprune.methods.base import Method
from itprune.tokens import Kept

@register_method("brightest_outside")
class Brightest(Method):
    places = ("before_llm",)

    def before_llm(self, images):
        length = images.features.norm(dim=-1)
        return Kept(length > length.quantile(1 - self.keep))
"""


def test_an_installed_package_brings_its_methods(tmp_path: Path) -> None:
    """An entry point of the group `itprune.methods` is all a package needs."""
    (tmp_path / "brightest.py").write_text(OUTSIDE)
    info = tmp_path / "brightest-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brightest\nVersion: 1.0\n")
    points = "[itprune.methods]\nbrightest = brightest\nbroken = nowhere_to_be_found\n"
    (info / "entry_points.txt").write_text(points)
    code = "import itprune; print('brightest_outside' in itprune.methods())"
    root = Path(__file__).parent.parent
    path = os.pathsep.join([str(tmp_path), str(root)])
    answer = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.strip() == "True"
    assert "'broken' of nowhere_to_be_found is left out" in answer.stderr
    assert "brightest_outside" not in methods()


def test_downsampling_runs_the_tower_on_a_small_picture() -> None:
    model, data = tiny_llava(), prompts(batch(((5, "image", 9),)))
    seen: list[torch.Size] = []
    tower = model.model.vision_tower
    tower.embeddings.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    with attach(model, PruneConfig("downsample", keep=0.25)) as pruner:
        model(**data)
        assert seen == [torch.Size([1, 10, 32])]  # CLS and 3 x 3 patches
        assert pruner.report.visual_stage1 == [9]
        with pruner.tracing() as trace:
            model(**data)
    kept = trace.keep.view(6, 6).nonzero().tolist()
    assert kept == [[row, column] for row in (1, 3, 5) for column in (1, 3, 5)]


def test_a_calibration_of_another_model_is_refused() -> None:
    model, data = tiny_llava(), prompts(batch(((5, "image", 9),)))
    with attach(model, PruneConfig(keep=0.3)) as pruner:
        found = calibrate(pruner, [data])
    again = Calibration.from_dict(json.loads(json.dumps(found.to_dict())))
    with attach(model, PruneConfig(keep=0.3), calibration=again) as pruner:
        assert pruner.calibration == found
    other = dataclasses.replace(found, host={**found.host, "depth": 32})
    with pytest.raises(ValueError, match=r"made with another model .32 LLM layers .* here 6"):
        attach(model, PruneConfig(keep=0.3), calibration=other)
    attach(model, PruneConfig(keep=0.3)).detach()  # the refusal left nothing behind


def test_a_combination_calibrates_its_parts() -> None:
    model, data = tiny_llava(), prompts(batch(((5, "image", 9),)))
    options = {"itprune": {"stage2": None}, "p_sigmoid": {"trials": 2}}
    with attach(model, PruneConfig("itprune+p_sigmoid", keep=0.3, options=options)) as pruner:
        found = calibrate(pruner, [data])
        assert set(found.found) == {"itprune", "p_sigmoid"}
        assert pruner.method.at("layers").calibration is not None
        model(**data)
        assert pruner.report.visual_layer_average < 0.5
