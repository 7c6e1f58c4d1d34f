"""Reads a report back: elements that are closed in order, and texts."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from itprune.reporting.render import render
from itprune.reporting.summary import summarise

VOID = {"meta", "link", "br", "img", "hr"}


class Page(HTMLParser):
    """The elements of a page, which must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data.strip())


def written(*folders: Path) -> str:
    return render(summarise(folders))
