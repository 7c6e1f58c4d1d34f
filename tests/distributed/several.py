"""Several runs of launch/train.py in one start of a launcher, which is most of a short run's time.

    deepspeed --num_gpus 2 tests/distributed/several.py JOBS.json

Every process that the launcher starts reads the same list and does one job after the other: a fork
of itself with the launcher's environment and a port of its own runs launch/train.py. What a
job says goes to FOLDER/NAME.RANK.log, its exit status to FOLDER/NAME.RANK.status. A job that takes
too long is killed and its status is `hangs`; `kill_at` names a file whose appearance kills it, too.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT = 90
"""Seconds of a job."""
sys.path.insert(0, str(ROOT))


def main(argv: list[str]) -> None:
    jobs = Path(argv[-1])
    arguments = argv[:-1]  # `deepspeed` passes --local_rank
    script = runpy.run_path(str(ROOT / "launch/train.py"), run_name="launch_train")
    import deepspeed  # noqa: F401  # what every job needs is imported once
    from transformers import AutoModelForImageTextToText  # noqa: F401

    import train.run  # noqa: F401
    from tests.distributed.counting import counting

    for job in json.loads(jobs.read_text()):
        name = f"{job['name']}.{os.environ.get('RANK', '0')}"
        child = os.fork()
        if child == 0:
            _become(job, jobs.parent / f"{name}.log")
            try:
                with counting(jobs.parent / f"{name}.bytes", job["count_bytes"]):
                    status = script["main"]([*arguments, *job["argv"]])
            except BaseException:  # noqa: BLE001  # the parent is told by the status
                import traceback

                traceback.print_exc()
                status = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        (jobs.parent / f"{name}.status").write_text(_wait(child, job))


def _become(job: dict[str, Any], log: Path) -> None:
    """Turns a fork into the process of one job."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if "RANK" in os.environ:
        os.environ |= {"MASTER_PORT": str(job["port"]), "TORCHELASTIC_USE_AGENT_STORE": "False"}


def _wait(child: int, job: dict[str, Any]) -> str:
    until = time.monotonic() + LIMIT
    kill_at = Path(job["kill_at"]) if job["kill_at"] else None
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return str(os.waitstatus_to_exitcode(status))
        late = time.monotonic() > until
        if late or (kill_at is not None and kill_at.exists()):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "hangs" if late else "killed"
        time.sleep(0.02)


if __name__ == "__main__":
    main(sys.argv[1:])
