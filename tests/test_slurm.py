"""launch/slurm: the scripts up to the launcher, on stand-ins for SLURM's own commands."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NODES = ("alpha", "beta")
FSDP2 = "launch/accelerate/fsdp2.yaml"
CONFIG = "configs/lora_pruned.yaml"
SCONTROL = f"""#!/usr/bin/env bash
[[ "$*" == "show hostnames cluster[1-2]" ]] || exit 1
printf '%s\\n' {" ".join(NODES)}
"""
SRUN = f"""#!/usr/bin/env bash
set -e
shift  # --kill-on-bad-exit=1
for (( i = 0; i < {len(NODES)}; i++ )); do
  SLURM_NODEID=$i "$@"
done
cp "$SLURM_SUBMIT_DIR"/.hostfile.* "$(dirname "$0")/hostfile" 2> /dev/null || true
"""


def submit(
    tmp_path: Path, script: str, *words: str, dry: bool = True, **env: str
) -> subprocess.CompletedProcess[str]:
    """What sbatch does with a script, its two helpers replaced."""
    tools, project = tmp_path / "bin", tmp_path / "project"
    tools.mkdir()
    project.mkdir()
    (project / "launch").symlink_to(ROOT / "launch")
    launchers = 'echo "ran: $(basename "$0") $*"'
    files = {"scontrol": SCONTROL, "srun": SRUN}
    files |= dict.fromkeys(("deepspeed", "accelerate"), f"#!/usr/bin/env bash\n{launchers}\n")
    for name, text in files.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    slurm = {
        "SLURM_SUBMIT_DIR": str(project),
        "SLURM_JOB_NODELIST": "cluster[1-2]",
        "SLURM_JOB_ID": "1234567",
        "SLURM_GPUS_ON_NODE": "4",
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        **({"ITPRUNE_DRY_RUN": "1"} if dry else {}),
    }
    return subprocess.run(
        ["bash", str(ROOT / f"launch/slurm/{script}.sh"), *words],
        cwd=tmp_path,
        env={**os.environ, **slurm, **env},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("dry", [True, False])
def test_accelerate_on_every_node(tmp_path: Path, dry: bool) -> None:
    done = submit(tmp_path, "accelerate", FSDP2, CONFIG, "trainer.max_steps=5", dry=dry)
    assert done.returncode == 0, done.stderr
    said = "" if dry else "ran: "
    assert done.stdout.splitlines() == [
        f"{said}accelerate launch --machine_rank {rank} --config_file {FSDP2} --num_machines 2 "
        "--num_processes 8 --main_process_ip alpha --main_process_port 34567 launch/train.py "
        f"{CONFIG} trainer.max_steps=5"
        for rank in range(2)
    ]


@pytest.mark.parametrize("dry", [True, False])
def test_deepspeed_on_every_node(tmp_path: Path, dry: bool) -> None:
    done = submit(tmp_path, "deepspeed", CONFIG, "prune.keep=0.3", dry=dry)
    assert done.returncode == 0, done.stderr
    said = "" if dry else "ran: "
    for rank, line in enumerate(done.stdout.splitlines()):
        before, _, rest = line.partition(str(tmp_path / "project/.hostfile."))
        assert before == f"{said}deepspeed --node_rank {rank} --no_ssh --hostfile "
        assert rest.split(" ", 1)[1] == (
            f"--master_addr alpha --master_port 34567 launch/train.py {CONFIG} prune.keep=0.3"
        )
    assert len(done.stdout.splitlines()) == 2
    assert (tmp_path / "bin/hostfile").read_text() == "alpha slots=4\nbeta slots=4\n"
    assert not list((tmp_path / "project").glob(".hostfile.*"))


@pytest.mark.parametrize(
    ("script", "words", "env", "says"),
    [
        ("deepspeed", (), {}, "usage: sbatch"),
        ("accelerate", (FSDP2,), {}, "usage: sbatch"),
        ("accelerate", ("none.yaml", CONFIG), {}, "holds no none.yaml"),
        ("deepspeed", (CONFIG,), {"SLURM_SUBMIT_DIR": "/"}, "holds no launch/train.py"),
        ("deepspeed", (CONFIG,), {"SLURM_GPUS_ON_NODE": ""}, "no GPUs; see --gpus-per-node"),
        ("deepspeed", (CONFIG,), {"SLURM_JOB_NODELIST": "other"}, ""),
    ],
)
def test_what_is_missing_ends_the_job(
    tmp_path: Path, script: str, words: tuple[str, ...], env: dict[str, str], says: str
) -> None:
    done = submit(tmp_path, script, *words, **env)
    assert done.returncode != 0
    assert says in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("script", ["deepspeed", "accelerate"])
def test_the_scripts_ask_for_one_task_a_node_and_a_warning(script: str) -> None:
    text = (ROOT / f"launch/slurm/{script}.sh").read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "#SBATCH --ntasks-per-node=1\n" in text
    assert "#SBATCH --signal=TERM@120\n" in text  # the run saves a checkpoint and ends
    assert "\nset -euo pipefail\n" in text
    assert subprocess.run(["bash", "-n", f"launch/slurm/{script}.sh"], cwd=ROOT).returncode == 0
