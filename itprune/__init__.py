"""itprune: fine-tune and run multimodal LLMs on the tokens that matter."""

from itprune.attach import Attached, attach, calibrate
from itprune.calibration import Calibration
from itprune.checkpoint import Loaded, load_pretrained, save_pretrained, save_pruner
from itprune.config import Draw, PruneConfig, Schedule
from itprune.families import families
from itprune.methods import methods, register_method
from itprune.prompt import PromptFormat
from itprune.report import Report

__version__ = "0.1.0"

__all__ = [
    "Attached",
    "Calibration",
    "Draw",
    "Loaded",
    "PromptFormat",
    "PruneConfig",
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
