"""``hf-lowbit detect``: files, directories, standard input; what is printed; what is refused."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from types import SimpleNamespace

import pytest

from hf_lowbit import SpotDetector, demo
from hf_lowbit.cli import main
from hf_lowbit.detect.calibration import FILE_NAME

SOURCE = demo.embedded_model()


@pytest.fixture(autouse=True)
def one_detector(monkeypatch, spot):
    """Loads the embedded model once for all of these tests."""
    load = SpotDetector.from_pretrained

    def loaded(place, **settings):
        plain = str(place) == str(SOURCE) and not (settings["observer"] or settings.get("calibration", True))
        return spot if plain and settings["score"] == spot.score else load(place, **settings)

    monkeypatch.setattr(SpotDetector, "from_pretrained", loaded)


@pytest.fixture
def refused(load_test_module, tmp_path, capsys):
    return load_test_module("commands.py").refused.__wrapped__(tmp_path, capsys)


@pytest.fixture
def folder(tmp_path, written, books):
    """Texts of every kind."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "greedy.txt").write_text(written[0], encoding="utf-8")
    (tmp_path / "book.txt").write_text("\ufeff" + books[0], encoding="utf-8")
    (tmp_path / "sub" / "binary.bin").write_bytes(bytes(range(256)) * 4)
    (tmp_path / "sub" / "latin.txt").write_bytes("caf\u00e9 au lait ".encode("latin-1") * 9)
    (tmp_path / "sub" / "empty.txt").touch()
    (tmp_path / ".hidden").write_text("not looked at")
    return tmp_path


def run(*arguments: object, command: str = "detect") -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([command, *map(str, arguments)]) == 0
    return out.getvalue()


def test_a_directory_is_judged_file_by_file(folder):
    found = json.loads(run(folder, "--json"))
    assert isinstance(found, list)
    assert all({"verdict", "score", "p_value", "tokens", "reason"} <= set(row) for row in found)
    rows = {row["source"]: row for row in found}
    assert list(rows) == ["book.txt", "greedy.txt", "sub/binary.bin", "sub/empty.txt", "sub/latin.txt"]
    assert rows["greedy.txt"]["verdict"] == "machine"
    assert [row["verdict"] for name, row in rows.items() if name != "greedy.txt"] == ["abstain"] * 4
    assert "NUL bytes" in rows["sub/binary.bin"]["reason"]
    assert "not UTF-8 text (invalid continuation byte at byte 3)" in rows["sub/latin.txt"]["reason"]
    assert rows["sub/empty.txt"]["reason"] == "the text is empty"
    assert rows["book.txt"]["score"] < rows["greedy.txt"]["score"]


def test_a_file_and_standard_input_say_the_same(folder, monkeypatch, written):
    (named,) = json.loads(run(folder / "greedy.txt", "--json"))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(written[0].encode())))
    (piped,) = json.loads(run("-", "--json"))
    assert {**named, "source": ""} == {**piped, "source": ""}
    assert (named["source"], piped["source"]) == ("greedy.txt", "standard input")


def test_what_people_read_has_the_error_rate_in_it(folder):
    out = run(folder / "greedy.txt")
    assert "Reads like a machine's (machine)" in out
    assert "at most 1 % get this verdict" in out
    assert "threshold set for 1 % false positives" in out
    assert "spot " in out and "lrr " in out


def test_a_page_is_written(folder, tmp_path):
    run(folder, "--html", tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert page.count("<article>") == 5
    assert "Token heat map" in page


def test_another_score_and_a_calibration_of_ones_own(folder, spot):
    spot.calibration.save(folder / "own.json")
    (found,) = json.loads(run(folder / "greedy.txt", "--json", "--score", "spot", "--calibration", folder / "own.json"))
    assert (found["score_name"], found["verdict"]) == ("spot", "machine")


def test_a_calibration_moves_with_its_checkpoint(folder):
    shutil.copytree(SOURCE, folder / "model", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    (found,) = json.loads(run(folder / "greedy.txt", "--json", "--detector", folder / "model"))
    assert found["verdict"] == "machine"
    (folder / "model" / FILE_NAME).unlink()
    (found,) = json.loads(run(folder / "greedy.txt", "--json", "--detector", folder / "model"))
    assert found["verdict"] == "abstain" and "no calibration" in found["reason"]


def test_refusals(refused, folder, tmp_path, spot):
    text = folder / "book.txt"
    (tmp_path / "none").mkdir()
    for arguments in ([], [text, "--serve"]):
        refused(2, ["detect", *arguments], "give what to judge, a FILE, a directory or -, or --serve")
    refused(2, ["detect", tmp_path / "nowhere"], "cannot read", "nowhere", "No such file")
    refused(2, ["detect", tmp_path / "none"], "holds no files")
    refused(2, ["detect", text, "--score", "spott"], "unknown score 'spott'. Did you mean 'spot'?")
    refused(2, ["detect", text, "--score", "binoculars"], "give the detector an observer")
    refused(2, ["detect", text, "--detector", tmp_path / "nowhere"], "neither a directory here nor a Hub id")
    refused(2, ["detect", text, "--calibration", tmp_path / "nowhere"], "cannot read", "No such file")
    refused(1, ["detect", text, "--calibration", text], "damaged: not JSON")
    refused(2, ["detect", text, "--html", tmp_path / "none"], "it is not a file")
    refused(2, ["detect", text, "--html", tmp_path / "no" / "out.html"], "cannot write")
    refused(2, ["detect", text, "--port", "x"], "--port", "not a whole number")
    spot.calibration.save(tmp_path / "own.json")
    other = json.loads((tmp_path / "own.json").read_text())
    other["detector"]["weights"] = "0" * 64
    (tmp_path / "other.json").write_text(json.dumps(other))
    refused(2, ["detect", text, "--calibration", tmp_path / "other.json"], "another detector (embedded): weights was")


def test_a_detector_is_calibrated_from_a_file_of_texts(refused, folder, tmp_path, books, written):
    human, own = tmp_path / "human.jsonl", tmp_path / "own.json"
    human.write_text("".join(json.dumps({"text": text}) + "\n" for text in books[:25]))
    said = json.loads(run(human, own, "--fpr", "0.05", "--source", "old books", "--json", command="calibrate"))
    assert said["human"] == 25 and said["bins"][0] == {"from": 60, "to": 100, "texts": 25}
    assert json.loads(own.read_text())["source"] == "old books"
    (found,) = json.loads(run(folder / "greedy.txt", "--json", "--calibration", own))
    assert found["verdict"] == "machine" and found["fpr"] == 0.05
    refused(2, ["calibrate", human, own], "own.json", "exists already")
    refused(2, ["calibrate", human, tmp_path / "more.json"], "fpr=0.01 takes at least 99 human texts", "25 were given")
    human.write_text('{"text": "one"}\n{"words": 1}\n')
    refused(2, ["calibrate", human, tmp_path / "more.json"], "human.jsonl:2 has no text")
    human.write_text("once upon\n")
    refused(2, ["calibrate", human, tmp_path / "more.json"], "human.jsonl:1 is not JSON")
    (tmp_path / "binary").write_bytes(b"a\0b")
    refused(2, ["calibrate", tmp_path / "binary", tmp_path / "more.json"], "'binary' is not a text: it holds NUL bytes")
