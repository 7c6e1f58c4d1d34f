"""The command, its end by a signal, and every command of docs/serve.md."""

from __future__ import annotations

import argparse
import io
import json
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import closing, redirect_stdout
from pathlib import Path

import httpx
import pytest
from PIL import Image

from itprune.cli import main, serve
from itprune.serving.limits import Limits
from tests.app.asking import png
from tests.serving.command import ROOT, running
from tests.serving.endpoint import CHAT, WAIT, asked, data_url, refusal
from tests.serving.upstreams import Servers, build_wide
from tests.tiny_llava import PLAIN
from tests.vllm.documented import commands, documented

MODEL = "assets/tiny-llava"
PAGE = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
ONE, MANY = PAGE.split("## More than one machine")
BLOCKS = re.findall(r"```bash\n(.*?)```", ONE, re.S)
SERVERS = [line for block in BLOCKS for line in block.splitlines() if "itprune serve" in line]
CURLS = [block for block in BLOCKS if "curl" in block]


def parse(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_parser(parser.add_subparsers())
    return parser.parse_args(["serve", str(ROOT / MODEL), *options])


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The first command of the page."""
    assert PAGE.split("```bash\n")[1].startswith(f"itprune serve {MODEL}\n")
    with running([MODEL]) as (address, _):
        yield address


# ------------------------------------------------------------------------------------ the page
def test_every_command_of_the_page_is_run_here() -> None:
    assert len(BLOCKS) == len(SERVERS) + len(CURLS)
    assert len(SERVERS) == 4


@pytest.mark.parametrize("line", SERVERS[1:])
def test_commands_that_serve(line: str) -> None:
    words = shlex.split(line.replace("0.0.0.0", "127.0.0.1"))  # tests open no port to others
    start = words.index("itprune")
    assert words[start : start + 2] == ["itprune", "serve"]
    more = dict(word.split("=", 1) for word in words[:start])
    headers = {"authorization": f"Bearer {more['ITPRUNE_API_KEY']}"} if more else {}
    with running(words[start + 2 :], more) as (url, process):
        assert httpx.get(f"{url}/v1/models").status_code == (401 if more else 200)
        answer = httpx.post(
            f"{url}{CHAT}",
            json={"model": "tiny-llava", "messages": asked(data_url(png()))},
            headers=headers,
            timeout=WAIT,
        )
        assert answer.status_code == 200, answer.text
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT) == 0


@pytest.mark.skipif(not shutil.which("curl"), reason="this machine has no curl")
@pytest.mark.parametrize("block", CURLS)
def test_commands_that_ask(url: str, block: str) -> None:
    done = subprocess.run(
        ["bash", "-euc", block.replace("http://127.0.0.1:8000", url)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=True,
    )
    if CHAT in block:
        answer = json.loads(done.stdout)
        assert answer["choices"][0]["message"]["content"]
        figures = re.search(r'"usage": .*\n.*"itprune": \{.*\}', PAGE)
        assert figures is not None
        shown = json.loads("{" + figures[0] + "}")
        assert (answer["usage"], answer["itprune"]) == (shown["usage"], shown["itprune"])
    else:
        assert '{"status":"ok"}' in done.stdout
        named = set(re.findall(r"`(itprune_\w+)`", PAGE))
        assert len(named) == 12
        for name in named:
            assert f"# TYPE {name.removesuffix('_total')}" in done.stdout
        assert '"id":"tiny-llava"' in done.stdout


def test_the_commands_for_many_machines(tmp_path: Path) -> None:
    export, node, front = commands(MANY)
    assert [node] == documented("launch/vllm/node.sh")  # which tests/test_vllm_launch.py runs
    exported = tmp_path / "deployed"
    here = {"outputs/run": str(build_wide(tmp_path / "run", PLAIN)), node[1]: str(exported)}
    assert main([here.get(word, word) for word in export[1:]]) == 0
    words = [here.get(word, word) for word in front[2:]]
    with closing(Servers(exported)) as servers:
        both = [servers.start() for _ in range(2)]
        words[words.index("--upstream") + 1] = ",".join(server.url for server in both)
        with running(words) as (url, _):
            body = {"model": exported.name, "messages": asked(data_url(png()))}
            for _ in both:
                answer = httpx.post(f"{url}{CHAT}", json=body, timeout=WAIT)
                assert answer.json()["itprune"]["kept_visual_tokens"] > 0
        assert [len(server.log) for server in both] == [1, 1]


def test_the_program_of_the_page(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    monkeypatch.chdir(ROOT)
    out = io.StringIO()
    with redirect_stdout(out):
        exec(compile(code.replace("http://127.0.0.1:8000", url), "serve.md", "exec"), {})
    assert out.getvalue().strip()


def test_the_table_of_limits_is_true() -> None:
    rows = dict(re.findall(r"^\| `(--[\w-]+)` \| ([\d.]+) \|", PAGE, re.M))
    limits, defaults = Limits(), parse()
    own = {option: vars(limits)[field] for option, field, *_ in serve.LIMITS}
    own["--max-rows"] = defaults.max_rows
    assert {option: float(shown) for option, shown in rows.items()} == own


# --------------------------------------------------------------------------------- the command
def test_sigterm_lets_answers_end() -> None:
    with running([MODEL]) as (url, process):
        body = {"model": "tiny-llava", "messages": asked(data_url(png())), "stream": True}
        with httpx.stream("POST", f"{url}{CHAT}", json=body, timeout=WAIT) as answer:
            process.send_signal(signal.SIGTERM)
            text = answer.read().decode()
        assert text.endswith("data: [DONE]\n\n")
        _, said = process.communicate(timeout=WAIT)
        assert process.returncode == 0, said
        assert said.rstrip().endswith("itprune serve: ended")
        assert "Traceback" not in said


def test_requests_leave_nothing_in_the_log() -> None:
    broken = Image.Exif()
    broken[0x8769] = {0x9286: b"x" * 99}
    out = io.BytesIO()
    Image.open(io.BytesIO(png())).save(out, "PNG", exif=broken.tobytes()[:-90])
    with running([MODEL]) as (url, process):
        for keep in (0.3, 0.4, 0.3, 0.4):
            asking = {"model": "tiny-llava", "messages": asked(data_url(out.getvalue()))}
            answer = httpx.post(f"{url}{CHAT}", json={**asking, "keep": keep}, timeout=WAIT)
            assert answer.status_code == 200, answer.text
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=WAIT)
    assert "EXIF" not in said
    assert "keep=0.3" not in said
    assert said.rstrip().endswith("itprune serve: ended")


def test_a_key_in_a_file_and_ctrl_c(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("a-long-secret\n")
    options = [MODEL, "--api-key-file", str(path), "--served-name", "mine", "--keep", "0.5"]
    with running(options) as (url, process):
        refusal(httpx.get(f"{url}/v1/models"), 401)
        headers = {"authorization": "Bearer a-long-secret"}
        (model,) = httpx.get(f"{url}/v1/models", headers=headers).json()["data"]
        assert model["id"] == "mine"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=WAIT)
        assert process.returncode == 0, said
        assert "Traceback" not in said


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--port", "70000"), "--port: must be 0 to 65535"),
        (("--host", "0.0.0.0"), "add --allow-remote"),
        (("--keep", "2"), "--keep"),
        (("--method", "visionzap"), "visionzip"),
        (("--methods", "visionzap"), "visionzip"),
        (("--rate", "0"), "--rate: must be above 0"),
        (("--max-seconds", "inf"), "--max-seconds: must be above 0"),
        (("--keep-min", "0.5", "--keep-max", "0.4"), "--keep-min and --keep-max: must be in order"),
        (("--keep-min", "0.5"), "takes 0.5 to 1, got 0.22"),
        (("--max-rows", "0"), "--max-rows"),
        (("--max-kv-mb", "-1"), "--max-kv-mb"),
        (("--max-kv-mb", "0.001"), "memory for keys and values"),
        (("--allow-files", "nowhere"), "--allow-files nowhere: no such folder"),
        (("--wire", "images"), "--wire: is for vLLM servers"),
        (("--same-count", "6"), "--same-count: is for vLLM servers"),
        (("--api-key-file", "nowhere"), "--api-key-file nowhere: cannot be read"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_wrong_options_are_one_sentence(options: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)) as error:
        serve.run(parse("--port", "0", *options))
    assert "\n" not in str(error.value)


def test_letting_others_in_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="no password .* and no encryption"):
        serve._warn("0.0.0.0", keys=False)
    with pytest.warns(UserWarning, match="who has a key may use"):
        serve._warn("0.0.0.0", keys=True)
