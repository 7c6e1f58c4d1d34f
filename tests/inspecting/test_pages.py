"""The page frame: self-contained, escaped, and with no script but the one handed over."""

import base64
import hashlib
import re

import pytest
from markupsafe import Markup

from itprune.pages import PALETTE, page, templates


def test_a_page_is_a_whole_document():
    text = page("A title", Markup("<p>body</p>"))
    assert text.startswith("<!DOCTYPE html>")
    assert '<meta charset="utf-8">' in text
    assert 'name="viewport"' in text
    assert "<title>A title</title>" in text
    assert "<p>body</p>" in text
    assert "prefers-color-scheme: dark" in text


def test_the_title_is_escaped():
    assert "<title>&lt;b&gt; &amp; co</title>" in page("<b> & co", Markup(""))


def test_nothing_outside_is_named():
    text = page("t", Markup(""), script="let a = 1")
    assert not re.findall(r"https?:|//[a-z]|@import|url\(", text)


def test_the_policy_lets_only_the_given_script_run():
    script = "document.title = 'x'"
    text = page("t", Markup(""), script=script)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"<script>{script}</script>" in text
    assert f"sha256-{digest}" in text.replace("&#43;", "+").replace("&#39;", "'")
    assert "script-src &#39;none&#39;" in page("t", Markup(""))


def test_a_body_nobody_escaped_is_refused():
    with pytest.raises(TypeError, match="must be Markup"):
        page("t", "<p>")  # type: ignore[arg-type]


@pytest.mark.parametrize("script", ["a = '</SCRIPT>'", "x <!-- y"])
def test_a_script_that_would_end_itself_is_refused(script):
    with pytest.raises(ValueError, match="would end it"):
        page("t", Markup(""), script=script)


def test_templates_escape():
    made = templates("itprune.pages").from_string("<p>{{ text }}</p>").render(text="<b>")
    assert made == "<p>&lt;b&gt;</p>"


def test_the_palette_is_in_the_style():
    text = page("t", Markup("")).lower()
    for i, colour in enumerate(PALETTE):
        assert f"--c{i}: {colour.lower()}" in text
