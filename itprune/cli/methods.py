"""`itprune methods`: every method in a table, or one in full with its options.

The table is made from each method's own card, and so is the one in docs/methods.md (`--markdown`).
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import json
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, get_args, get_type_hints

from itprune.options import to_plain

ARXIV = "https://arxiv.org/abs/"
NONE = "–"
WIDTH = 100
Fact = dict[str, Any]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "methods",
        help="list methods, their options and model families",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="show this one with its options")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="everything, as JSON")
    form.add_argument("--markdown", action="store_true", help="the table, as Markdown")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the table, or one method.

    Raises:
        ValueError: no such method.
    """
    from itprune.methods import methods

    facts = [fact_of(name) for name in ([args.name] if args.name else methods())]
    if args.json:
        print(json.dumps(facts[0] if args.name else facts, indent=1, ensure_ascii=False))
    elif args.markdown:
        print("\n".join(markdown(facts)))
    else:
        print("\n".join(in_full(facts[0]) if args.name else compact(facts)))
    return 0


def fact_of(name: str) -> Fact:
    """All there is to know of a method.

    Raises:
        ValueError: no such method.
    """
    from itprune.methods import method_class

    cls = method_class(name)
    card = dataclasses.asdict(cls.card)
    return {
        "method": name,
        **card,
        "places": list(cls.places),
        "positions": cls.positions,
        "families": _families(name),
        "options": list(_options(cls.Options)),
    }


def _families(name: str) -> list[str]:
    """Model families a method runs on: one that reads patches needs them as visual tokens."""
    import torch

    from itprune.families import families, family_class
    from itprune.families.base import PatchFamily
    from itprune.host import Host
    from itprune.methods import build_method

    with torch.device("meta"):
        patches = build_method(name, {}, Host.example()).needs_patches
    return [f for f in families() if not patches or issubclass(family_class(f), PatchFamily)]


def _fits(fact: Fact) -> str:
    from itprune.families import families

    return "all" if fact["families"] == list(families()) else ", ".join(fact["families"])


# ------------------------------------------------------------------------------------- tables
def compact(facts: Sequence[Fact]) -> Iterator[str]:
    """The table in plain text, at most 100 columns wide."""
    from itprune.families import families

    cells = [["method", "arXiv", "acts at", "count", "training", "needs", "families"]]
    for f in facts:
        shown = [f["method"], f["paper"], ", ".join(f["places"]), f["count"], f["training"]]
        cells.append([text or NONE for text in (*shown, ", ".join(f["needs"]), _fits(f))])
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for row in cells:
        yield "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
    yield ""
    yield from _wrapped(f"families: {', '.join(families())}", "")
    yield "one with its options and notes: itprune methods NAME; several at different places: A+B"


def markdown(facts: Sequence[Fact]) -> Iterator[str]:
    """The table of docs/methods.md."""
    yield "| method | what | source | acts at | count | training | needs | families | notes |"
    yield "|---" * 9 + "|"
    for f in facts:
        paper = f["paper"]
        cells = [
            f"`{f['method']}`",
            f["title"],
            f"[{paper}]({ARXIV}{paper})" if paper else NONE,
            ", ".join(f"`{place}`" for place in f["places"]) or NONE,
            f["count"],
            f["training"],
            ", ".join(f["needs"]) or NONE,
            _fits(f),
            f["notes"] or NONE,
        ]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def in_full(fact: Fact) -> Iterator[str]:
    """One method: its card, then its own options, then those all methods have."""
    from itprune.config import PruneConfig
    from itprune.methods import method_class

    yield from _wrapped(f"{fact['method']}: {fact['title']}", "")
    rows = {
        "source": f"arXiv {fact['paper']}" if fact["paper"] else "",
        "acts at": ", ".join(fact["places"]),
        "count": fact["count"],
        "training": fact["training"],
        "needs": ", ".join(fact["needs"]),
        "positions": fact["positions"],
        "families": ", ".join(fact["families"]),
        "notes": fact["notes"],
    }
    for name, text in rows.items():
        if text:
            lines = textwrap.wrap(text, WIDTH - 13)
            yield f"  {name:9}  {lines[0]}"
            yield from (" " * 13 + line for line in lines[1:])
    yield "options:"
    yield from list(describe_options(method_class(fact["method"]).Options, "  ")) or ["  none"]
    yield "common options (the recipe's section `prune`):"
    yield from describe_options(PruneConfig, "  ", skip=("options",))


# ------------------------------------------------------------------------------------ options
def _options(cls: type) -> Iterator[Fact]:
    """Every option as {option, default, doc}; sections are opened."""
    docs, hints = field_docs(cls), get_type_hints(cls)
    for field in dataclasses.fields(cls):
        nested = _nested(field.name, hints[field.name])
        if nested is not None:
            inner = _options(nested)
            yield from ({**fact, "option": f"{field.name}.{fact['option']}"} for fact in inner)
        else:
            yield {
                "option": field.name,
                "default": to_plain(_default(field)),
                "doc": docs.get(field.name, ""),
            }


def describe_options(cls: type, indent: str, skip: tuple[str, ...] = ()) -> Iterator[str]:
    """One line or two for each field of an options dataclass, nested ones included."""
    docs, hints = field_docs(cls), get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name in skip:
            continue
        nested = _nested(field.name, hints[field.name])
        default = "" if nested else f" (default {_plain(_default(field))})"
        yield f"{indent}{field.name}{default}"
        yield from _wrapped(docs.get(field.name, ""), f"{indent}    ")
        if nested is not None:
            yield from describe_options(nested, indent + "  ")


def field_docs(cls: type) -> dict[str, str]:
    """The strings under a dataclass's fields: where options are documented, once."""
    docs: dict[str, str] = {}
    for part in reversed(cls.__mro__):
        if dataclasses.is_dataclass(part):
            docs |= _own_docs(part)
    return docs


def _own_docs(cls: type) -> dict[str, str]:
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


def _nested(name: str, hint: Any) -> type | None:
    """The dataclass of a section; `keep` may be a schedule, but is one value to a reader."""
    kinds = (hint, *get_args(hint)) if name != "keep" else ()
    return next((k for k in kinds if isinstance(k, type) and dataclasses.is_dataclass(k)), None)


def _default(field: dataclasses.Field[Any]) -> Any:
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent)
