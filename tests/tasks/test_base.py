"""What all benchmarks have in common: checks at reading, questions, means, groups, the registry."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from itprune import plugins
from itprune.records import image_names
from itprune.tasks import find_task, register_task, tasks
from itprune.tasks.base import Item, Task, check_images, share_all_right

from .made import picture, png

NAMES = ("gqa", "mmbench", "mme", "pope", "records", "scienceqa", "textvqa", "vqav2")


class Lines(Task):
    """A question a line: id, image, answer."""

    name = "lines"
    needs = "a text file"
    metric = "accuracy"
    prompt = "Be short."

    def read_items(self) -> Iterable[Item]:
        for line in self.files[0].read_text().splitlines():
            name, image, answer = line.split()
            yield Item(name, {"prompt": self.asked("Well?"), "image": image}, (answer,))

    def score(self, item: Item, answer: str) -> dict[str, float]:
        return {"score": float(answer in item.references)}

    def group(self, item: Item) -> str:
        return item.id[0]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    picture(tmp_path / "one.png")
    picture(tmp_path / "deep" / "two.png")
    path = tmp_path / "lines.txt"
    path.write_text("a1 one.png yes\na2 deep/two.png no\nb1 one.png no\n")
    return path


def refused(file: Path, message: str, root: Path | None = None, **options: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        Lines.read([file], root, options)
    assert "\n" not in str(caught.value)


def test_images_are_looked_for_beside_the_file(file: Path) -> None:
    task = Lines.read([file], None, {})
    assert [item.id for item in task.items] == ["a1", "a2", "b1"]
    assert task.image_root == file.parent
    question = task.question(task.items[1])
    assert question.images[0].size == (4, 4)
    assert question.messages[0]["content"][1]["text"] == "Well?\nBe short."


def test_an_option_replaces_the_instruction(file: Path) -> None:
    task = Lines.read([file], None, {"instruction": "One letter."})
    assert task.items[0].record["prompt"] == "Well?\nOne letter."
    assert Lines.read([file], None, {"instruction": ""}).items[0].record["prompt"] == "Well?"


def test_unknown_option(file: Path) -> None:
    refused(file, "did you mean 'instruction'", instructoin="x")


def test_missing_files_and_folders(file: Path, tmp_path: Path) -> None:
    refused(tmp_path / "gone.txt", "no such file; task lines needs a text file")
    refused(file, "--image-root", tmp_path / "gone")
    with pytest.raises(ValueError, match="no file is given; it needs a text file"):
        Lines.read([], None, {})


def test_no_item(file: Path) -> None:
    file.write_text("")
    refused(file, "holds no questions")


def test_an_id_that_occurs_twice(file: Path) -> None:
    file.write_text("a1 one.png yes\na1 one.png no\n")
    refused(file, "the id 'a1' occurs twice")


def test_all_missing_images_are_counted(file: Path) -> None:
    file.write_text(
        "a gone.png x\nb one.png x\nc deep/gone.png x\nd far/gone.png x\ne gone.png x\n"
    )
    refused(file, "3 of 4 images are missing")
    refused(file, "the first is 'gone.png'")


@pytest.mark.parametrize("name", ["../one.png", "/etc/hosts", "deep/../../one.png"])
def test_an_image_elsewhere(file: Path, name: str) -> None:
    file.write_text(f"a {name} x\n")
    refused(file, "lies outside")


def test_an_image_on_the_net(file: Path) -> None:
    file.write_text("a http://there/one.png x\n")
    refused(file, "is an address")


def test_each_folder_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    names = [f"deep/{number}.png" for number in range(30)]
    for name in names:
        picture(tmp_path / name)
    listed: list[str] = []
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: listed.append(folder) or listdir(folder))
    check_images(tmp_path, names)
    assert listed == [str(tmp_path / "deep")]


def test_images_inside_the_file_are_named_in_errors(file: Path) -> None:
    task = Lines.read([file], None, {})
    record = {"prompt": "Well?", "image": "row 3"}
    good = Item("x", record, ("y",), pictures={"row 3": png()})
    assert task.question(good).images[0].size == (4, 4)
    with pytest.raises(ValueError, match="unreadable image row 3"):
        task.question(Item("x", record, ("y",), pictures={"row 3": b"no image"}))


def test_image_names_of_every_layout() -> None:
    assert image_names({"prompt": "x", "image": "a"}) == ["a"]
    assert image_names({"prompt": "x", "images": ["a", "b"]}) == ["a", "b"]
    part = {"type": "image", "path": "c"}
    assert image_names({"messages": [{"role": "user", "content": [part, "d"]}]}) == ["c"]
    assert image_names({"prompt": "x"}) == []


def test_the_total_is_the_mean(file: Path) -> None:
    task = Lines.read([file], None, {})
    scores = [task.score(item, "yes") for item in task.items]
    assert task.total(task.items, scores) == {"accuracy": pytest.approx(1 / 3)}
    with pytest.raises(ValueError, match="no answers to total"):
        task.total([], [])


def test_a_group_is_right_when_all_of_it_is(file: Path) -> None:
    task = Lines.read([file], None, {})
    a1, a2, b1 = task.items
    right, wrong = {"score": 1.0}, {"score": 0.0}
    # Groups: a = {a1, a2}, b = {b1}.
    assert share_all_right(task, [a1, a2, b1], [right, right, wrong]) == pytest.approx(1 / 2)
    assert share_all_right(task, [a1, a2, b1], [right, wrong, right]) == pytest.approx(1 / 2)
    # Drawn a, a, b: two of three groups, though they are four of five items.
    drawn = [a1, a2, a1, a2, b1]
    assert share_all_right(task, drawn, [right] * 4 + [wrong]) == pytest.approx(2 / 3)


def test_the_registry_has_the_fields_benchmarks() -> None:
    assert set(NAMES) <= set(tasks())
    for name in NAMES:
        task = find_task(name)
        assert task.name == name
        assert task.needs
        assert task.__doc__


def test_unknown_task() -> None:
    with pytest.raises(ValueError, match="unknown task 'vqav'; did you mean 'vqav2'"):
        find_task("vqav")


def test_tasks_of_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        name, value = "broken", "somewhere:Broken"

        def load(self) -> None:
            raise NameError("no module somewhere")

    monkeypatch.setattr(plugins, "entry_points", lambda group: [Broken()])
    with pytest.warns(UserWarning, match="task 'broken' of somewhere:Broken is left out"):
        plugins.load_plugins.__wrapped__("itprune.tasks", "task")


@pytest.mark.parametrize(("name", "message"), [("Bad Name", "lower-case"), ("gqa", "taken")])
def test_names_that_cannot_be_registered(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        register_task(type("Other", (Lines,), {"name": name}))
