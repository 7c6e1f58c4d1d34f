"""`itprune chat`: lines in, answers out, and whatever else may be typed."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from itprune.answer import Answerer
from itprune.checkpoint import load_pretrained
from itprune.cli import chat, main
from itprune.cli.chat_session import Session
from itprune.cli.terminal import harmless, say
from itprune.decoding import Decoding
from itprune.question import Question, open_image

SHORT = ("--max-new-tokens", "5", "--device", "cpu")
Chat = Callable[..., tuple[list[str], str]]


def options(folder: Path, *more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    chat.add_parser(parser.add_subparsers())
    return parser.parse_args(["chat", "--model", str(folder), *SHORT, *more])


@pytest.fixture
def talk(checkpoint: Path, monkeypatch: Any, capsys: Any) -> Chat:
    """Hands lines to the command; its answers, and what it says besides."""

    def run(*lines: str, more: tuple[str, ...] = (), folder: Path = checkpoint) -> Any:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        assert main(["chat", "--model", str(folder), *SHORT, *more]) == 0
        out, err = capsys.readouterr()
        return out.splitlines(), err

    return run


def make_session(checkpoint: Path) -> Session:
    """A chat that writes into strings."""
    made = chat.make_session(options(checkpoint))
    made.out, made.err = io.StringIO(), io.StringIO()
    return made


@pytest.fixture
def session(checkpoint: Path) -> Session:
    return make_session(checkpoint)


def told(session: Session) -> str:
    return session.err.getvalue()


# ---------------------------------------------------------------------------------- a dialogue
def test_lines_are_questions_and_answers_are_lines(
    talk: Chat, checkpoint: Path, pictures: Path
) -> None:
    answers, err = talk(
        "What colour is the square?",
        "",
        "   ",
        "Which shape is on the left?",
        more=("--image", str(pictures / "0.png")),
    )
    answerer = Answerer(load_pretrained(checkpoint, device="cpu"), Decoding(max_new_tokens=5))
    image = open_image(pictures / "0.png")
    asked = Question.from_prompt("What colour is the square?", [image])
    first = answerer([asked])[0].answer
    said = {"role": "assistant", "content": [{"type": "text", "text": first}]}
    more = Question.from_prompt("Which shape is on the left?").messages
    second = answerer([Question((*asked.messages, said, *more), (image,))])[0].answer
    assert "".join(answers) == harmless(first + second).replace("\n", "")
    assert err == ""


def test_pictures_wait_for_the_next_question(session: Session, pictures: Path) -> None:
    session.take(f"/image {pictures / '0.png'}")
    session.take(f"/image '{pictures / '1.png'}'")
    assert "2 picture(s) with the next question" in told(session)
    session.take("What?")
    assert len(session.conversation.images) == 2
    session.take(f"/image {pictures / '2.png'}")
    session.take("/image")
    session.take("And now?")
    assert len(session.conversation.images) == 2
    assert session.conversation.turn.tokens_cached > 32


def test_keep_method_and_dense_run_the_dialogue_again(session: Session, pictures: Path) -> None:
    session.take(f"/image {pictures / '0.png'}")
    kept = []
    for command in (
        "/help",
        "/keep 0.5",
        "/method uniform",
        "/dense",
        "/method itprune",
        "/keep 1",
    ):
        session.take(command)
        session.take("What?")
        kept.append(session.conversation.turn.visual_stage1)
    notes = [line for line in told(session).splitlines() if line.startswith("[the whole")]
    assert notes == [
        "[the whole dialogue was run again: it is itprune at keep 0.5 now, and was itprune by its "
        "own rule]",
        "[the whole dialogue was run again: it is uniform at keep 0.5 now, and was itprune at keep "
        "0.5]",
        "[the whole dialogue was run again: it is dense now, and was uniform at keep 0.5]",
        "[the whole dialogue was run again: it is itprune at keep 0.5 now, and was dense]",
        "[the whole dialogue was run again: it is dense now, and was itprune at keep 0.5]",
    ]
    assert kept[2:4] == [8, 16]
    assert kept[1] == kept[4] < 16
    assert kept[5] == 16
    session.take("/dense")
    assert "[dense, as before]" in told(session)


def test_an_ordinary_folder_is_dense_until_told(base: Path, talk: Chat, pictures: Path) -> None:
    answers, err = talk(
        f"/image {pictures / '0.png'}",
        "What?",
        "/stats",
        "/method random",
        "/stats",
        "/keep 0.25",
        "What?",
        "/stats",
        folder=base,
    )
    assert len(answers) == 2
    told = [line for line in err.splitlines() if "] " in line or "random" in line]
    assert "[dense] visual tokens 16 -> 16 -> 16 (layer average 100.0%)" in told[0]
    assert "[random at keep 0.22; the next turn runs the whole dialogue again]" in told[1]
    assert "[random at keep 0.25] visual tokens 16 -> 4 -> 4 (layer average 25.0%)" in told[-1]


def test_stats_before_and_after(session: Session) -> None:
    session.take("/stats")
    assert "[itprune by its own rule] nothing was asked yet" in told(session)
    session.take("green blue")
    session.take("/stats")
    assert "0 known; KV cache " in told(session)


def test_reset_forgets_everything(session: Session, pictures: Path) -> None:
    session.take(f"/image {pictures / '0.png'}")
    session.take("What?")
    session.take(f"/image {pictures / '1.png'}")
    session.take("/reset")
    assert (session.waiting, session.shown, session.conversation.messages) == ([], [], ())
    session.take("green")
    assert session.conversation.turn.visual_in == 0


# ---------------------------------------------------------------------------------------- /save
def test_a_saved_dialogue_is_asked_again_by_infer(
    session: Session, checkpoint: Path, pictures: Path, tmp_path: Path, capsys: Any
) -> None:
    for line in (
        f"/image {pictures / '0.png'}",
        "What colour is the square?",
        f"/image {pictures / '1.png'}",
        "green?",
        f"/save {tmp_path / 'chat.jsonl'}",
    ):
        session.take(line)
    assert f"--image-root {pictures}" in told(session)
    record = json.loads((tmp_path / "chat.jsonl").read_text(encoding="utf-8"))
    assert [m["role"] for m in record["messages"]] == ["user", "assistant"] * 2
    capsys.readouterr()
    ask = ["infer", "--model", str(checkpoint), "--jsonl", str(tmp_path / "chat.jsonl")]
    assert main([*ask, "--image-root", str(pictures), "--quiet", *SHORT]) == 0
    answer = json.loads(capsys.readouterr().out)
    turn = session.conversation.turn
    assert answer["tokens_in"] == turn.tokens_new + turn.tokens_cached
    assert answer["visual_in"] == 32


def test_pictures_beside_the_saved_file_are_named_from_it(
    session: Session, pictures: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes((pictures / "0.png").read_bytes())
    for line in (f"/image {tmp_path}/in/a.png", "What?", f"/save {tmp_path}/chat.jsonl"):
        session.take(line)
    record = json.loads((tmp_path / "chat.jsonl").read_text(encoding="utf-8"))
    assert record["messages"][0]["content"][0] == {"type": "image", "path": "in/a.png"}
    assert "--image-root" not in told(session)
    with pytest.raises(ValueError, match="is there already; name another file"):
        session.take(f"/save {tmp_path}/chat.jsonl")
    with pytest.raises(ValueError, match="cannot be written"):
        session.take(f"/save {tmp_path}/nowhere/chat.jsonl")


# ------------------------------------------------------------------------------ what goes wrong
@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/imgae a.png", "unknown command /imgae; did you mean 'image'?"),
        ("/", "unknown command /; "),
        ("/image nowhere.png", "missing image "),
        ("/keep", "/keep: a fraction in (0, 1] is needed, got ''"),
        ("/keep 2", "keep: must be a fraction in (0, 1], got 2.0"),
        ("/keep nan", "keep: must be a fraction in (0, 1], got nan"),
        ("/method visionzap", "method: unknown value 'visionzap'; did you mean 'visionzip'?"),
        ("/method quecc", "method 'quecc' has trained parts"),
        ("/image ~nobody-of-this-name/a.png", "missing image"),
        ("/save ~nobody-of-this-name/a.jsonl", "/save: there is no dialogue yet"),
        ("/save", "/save: the name of a file is needed"),
        ("/save a.jsonl", "/save: there is no dialogue yet"),
        ("blue \udc80", "the text holds half a character"),
        ("<image> what?", "the text has 1 <image> but 0 image(s) are given"),
        ("blue " * 600, "holds 512; shorten it or use fewer images; /reset begins a new dialogue"),
    ],
)
def test_one_sentence_and_the_chat_stays_up(talk: Chat, line: str, sentence: str) -> None:
    answers, err = talk(line, "green blue")
    assert sentence in err
    assert len(err.splitlines()) == 1
    assert len(answers) >= 1


def test_a_bad_picture_is_one_sentence(talk: Chat, tmp_path: Path) -> None:
    broken = tmp_path / "a\x1b[2Jb.png"
    broken.write_bytes(b"\x89PNG no picture")
    answers, err = talk(f"/image {broken}", "green blue")
    assert "unreadable image " in err
    assert "a\\x1b[2Jb.png" in err
    assert "\x1b" not in err
    assert answers


def test_a_method_that_does_not_fit_leaves_the_one_before(session: Session) -> None:
    before = session.wardrobe.loaded.attached.config
    with pytest.raises(ValueError, match="trained parts"):
        session.take("/method quecc")
    assert session.wardrobe.loaded.attached.config == before
    session.take("green")


def test_a_picture_is_looked_at_before_the_model_is_loaded(
    checkpoint: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(chat, "load", lambda args: pytest.fail("loaded"))
    args = options(checkpoint, "--image", "nowhere.png")
    with pytest.raises(ValueError, match="missing image"):
        args.run(args)


def test_a_letter_in_another_encoding_is_one_sentence(
    checkpoint: Path, monkeypatch: Any, capsys: Any
) -> None:
    lines = io.TextIOWrapper(io.BytesIO(b"blue\n\xff\xfe\ngreen\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", lines)
    assert main(["chat", "--model", str(checkpoint), *SHORT]) == 0
    out, err = capsys.readouterr()
    assert "half a character" in err
    assert len(err.splitlines()) == 1
    assert len(out.splitlines()) == 2


def test_quit_ends_it(talk: Chat) -> None:
    assert talk("/quit", "green blue") == ([], "")


def test_letters_that_steer_a_terminal_are_spelt_out() -> None:
    assert harmless("a\x1b[31mb\rc\x9bd\u202ee\udc80\n\tf") == (
        "a\\x1b[31mb\\rc\\x9bd\\u202ee\\udc80\n\tf"
    )
    plain = "naïve 日本 👩\u200d🚀"
    assert harmless(plain) == plain
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", newline="\n")
    say("é\x07", stream)
    assert raw.getvalue() == b"\\xe9\\x07\n"
