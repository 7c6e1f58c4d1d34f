"""The files of launch/: each is read as its launcher reads it, or a run of the matrix uses it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from deepspeed.launcher.runner import fetch_hostfile

from tests.distributed.matrix import LAUNCHERS
from tests.distributed.starting import ROOT
from train.fsdp import fsdp_options, set_plan
from train.launcher import Launch

ACCELERATE = sorted(path.stem for path in (ROOT / "launch/accelerate").glob("*.yaml"))
ALONE, TWO = Launch(1, 0, False, False), Launch(2, 0, False, False)
BY_FILE = Launch(2, 0, False, False, accelerate_fsdp="2")


def test_there_is_a_file_for_every_launcher() -> None:
    used = {option for launcher in LAUNCHERS.values() for option in launcher.overrides}
    for path in (ROOT / "launch/deepspeed").glob("*.json"):
        name = f"launch/deepspeed/{path.name}"
        assert path.stem == "zero2" or f"trainer.deepspeed={name}" in used  # zero2 is the default
    assert (
        sorted(["cpu2", "fsdp2", "fsdp2_cpu2", "multi_gpu", "multi_node", "zero2", "zero3"])
        == ACCELERATE
    )


@pytest.mark.parametrize("name", ACCELERATE)
def test_accelerate_reads_its_files(name: str) -> None:
    file = ROOT / f"launch/accelerate/{name}.yaml"
    config = load_config_from_file(str(file))
    assert file.read_text().startswith("# ")  # says what it is for
    kinds = {"f": DistributedType.FSDP, "z": DistributedType.DEEPSPEED}
    assert config.distributed_type == kinds.get(name[0], DistributedType.MULTI_GPU)
    assert config.use_cpu == name.endswith("cpu2")
    counts = {"cpu2": 2, "fsdp2_cpu2": 2, "multi_node": 16}
    assert config.num_processes == counts.get(name, 8)
    if name.startswith("fsdp2"):
        assert config.fsdp_config["fsdp_version"] == 2
    if name.startswith("zero"):
        named = config.deepspeed_config["deepspeed_config_file"]
        assert json.loads((ROOT / named).read_text())["zero_optimization"]["stage"] == int(name[-1])
    assert config.num_machines == (2 if name == "multi_node" else 1)


def test_deepspeed_reads_the_host_file() -> None:
    assert fetch_hostfile(str(ROOT / "launch/hostfile.example")) == {"node1": 8, "node2": 8}


# ---------------------------------------------------------------------------------------- FSDP2
def test_who_runs_fsdp() -> None:
    named = {"fsdp": "full_shard", "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}
    assert fsdp_options({}, TWO, "lora") == {}
    assert fsdp_options({}, BY_FILE, "lora") == {}
    assert fsdp_options(named, TWO, "lora") == {"fsdp_config": named["fsdp_config"]}
    assert fsdp_options({"optim": "adamw_8bit"}, TWO, "lora") == {}
    assert fsdp_options(named, ALONE, "lora") == {"fsdp": None, "fsdp_config": None}


@pytest.mark.parametrize(
    ("trainer", "launch", "says"),
    [
        ({"fsdp": "true"}, BY_FILE, "in one place only"),
        ({"fsdp": "true", "fsdp_config": {"version": 1}}, TWO, "FSDP version 1 cannot hold"),
        ({}, Launch(2, 0, False, False, accelerate_fsdp="1"), "set fsdp_version: 2"),
        ({"fsdp": "true", "deepspeed": "a.json"}, TWO, "runs without trainer.deepspeed"),
        ({"fsdp": "true", "fsdp_config": "none.json"}, TWO, "fsdp_config: no such file: none.json"),
        ({"fsdp": "true", "optim": "adamw_bnb_8bit"}, TWO, "trainer.optim: adamw_bnb_8bit is of"),
        ({"optim": "paged_adamw_8bit"}, BY_FILE, "trainer.optim: paged_adamw_8bit is of"),
    ],
)
def test_fsdp_that_cannot_be_is_refused(
    trainer: dict[str, object], launch: Launch, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        fsdp_options(trainer, launch, "lora")


def test_a_configuration_of_fsdp_is_read_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "fsdp.json"
    file.write_text('{"version": 2, "cpu_offload": true}')
    named = {"fsdp": "true", "fsdp_config": str(file)}
    assert fsdp_options(named, TWO, "lora")["fsdp_config"] == {"version": 2, "cpu_offload": True}
    file.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        fsdp_options(named, TWO, "lora")


def test_fsdp_that_accelerate_made_something_else_of_is_never_silent() -> None:
    other = SimpleNamespace(is_fsdp2=False, distributed_type=DistributedType.MULTI_CPU)
    with pytest.raises(ValueError, match="accelerate would train MULTI_CPU in which every process"):
        set_plan(other, ["LlamaDecoderLayer"])
