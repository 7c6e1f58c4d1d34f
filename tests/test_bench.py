"""The bench: its records are complete and its counts right. No test looks at a time."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from itprune.bench import bench_eval, bench_infer, bench_methods, bench_train
from itprune.bench.counting import SavedBytes, measure_flops, timed_choices
from itprune.bench.methods import MethodsBench, untrained
from itprune.bench.shape import Shape
from itprune.bench.shapes import SHAPES, build_model, find_shape, make_batch
from itprune.bench.train import Measured, _Bench
from itprune.bench.variants import Variant, train_variants
from itprune.cli import bench as command
from itprune.config import PruneConfig
from itprune.methods import method_class

TRAIN = (
    "dense",
    "dense_label_logits",
    "pruned_padded",
    "pruned_packed",
    "two_stage_packed",
    "attached_keep_1",
)

SMALL = {
    "vision_width": 32,
    "vision_layers": 3,
    "vision_heads": 2,
    "vision_ffn": 64,
    "patch": 4,
    "width": 32,
    "layers": 4,
    "ffn": 64,
    "vocab": 320,
    "text": 16,
    "supervised": 6,
}
SMALL_SHAPES = {
    "tiny": SHAPES["tiny"],
    "next-like": replace(
        SHAPES["next-like"], **SMALL, heads=4, image_size=16, tiles=2, mosaic=(6, 8)
    ),
    "qwen2.5-vl-like": replace(
        SHAPES["qwen2.5-vl-like"],
        **SMALL,
        heads=2,
        window=16,
        full_blocks=(1,),
        grids=((6, 8), (12, 4), (4, 12)),
    ),
}
"""Every kind of shape, small enough for a test."""


@pytest.fixture(params=sorted(SMALL_SHAPES))
def small(request, monkeypatch) -> str:
    """The name of a small shape of each kind."""
    monkeypatch.setitem(SHAPES, "small", SMALL_SHAPES[request.param])
    return "small"


def run(*args: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return command.run(parser.parse_args(["bench", *args]))


def numbers(row: dict) -> list[float]:
    return [value for value in row.values() if isinstance(value, int | float)]


def test_train_writes_a_complete_record(tmp_path, capsys) -> None:
    path = tmp_path / "bench.json"
    threads = torch.get_num_threads()
    assert (
        run("train", "--shape", "tiny", "--repeats", "2", "--threads", "2", "--json", str(path))
        == 0
    )
    assert torch.get_num_threads() == threads
    record = json.loads(path.read_text())
    rows = {row["variant"]: row for row in record["rows"]}
    assert tuple(rows) == TRAIN
    assert {"machine", "versions", "shape", "batch"} <= set(record)
    assert (record["machine"]["threads"], record["clock"]) == (2, "wall-clock seconds")
    for row in rows.values():
        assert {"step_s", "speedup", "flop_speedup", "peak_mb"} <= set(row)
        assert all(math.isfinite(n) for n in numbers(row))
        assert row["step_s"] > 0
        assert row["peak_mb"] > 0
    assert rows["dense"]["speedup"] == rows["dense"]["flop_speedup"] == 1
    assert rows["attached_keep_1"]["flop_speedup"] == 1
    assert 1 < rows["pruned_packed"]["seen_flop_speedup"] < rows["pruned_packed"]["flop_speedup"]
    assert rows["attached_keep_1"]["peak_mb"] == rows["dense"]["peak_mb"]
    assert 1 < rows["dense_label_logits"]["flop_speedup"] < rows["pruned_padded"]["flop_speedup"]
    assert rows["pruned_padded"]["flop_speedup"] < rows["pruned_packed"]["flop_speedup"]
    assert rows["pruned_packed"]["peak_mb"] < rows["dense_label_logits"]["peak_mb"]
    shown = capsys.readouterr().out
    assert all(f"| {name} " in shown for name in TRAIN)


def test_pruned_variants_meet_the_target_with_counts_that_differ(small: str) -> None:
    record = bench_train(small, batch=8, repeats=1)
    rows = {row["variant"]: row for row in record["rows"]}
    tokens = SHAPES[small].visual
    beside = 6 / tokens if "image_sizes" in make_batch(SHAPES[small], 1, labels=False) else 0.0
    for name in ("pruned_padded", "pruned_packed", "two_stage_packed"):
        # A newline stays beside what is kept of its row.
        assert -0.02 < rows[name]["visual_layer_average"] - 0.22 < 0.02 + beside
        assert rows[name]["selection_s"] > 0
        kept = rows[name]["visual_stage1"]
        assert max(kept) >= (1.4 if beside else 2) * min(kept)
    assert rows["dense"]["selection_s"] == 0


def test_lora_with_gradient_checkpointing_stays_out_of_the_tower() -> None:
    """The arithmetic of the shape for GPUs, on a tiny one."""
    shape = replace(SHAPES["tiny"], lora=True)
    bench = _Bench(shape, batch=2, threads=1)
    found = {}
    for variant in train_variants(shape, keep=0.22):
        found[variant.name] = Measured()
        bench.count(variant, found[variant.name])
    for name in ("pruned_packed", "two_stage_packed"):
        assert found[name].flops.all < found["dense_label_logits"].flops.all / 2
    assert found["attached_keep_1"].flops == found["dense"].flops
    tower = bench.model.get_base_model().model.vision_tower
    patches = tower(bench.batch["pixel_values"]).last_hidden_state
    assert not patches.requires_grad
    with SavedBytes(bench.model) as saved:
        loss = bench.forward()
    assert loss.requires_grad
    rows = bench.batch["input_ids"].numel() * shape.width * 4
    logits = bench.batch["input_ids"].numel() * shape.vocab * 4
    assert saved.total < 12 * rows + 3 * logits  # not the 20 or so rows that each layer saves


def test_infer_stores_what_the_report_says(small: str) -> None:
    record = bench_infer(small, batches=(1, 3), repeats=1, new_tokens=2)
    assert {row["batch"] for row in record["rows"]} == {1, 3}
    for row in record["rows"]:
        assert row["kv_as_reported"]
        assert all(math.isfinite(n) for n in numbers(row))
        if row["variant"] != "dense":
            assert row["prefill_flop_speedup"] > 1
            assert row["decode_flop_speedup"] > 1
            assert row["kv_ratio"] > 1
        if row["batch"] == 1:
            assert row["kv_mb"] == row["kv_filled_mb"]


def test_answers_are_timed_in_turns_on_the_tokens_that_stay(small: str, tmp_path, capsys) -> None:
    assert run("eval", "--shape", "small", "--batch", "2", "--repeats", "1", "--json",
               str(tmp_path / "eval.json")) == 0  # fmt: skip
    record = json.loads((tmp_path / "eval.json").read_text())
    rows = {row["variant"]: row for row in record["rows"]}
    assert set(rows) == {"dense", "pruned_padded", "pruned_packed", "two_stage_packed", "bare"}
    assert rows["dense"]["speedup"] == rows["dense"]["visual_layer_average"] == 1.0
    assert rows["bare"]["flop_speedup"] == 1.0
    assert rows["pruned_padded"]["visual_layer_average"] < 0.5
    assert all(math.isfinite(n) and n > 0 for row in rows.values() for n in numbers(row))
    assert "answers/s" in capsys.readouterr().out
    with torch.no_grad():
        assert len(bench_eval("small", 1, 1, new_tokens=2)["rows"]) == 5


@pytest.mark.parametrize("name", ["tiny", "next-like"])
def test_several_questions_share_their_picture(name: str, monkeypatch) -> None:
    """Dense and pruned alike: only the bare model runs its tower for every question."""
    monkeypatch.setitem(SHAPES, "small", SMALL_SHAPES[name])
    alone, shared = (
        {r["variant"]: r for r in bench_eval("small", 4, 1, questions=n)["rows"]} for n in (1, 2)
    )
    assert shared["bare"]["flop_speedup"] < 1.0 == alone["bare"]["flop_speedup"]
    assert shared["pruned_packed"]["flop_speedup"] > alone["pruned_packed"]["flop_speedup"]


def test_pictures_in_one_sequence_cannot_be_shared(monkeypatch) -> None:
    monkeypatch.setitem(SHAPES, "small", SMALL_SHAPES["qwen2.5-vl-like"])
    with pytest.raises(ValueError, match="takes all pictures in one sequence"):
        bench_eval("small", 2, 1, questions=2)
    with pytest.raises(ValueError, match="belongs to `itprune bench eval`"):
        run("train", "--shape", "small", "--questions", "2")


def test_methods_that_need_no_training_are_measured_beside_the_controls() -> None:
    names = [n for n in untrained() if method_class(n).__module__.startswith("itprune.")]
    assert not {"setok", "dyvte", "quecc", "vistog"} & set(names)  # others are other tests' own
    record = bench_methods("tiny", batch=2, repeats=1, names=",".join(names))
    rows = {row["variant"]: row for row in record["rows"]}
    assert list(rows)[:3] == ["dense", "random", "downsample"]
    assert set(rows) == set(names)
    for name, row in rows.items():
        assert all(math.isfinite(n) for n in numbers(row))
        assert (row["selection_s"] > 0) == (name != "dense")
        assert row["of_flop_bound"] == pytest.approx(row["speedup"] / row["flop_speedup"])
        if name != "dense":
            assert row["flop_speedup"] > 1
    assert rows["dense"]["speedup"] == rows["dense"]["flop_speedup"] == 1


def test_methods_say_where_the_budget_is_not_the_one_asked_for() -> None:
    record = bench_methods("tiny", batch=2, repeats=1, keep=0.22, names="fastv,topk_cls,prumerge")
    rows = {row["variant"]: row for row in record["rows"]}
    assert set(rows) == {"dense", "random", "downsample", "fastv", "topk_cls", "prumerge"}
    assert (rows["fastv"]["keep"], rows["topk_cls"]["keep"]) == (None, 0.22)
    assert rows["fastv"]["note"] == "published setting, 0.22 is out of reach"
    assert rows["fastv"]["visual_layer_average"] == pytest.approx((1 + 3 * 0.5) / 4, abs=0.01)
    assert rows["topk_cls"]["visual_layer_average"] == pytest.approx(0.22, abs=0.01)
    assert rows["prumerge"]["note"] == "calibrated"


def test_methods_take_options_and_are_printed(tmp_path, capsys) -> None:
    path = tmp_path / "methods.json"
    shown = "fastv:fraction=0.5"
    args = ("--shape", "tiny", "--batch", "2", "--repeats", "1", "--keep", "0.5")
    assert run("methods", *args, "--methods", f"{shown},p_sigmoid", "--json", str(path)) == 0
    rows = {row["variant"]: row for row in json.loads(path.read_text())["rows"]}
    assert rows["p_sigmoid"]["note"] == "not searched"
    printed = capsys.readouterr().out
    assert f"| {shown} " in printed
    assert "of the prefill" in printed


def test_the_look_ahead_pass_belongs_to_the_choice() -> None:
    """PyramidDrop's scores need a projection of their own, after every stage."""
    bench = MethodsBench(build_model(SHAPES["tiny"], False), SHAPES["tiny"], 2, 1, keep=0.5)
    config = PruneConfig(method="pyramiddrop", keep=0.7)
    ticks = iter(range(1000))
    bench.clock.now = lambda: float(next(ticks))
    with Variant("p", config).on(bench.model) as attached:
        with torch.no_grad(), timed_choices(attached, bench.clock) as choice:
            bench.prefill()
        stages = len(attached.method.layers())
        assert choice.seconds == 2 * stages  # one tick for each q and k, one for each choice
        with torch.no_grad():
            bench.prefill()
        assert choice.seconds == 2 * stages


@pytest.mark.parametrize("shape", SMALL_SHAPES.values(), ids=SMALL_SHAPES)
def test_a_shape_knows_its_tokens_and_its_cache(shape: Shape) -> None:
    batch = make_batch(shape, 3, labels=True)
    assert ((batch["input_ids"] == shape.image_id).sum(1) == shape.visual).all()
    assert ((batch["labels"] != -100).sum(1) == shape.supervised).all()
    with torch.no_grad():  # a model refuses other counts of visual tokens
        out = build_model(shape, training=False)(**batch, use_cache=True)
    assert out.loss.isfinite()
    keys = out.past_key_values.layers[0].keys
    assert keys.shape[1] * keys.shape[3] == shape.kv_width
    assert keys.shape[2] == shape.visual + shape.text


@pytest.mark.parametrize("shape", SMALL_SHAPES.values(), ids=SMALL_SHAPES)
def test_everything_trains_but_the_tower(shape: Shape) -> None:
    model = build_model(shape, training=True)
    model(**make_batch(shape, 2, labels=True)).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    frozen = {name for name, _ in model.named_parameters()} - trained
    assert frozen
    assert all("projector" in name or "merger" in name for name in trained if "vis" in name)
    assert any("projector" in name or "merger" in name for name in trained)
    assert all("vis" in name for name in frozen)


def test_two_shapes_have_the_tokens_of_high_resolution() -> None:
    assert SHAPES["next-like"].visual == 24**2 + 36 * 48 + 36
    assert SHAPES["qwen2.5-vl-like"].visual == 42 * 48
    sizes = make_batch(SMALL_SHAPES["qwen2.5-vl-like"], 3, labels=False)["image_grid_thw"]
    assert sizes.tolist() == [[1, 12, 16], [1, 24, 8], [1, 8, 24]]
    with pytest.raises(ValueError, match="different numbers of tokens"):
        replace(SMALL_SHAPES["qwen2.5-vl-like"], grids=((4, 4), (4, 6)))
    with pytest.raises(ValueError, match="does not fill 2 tiles of 4 patches"):
        replace(SMALL_SHAPES["next-like"], mosaic=(6, 6))


@pytest.mark.parametrize("mask", [False, True])
def test_attention_on_a_cpu_is_counted(mask: bool) -> None:
    query, key, value = (torch.randn(2, heads, 24, 8, requires_grad=True) for heads in (4, 2, 2))
    seen = torch.ones(24, 24, dtype=torch.bool).tril() if mask else None

    def attend() -> torch.Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, seen, is_causal=not mask, enable_gqa=True
        )

    product = 2 * 2 * 4 * 24 * 24 * 8  # multiply-adds of q k^T: B, H, Lq, Lk, d
    later = 0 if mask else 2 * 2 * 4 * sum(range(24)) * 8  # the same of pairs a causal call skips
    found = measure_flops(attend)
    assert (found.all, found.unseen) == (2 * product, 2 * later)
    assert found.seen == 2 * (product - later)
    out = attend()
    found = measure_flops(lambda: out.sum().backward())
    assert (found.all, found.unseen) == (5 * product, 5 * later)


def test_saved_bytes_count_activations_once() -> None:
    layer = torch.nn.Linear(8, 8)
    x = torch.randn(4, 8, requires_grad=True)
    with SavedBytes(layer) as saved:
        (layer(x) * x).sum()
    assert saved.total == 2 * 4 * 8 * 4  # x, kept by both products, and the output


def test_impossible_orders_are_one_sentence(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"--shape.*tiny"):
        bench_train("tniy")
    with pytest.raises(ValueError, match="--repeats: must be at least 1"):
        run("train", "--repeats", "0")
    with pytest.raises(ValueError, match="--methods: belongs to"):
        run("infer", "--methods", "random")
    with pytest.raises(ValueError, match="unknown method 'fastvv'"):
        bench_methods("tiny", names="fastvv")
    with pytest.raises(ValueError, match="there is no folder"):
        run("train", "--json", str(tmp_path / "none" / "bench.json"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="refusal of a machine without a GPU")
def test_a_shape_for_gpus_is_refused_without_one() -> None:
    assert SHAPES["llava-1.5-7b"].gpu_gib > 0
    with pytest.raises(ValueError, match=r"needs a CUDA GPU with 40 GiB"):
        find_shape("llava-1.5-7b")
