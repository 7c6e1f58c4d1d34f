"""What trains under which launcher, as data: the table of docs/training.md and its tests' cells.

    python -m tests.distributed.matrix

Every mode runs with a method that is a danger to ranks that have to meet: trained parts that need
an image, counts that differ, a keep drawn anew each step, an early exit, narrower layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.distributed.starting import Job

STEPS = 4
EVALUATED = ("trainer.eval_strategy=steps", "trainer.eval_steps=4")
SAVED = ("trainer.save_strategy=steps", "trainer.save_steps=2")
MODES = {
    "projector": ("model.mode=projector", "lora=null", "prune={method: dyvte, exit_layer: 2}"),
    "lora": ("prune={method: quecc, keep: 0.25}",),
    "qlora": (
        "model.mode=qlora",
        "prune={method: yopo, keep: 0.5, heads: null}",
        "model.learning_rates={projector: 2e-3}",
    ),
    "full": (
        "model.mode=full",
        "lora=null",
        "prune={method: itprune, keep: [0.3, 1.0, 0.5]}",
        *EVALUATED,
    ),
    "router": ("model.mode=router", "lora=null", "prune={method: dyvte, keep: null, hidden: 8}"),
}
"""Mode -> its overrides."""


@dataclass(frozen=True)
class Launcher:
    """A column of the table."""

    title: str
    kind: str
    """Of tests/distributed/starting.py, without the processes."""
    says: str
    """What the run's first line tells of it."""
    overrides: tuple[str, ...] = ()
    modes: tuple[str, ...] = tuple(MODES)
    """What runs in two processes."""
    alone: tuple[str, ...] = ()
    """What runs in one."""


def zero(name: str) -> tuple[str, ...]:
    return (f"trainer.deepspeed=launch/deepspeed/{name}.json",)


LAUNCHERS = {
    "python": Launcher("`python`", "python", "1 process", modes=(), alone=tuple(MODES)),
    "ddp": Launcher("accelerate, DDP", "ddp", "on cpu"),
    "fsdp2": Launcher("accelerate, FSDP2", "fsdp2", "FSDP2", alone=("lora", "full")),
    "fsdp2_sharded": Launcher(
        "FSDP2, sharded checkpoints",
        "ddp",
        "FSDP2",
        ("trainer.fsdp=true", "trainer.fsdp_config={state_dict_type: SHARDED_STATE_DICT}"),
        ("lora", "full"),
    ),
    "zero1": Launcher("ZeRO-1", "deepspeed", "ZeRO-1", zero("zero1"), ("lora", "full")),
    "zero2": Launcher("ZeRO-2", "deepspeed", "ZeRO-2", alone=("lora", "full")),
    "zero3": Launcher("ZeRO-3", "deepspeed", "ZeRO-3", zero("zero3"), alone=("lora", "full")),
    "zero3_accelerate": Launcher("accelerate, ZeRO-3", "zero3", "ZeRO-3", modes=("lora",)),
    "zero2_offload": Launcher(
        "ZeRO-2, offload", "deepspeed", "ZeRO-2", zero("zero2_offload"), ("lora",)
    ),
    "zero3_offload": Launcher(
        "ZeRO-3, offload", "deepspeed", "ZeRO-3", zero("zero3_offload"), ("lora",)
    ),
}
REFUSED = {("router", "fsdp2"): "model.mode: router trains beside the model's own forward"}
"""(mode, launcher) -> how its one sentence begins."""


@dataclass(frozen=True)
class Cell:
    """One mode under one launcher."""

    mode: str
    launcher: str
    processes: int

    @property
    def name(self) -> str:
        return f"{self.mode}-{self.launcher}-{self.processes}"

    @property
    def kind(self) -> str:
        kind = LAUNCHERS[self.launcher].kind
        return kind if kind == "python" else f"{kind} {self.processes}"

    @property
    def refused(self) -> str | None:
        return REFUSED.get((self.mode, self.launcher))

    def jobs(self) -> list[Job]:
        """Two processes that train adapters are killed on the way and go on."""
        batch = f"trainer.per_device_train_batch_size={4 // self.processes}"
        steps = f"trainer.max_steps={STEPS}"
        own = (*LAUNCHERS[self.launcher].overrides, *MODES[self.mode], batch)
        if self.mode != "lora" or self.processes == 1:
            return [Job(self.name, (*own, steps))]
        killed = Job(
            f"{self.name}-killed",
            (*own, *SAVED, "trainer.max_steps=200"),
            kill_at="checkpoint-4",
            goes_on=self.name,
        )
        return [killed, Job(self.name, (*own, *SAVED, steps, "--resume"))]


CELLS = [
    Cell(mode, name, processes)
    for name, launcher in LAUNCHERS.items()
    for processes, modes in ((1, launcher.alone), (2, launcher.modes))
    for mode in modes
]


def jobs(kind: str) -> list[Job]:
    """All jobs of one start of a launcher."""
    return [job for cell in CELLS if cell.kind == kind for job in cell.jobs()]


def table() -> str:
    """The matrix in Markdown: processes each cell was run with."""
    rows = [
        ["mode", *(launcher.title for launcher in LAUNCHERS.values())],
        ["---"] * (1 + len(LAUNCHERS)),
    ]
    for mode in MODES:
        rows.append([f"`{mode}`", *(_entry(mode, name) for name in LAUNCHERS)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _entry(mode: str, launcher: str) -> str:
    cells = [c for c in CELLS if (c.mode, c.launcher) == (mode, launcher)]
    if any(cell.refused for cell in cells):
        return "refused"
    return ", ".join(str(cell.processes) for cell in cells) or "–"


if __name__ == "__main__":
    print(table())
