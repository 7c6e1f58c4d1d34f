"""`itprune methods`: the methods with their options, and the model families."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "methods", help="list methods, their options and model families", description=__doc__
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the lists."""
    from itprune.config import PruneConfig
    from itprune.families import families
    from itprune.methods import build_method, methods

    print("common options (the recipe's section `prune`):")
    print("\n".join(describe_options(PruneConfig, "  ", skip=("options",))))
    for name in methods():
        method = build_method(name, {}, depth=32)
        print(f"\n{name}: {_first_sentence(type(method))}")
        print("\n".join(describe_options(type(method).Options, "  ")) or "  no options of its own")
    print(f"\nmodel families: {', '.join(families())}")
    return 0


def describe_options(cls: type, indent: str, skip: tuple[str, ...] = ()) -> Iterator[str]:
    """One line or two for each field of an options dataclass, nested ones included."""
    docs, hints = field_docs(cls), get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name in skip:
            continue
        nested = _dataclass_in(hints[field.name]) if field.name != "keep" else None
        default = "" if nested else f" (default {_plain(field.default)})"
        yield f"{indent}{field.name}{default}"
        text = docs.get(field.name, "")
        yield from textwrap.wrap(
            text, 96, initial_indent=f"{indent}    ", subsequent_indent=f"{indent}    "
        )
        if nested is not None:
            yield from describe_options(nested, indent + "  ")


def field_docs(cls: type) -> dict[str, str]:
    """The strings under a dataclass's fields: where options are documented, once."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(tree, ast.ClassDef)
    docs, last = {}, ""
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            last = node.target.id
        elif last and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docs[last], last = " ".join(str(node.value.value).split()), ""
        else:
            last = ""
    return docs


def _dataclass_in(hint: Any) -> type | None:
    kinds = (hint, *get_args(hint))
    return next((k for k in kinds if isinstance(k, type) and dataclasses.is_dataclass(k)), None)


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _first_sentence(cls: type) -> str:
    text = " ".join((inspect.getdoc(cls) or "").split())
    return text.split(". ")[0].rstrip(".")
