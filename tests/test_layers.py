"""The house rules a machine can check: who imports whom, and nothing patched, copied or global."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).parent.parent
LIBRARY = sorted((ROOT / "itprune").rglob("*.py"))
SECRETS = ROOT / "itprune" / "cli" / "secrets.py"
"""May read the environment: a key on a command line can be read by everybody on the machine."""
PROJECT = LIBRARY + sorted((ROOT / "train").rglob("*.py")) + sorted((ROOT / "launch").glob("*.py"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_dependence_has_one_direction(path: Path) -> None:
    modules = imported(path)
    assert not {m for m in modules if m.split(".")[0] in {"train", "launch", "tests"}}
    if "methods" in path.parts:
        banned = ("itprune.families", "itprune.engine", "itprune.attach", "transformers")
        assert not {m for m in modules if m.startswith(banned)}
    if "maths" in path.parts:
        banned = ("itprune.methods", "itprune.families", "itprune.engine", "transformers")
        assert not {m for m in modules if m.startswith(banned)}
    if "families" in path.parts:
        assert not {m for m in modules if m.startswith(("itprune.methods", "itprune.engine"))}
    if "engine" in path.parts:
        families = {m for m in modules if m.startswith("itprune.families")} - {"itprune.families"}
        assert not {m for m in families if not m.startswith("itprune.families.base")}
        method = {"itprune.methods.base", "itprune.methods.base.Method"}
        assert not {m for m in modules if m.startswith("itprune.methods")} - method


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_nothing_is_patched_copied_or_read_from_the_environment(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in targets:
            assert not (
                isinstance(target, ast.Attribute) and target.attr in {"forward", "__class__"}
            )
        if isinstance(node, ast.ClassDef):
            assert not hasattr(transformers, node.name), f"{node.name} is a transformers class"
        if isinstance(node, ast.Attribute):
            assert node.attr not in {"environ", "getenv"} or path == SECRETS
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"eval", "exec"}
            probing = node.func.id == "getattr" and len(node.args) == 3
            assert not probing, f"line {node.lineno}: getattr with a default"


@pytest.mark.parametrize("path", PROJECT, ids=name)
def test_files_are_small_and_say_what_they_are(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 350
    if text.strip():
        assert ast.get_docstring(ast.parse(text)), "no module docstring"


def test_no_method_names_a_family_and_no_family_a_method() -> None:
    from itprune import families, methods

    for path in sorted((ROOT / "itprune" / "methods").glob("*.py")):
        assert not {f for f in families() if f in path.read_text().lower().replace("llava-", "")}
    for path in sorted((ROOT / "itprune" / "families").glob("*.py")):
        words = set(path.read_text().replace('"', " ").split())
        assert not {m for m in methods() if m in words and m != "itprune"}
