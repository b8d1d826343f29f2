"""The working directory: what was finished is there after any kill, and a result appears whole or not at all."""

from __future__ import annotations

import json
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_lowbit.errors import BadRequest, FormatError, LowBitError
from hf_lowbit.format import LowBitTensor, Spec
from hf_lowbit.pipeline.workspace import Workspace
from hf_lowbit.solvers import solve

MADE_FOR = {"model": {"files": "abc"}, "bits": 4, "data": None}
REPORT = [{"name": "q_proj", "error": 0.25}]


def small(seed: int = 0) -> dict[str, LowBitTensor]:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))
    return {
        f"layers.{seed}.q.weight": solve(weight, Spec(method="rtn")),
        f"layers.{seed}.größe": solve(weight, Spec(bits=3)),
    }


def assert_same(one: dict[str, LowBitTensor], other: dict[str, LowBitTensor]) -> None:
    assert one.keys() == other.keys()
    for name, record in one.items():
        assert record.layout == other[name].layout
        assert all(torch.equal(value, other[name].tensors[field]) for field, value in record.tensors.items())


def begun(place: Path, parts: int = 2, made_for: dict | None = None) -> Path:
    """A workspace with some finished parts, closed; its folder."""
    with Workspace.open(place, made_for or MADE_FOR) as work:
        for number in range(parts):
            work.put(f"layers.{number}", small(number), REPORT)
    return work.folder


def fill(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "model.txt").write_text("model")


@contextmanager
def full_disk(size: int):
    """Stands for a full disk: no file may pass ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def opening(place: Path, *parts: str, error: type = BadRequest, made_for: dict | None = None, **options: bool) -> None:
    with pytest.raises(error) as caught:
        Workspace.open(place, MADE_FOR if made_for is None else made_for, **options)
    for part in parts:
        assert part in str(caught.value)


def test_parts_come_back_in_the_next_run(tmp_path):
    begun(tmp_path / "out")
    with Workspace.open(str(tmp_path / "out"), MADE_FOR) as work:
        assert work.finished() == ["layers.0", "layers.1"] and not work.notes
        for number in range(2):
            tensors, report = work.get(f"layers.{number}")
            assert_same(tensors, small(number))
            assert report == REPORT
        work.put("empty", {}, [])
        assert work.get("empty") == ({}, [])
        with pytest.raises(LowBitError, match=r"part 'other' is not finished. Finished are: layers.0, layers.1, empty"):
            work.get("other")


@settings(max_examples=6)
@given(names=st.lists(st.text(max_size=12).filter(lambda name: name.isprintable()), unique=True, max_size=6))
def test_any_name_names_a_part(tmp_path_factory, names):
    place = tmp_path_factory.mktemp("names") / "out"
    part = {"w": small()["layers.0.q.weight"]}
    with Workspace.open(place, {}) as work:
        for number, name in enumerate(names):
            work.put(name, part, [{"n": number}])
    with Workspace.open(place, {}) as work:
        assert work.finished() == names
        assert [work.get(name)[1] for name in names] == [[{"n": number}] for number in range(len(names))]


def test_a_part_can_be_put_again(tmp_path):
    begun(tmp_path / "out")
    with Workspace.open(tmp_path / "out", MADE_FOR) as work:
        work.put("layers.0", small(5), [])
    with Workspace.open(tmp_path / "out", MADE_FOR) as work:
        assert work.finished() == ["layers.0", "layers.1"] and not work.notes
        assert_same(work.get("layers.0")[0], small(5))


def test_the_result_appears_and_the_workspace_goes(tmp_path):
    place = tmp_path / "new" / "parent" / "out"
    with Workspace.open(place, MADE_FOR) as work:
        work.put("a", small(), REPORT)
        assert not place.exists()
        work.finish(fill)
    assert (place / "sub" / "model.txt").read_text() == "model"
    assert [path.name for path in place.parent.iterdir()] == ["out"]


def test_an_empty_destination_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    with Workspace.open(tmp_path / "out", MADE_FOR) as work:
        work.finish(fill)
    assert (tmp_path / "out" / "sub").is_dir() and len(list(tmp_path.iterdir())) == 1


def test_without_a_finished_part_nothing_is_left(tmp_path):
    with Workspace.open(tmp_path / "new" / "out", MADE_FOR), pytest.raises(KeyboardInterrupt):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_destination_that_is_taken(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("full", "file", "link"):
        opening(tmp_path / name, f"{name} exists and is not an empty directory. Choose another name or remove it.")
        opening(tmp_path / name, f"{name} exists", restart=True)
    opening(tmp_path / "file" / "out", "out cannot be written (Not a directory). Choose a directory you can write to.")
    opening(Path("/proc"), "/proc", "mount point", "Name a directory inside it")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full", "link"]


def test_a_destination_taken_during_the_run(tmp_path):
    folder = begun(tmp_path / "out")
    with Workspace.open(tmp_path / "out", MADE_FOR) as work, pytest.raises(BadRequest, match="out exists"):
        work.finish(lambda result: (fill(result), fill_out(tmp_path / "out")))
    opening(tmp_path / "out", "out exists")
    opening(tmp_path / "out", "out exists", restart=True)
    (tmp_path / "out").rename(tmp_path / "other")
    assert not (folder / "result").exists()
    with Workspace.open(tmp_path / "out", MADE_FOR) as work:
        assert len(work.finished()) == 2


def fill_out(place: Path) -> None:
    place.mkdir()
    (place / "mine").touch()


def test_a_second_run_is_refused(tmp_path):
    with Workspace.open(tmp_path / "out", MADE_FOR) as work:
        work.put("a", small(), REPORT)
        opening(tmp_path / "out", f"another run is working on {tmp_path / 'out'}", "Wait for it, or choose another name")
        opening(tmp_path / "out", "another run", restart=True)
        with Workspace.open(tmp_path / "out2", MADE_FOR):
            pass
    with Workspace.open(tmp_path / "out", MADE_FOR) as work:
        assert work.finished() == ["a"]


def test_work_for_something_else_is_refused_by_name(tmp_path):
    folder = begun(tmp_path / "out")
    other = {"model": {"files": "x" * 99}, "bits": 3, "data": None, "seed": 1}
    opening(tmp_path / "out", f"{folder} holds the unfinished work of another run", made_for=other)
    opening(tmp_path / "out", "bits was 4, now 3; ", "; seed was null, now 1. Ask for the same again", made_for=other)
    opening(tmp_path / "out", 'model.files was "abc", now "xxxxxxx', "xxx...;", "pass --restart", made_for=other)
    opening(tmp_path / "out", "data was null, now null", made_for={"model": {"files": "abc"}, "bits": 4})
    opening(tmp_path / "out", " and 4 more. ", made_for=MADE_FOR | {f"k{n}": n for n in range(10)})
    with Workspace.open(tmp_path / "out", MADE_FOR) as work:
        assert len(work.finished()) == 2
    with Workspace.open(tmp_path / "out", other, restart=True) as work:
        assert not work.finished() and not list(folder.glob("part-*"))
        work.put("a", small(), REPORT)
    opening(tmp_path / "out", "bits was 3, now 4")


def test_a_damaged_or_missing_part_is_made_again(tmp_path):
    folder = begun(tmp_path / "out", parts=4)
    files = sorted(folder.glob("part-*"))
    data = bytearray(files[0].read_bytes())
    data[len(data) // 2] ^= 1
    files[0].write_bytes(data)
    files[1].unlink()
    files[2].write_bytes(files[2].read_bytes()[:-1])
    with Workspace.open(tmp_path / "out", MADE_FOR) as work:
        assert work.finished() == ["layers.3"]
        assert [note.split(":")[0] for note in work.notes] == [
            "finished part 'layers.0' is damaged",
            "finished part 'layers.1' is lost (No such file or directory)",
            "finished part 'layers.2' is damaged",
        ]
        assert sorted(folder.glob("part-*")) == files[3:]
    with Workspace.open(tmp_path / "out", MADE_FOR) as work:
        assert work.finished() == ["layers.3"] and not work.notes


def test_a_part_damaged_during_the_run_is_named_and_dropped(tmp_path):
    begun(tmp_path / "out")
    with Workspace.open(tmp_path / "out", MADE_FOR) as work:
        work.folder.joinpath("part-layers.0.safetensors").write_bytes(b"nothing")
        with pytest.raises(LowBitError, match=r"part 'layers.0' was damaged .* Run the same command again"):
            work.get("layers.0")
        assert work.finished() == ["layers.1"]


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("{", ["manifest.json is damaged", "pass --restart"]),
        ("[]", ["manifest.json is damaged"]),
        ('{"manifest_version": 1}', ["damaged", "parts"]),
        ('{"manifest_version": 1, "parts": {"a": {}}, "fingerprint": {}}', ["an entry is incomplete"]),
        ('{"manifest_version": 2, "parts": []}', ["has version 2, this hf-lowbit works with 1", "--restart"]),
    ],
)
def test_a_manifest_that_cannot_be_used(tmp_path, content, parts):
    folder = begun(tmp_path / "out")
    (folder / "manifest.json").write_text(content)
    opening(tmp_path / "out", *parts, error=FormatError)
    assert len(list(folder.glob("part-*"))) == 2
    with Workspace.open(tmp_path / "out", MADE_FOR, restart=True) as work:
        assert not work.finished()


def test_a_full_disk_keeps_what_is_finished(tmp_path):
    folder = begun(tmp_path / "out")
    before = sorted(path.name for path in folder.iterdir())
    big = {"w": solve(torch.randn(256, 256), Spec(method="rtn"))}
    message = rf"part 'big' failed .*; 2 finished parts kept in {folder}\. .* run the same command again"
    with Workspace.open(tmp_path / "out", MADE_FOR) as work:
        with full_disk(20_000), pytest.raises(LowBitError, match=message):
            work.put("big", big, [])
        assert work.finished() == ["layers.0", "layers.1"]
        with full_disk(100), pytest.raises(LowBitError, match="part 'small' failed"):
            work.put("small", {}, [])
        with (
            full_disk(100),
            pytest.raises(LowBitError, match=rf"writing {tmp_path / 'out'} failed .*; 2 finished parts kept"),
        ):
            work.finish(lambda result: (result / "a").write_bytes(bytes(9999)))
        assert len(work.finished()) == 2 and not (tmp_path / "out").exists()
    assert sorted(path.name for path in folder.iterdir()) == before
    with Workspace.open(tmp_path / "out", MADE_FOR) as work:
        assert len(work.finished()) == 2 and not work.notes
        work.put("big", big, [])
        work.finish(fill)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_full_from_the_start_leaves_nothing(tmp_path):
    with full_disk(10):
        opening(tmp_path / "new" / "out", "preparing", "nothing was left behind", error=LowBitError)
    assert not list(tmp_path.iterdir())


def test_leftovers_of_a_kill_go_at_the_next_open(tmp_path):
    folder = begun(tmp_path / "out")
    for name in ("part-layers.2.safetensors.tmp", "part-layers.2.safetensors", "manifest.json.tmp"):
        (folder / name).touch()
    fill_out(folder / "result")
    (folder / "mine").touch()
    with Workspace.open(tmp_path / "out", MADE_FOR) as work:
        found = {path.name for path in folder.iterdir()} - {"lock", "mine", "manifest.json"}
        assert found == {"part-layers.0.safetensors", "part-layers.1.safetensors"}
        work.finish(fill)
    assert [path.name for path in folder.iterdir()] == ["mine"]  # what others put there is theirs


@pytest.mark.parametrize("stands", [True, False])
def test_a_run_killed_around_the_moment_its_result_stands(tmp_path, stands):
    folder = begun(tmp_path / "out")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"handing_over": True}))
    if not stands:
        (folder / "result").mkdir()
    fill_out(tmp_path / "out")  # the result, or what others put there since
    opening(tmp_path / "out", "out exists and is not an empty directory")
    assert len(list(folder.glob("part-*"))) == (0 if stands else 2)
    assert folder.exists() != stands
