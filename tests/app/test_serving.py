"""The command and the real server: many visitors, visitors who go, ports in use, the end."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from starlette.responses import Response

from itprune.cli import app
from itprune.web.addresses import is_loopback
from itprune.web.guards import Guards
from tests.app.asking import answers, connect, events, form, png, post
from tests.app.conftest import BUNDLED

COMMAND = """\
import argparse, sys
from itprune.cli import app
parser = argparse.ArgumentParser()
app.add_parser(parser.add_subparsers())
args = parser.parse_args()
sys.exit(args.run(args))
"""
"""The subcommand alone, whatever else the command line has."""
USERS = 20


def parse(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    app.add_parser(parser.add_subparsers())
    return parser.parse_args(["app", "--model", str(BUNDLED), *options])


@contextmanager
def running(*options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server on a free port: its address and process."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "app", "--model", str(BUNDLED), "--port", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "http://127.0.0.1:" in line, process.communicate()[1]
        yield line.split()[2], process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running() as (address, _):
        yield address


def test_twenty_visitors_at_once_get_what_each_would_alone(url: str) -> None:
    pictures = [png(seed=i % 5) for i in range(USERS)]
    keeps = [("0.3", "0.6", "1.0")[i % 3] for i in range(USERS)]
    alone = {}
    for picture, keep in dict.fromkeys(zip(pictures, keeps, strict=True)):
        alone[picture, keep] = done(post(url, picture, keep=keep))
    with ThreadPoolExecutor(USERS) as pool:
        pairs = zip(pictures, keeps, strict=True)
        told = pool.map(lambda pair: post(url, pair[0], keep=pair[1]), pairs)
        for picture, keep, answer in zip(pictures, keeps, told, strict=True):
            assert done(answer) == alone[picture, keep]


def done(answer: tuple[int, str]) -> dict[str, object]:
    """An answer without its times."""
    status, text = answer
    assert status == 200, text
    figures = answers(events(text))["pruned"]
    return {name: value for name, value in figures.items() if not name.endswith("_s")}


def test_a_visitor_who_goes_in_the_middle_holds_up_nobody(url: str) -> None:
    for _ in range(3):
        connection = connect(url)
        body, headers = form(png(), beside="1")
        connection.request("POST", "/api/ask", body, headers)
        response = connection.getresponse()
        assert response.read1(20).startswith(b"data: ")
        response.close()
        connection.close()
    assert done(post(url, png()))["answer"] is not None


def test_a_visitor_who_goes_during_the_upload_holds_up_nobody(url: str) -> None:
    body, headers = form(png())
    connection = connect(url)
    connection.putrequest("POST", "/api/ask")
    for name, value in {**headers, "Content-Length": str(len(body))}.items():
        connection.putheader(name, value)
    connection.endheaders()
    connection.send(body[: len(body) // 2])
    connection.close()
    assert done(post(url, png()))["answer"] is not None


def test_an_upload_that_is_too_large_hears_the_sentence(url: str) -> None:
    status, text = post(url, bytes(11_000_000))
    assert status == 413
    assert "larger than 10 MB" in text


def test_the_bounds_of_the_server_are_options() -> None:
    limits = app._limits(parse("--max-mb", "2.5", "--max-waiting", "3", "--max-new-tokens", "9"))
    assert (limits.body_bytes, limits.waiting, limits.answer) == (2_500_000, 3, 9)
    with pytest.raises(ValueError, match="--max-mb: must be above 0, got 0"):
        app._limits(parse("--max-mb", "0"))


# -------------------------------------------------------------------------------- the command
def test_ctrl_c_ends_it_cleanly_even_in_the_middle_of_an_answer() -> None:
    with running() as (url, process):
        connection = connect(url)
        body, headers = form(png(), beside="1")
        connection.request("POST", "/api/ask", body, headers)
        connection.getresponse().read1(20)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
        assert said.rstrip().endswith("itprune app: ended")
        assert "Traceback" not in said


def test_a_port_in_use_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port} is in use on 127.0.0.1; choose"):
            app.run(parse("--port", str(port)))


def test_two_servers_cannot_have_one_port() -> None:
    with app.open_socket("127.0.0.1", 0) as first:
        with pytest.raises(ValueError, match="is in use"):
            app.open_socket("127.0.0.1", first.getsockname()[1])
        assert app.address(first).startswith("http://127.0.0.1:")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--port", "70000"), "--port: must be 0 to 65535"),
        (("--host", "0.0.0.0"), "add --allow-remote"),
        (("--host", "192.168.0.7"), "add --allow-remote"),
        (("--keep", "2"), "--keep"),
        (("--method", "visionzap"), "visionzip"),
        (("--max-seconds", "inf"), "--max-seconds: must be above 0"),
        (("--allow-remote", "--host", "203.0.113.7"), "--host 203.0.113.7"),
    ],
)
def test_wrong_options_are_one_sentence(options: tuple[str, ...], sentence: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(ValueError, match=sentence) as error:
            app.run(parse(*options))
    assert "\n" not in str(error.value)


def test_letting_others_in_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="no password and no encryption"):
        app._check_host(parse("--host", "0.0.0.0", "--allow-remote"))


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "127.9.9.9", "::1"])
def test_what_reaches_this_machine_only(name: str) -> None:
    assert is_loopback(name)


@pytest.mark.parametrize("name", ["0.0.0.0", "::", "192.168.0.7", "example.org", ""])
def test_what_others_can_reach(name: str) -> None:
    assert not is_loopback(name)


@pytest.mark.parametrize(
    ("bound", "host", "known"),
    [
        ("0.0.0.0", "192.168.0.7:7860", True),
        ("0.0.0.0", f"{socket.gethostname()}:7860", True),
        ("0.0.0.0", "evil.example:7860", False),
        ("box.example", "box.example:7860", True),
        ("127.0.0.1", "192.168.0.7:7860", False),
        ("127.0.0.1", "see.example", True),
        ("127.0.0.1", "not-see.example", False),
    ],
)
def test_names_a_server_goes_by(bound: str, host: str, known: bool) -> None:
    async def nothing(*args: object) -> None: ...

    assert Guards(nothing, bound, Response, ["See.example"])._known(host) is known


def test_the_page_behind_a_proxy() -> None:
    with running("--name", "see.example") as (url, _):
        body, headers = form(png())
        named = {"Host": "see.example", "Origin": "https://see.example"}
        for more, status in ((named, 200), ({**named, "Host": "else.example"}, 403)):
            connection = connect(url)
            connection.request("POST", "/api/ask", body, {**headers, **more})
            response = connection.getresponse()
            assert response.status == status
            response.read()
            connection.close()
