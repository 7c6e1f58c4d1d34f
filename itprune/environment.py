"""What is installed here, what the machine has, and which features that makes ready.

Versions come from the packages' own metadata, without importing them: that is quick, and a broken
package cannot break the report about it. Only torch is imported, for it alone knows the devices.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import Version

PACKAGES = (
    "itprune", "torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes",
    "datasets", "trl", "liger-kernel", "flash-attn", "torchvision", "tensorboard", "wandb",
    "trackio", "optuna", "safetensors", "pillow", "tqdm", "pyyaml", "triton", "ninja", "matplotlib",
)  # fmt: skip
COMPILERS = ("c++", "g++", "clang++", "nvcc", "ninja")
GPU = "a CUDA GPU"
COMPILER = "a C++ compiler"
NINJA = "ninja on the PATH"
CUDA_DRIVER = Path("/proc/driver/nvidia/version")
SHARED_MEMORY = Path("/dev/shm")
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
SMALL = 1 << 30
"""Bytes of shared memory below which data workers may run out of it."""


@dataclass(frozen=True)
class Feature:
    """What a user may want to do."""

    name: str
    packages: tuple[str, ...] = ()
    """As pip takes them."""
    machine: tuple[str, ...] = ()
    """What else it takes: `GPU`, `COMPILER`, `NINJA`."""


FEATURES = (
    Feature(
        "ask, merge, export, compare", ("torch", "transformers", "peft", "safetensors", "pillow")
    ),
    Feature("train", ("accelerate>=1.10", "datasets>=4", "pyyaml>=6", "tensorboard>=2.16")),
    Feature("DeepSpeed ZeRO-1/2/3", ("accelerate>=1.10", "deepspeed>=0.18")),
    Feature("ZeRO with CPU offload", ("deepspeed>=0.18", "ninja>=1.11"), (COMPILER, NINJA)),
    Feature("FSDP2, DDP", ("accelerate>=1.10",)),
    Feature("QLoRA, 8-bit and paged optimisers", ("bitsandbytes>=0.48",)),
    Feature("Liger kernels", ("liger-kernel", "triton"), (GPU,)),
    Feature("flash attention", ("flash-attn",), (GPU,)),
    Feature("processors with videos (Qwen-VL, InternVL, …)", ("torchvision",)),
    Feature("TRL", ("trl>=1.16",)),
    Feature("report_to: wandb", ("wandb>=0.20",)),
    Feature("report_to: trackio", ("trackio",)),
    Feature("searched schedules", ("optuna>=4",)),
    Feature("plots", ("matplotlib>=3.9",)),
)


@dataclass(frozen=True)
class State:
    """A feature on this machine."""

    feature: str
    missing: tuple[str, ...]
    """Packages and other things; none: it is ready."""
    command: str | None
    """Installs the packages."""

    @property
    def ready(self) -> bool:
        return not self.missing


@dataclass(frozen=True)
class Device:
    """An accelerator."""

    name: str
    memory: int
    """Bytes; 0: it does not tell."""
    capability: str
    bf16: bool


@dataclass(frozen=True)
class Environment:
    """Everything `itprune env` tells."""

    system: str
    python: str
    packages: Mapping[str, str | None]
    """Version of each; None: not installed."""
    devices: tuple[Device, ...]
    cuda: str | None
    """That torch was built for; None: a CPU build."""
    cores: int
    """Open to this process."""
    memory: int
    """Bytes, of the machine or of the container."""
    tools: Mapping[str, str | None]
    """Compilers and ninja: where they are."""
    features: tuple[State, ...]
    traps: tuple[str, ...]
    """What is installed but would go wrong, one sentence each."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        values = asdict(self)
        states = zip(values["features"], self.features, strict=True)
        return {**values, "features": [{**v, "ready": s.ready} for v, s in states]}


def look() -> Environment:
    """Looks at this machine."""
    devices, cuda, broken = _devices()
    tools = {name: shutil.which(name) for name in COMPILERS}
    return Environment(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        packages={name: installed(name) for name in PACKAGES},
        devices=devices,
        cuda=cuda,
        cores=cores(),
        memory=memory(),
        tools=tools,
        features=tuple(state_of(f, tools, bool(devices)) for f in FEATURES),
        traps=(*broken, *traps(cuda is None and not broken, tools)),
    )


# ------------------------------------------------------------------------------------ packages
@cache
def installed(name: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def meets(requirement: str) -> bool:
    """Whether what is installed is what pip would want, versions with local tags included."""
    wanted = Requirement(requirement)
    found = installed(wanted.name)
    return found is not None and wanted.specifier.contains(Version(found), prereleases=True)


def state_of(feature: Feature, tools: Mapping[str, str | None], gpu: bool) -> State:
    """A feature on this machine."""
    lacking = tuple(text for text in feature.packages if not meets(text))
    there = {
        GPU: gpu,
        COMPILER: any(tools[name] for name in ("c++", "g++", "clang++")),
        NINJA: tools["ninja"] is not None or "ninja>=1.11" in lacking,
    }
    others = tuple(thing for thing in feature.machine if not there[thing])
    return State(feature.name, (*lacking, *others), _command(lacking) if lacking else None)


def _command(lacking: tuple[str, ...]) -> str:
    """What installs packages, those included that pip alone would get wrong."""
    words = [f"'{text}'" if ">" in text else text for text in lacking]
    if "torchvision" in lacking and (installed("torch") or "").endswith("+cpu"):
        words += ["--index-url", CPU_WHEELS]  # the usual index has it for CUDA: see traps
    if "flash-attn" in lacking:
        words.append("--no-build-isolation")  # it compiles against the torch that is here
    return f"pip install {' '.join(words)}"


def unmet(name: str) -> Iterator[str]:
    """What an installed package demands of others we know of and does not get."""
    for text in requires(name) or ():
        try:
            wanted = Requirement(text)
        except InvalidRequirement:
            continue
        known = wanted.name.lower().replace("_", "-")
        plain = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
        if plain and known in PACKAGES and not meets(f"{known}{wanted.specifier}"):
            have = installed(known) or "not installed"
            yield f"{name} {installed(name)} needs {known}{wanted.specifier}, but it is {have}"


def traps(cpu_build: bool, tools: Mapping[str, str | None]) -> Iterator[str]:
    """What looks installed and would go wrong later, often without a word."""
    for name in PACKAGES:
        if installed(name) is not None:
            yield from unmet(name)
    torch, vision = installed("torch"), installed("torchvision")
    if torch is not None and vision is not None and torch.endswith("+cpu") and "+cpu" not in vision:
        yield (
            f"torchvision {vision} is built for CUDA, but torch {torch} for the CPU: importing it "
            "breaks transformers; pip uninstall torchvision, or install both from one index"
        )
    if cpu_build and CUDA_DRIVER.exists():
        yield "there is an NVIDIA driver, but torch is a CPU build: training would not use the GPU"
    if installed("ninja") is not None and tools["ninja"] is None:
        yield (
            "ninja is installed but not on the PATH, so DeepSpeed cannot compile; activate the "
            "environment"
        )
    if SHARED_MEMORY.is_dir():
        size = shutil.disk_usage(SHARED_MEMORY).total
        if size < SMALL:
            yield (
                f"{SHARED_MEMORY} holds {size >> 20} MB only: data workers may die of it; start "
                "the container with --shm-size=8g, or set data.workers=0"
            )


# ------------------------------------------------------------------------------------- machine
def _devices() -> tuple[tuple[Device, ...], str | None, tuple[str, ...]]:
    """Accelerators, torch's CUDA version, and what is wrong with torch."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return (), None, (f"torch cannot be imported ({str(error).splitlines()[0]})",)
    cuda = torch.version.cuda
    if torch.cuda.is_available():
        return tuple(_cuda_device(i) for i in range(torch.cuda.device_count())), cuda, ()
    other = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return (() if other is None else (Device(other.type, 0, "", False),)), cuda, ()


def _cuda_device(index: int) -> Device:
    import torch

    facts = torch.cuda.get_device_properties(index)
    capability = f"{facts.major}.{facts.minor}"
    return Device(facts.name, facts.total_memory, capability, facts.major >= 8)


def cores() -> int:
    """CPU cores open to this process, where the system tells; else the machine's."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def memory() -> int:
    """Bytes of the machine, or of the container where that allows less."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(limit).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            return min(whole, int(text))
    return whole
