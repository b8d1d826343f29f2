"""Files of results: what is read, and what is refused in one sentence."""

from __future__ import annotations

import json

import pytest

from hf_lowbit.errors import BadRequest
from hf_lowbit.report.points import read_points

ROW = {"bytes": 1000, "perplexity": 9.5, "kl": 0.1, "method": "rtn"}


def written(tmp_path, content) -> str:
    path = tmp_path / "four bits.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def test_what_eval_prints(tmp_path):
    (point,) = read_points(written(tmp_path, ROW))
    assert (point.label, point.bytes, point.kl, point.perplexity, point.own) == ("four bits", 1000, 0.1, 9.5, False)


def test_without_a_reference_there_is_no_kl(tmp_path):
    (point,) = read_points(written(tmp_path, ROW | {"kl": None}))
    assert point.kl is None


def test_what_demo_prints(tmp_path):
    rows = {"text": "x", "rows": [ROW | {"model": "original", "kl": 0.0}, ROW | {"model": "3 bits"}]}
    assert [point.label for point in read_points(written(tmp_path, rows))] == ["original", "3 bits"]


def test_results_of_eval_leave_out_rows_that_failed_or_have_no_size(tmp_path):
    rows = {"command": "x", "result": {"a": ROW, "b": {"fails": "no"}, "c": {"perplexity": 3.0}, "d": {"bytes": 5}}}
    assert [point.label for point in read_points(written(tmp_path, rows))] == ["a"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ({"perplexity": 3.0}, "holds no row with `bytes` and `perplexity`. Give what `hf-lowbit eval --json`"),
        ([1, 2], "holds no row"),
        ({"bytes": True, "perplexity": 1.0}, "holds no row"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path, content, message):
    with pytest.raises(BadRequest, match=message):
        read_points(written(tmp_path, content))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(BadRequest, match=r"cannot read .*gone\.json.*: No such file"):
        read_points(str(tmp_path / "gone.json"))
