"""`itprune train`: train from a recipe, under the launcher that fits.

One process runs in this Python. Several run under `deepspeed` where the recipe names
trainer.deepspeed, and under `accelerate launch` otherwise; FSDP2 is what the recipe's trainer.fsdp
or an accelerate file says. A run whose output folder holds a checkpoint of the same recipe goes on
from there. The exit status is that of training: 2 where the recipe has to be put right.
"""

from __future__ import annotations

import argparse
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from itprune.cli.child import run_child
from itprune.cli.loading import check_least
from itprune.project import Project, find_project

LAUNCHERS = ("none", "deepspeed", "accelerate")
EXAMPLES = """\
examples:
  itprune train configs/quickstart.yaml
  itprune train configs/lora_pruned.yaml prune.keep=0.33 trainer.output_dir=outputs/keep33
  itprune train configs/lora_pruned.yaml --nproc 4 --launcher accelerate
  itprune train configs/full_pruned.yaml --config-file launch/accelerate/fsdp2.yaml
  itprune train configs/lora_pruned.yaml --nproc 2 --dry-run       (print the command and stop)
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "train",
        help="train from a recipe, under the launcher that fits",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_recipe(parser)
    parser.add_argument(
        "--nproc",
        type=int,
        metavar="N",
        help="processes; default: one a GPU; on a CPU what --config-file says, else 1",
    )
    parser.add_argument("--launcher", choices=LAUNCHERS, help="default: as told above")
    parser.add_argument(
        "--config-file", metavar="FILE", help="accelerate's file (means --launcher accelerate)"
    )
    parser.add_argument("--resume", action="store_true", help="demand a checkpoint to go on from")
    parser.add_argument(
        "--check",
        action="store_true",
        help="validate recipe and options, print the recipe resolved and stop",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command and stop")
    parser.set_defaults(run=run)


def add_recipe(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    """CONFIG and its overrides."""
    parser.add_argument("config", metavar="CONFIG", nargs=nargs, help="a recipe, a YAML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="replaces a value of the recipe"
    )


def run(args: argparse.Namespace) -> int:
    """Starts the launcher; returns its exit status."""
    check_least(args, nproc=1)
    if not Path(args.config).is_file():
        raise ValueError(f"{args.config}: no such recipe")
    if find_spec("accelerate") is None:
        raise ValueError("training needs the package accelerate; pip install -e '.[train]'")
    project = find_project()
    script = [sys.executable, str(project.script("train.py")), args.config, *args.overrides]
    script += ["--traceback"] if args.traceback else []
    if args.check:
        return run_child([*script, "--check"])
    script += ["--resume"] if args.resume else []
    import torch

    devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    trainer: Mapping[str, Any] = {}
    if devices or args.launcher or args.config_file or (args.nproc or 1) > 1:
        # One process tells what is wrong with a recipe better than eight.
        checked = subprocess.run([*script, "--check"], stdout=subprocess.PIPE, text=True)
        if checked.returncode:
            return checked.returncode
        import yaml

        trainer = yaml.safe_load(checked.stdout)["trainer"]
    start = choose(args, trainer, 0 if trainer.get("use_cpu") else devices, project)
    command = start.command(project, script[1:])
    if args.dry_run:
        print(shlex.join(command))
        return 0
    return run_child(command, shell_around=start.launcher == "deepspeed")


@dataclass(frozen=True)
class Start:
    """How a run is started."""

    launcher: str
    processes: int
    gpus: int
    """That this machine shows; 0: the run uses the CPU."""
    config_file: Path | None = None
    """The accelerate file the user named."""

    def command(self, project: Project, script: list[str]) -> list[str]:
        """The words of the command.

        Args:
            project: where launch files are.
            script: the training script and its own words.
        """
        if self.launcher == "none":
            return [sys.executable, *script]
        count = str(self.processes)
        if self.launcher == "accelerate":
            usual = "multi_gpu.yaml" if self.gpus else "cpu2.yaml"
            file = self.config_file or project.accelerate_file(usual)
            module = ["-m", "accelerate.commands.launch", "--config_file", str(file)]
            counts = ["--num_processes", count, "--main_process_port", free_port()]
            return [sys.executable, *module, *counts, *script]
        # Told a number, DeepSpeed counts from the first GPU whatever CUDA_VISIBLE_DEVICES says;
        # told none, it takes those that are shown.
        counts = [] if self.processes == self.gpus else ["--num_gpus", count]
        module = ["-m", "deepspeed.launcher.runner", "--master_port", free_port()]
        return [sys.executable, *module, *counts, *script]


def choose(
    args: argparse.Namespace, trainer: Mapping[str, Any], gpus: int, project: Project
) -> Start:
    """The launcher and the number of processes.

    Args:
        args: the options.
        trainer: the recipe's section.
        gpus: that this machine shows; 0: the run uses the CPU.
        project: where launch files are.

    Raises:
        ValueError: options that do not go together, more processes than GPUs, a missing package.
    """
    if args.config_file is not None and args.launcher not in (None, "accelerate"):
        raise ValueError(f"--config-file belongs to accelerate, not to --launcher {args.launcher}")
    alone = args.launcher == "none"
    file = None if args.config_file is None else _find(project, args.config_file)
    processes = args.nproc or (1 if alone else gpus or _processes_of(file))
    if gpus and processes > gpus:
        raise ValueError(f"--nproc {processes}: this machine shows {gpus} GPU(s)")
    if alone and processes > 1:
        raise ValueError(
            f"--nproc {processes}: one process runs without a launcher; use --launcher deepspeed "
            "or accelerate"
        )
    if alone and gpus > 1:
        raise ValueError(
            f"--launcher none: a bare process would spread each batch over all {gpus} GPUs; use "
            "--launcher accelerate --nproc 1, or show it one GPU (CUDA_VISIBLE_DEVICES)"
        )
    launcher = args.launcher or _default(args, trainer, processes, gpus)
    if launcher == "deepspeed":
        if find_spec("deepspeed") is None:
            raise ValueError(
                "--launcher deepspeed: the package is not installed; pip install deepspeed, or use "
                "--launcher accelerate"
            )
        if processes < gpus:
            print(
                f"itprune: warning: DeepSpeed takes the machine's first {processes} GPU(s), "
                "whatever CUDA_VISIBLE_DEVICES says; --launcher accelerate respects it",
                file=sys.stderr,
            )
    return Start(launcher, processes, gpus, file)


def _find(project: Project, named: str) -> Path:
    for path in (Path(named), project.root / named):
        if path.is_file():
            return path
    raise ValueError(f"--config-file: no such file: {named}")


def _processes_of(file: Path | None) -> int:
    """What accelerate's file says; 1 where it says nothing."""
    if file is None:
        return 1
    import yaml

    try:
        said = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config-file: {file}: {' '.join(str(error).split())}") from None
    count = said.get("num_processes", 1) if isinstance(said, dict) else None
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"--config-file: {file}: num_processes must be a number of at least 1")
    return count


def _default(
    args: argparse.Namespace, trainer: Mapping[str, Any], processes: int, gpus: int
) -> str:
    if args.config_file is not None:
        return "accelerate"
    if processes == 1 and gpus <= 1:
        return "none"
    named = trainer.get("deepspeed") is not None and processes > 1
    return "deepspeed" if named and find_spec("deepspeed") is not None else "accelerate"


def free_port() -> str:
    """A port nobody listens on, so that two runs on one machine do not meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])
