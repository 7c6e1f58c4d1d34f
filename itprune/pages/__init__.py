"""Pages: the frame and the look that all HTML pages of itprune share.

A page is one self-contained document. Its style stands inside it, its fonts are the reader's own,
it names no address outside, and its content policy forbids the browser to ask for one. The only
script that runs is the one the caller hands over: the policy names its hash.

Templates lie in the packages that use them; `templates` reads them with autoescape, always on.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

PALETTE = (
    "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#F0E442", "#666666",
)  # fmt: skip
"""Colours that stay apart for colour-blind readers (Okabe and Ito); grey instead of black, so that
the last one is seen on dark pages, too. In style.css they are --c0 to --c7."""


def page(title: str, body: Markup, *, script: str = "") -> str:
    """One HTML5 document.

    Args:
        title: its title; escaped.
        body: what stands inside `<main>`; from a template of `templates`.
        script: inline JavaScript of our own, run at the end of the body; handlers in attributes
            (`onclick=`) do not run.

    Raises:
        ValueError: the script would end its own element.
        TypeError: a body that is plain text, which nobody escaped.
    """
    if not isinstance(body, Markup):
        raise TypeError("page: body must be Markup, from a template with autoescape")
    if "</script" in script.lower() or "<!--" in script:
        raise ValueError("page: the script holds </script or <!--, which would end it")
    frame = templates("itprune.pages").get_template("page.html")
    return frame.render(
        title=title,
        style=Markup(_style()),
        body=body,
        script=Markup(script),
        policy=_policy(script),
    )


@cache
def templates(package: str) -> Environment:
    """The .html templates that lie beside a package's modules.

    Args:
        package: its dotted name, such as "itprune.inspecting".
    """
    # "." and not the default "templates": the few files of a package need no folder of their own.
    return Environment(
        loader=PackageLoader(package, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def _style() -> str:
    return (files("itprune.pages") / "style.css").read_text(encoding="utf-8")


def _policy(script: str) -> str:
    """What the browser may load: nothing but what the document holds and its own server."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return "; ".join(
        (
            "default-src 'none'",
            "img-src data: blob: 'self'",
            "style-src 'unsafe-inline'",
            f"script-src 'sha256-{digest}'" if script else "script-src 'none'",
            "connect-src 'self'",
            "form-action 'self'",
            "base-uri 'none'",
        )
    )
