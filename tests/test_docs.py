"""The documentation tells the truth: its programs run, its messages are the code's, its links lead somewhere."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_lowbit.format import Spec, load_tensors, save_tensors
from hf_lowbit.solvers import SOLVERS, solve

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
pytestmark = pytest.mark.skipif(not DOCS, reason="docs/ is not in this installation")


def blocks(name: str) -> list[str]:
    """The Python programs of a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / name).read_text(encoding="utf-8"), re.DOTALL)


def test_the_reader_of_the_format_page_reads_every_golden_record():
    space: dict = {}
    exec(blocks("format.md")[0], space)
    for path in sorted((ROOT / "tests" / "golden").glob("v?.safetensors")):
        found, record = space["read"](str(path))
        ours = load_tensors(path)
        assert found.keys() == ours.keys() and len(found) > 30
        assert record["format_version"] == 1
        for name, tensor in ours.items():
            expected = tensor.dequantize()
            assert found[name].shape == tuple(expected.shape)
            torch.testing.assert_close(torch.from_numpy(found[name]), expected, rtol=1e-6, atol=1e-9, msg=name)


@settings(max_examples=60)
@given(st.data())
def test_the_reader_of_the_format_page_reads_every_optional_term(records, tmp_path_factory, data):
    space: dict = {}
    exec(blocks("format.md")[0], space)
    record = records.fill(data.draw(records.layouts()), data.draw(st.integers(0, 99)))
    path = tmp_path_factory.mktemp("format") / "record.safetensors"
    save_tensors(path, {"w": record})
    found = torch.from_numpy(space["read"](str(path))[0]["w"])
    expected = record.dequantize()
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.fixture
def loaded():
    """The solver of the page, registered for one test."""
    program, row = blocks("adding_a_solver.md")
    try:
        exec(program, {"__name__": "loaded"})
        yield row
    finally:
        SOLVERS.pop("loaded", None)


def test_the_solver_of_the_page_obeys_the_laws_its_row_states(loaded, solver_table, load_test_module):
    laws = load_test_module("solvers/test_laws.py")
    row = eval(loaded, {"Row": solver_table.Row})
    for bits in row.cases:
        laws.test_zeros_stay_exact_zeros((row, bits), (3, 64), 16)
        laws.test_constant_groups_are_kept((row, bits))
    laws.test_more_bits_never_hurt(row)
    laws.test_the_weight_is_left_alone(row)
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    plain = Spec(method="rtn", levels="uniform_zero_free", bits=2, group_size=32)
    page = Spec(method="loaded", bits=2, group_size=32, options={"load": 1.5})
    errors = [float((solve(weight, spec).dequantize() - weight).square().mean()) for spec in (plain, page)]
    assert errors[1] < errors[0]  # what the page claims: clipping rare weights pays


def test_messages_quoted_in_the_troubleshooting_page_are_the_codes():
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^> (.+)$", text, re.MULTILINE)
    assert len(quoted) > 20
    known = "\n".join(message for file in (ROOT / "hf_lowbit").rglob("*.py") for message in strings(file))
    for message in quoted:
        for part in message.split("..."):
            part = part.strip(" .():;,")
            assert part in known, f"no message of the code holds {part!r} (quoted: {message!r})"


def strings(file: Path) -> list[str]:
    """Every text of a module, pieces side by side joined as Python joins them, values as a line break."""
    out = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            out.append("".join(part.value if isinstance(part, ast.Constant) else "\n" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            out.append(re.sub(r"%\.?\d*[gsd]", "\n", node.value))
    return out


@pytest.mark.parametrize("page", [*DOCS, ROOT / "README.md", ROOT / "eval" / "README.md"], ids=lambda path: path.name)
def test_links_and_files_named_exist(page):
    text = page.read_text(encoding="utf-8")
    pictures = re.findall(r'src(?:set)?="([^"]+)"', text)
    for target in [*re.findall(r"\]\((?!https?:|#)([^)#]+)", text), *pictures]:
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"
    for name in re.findall(r"`(eval/[\w/]+\.(?:py|json))`", text):
        assert (ROOT / name).exists(), f"{page.name} names {name}, which is not there"
