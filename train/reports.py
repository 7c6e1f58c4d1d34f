"""Where a run reports to: the package must be there, and what it writes lies in the output folder.

TensorBoard's files go to OUTPUT/runs by themselves, unless TENSORBOARD_LOGGING_DIR names another
folder. The others write into the working directory or the home folder if nobody says otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

PACKAGES = {
    "clearml": "clearml",
    "codecarbon": "codecarbon",
    "comet_ml": "comet_ml",
    "dvclive": "dvclive",
    "mlflow": "mlflow",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}
FOLDERS = {"wandb": ("WANDB_DIR", "_logs"), "trackio": ("TRACKIO_DIR", "_logs/trackio")}
"""Variable that says where a package writes, and the folder in the output folder (wandb adds its
own to it). A Trainer pushes nothing to the hub whose name begins with `_`: such logs describe the
machine."""


def check_reports(names: Sequence[str]) -> None:
    """Checks `trainer.report_to`.

    Raises:
        ValueError: a name transformers does not know, or whose package is not installed.
    """
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(PACKAGES))
            raise ValueError(f"trainer.report_to: unknown name {name!r}; choose from: {known}")
        package = PACKAGES.get(name)
        if package is not None and find_spec(package) is None:
            raise ValueError(
                f"trainer.report_to: {name} needs the package {package}, which is not installed; "
                f"`pip install {package.replace('_', '-')}`, or report to something else"
            )


def prepare_reports(args: Any) -> None:
    """Checks `trainer.report_to` before anything is loaded, and says where logs go.

    Args:
        args: the TrainingArguments. Variables of the environment that are set already stay.

    Raises:
        ValueError: of `check_reports`.
    """
    check_reports(args.report_to)
    for name in args.report_to:
        if name in FOLDERS:
            variable, folder = FOLDERS[name]
            home = Path(args.output_dir).resolve() / folder
            if variable not in os.environ:
                home.mkdir(parents=True, exist_ok=True)  # wandb writes elsewhere where it is not
                os.environ[variable] = str(home)
