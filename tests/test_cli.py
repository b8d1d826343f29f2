"""The command line: quantize, inspect and eval agree with each other and with the files, and JSON is all they print."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hf_lowbit
from hf_lowbit import demo
from hf_lowbit.cli import main
from hf_lowbit.plugin.outliers import Channels
from hf_lowbit.solvers import SOLVERS

SOURCE = str(demo.embedded_model())
TEXT = ["--text", str(demo.held_out_text()), "--characters", "3000", "--window", "128"]
PROMISED = {
    "perplexity", "kl", "top1_agreement", "tokens", "bytes", "bits_per_weight_linears", "bits_per_weight_model", "method"
}  # fmt: skip


def in_process(*arguments: str) -> str:
    """Standard output of a command that succeeds."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(arguments) == 0
    return out.getvalue()


def one_object(text: str) -> dict:
    """The single JSON object a text consists of."""
    value = json.loads(text)  # more than one would be an error
    assert isinstance(value, dict)
    return value


def child(*arguments: str) -> subprocess.CompletedProcess:
    """A command as a user runs it, so that nothing printed below Python escapes notice."""
    done = subprocess.run(
        [sys.executable, "-m", "hf_lowbit.cli", *arguments], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> tuple[str, dict]:
    """A quantized directory and what ``quantize --json`` said of it; its parent did not exist."""
    target = tmp_path_factory.mktemp("cli") / "new" / "rtn-4"
    done = child("quantize", SOURCE, str(target), "--method", "rtn", "--json")
    assert done.stderr == ""  # no terminal, so no progress bar
    return str(target), one_object(done.stdout)


@pytest.fixture(scope="module")
def inspected(quantized) -> dict:
    return one_object(in_process("inspect", quantized[0], "--json"))


@pytest.fixture(scope="module")
def evaluated(quantized) -> dict:
    done = child("eval", quantized[0], "--reference", SOURCE, *TEXT, "--json")
    assert "%|" not in done.stderr
    return one_object(done.stdout)


def test_version():
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert out.getvalue() == f"hf-lowbit {hf_lowbit.__version__}\n"


def test_quantize_and_inspect_say_the_same(quantized, inspected):
    target, said = quantized
    report = said.pop("report")
    assert said == inspected | {"destination": target}
    assert {row["name"] for row in report} == set(said["tensors"])
    saved = json.loads((Path(target) / "quantization_report.json").read_text(encoding="utf-8"))
    assert saved == [{key: value for key, value in row.items() if key != "seconds"} for row in report]
    assert said["method"] == "rtn"


def test_the_destination_holds_a_whole_checkpoint_and_nothing_else(quantized):
    names = {path.name for path in Path(quantized[0]).iterdir()}
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "quantization_report.json"} | tokenizer
    assert [path.name for path in Path(quantized[0]).parent.iterdir()] == ["rtn-4"]


def test_the_ledger_sums_to_the_file_to_the_byte(quantized, inspected):
    size = sum(file.stat().st_size for file in Path(quantized[0]).glob("*.safetensors"))
    high_precision = sum(entry["bytes"] for entry in inspected["high_precision"].values())
    assert inspected["bytes"] == size
    assert sum(inspected["bytes_by_kind"].values()) + high_precision + inspected["header_bytes"] == size


def test_bits_per_weight_follow_from_the_bytes(inspected):
    shapes = {name: entry["shape"] for name, entry in inspected["tensors"].items()}
    weights = sum(rows * columns for rows, columns in shapes.values())
    packed = sum(rows * columns * inspected["tensors"][n]["bits_per_weight"] for n, (rows, columns) in shapes.items())
    assert packed == pytest.approx(8 * sum(inspected["bytes_by_kind"].values()), rel=1e-12)
    norms = sum(entry["bytes"] for entry in inspected["high_precision"].values()) // 2  # in fp16
    assert inspected["bits_per_weight_model"] == pytest.approx(8 * inspected["bytes"] / (weights + norms), rel=1e-12)
    blocks = [entry["bits_per_weight"] for name, entry in inspected["tensors"].items() if "layers" in name]
    assert min(blocks) <= inspected["bits_per_weight_linears"] <= max(blocks)


def test_inspect_prints_a_line_per_tensor(quantized, inspected):
    out = in_process("inspect", quantized[0])
    assert "all checksums hold" in out
    for name in [*inspected["tensors"], *inspected["high_precision"]]:
        assert name in out
    assert f"{inspected['bytes']:,} bytes" in out


def test_eval_keeps_its_promised_fields(evaluated, inspected):
    assert set(evaluated) >= PROMISED
    for shared in ("method", "bytes", "bits_per_weight_linears", "bits_per_weight_model"):
        assert evaluated[shared] == inspected[shared]
    assert evaluated["tokens"] % 127 == 0  # whole windows of 128, each predicting all tokens but its first
    assert 0 < evaluated["kl"] < 0.2
    assert 0.8 < evaluated["top1_agreement"] <= 1
    assert evaluated["perplexity"] == pytest.approx(evaluated["reference_perplexity"], rel=0.1)


def test_eval_without_a_reference_gives_the_same_perplexity(quantized, evaluated):
    alone = one_object(in_process("eval", quantized[0], *TEXT, "--json"))
    assert set(alone) >= PROMISED
    assert alone["perplexity"] == pytest.approx(evaluated["perplexity"], rel=1e-9)
    assert (alone["kl"], alone["top1_agreement"]) == (None, None)


def test_a_model_agrees_with_itself():
    found = one_object(in_process("eval", SOURCE, "--reference", SOURCE, *TEXT, "--json"))
    assert found["perplexity"] == found["reference_perplexity"]
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["top1_agreement"] == 1
    assert (found["method"], found["bits_per_weight_linears"]) == (None, None)
    assert found["bytes"] == (demo.embedded_model() / "model.safetensors").stat().st_size


def test_eval_prints_what_it_measured(quantized, evaluated):
    lines = in_process("eval", quantized[0], *TEXT).splitlines()
    keys = ["method", "perplexity", "tokens", "bytes", "bits_per_weight_linears", "bits_per_weight_model"]
    assert [line.split()[0] for line in lines] == keys  # no kl: there is nothing to compare with
    assert f"{evaluated['bytes']:,}" in lines[3]


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")
def test_progress_is_drawn_on_a_terminal_and_never_on_standard_output(quantized):
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "hf_lowbit.cli", "eval", quantized[0], *TEXT]
    terminal = {"stderr": theirs, "env": os.environ | {"TERM": "xterm"}}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **terminal) as run:
        os.close(theirs)
        drawn = b""
        with contextlib.suppress(OSError):  # how a pseudo-terminal says that its other end is closed
            while piece := os.read(ours, 1 << 16):
                drawn += piece
        out = run.stdout.read()
    os.close(ours)
    assert run.returncode == 0
    assert b"windows" in drawn
    assert out.splitlines()[0].split() == ["method", "rtn"]
    assert len(out.splitlines()) == 6


def test_options_reach_the_config_and_the_file(tmp_path):
    target = str(tmp_path / "options")
    options = "--method rtn --bits 3 --group-size 64 --scale-bits 8 --outliers 0.01 --residual-terms 2 --seed 7"
    options += " --skip o_proj --override down_proj:bits=5 --override layers.0:levels=uniform --no-quantize-embeddings"
    said = one_object(in_process("quantize", SOURCE, target, *options.split(), "--json"))
    expected = {"method": "rtn", "bits": 3, "group_size": 64, "scale_bits": 8, "outliers": 0.01, "residual_terms": 2}
    expected |= {"seed": 7, "modules_to_not_convert": ["o_proj"], "quantize_embeddings": False, "quant_method": "hf_lowbit"}
    expected |= {"overrides": {"down_proj": {"bits": 5}, "layers.0": {"levels": "uniform"}}}
    stored = json.loads(Path(target, "config.json").read_text())["quantization_config"]
    assert expected.items() <= stored.items()
    assert said["config"] == stored
    widths = {name: entry["stages"][0]["bits"] for name, entry in said["tensors"].items()}
    assert widths["model.layers.1.mlp.down_proj.weight"] == 5
    assert widths["model.layers.1.mlp.up_proj.weight"] == 3
    assert not [name for name in widths if "o_proj" in name or "embed_tokens" in name]
    assert "o_proj" in said["high_precision"]["model.layers.0.self_attn.o_proj.weight"]["reason"]
    assert {len(entry["stages"]) for entry in said["tensors"].values()} == {2}


def test_the_same_request_gives_the_same_bytes(quantized, tmp_path):
    again = tmp_path / "again"
    out = in_process("quantize", SOURCE, str(again), "--method", "rtn")
    assert f"written to {again}" in out
    for name in ("model.safetensors", "config.json"):
        assert (again / name).read_bytes() == Path(quantized[0], name).read_bytes()


def test_a_checkpoint_without_a_tokenizer_is_quantized_all_the_same(tmp_path):
    shutil.copytree(SOURCE, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*", "*.py", "__pycache__"))
    said = one_object(in_process("quantize", str(tmp_path / "bare"), str(tmp_path / "out"), "--method", "rtn", "--json"))
    assert said["method"] == "rtn"
    assert not list((tmp_path / "out").glob("tokenizer*"))


def test_doctor_says_what_is_here(monkeypatch):
    monkeypatch.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD", raising=False)
    report = one_object(in_process("doctor", "--json"))
    assert report["versions"]["hf-lowbit"] == hf_lowbit.__version__
    assert report["registration"]["transformers"] == "registered"
    assert report["registration"]["found without import"] == "yes"
    assert set(SOLVERS) <= set(report["methods"])
    assert report["backends, fastest first"]
    out = in_process("doctor")
    for section, lines in report.items():
        assert section in out
        assert all(name in out for name in lines)
    for value in ("0", "false"):  # torch calls no entry point for anything but 1
        monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", value)
        found = one_object(in_process("doctor", "--json"))["registration"]["found without import"]
        assert found == f"off: TORCH_DEVICE_BACKEND_AUTOLOAD={value}"


def test_demo_reloads_what_it_kept(tmp_path, monkeypatch):
    # One method at one width on a short text: the whole table takes a minute and runs the same lines.
    text = tmp_path / "text.txt"
    text.write_text(demo.held_out_text().read_text(encoding="utf-8")[:3000], encoding="utf-8")
    monkeypatch.setattr(demo, "held_out_text", lambda: text)
    monkeypatch.setattr(demo, "METHODS", ("rtn",))
    monkeypatch.setattr(demo, "WIDTHS", (4,))
    report = one_object(in_process("demo", "--json", "--keep", str(tmp_path / "kept")))
    original, low = report["rows"]
    assert original["kl"] == pytest.approx(0, abs=1e-6)
    assert low["model"] == "4 bits, rtn"
    assert 0 < low["kl"] < 0.2
    assert low["bytes"] == (tmp_path / "kept" / "rtn-4" / "model.safetensors").stat().st_size
    assert low["text"]


def test_outliers_are_listed_before_and_after_and_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "text").write_text(demo.held_out_text().read_text(encoding="utf-8")[:3000], encoding="utf-8")
    page = tmp_path / "outliers.html"
    options = ("--outliers", "--text", str(tmp_path / "text"), "--transform", "hadamard", "--plot", str(page), "--json")
    found = one_object(in_process("inspect", SOURCE, *options))
    assert found["tokens"] > 256
    assert len(found["matrices"]) == 28
    for row in found["matrices"]:
        if "down_proj" in row["before"]["name"]:  # the widest range of channels, which a rotation evens out
            assert row["after"]["inputs_ratio"] < row["before"]["inputs_ratio"]
    text = page.read_text(encoding="utf-8")
    assert "data:image/png;base64," in text
    assert text.count("<tr>") == 29
    assert "<h1>Outliers of embedded before and after hadamard</h1>" in text


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.11.self_attn.q_proj", (11, "self_attn.q_proj")),
        ("transformer.h.3.mlp.c_proj", (3, "mlp.c_proj")),  # attention has a c_proj, too
        ("model.layers.2.mlp.experts.5.w1", (2, "mlp.experts.5.w1")),
        ("pooler.dense", (0, "pooler.dense")),
    ],
)
def test_a_matrix_is_drawn_at_its_layer_beside_its_like(name, place):
    assert Channels(name, torch.ones(2), torch.ones(2)).place == place


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plot", "x.png"], "--plot goes with --outliers"),
        (["--transform", "hadamard"], "--transform goes with --outliers"),
        (["--outliers", "--plot", "x.jpg"], "a plot is written as .png, .svg, .pdf, .html, got 'x.jpg'"),
        (["--outliers", "--transform", "hadamrd"], "Did you mean 'hadamard'?"),
    ],
)
def test_what_inspect_cannot_show_is_refused(options, message, capsys):
    assert main(["inspect", SOURCE, *options]) == 2
    assert message in capsys.readouterr().err
