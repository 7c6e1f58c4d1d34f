"""Faults in this process: sick losses, checkpoints cut short, files that cannot be written."""

from __future__ import annotations

import errno
import json
import re
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from tests.train.helpers import losses, recipe_values, turn, write_data, write_recipe
from train.guards.complete import COMPLETE, clear, flaw, last_complete, remove_old, seal
from train.guards.faults import Fault, lost_peer, not_written, told
from train.guards.health import Health
from train.guards.stopping import StopRequest
from train.launcher import Launch
from train.recipe.config import load_recipe
from train.run import run

ALONE = Launch(processes=1, rank=0, by_deepspeed=False, accelerate_deepspeed=False)
SAVES = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
Train = Callable[..., Path]


def start(
    model: Path,
    data: Path,
    output: Path,
    *overrides: str,
    resume: bool = False,
    stop: StopRequest | None = None,
) -> Path:
    values = recipe_values(model, data, output, **SAVES)
    recipe = load_recipe(write_recipe(output.with_suffix(".yaml"), values), overrides)
    run(recipe, ALONE, resume, stop)
    return output


# ------------------------------------------------------------------------- what counts
@pytest.fixture(scope="module")
def whole(tiny_llava_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an unbroken run with three checkpoints."""
    folder = tmp_path_factory.mktemp("faults")
    return start(tiny_llava_folder, write_data(folder / "data"), folder / "out")


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "out")
    return tmp_path / "out"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwrite(path: Path, start: int, stop: int | None) -> None:
    """Zeros in place of some bytes, at the same size: what a power cut leaves."""
    content = bytearray(path.read_bytes())
    content[start:stop] = bytes(len(content[start:stop]))
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "harm", "reason"),
    [
        ("adapter_model.safetensors", cut, r"adapter_model.safetensors has [\d,]+ of [\d,]+ bytes"),
        ("optimizer.pt", cut, r"optimizer.pt has"),
        ("rng_state.pth", cut, r"rng_state.pth has"),
        ("scheduler.pt", Path.unlink, r"scheduler.pt is missing"),
        ("recipe.yaml", Path.unlink, r"recipe.yaml is missing"),
        (COMPLETE, Path.unlink, r"the run ended while it was written"),
        (COMPLETE, cut, r"complete.json cannot be read"),
        ("adapter_model.safetensors", lambda p: overwrite(p, 0, 64), r"safetensors is damaged"),
        ("optimizer.pt", lambda p: overwrite(p, -2000, None), r"optimizer.pt is damaged"),
        ("trainer_state.json", lambda p: overwrite(p, 9, 90), r"trainer_state.json is damaged"),
    ],
)
def test_a_checkpoint_counts_only_when_it_is_complete(
    copy: Path, name: str, harm: Callable[[Path], Any], reason: str
) -> None:
    assert flaw(copy / "checkpoint-6") is None
    harm(copy / "checkpoint-6" / name)
    found = flaw(copy / "checkpoint-6")
    assert found is not None
    assert re.search(reason, found), found
    assert last_complete(copy) == copy / "checkpoint-4"


def test_a_run_goes_on_from_the_checkpoint_before_a_broken_one(
    whole: Path, copy: Path, tiny_llava_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = losses(whole)
    cut(copy / "checkpoint-6/optimizer.pt")
    (copy / "checkpoint-4" / COMPLETE).unlink()
    data = whole.parent / "data/train.json"
    start(tiny_llava_folder, data, copy, resume=True)
    said = capsys.readouterr()
    first, second = said.err.strip().splitlines()[:2]
    assert "checkpoint-6 does not count: optimizer.pt has" in first
    assert "checkpoint-4 does not count: the run ended while it was written" in second
    assert first.endswith(f"going on from {copy / 'checkpoint-2'}")
    assert f"going on from {copy / 'checkpoint-2'}" in said.out
    assert losses(copy) == expected
    assert flaw(copy / "checkpoint-6") is None  # written anew


def test_a_file_that_only_loading_finds_damaged_is_one_sentence(
    whole: Path, copy: Path, tiny_llava_folder: Path
) -> None:
    overwrite(copy / "checkpoint-6/optimizer.pt", 30, 4000)  # its table of contents is at the end
    assert flaw(copy / "checkpoint-6") is None
    data = whole.parent / "data/train.json"
    with pytest.raises(Fault, match=r"a file of the checkpoint cannot be read .*move .* away"):
        start(tiny_llava_folder, data, copy, "trainer.max_steps=8")


def test_old_checkpoints_go_and_the_best_stays(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_text("x")
        if step != 6:
            seal(folder)

    def steps() -> list[int]:
        return sorted(int(path.name[11:]) for path in tmp_path.glob("checkpoint-*"))

    remove_old(tmp_path, None, None)
    assert steps() == [2, 4, 6, 8, 10]
    remove_old(tmp_path, 3, str(tmp_path / "checkpoint-2"))
    assert steps() == [2, 8, 10]
    clear(tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-10").mkdir()  # being written
    remove_old(tmp_path, 1, None)
    assert steps() == [8]


def test_a_damaged_checkpoint_does_not_count_as_the_newest(tmp_path: Path) -> None:
    for step in (4, 6, 5):  # 5 is written by the run that passed over 6
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_text("whole")
        seal(folder)
        if step == 6:
            cut(folder / "weights")
    remove_old(tmp_path, 1, None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


# ------------------------------------------------------------------------- no room to write
@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Files end at so many bytes, as they do on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("file", ["optimizer.pt", "adapter_model.safetensors"])
def test_a_full_disk_leaves_the_checkpoint_before(
    whole: Path, copy: Path, tiny_llava_folder: Path, file: str
) -> None:
    largest = (copy / "checkpoint-6" / file).stat().st_size
    data = whole.parent / "data/train.json"
    options = ("trainer.max_steps=10", "trainer.save_total_limit=1")
    with (
        pytest.raises(Fault, match=r"step 8, saving checkpoint-8: .* MB are free in") as fault,
        no_file_above(largest - 1000),
    ):
        start(tiny_llava_folder, data, copy, *options)
    assert f"the last complete checkpoint is {copy / 'checkpoint-6'}" in str(fault.value)
    assert "\n" not in str(fault.value)
    assert not (copy / "checkpoint-8").exists()
    assert last_complete(copy) == copy / "checkpoint-6"


def test_reasons_of_the_system_are_told(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as full:
        Path("/dev/full").write_text("x")
    assert full.value.errno == errno.ENOSPC
    reason = not_written(full.value, tmp_path)
    assert reason is not None
    assert reason.startswith("No space left on device")
    assert not_written(KeyError("x"), tmp_path) is None
    assert told(FileNotFoundError(2, "No such file", "a.json"))[:2] == (
        "[Errno 2] No such file: 'a.json'",
        1,
    )
    assert told(ValueError("a"))[:2] == ("a", 2)
    assert told(KeyError("a"))[0] is None


# ------------------------------------------------------------------------- sick losses
@pytest.fixture(scope="module")
def poisoned(tiny_llava_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with weights that are no numbers for one rare token."""
    folder = tmp_path_factory.mktemp("poisoned") / "model"
    shutil.copytree(tiny_llava_folder, folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    token = AutoTokenizer.from_pretrained(folder).encode("Q", add_special_tokens=False)[-1]
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.nan
    model.save_pretrained(folder)
    return folder


def test_a_loss_that_is_no_number_stops_the_run_and_names_its_samples(
    poisoned: Path, tmp_path: Path
) -> None:
    data = write_data(tmp_path / "data")
    good = data.read_text()
    records = json.loads(good)
    records[5]["conversations"] = [turn("human", "<image>\nQ"), turn("gpt", "yes")]
    data.write_text(json.dumps(records))
    output = tmp_path / "out"
    with pytest.raises(Fault, match=r"step \d: the loss is nan") as fault:
        start(poisoned, data, output, "trainer.save_steps=1")
    said = str(fault.value)
    step = int(said.partition(":")[0].removeprefix("step "))
    assert step > 1, "the sample must not come first"
    assert f"{data}, record 5" in said
    assert said.count("record ") == 4  # the batch's, no others
    assert last_complete(output) == output / f"checkpoint-{step - 1}"
    assert str(output / f"checkpoint-{step - 1}") in said
    assert fault.value.status == 1
    data.write_text(good)  # the user mends the sample
    start(poisoned, data, output, "trainer.save_steps=1", "trainer.max_grad_norm=0.5")
    assert len(losses(output)) == 6


def health(ranks: int = 1) -> tuple[Health, Callable[..., Any]]:
    """Health of several processes, and a step with their losses."""
    told: list[torch.Tensor] = []

    def gather(mine: torch.Tensor) -> torch.Tensor:
        return torch.cat([*told, mine])

    judged = Health(SimpleNamespace(gather=gather), scaled=False)

    def step(*values: float, norm: float = 1.0, stop: float = 0.0) -> Any:
        told[:] = [torch.tensor([value, norm, stop]) for value in values[:-1]]
        judged.add(torch.tensor(values[-1] / 2))
        judged.add(torch.tensor(values[-1] / 2))
        return judged.judge(torch.tensor(norm), stop=False)

    return judged, step


def test_the_processes_judge_alike() -> None:
    _, step = health()
    assert step(2.0, 3.0).illness is None
    assert step(2.0, 3.0, stop=1.0).stop
    ill = step(float("inf"), 2.0)
    assert (ill.illness, ill.ranks, ill.stop) == ("the loss is inf", (0,), False)
    assert step(2.0, float("nan")).ranks == (1,)
    assert "gradients are not" in step(2.0, 3.0, norm=float("nan")).illness
    assert "gradients are not" in step(2.0, 3.0, norm=-1.0).illness  # DeepSpeed's way to say it


def test_only_a_loss_far_above_the_usual_has_exploded() -> None:
    _, step = health()
    assert step(11.0).illness is None
    for loss in (2.0, 0.001, 90.0, 0.001, 0.001):
        assert step(loss).illness is None  # jumps are not explosions
    assert step(120.0).illness == "the loss is 120, its median was 1.001"
    _, step = health()
    assert step(500.0).illness is None  # a sum, not a mean: nothing to compare it with
    assert step(900.0).illness is None
    assert step(80_000.0).illness is not None


def test_a_tiny_loss_that_jumps_has_not_exploded() -> None:
    _, step = health()
    for loss in (0.01, 0.01, 50.0):  # 5,000 times the median, but no more than guessing costs
        assert step(loss).illness is None


def test_weights_that_do_not_fill_their_file_are_damaged(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    path = folder / "model.safetensors"
    save_file({"weight": torch.ones(4)}, path)
    seal(folder)
    assert flaw(folder) is None
    path.write_bytes(path.read_bytes() + bytes(8))
    seal(folder)  # its list agrees, its table of contents does not
    assert flaw(folder) == "model.safetensors is damaged: its weights do not fill it"


def test_float16_may_overflow() -> None:
    judged, _ = health()
    judged.scaled = True
    judged.accelerator.gather = lambda mine: mine
    judged.add(torch.tensor(2.0))
    assert judged.judge(torch.tensor(torch.inf), stop=False).illness is None


def test_an_exploding_run_stops(tiny_llava_folder: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    wild = ("model.mode=full", "lora=null", "trainer.optim=sgd", "trainer.learning_rate=300",
            "trainer.max_grad_norm=0", "trainer.lr_scheduler_type=constant_with_warmup",
            "trainer.warmup_steps=30", "trainer.save_steps=1")  # fmt: skip
    with pytest.raises(Fault, match=r"step (\d): the loss is [\d,]+, its median was \d") as fault:
        start(tiny_llava_folder, data, tmp_path / "out", *wild)
    step = int(str(fault.value)[5])
    assert last_complete(tmp_path / "out") == tmp_path / f"out/checkpoint-{step - 1}"


def test_a_lost_connection_is_told_from_other_errors() -> None:
    assert lost_peer(torch.distributed.DistBackendError("NCCL"))
    assert not lost_peer(RuntimeError("shapes do not match"))


# ------------------------------------------------------------------------- asked to stop
class Asked(StopRequest):
    """Is asked as soon as a checkpoint can be written."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "saves" and value:
            self.receive(signal.SIGUSR1)


def test_a_run_that_is_asked_to_stop_saves_and_goes_on_later(
    whole: Path, tiny_llava_folder: Path, tmp_path: Path
) -> None:
    data, output = whole.parent / "data/train.json", tmp_path / "out"
    never = "trainer.save_strategy=no"
    with pytest.raises(Fault, match=r"^stopped by SIGUSR1 after step 1; .*checkpoint-1,") as fault:
        start(tiny_llava_folder, data, output, never, stop=Asked())
    assert fault.value.status == 128 + signal.SIGUSR1
    assert not (output / "adapter_model.safetensors").exists()  # nothing to take for trained
    start(tiny_llava_folder, data, output, never, resume=True)
    assert losses(output) == losses(whole)
