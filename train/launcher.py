"""Who started this process, and the traps of doing so.

Three ways lead here: plain `python`, the `deepspeed` launcher (it passes --local_rank and means
ZeRO), and torchrun or `accelerate launch`. Some combinations run silently as something else than
asked for; each of them is refused with a sentence.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from train.guards.faults import forget_children
from train.recipe.arguments import find_file
from train.recipe.contradictions import need

ZERO2 = "launch/deepspeed/zero2.json"


@dataclass(frozen=True)
class Launch:
    """The launcher's facts, read once from its environment."""

    processes: int
    """Processes that the launcher started."""
    rank: int
    by_deepspeed: bool
    """Started by the `deepspeed` launcher."""
    accelerate_deepspeed: bool
    """`accelerate launch` with a DeepSpeed configuration of its own."""
    accelerate_fsdp: str | None = None
    """The FSDP version of `accelerate launch` with an FSDP configuration of its own."""


def read_launch(local_rank: int | None, env: Mapping[str, str] = os.environ) -> Launch:
    """Reads the launcher's environment.

    Args:
        local_rank: the --local_rank argument, which only the `deepspeed` launcher passes.
        env: the environment.

    Raises:
        ValueError: `accelerate launch` was asked for several processes but started one.
    """
    distributed = "RANK" in env and "WORLD_SIZE" in env
    if not distributed and "ACCELERATE_MIXED_PRECISION" in env and "MASTER_PORT" in env:
        raise ValueError(
            "accelerate was asked for several processes but started only one (--cpu and "
            "distributed_type: MULTI_CPU do that); use --config_file launch/accelerate/cpu2.yaml"
        )
    return Launch(
        processes=int(env["WORLD_SIZE"]) if distributed else 1,
        rank=int(env["RANK"]) if distributed else 0,
        by_deepspeed=distributed and (local_rank is not None or "CROSS_SIZE" in env),
        accelerate_deepspeed=_says(env, "ACCELERATE_USE_DEEPSPEED"),
        accelerate_fsdp=env.get("FSDP_VERSION", "1") if _says(env, "ACCELERATE_USE_FSDP") else None,
    )


def _says(env: Mapping[str, str], name: str) -> bool:
    return env.get(name, "").lower() == "true"


def deepspeed_config(trainer: Mapping[str, Any], launch: Launch) -> str | dict[str, Any] | None:
    """The DeepSpeed configuration of this run, or None for a run without DeepSpeed.

    The `deepspeed` launcher means ZeRO-2 where the recipe names nothing; a single process started
    by plain `python` runs without, so that one recipe serves all launchers.

    Raises:
        ValueError: the file does not exist, or accelerate brings a second configuration
            or FSDP.
    """
    named = trainer.get("deepspeed")
    if launch.accelerate_deepspeed:
        if named is not None:
            raise ValueError(
                "trainer.deepspeed: accelerate's file already configures DeepSpeed; name it in "
                "one place only"
            )
        return None
    if named is not None and launch.accelerate_fsdp is not None:
        raise ValueError(
            "trainer.deepspeed: accelerate's file already asks for FSDP; a run has one of them, "
            "so set trainer.deepspeed=null or use another file"
        )
    if named is None and launch.by_deepspeed:
        named = ZERO2
    if named is None or (launch.processes == 1 and not launch.by_deepspeed):
        return None
    if isinstance(named, dict):
        return named
    path = find_file(named)
    if path is None:
        raise ValueError(f"trainer.deepspeed: no such file: {named}")
    return str(path)


def prepare_deepspeed(on_cpu: bool) -> None:
    """Starts DeepSpeed's process group before transformers reads the world size.

    With ZeRO-3 a model is sharded while it loads and must know the world size by then. On a CPU
    the shared-memory all-reduce, which a compiler would have to build first, is left out: gloo
    does the same without one.

    Raises:
        ValueError: DeepSpeed is not installed.
    """
    need("deepspeed", "trainer.deepspeed", "ZeRO", "train")
    import deepspeed
    import deepspeed.ops

    if on_cpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="gloo" if on_cpu else None, auto_mpi_discovery=False, verbose=False
    )


def check_world(args: Any, launch: Launch) -> None:
    """Refuses a run whose processes do not know of each other, and one process on many devices.

    Raises:
        ValueError: transformers sees another number of processes than the launcher started, or
            would split each batch over several GPUs by itself.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"one process sees {args.n_gpu} GPUs, over which transformers would split every batch; "
            "start one process a GPU (`itprune train`, deepspeed, accelerate launch), or show it "
            "one by CUDA_VISIBLE_DEVICES=0"
        )
    if args.world_size != launch.processes:
        raise ValueError(
            f"the launcher started {launch.processes} processes but each would train alone "
            f"(world size {args.world_size}); on a machine without an accelerator set "
            "trainer.use_cpu=true"
        )


def leave(status: int) -> None:
    """Ends the process; one of several without the interpreter's teardown.

    Everything is written and the process group closed by now, but on a CPU gloo's native threads
    can still be running, and tearing them down then aborts a rank that has done its work.
    """
    forget_children()
    for child in multiprocessing.active_children():
        child.kill()  # data workers, which do not hear the request to end that comes at exit
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
