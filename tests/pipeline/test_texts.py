"""Calibration data: the same windows from the same words, every kind of source, and a clear word on what is no source."""

from __future__ import annotations

import io
import json
import re
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hf_lowbit import demo
from hf_lowbit.errors import BadRequest
from hf_lowbit.pipeline.readers import _rows
from hf_lowbit.pipeline.sources import parse
from hf_lowbit.pipeline.texts import read_calibration

END = 256


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8; it remembers how many it made."""

    def __init__(self, end: int | None = END, chat_template: str | None = None) -> None:
        self.eos_token_id, self.chat_template, self.made = end, chat_template, 0

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> SimpleNamespace:
        assert not add_special_tokens and not verbose
        ids = list(text.encode())
        self.made += len(ids)
        return SimpleNamespace(input_ids=ids)

    def apply_chat_template(self, messages: list, tokenize: bool = True) -> str:
        assert not tokenize
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def place(tmp_path):
    """Writes a file and gives its path."""

    def write(name: str, content: str | bytes) -> Path:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path / name

    return write


def text_of(windows: torch.Tensor) -> str:
    """All windows as text; the end token is a bar."""
    return bytes(ord("|") if i == END else i for i in windows.flatten().tolist()).decode()


def refused(source: object, *parts: str, tokenizer: object = None, **options: object) -> None:
    with pytest.raises(BadRequest) as caught:
        read_calibration(source, tokenizer or Bytes(), **options)
    for part in parts:
        assert part in str(caught.value)


def test_windows_of_a_text_are_runs_of_its_tokens():
    tokenizer = AutoTokenizer.from_pretrained(demo.embedded_model())
    found = read_calibration(demo.held_out_text(), tokenizer, sequences=5, length=64, vocabulary=4096, places=1024)
    assert found.windows.shape == (5, 64) and found.windows.dtype == torch.int64
    text = demo.held_out_text().read_text(encoding="utf-8")
    assert all(tokenizer.decode(window[2:-2]) in text for window in found.windows)


def test_provenance(place):
    found = read_calibration(place("data.txt", "abcdefgh" * 9), Bytes(), sequences=100, length=8, seed=3)
    assert found.provenance == json.loads(json.dumps(found.provenance))
    sha = found.provenance.pop("sha256")
    assert len(sha) == 64 and sha != read_calibration(["abcdefg " * 9], Bytes(), length=8).provenance["sha256"]
    expected = {"source": "data.txt", "kind": "text", "sequences": 9, "length": 8, "asked": 100, "seed": 3}
    assert found.provenance == expected


@pytest.mark.parametrize("size", [600, 50_000])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_the_same_words_give_the_same_windows(place, name, size):
    words = [f"word {number} " for number in range(size // 9)]
    source = place(name, "".join(words) if name == "a.txt" else lines(*({"text": word} for word in words)))

    def chosen(seed: int) -> torch.Tensor:
        return read_calibration(source, Bytes(), sequences=6, length=32, seed=seed).windows

    assert torch.equal(chosen(1), chosen(1))
    assert len({chosen(seed).numpy().tobytes() for seed in range(8)}) > 5


@given(count=st.integers(0, 400), length=st.integers(1, 40), sequences=st.integers(1, 12), seed=st.integers(0, 99))
def test_windows_are_disjoint_in_order_and_as_many_as_there_are(count, length, sequences, seed):
    options = {"sequences": sequences, "length": length, "seed": seed}

    def numbered(text: str, **_: object) -> SimpleNamespace:
        return SimpleNamespace(input_ids=list(range(len(text))))

    if count < length:
        return refused(["x" * count], f"has {count} tokens", tokenizer=numbered, **options)
    windows = read_calibration(["x" * count], numbered, **options).windows
    starts = windows[:, 0]
    assert len(windows) == min(count // length, sequences)
    assert torch.equal(windows, starts[:, None] + torch.arange(length))
    assert bool((starts % length == 0).all()) and starts.unique().tolist() == starts.tolist()


def test_documents_are_joined_by_the_end_token_and_a_file_is_one_text(place):
    rows = [{"text": "abc"}, {"text": "  "}, {"text": None}, {"text": "de"}, {"text": "fg"}]
    for source in (["abc", "", "de", "fg"], place("a.jsonl", lines(*rows) + "\n")):
        assert text_of(read_calibration(source, Bytes(), length=9).windows) == "abc|de|fg"
        assert text_of(read_calibration(source, Bytes(end=None), length=7).windows) == "abcdefg"
    assert text_of(read_calibration(place("a.txt", "abc\r\nde\n"), Bytes(), length=7).windows) == "abc\nde\n"
    assert text_of(read_calibration(place("b.txt", "\ufeffabc"), Bytes(), length=3).windows) == "abc"


def test_a_long_file_gives_slices_from_all_over_it(place):
    text = "".join(f"{number:07d} " for number in range(100_000))
    tokenizer = Bytes()
    windows = read_calibration(place("long.txt", text), tokenizer, sequences=20, length=64).windows
    assert tokenizer.made <= 12 * 20 * 64
    starts = [int(re.search(r"\d{7}", text_of(window))[0]) for window in windows]
    assert starts == sorted(starts)
    assert max(b - a for a, b in zip([0, *starts], [*starts, 100_000], strict=True)) < 25_000
    assert all(text_of(window) in text for window in windows)
    assert max(start % 5_000 for start in starts) > 1_000  # the slices move, not only the choice among them


def test_slices_of_a_long_file_cut_no_character(place):
    source = place("long.txt", "aé€😀" * 5_000)
    for seed in range(6):
        windows = read_calibration(source, Bytes(end=None), sequences=8, length=10, seed=seed).windows
        assert set(windows[0].tolist()) <= set("aé€😀".encode())


def test_a_long_file_of_few_tokens_is_read_until_it_suffices(place):
    source = place("sparse.txt", "x" * 30_000)
    tokenizer = lambda text, **_: SimpleNamespace(input_ids=[1] * (len(text) // 50))  # noqa: E731
    found = read_calibration(source, tokenizer, sequences=10, length=16)
    assert found.windows.shape == (10, 16)
    assert len(read_calibration(source, tokenizer, sequences=99, length=16).windows) == 30_000 // 50 // 16


def test_a_long_list_gives_a_seeded_choice():
    texts = [f"{number:08d}" for number in range(9_000)]
    tokenizer = Bytes(end=None)
    windows = read_calibration(texts, tokenizer, sequences=10, length=8).windows
    assert tokenizer.made <= 12 * 10 * 8
    numbers = [int(text_of(window)) for window in windows]
    assert numbers == sorted(numbers) and max(numbers) > 4_000


def test_rows_of_a_long_file_are_whole(place):
    source = place("long.jsonl", lines(*({"text": f"{number:08d}"} for number in range(9_000))))
    windows = read_calibration(source, Bytes(), sequences=12, length=9, seed=5).windows
    assert all(re.fullmatch(r"\d{0,8}\|\d{0,8}", text_of(window)) for window in windows)
    assert text_of(windows)[:8].isdigit()


@given(sizes=st.lists(st.integers(0, 9), max_size=12), cuts=st.lists(st.integers(0, 200), max_size=6))
def test_each_row_belongs_to_the_slice_it_begins_in(sizes, cuts):
    rows = [f"{number:x}" * size for number, size in enumerate(sizes)]
    data = lines(*({"text": row} for row in rows)).encode()
    request = parse("rows.jsonl", 1, 1, 0)
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    found = [row for a, b in pairwise(places) for row in _rows(io.BytesIO(data), a, b, request, None)]
    assert found == rows


def test_rows_of_messages_go_through_the_chat_template(place):
    rows = lines({"messages": [{"role": "user", "content": "hi"}, {"role": "ai", "content": "yo"}]})
    source = place("chat.jsonl", rows)
    windows = read_calibration(source, Bytes(chat_template="x"), length=14).windows
    assert text_of(windows) == "<user>hi<ai>yo"
    refused(source, "chat.jsonl', the row at byte 0, holds messages", "no chat template", "Use rows with a text column")
    odd = place("odd.jsonl", lines({"text": "a"}, {"messages": [{"role": "user"}]}))
    refused(odd, "byte 14", "does not fit the tokenizer's chat template", tokenizer=Bytes(chat_template="x"))


def test_a_mapping_overrides(place):
    source = place("a.jsonl", lines({"body": "abcdefgh" * 4, "text": 3}))
    settings = {"source": source, "column": "body", "sequences": 2, "length": 8, "seed": None}
    found = read_calibration(settings, Bytes(), sequences=9, length=512, seed=7)
    assert found.windows.shape == (2, 8)
    assert found.provenance["column"] == "body" and found.provenance["seed"] == 7
    refused(settings | {"colum": "x"}, "unknown calibration setting 'colum'", "Did you mean 'column'?")
    refused({"length": 8}, "need a 'source'")
    refused(settings | {"length": 0}, "calibration length must be a whole number of 1 or more, got 0")
    refused(settings | {"seed": -1}, "calibration seed must be a whole number of 0 or more, got -1")
    refused(settings | {"sequences": True}, "sequences must be a whole number", "got True")
    refused(settings | {"column": 3}, "calibration column must be a name, got 3")
    refused({"source": ["a"], "split": "test"}, "calibration split='test' has no meaning for texts; leave it out")
    refused({"source": place("a.txt", "a"), "column": "b"}, "column='b' has no meaning for text")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_token_ids_are_used_as_they_are(dtype):
    ids = torch.tensor([[3, 1, 2], [0, 5, 4]])
    for source in (ids.to(dtype), ids.tolist(), list(ids), tuple(map(tuple, ids.tolist()))):
        found = read_calibration(source, None, sequences=1, length=2, vocabulary=6, places=3)
        assert torch.equal(found.windows, ids) and found.windows.dtype == torch.int64
    assert found.provenance["source"] is None
    assert [found.provenance[key] for key in ("kind", "sequences", "length", "asked")] == ["tokens", 2, 3, 2]


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ([], ["got list '[]'"]),
        (3, ["a calibration source is a file", "got int '3'"]),
        (None, ["got NoneType"]),
        (["a", 3], ["only texts, or only windows of token ids"]),
        ([[1, 2], [3]], ["windows of token ids of one length"]),
        ([1, 2, 3], ["token ids [n, length], got torch.int64 [3]"]),
        (torch.tensor(3), ["got torch.int64 []"]),
        (torch.zeros(2, 3), ["got torch.float32 [2, 3]"]),
        (torch.zeros(0, 3).long(), ["got torch.int64 [0, 3]"]),
        ([[1, -100]], ["the windows hold token -100", "0 or more"]),
        ([[1, 300]], ["the windows hold token 300, the model knows 256 tokens", "not of one checkpoint"]),
        ([[1] * 33], ["a window of 33 tokens", "the model takes 32", "Use a length of 32"]),
    ],
    ids=str,
)
def test_no_source_and_no_token_ids(source, parts):
    refused(source, *parts, vocabulary=256, places=32)


def test_text_that_does_not_fit(place):
    text = place("a.txt", "abcdé" * 9)
    refused(text, "a window of 512 tokens was asked for, the model takes 32. Use a length of 32", places=32)
    refused(
        text, "the tokenizer makes token 195, the model knows 128 tokens", "not of one checkpoint", length=8, vocabulary=128
    )
    refused(text, "a.txt' has 54 tokens, one calibration window needs 64", "Give more text or ask for a shorter", length=64)
    refused(["ab", "c"], "the list of texts has 4 tokens", length=64)
    for content in ("", " \n"):
        refused(place("empty.txt", content), "empty.txt' has 0 tokens")
    with pytest.raises(BadRequest, match="needs the model's tokenizer"):
        read_calibration(text, None)


@pytest.mark.parametrize("size", [1, 3_000])
def test_files_that_hold_no_text(place, size):
    options = {"sequences": 4, "length": 8}
    for name, content, found in (
        ("latin", "café au lait ".encode("latin-1"), "invalid continuation byte at byte 3"),
        ("utf16", "abc ".encode("utf-16-le"), "a zero byte at byte 1"),
    ):
        refused(place(name, content * size), f"{name}' is not UTF-8 text", "Convert it first", **options)
        refused(place(name, content), found, **options)
    refused(place("cut.txt", "abcdefghé".encode()[:-1]), "unexpected end of data at byte 8", **options)


def test_paths_that_cannot_be_read(place, tmp_path):
    refused(tmp_path, "cannot read", "Is a directory", "Give a text file, rows (.jsonl)")
    refused(tmp_path / "nowhere", "cannot read", "nowhere", "No such file")
    for name in ("text.txt", "a/b/c", "/nowhere", "./x", "rows.jsonl", "Once upon a time. " * 99, "a\0b"):
        refused(name, "cannot read")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ('{"text": "a"}\n{"text": \n', ["the row at byte 14, is not JSON", "one JSON object a line"]),
        ('"text"\n', ["has no column 'text' or 'messages', but no columns"]),
        ('{"body": "a", "title": "b"}', ["has no column 'text' or 'messages', but body, title", "column=..."]),
        ('{"text": ["a"]}', ["neither text nor messages in column 'text': ['a']"]),
        ("[" * 100_000, ["is not JSON"]),
        (b'{"text": "caf\xe9"}', ["not UTF-8", "at byte 13"]),
    ],
    ids=range(6),
)
def test_rows_that_cannot_be_read(place, content, parts):
    refused(place("rows.jsonl", content), "rows.jsonl'", *parts)


def test_lone_surrogates_in_json_are_dropped(place):
    source = place("a.jsonl", '{"text": "ab\\ud83dcd"}')
    assert text_of(read_calibration(source, Bytes(), length=4).windows) == "abcd"


def test_repeated_text_is_allowed():
    assert read_calibration(["a" * 64], Bytes(), length=8).windows.unique().tolist() == [ord("a")]


def test_progress_ends_at_what_was_asked():
    steps: list[tuple[int, int]] = []
    read_calibration(["abcd" * 8] * 9, Bytes(), sequences=4, length=8, progress=lambda *step: steps.append(step))
    assert steps == sorted(steps) and steps[-1] == (32, 32)


@pytest.fixture
def library(monkeypatch, tmp_path):
    """Stands for the datasets package; its one data set has 500 rows and counts those that were read."""
    module = ModuleType("datasets")
    module.calls, module.read, module.offline = [], 0, False

    def load_dataset(path, name=None, split=None, streaming=False):
        module.calls.append((path, name, split, streaming))
        if path == "user/private":
            raise PermissionError("gated\nask first")
        if module.offline and streaming:
            raise ConnectionError("offline")
        return rows()

    def rows():
        for number in range(500):
            module.read += 1
            if module.broken == number:
                raise OSError("connection lost")
            yield {"text": f"{number:07d}", "n": number}

    module.load_dataset, module.broken = load_dataset, None
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.chdir(tmp_path)
    return module


def test_a_data_set_is_streamed_as_far_as_needed(library):
    settings = {"source": "user/name", "config": "small", "split": "validation"}
    found = read_calibration(settings, Bytes(), sequences=3, length=8)
    assert library.calls == [("user/name", "small", "validation", True)]
    assert 3 <= library.read < 50
    assert found.provenance["source"] == "user/name" and found.provenance["kind"] == "dataset"
    assert found.provenance["config"] == "small" and found.provenance["split"] == "validation"
    assert len(read_calibration("wikitext", Bytes(), sequences=999, length=8).windows) == 500 - 1


def test_a_data_set_in_the_cache_needs_no_network(library):
    library.offline = True
    assert len(read_calibration("user/name", Bytes(), sequences=3, length=8).windows) == 3
    assert library.calls[-1] == ("user/name", None, "train", False)


def test_a_data_set_that_cannot_be_loaded(library, monkeypatch):
    refused("user/private", "'user/private' is no file here", "split 'train'", "gated ask first", "Check name")
    library.broken = 2
    refused("user/name", "connection lost")
    refused({"source": "user/name", "column": "body"}, "data set 'user/name', row 0, has no column 'body', but text, n")
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused("wikitext", "'wikitext' is no file here", 'pip install "hf-lowbit[eval]"')


def test_a_file_comes_before_a_data_set_of_its_name(library, place):
    place("wikitext", "abcdefgh")
    found = read_calibration("wikitext", Bytes(), length=8)
    assert found.provenance["kind"] == "text" and not library.calls
