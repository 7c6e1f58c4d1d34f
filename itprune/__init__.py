"""itprune: fine-tune and run multimodal LLMs on the tokens that matter."""

from typing import TYPE_CHECKING, Any

from itprune.attach import Attached, attach
from itprune.calibrating import calibrate
from itprune.calibration import Calibration
from itprune.checkpoint import Loaded, load_pretrained, save_pretrained, save_pruner
from itprune.config import Draw, PruneConfig, Schedule
from itprune.families import families
from itprune.methods import methods, register_method
from itprune.prompt import PromptFormat
from itprune.report import Report

if TYPE_CHECKING:
    from itprune.callback import PrunerCallback

__version__ = "0.1.0"

__all__ = [
    "Attached",
    "Calibration",
    "Draw",
    "Loaded",
    "PromptFormat",
    "PruneConfig",
    "PrunerCallback",
    "Report",
    "Schedule",
    "attach",
    "calibrate",
    "families",
    "load_pretrained",
    "methods",
    "register_method",
    "save_pretrained",
    "save_pruner",
]


def __getattr__(name: str) -> Any:
    """PrunerCallback is imported when it is asked for: with it comes transformers' trainer."""
    if name == "PrunerCallback":
        from itprune.callback import PrunerCallback

        return PrunerCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
