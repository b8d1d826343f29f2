"""Checkpoints that other tools made: taken over, they decode to the very bytes the tool decodes them to."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_lowbit import cli
from hf_lowbit.errors import BadRequest, FormatError
from hf_lowbit.exchange import Misfit
from hf_lowbit.format import load_tensors
from hf_lowbit.kernels import cpu, cpu_library
from hf_lowbit.plugin.checkpoint import load_model
from hf_lowbit.plugin.foreign import import_checkpoint
from hf_lowbit.plugin.modules import LowBitLinear

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.name for path in GOLDEN.iterdir())
Q_PROJ = "model.layers.0.self_attn.q_proj"


def checksum(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().tobytes())


def changed(source: Path, folder: Path, settings: dict | None = None, tensors=None) -> Path:
    """A copy of a golden checkpoint with other settings, or tensors that ``tensors`` changed in place."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= settings or {}
    (folder / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        held = load_file(folder / "model.safetensors")
        tensors(held)
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=NAMES)
def imported(request, tmp_path_factory) -> tuple[Path, Path]:
    """A golden checkpoint and what became of it."""
    target = tmp_path_factory.mktemp("imported") / request.param
    import_checkpoint(str(GOLDEN / request.param), target)
    return GOLDEN / request.param, target


def expected_of(folder: Path) -> tuple[dict[str, int], torch.dtype]:
    found = json.loads((folder / "expected.json").read_text())
    return found["crc32"], getattr(torch, found["dtype"])


def test_every_matrix_decodes_to_the_bytes_of_its_maker(imported):
    source, target = imported
    sums, dtype = expected_of(source)
    records = load_tensors(target / "model.safetensors")
    assert len(sums) == 14 and {f"{name}.weight" for name in sums} == records.keys()
    for name, expected in sums.items():
        assert checksum(records[f"{name}.weight"].dequantize(dtype)) == expected, name


@pytest.mark.skipif(cpu_library.library() is None, reason=str(cpu_library.trouble()))
def test_the_model_loads_and_runs_on_the_kernels(imported):
    _, target = imported
    ids = torch.arange(1, 30)[None]
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    layers = [m for m in model.modules() if isinstance(m, LowBitLinear)]
    assert len(layers) == 14 and {m.choice(strict=True).backend.name for m in layers} == {"cpu"}
    dense = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).dequantize().eval()
    with torch.no_grad():
        wanted = dense(ids).logits
        with cpu.arithmetic("exact"):
            exact = model(ids).logits
        rounded = model(ids).logits
    assert torch.allclose(exact, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    assert (rounded - wanted).pow(2).mean() < 1e-3 * wanted.pow(2).mean()


def test_dtype_and_everything_dense_stay_as_they_were(imported):
    source, target = imported
    dense = {n: v for n, v in load_file(source / "model.safetensors").items() if "layers" not in n or "norm" in n}
    held = load_file(target / "model.safetensors")
    assert dense and all(torch.equal(held[name], value) for name, value in dense.items())
    assert load_model(str(target)).dtype == expected_of(source)[1]


def test_the_second_zero_point_convention_of_gptq(tmp_path):
    def count_from_zero(held):
        for name in [name for name in held if name.endswith("qzeros")]:
            held[name] += 0x11111111  # none of them is 15 in the golden file

    source = changed(GOLDEN / "gptq-4-act-order", tmp_path / "v2", {"checkpoint_format": "gptq_v2"}, count_from_zero)
    import_checkpoint(str(source), tmp_path / "out")
    sums, dtype = expected_of(GOLDEN / "gptq-4-act-order")
    records = load_tensors(tmp_path / "out" / "model.safetensors")
    assert {n: checksum(records[f"{n}.weight"].dequantize(dtype)) for n in sums} == sums


def test_columns_of_a_group_that_lie_apart(tmp_path):
    """Releases that wrote ``weight_g_idx`` are gone: made here from its definition, the group of each column."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    groups = torch.arange(64) // 32

    def scatter(held):
        words = held[f"{Q_PROJ}.weight_packed"]
        codes = torch.stack([(words >> (4 * k)) & 15 for k in range(8)], -1).flatten(1)
        moved = torch.empty_like(codes)
        moved[:, order] = codes
        lanes = moved.view(len(codes), -1, 8).to(torch.int64)
        packed = sum(lanes[..., k] << (4 * k) for k in range(8))
        held[f"{Q_PROJ}.weight_packed"] = packed.to(torch.int32)
        held[f"{Q_PROJ}.weight_g_idx"] = torch.empty(64, dtype=torch.int32).scatter_(0, order, groups.int())

    import_checkpoint(str(GOLDEN / "packed-4"), tmp_path / "plain")
    import_checkpoint(str(changed(GOLDEN / "packed-4", tmp_path / "apart", None, scatter)), tmp_path / "out")
    plain, apart = (load_tensors(tmp_path / n / "model.safetensors")[f"{Q_PROJ}.weight"] for n in ("plain", "out"))
    assert apart.layout.permuted
    assert torch.equal(apart.dequantize()[:, order], plain.dequantize())


def uneven(held):
    held[f"{Q_PROJ}.g_idx"][:40] = 0


def another_table(held):
    held[f"{Q_PROJ}.weight.quant_map"][3] += 0.01


def not_finite(held):
    held[f"{Q_PROJ}.scales"][0, 0] = float("inf")


@pytest.mark.parametrize(
    ("name", "settings", "tensors", "message"),
    [
        ("awq-4", {"version": "gemv"}, None, "'version'"),
        ("awq-4", {"bits": 3}, None, r"'bits'\] is 3; it can be imported where it is 4"),
        ("awq-4", {"quant_method": "awk"}, None, "unknown quant_method 'awk'. Did you mean 'awq'"),
        ("awq-4", {}, not_finite, rf"{Q_PROJ}.weight: a scale is not finite"),
        ("gptq-3-rows", {"bits": 5}, None, r"'bits'\] is 5; it can be imported where it is 2, 3, 4, 8"),
        ("gptq-3-rows", {"dynamic": {"x": {}}}, None, "'dynamic'"),
        ("gptq-4-act-order", {}, uneven, f"{Q_PROJ}.weight: g_idx is uneven; each group must have 32 columns"),
        ("nf4-nested", {"bnb_4bit_quant_type": "fp4"}, None, r"'bnb_4bit_quant_type'\] is 'fp4'"),
        ("nf4-nested", {"load_in_8bit": True}, None, "'load_in_8bit'"),
        ("nf4-nested", {}, another_table, f"{Q_PROJ}.weight: quant_map is another table"),
        ("packed-4", {"format": "nvfp4-pack-quantized"}, None, "'format'"),
        ("packed-4", {"kv_cache_scheme": {"num_bits": 8}}, None, "'kv_cache_scheme'"),
    ],
)
def test_what_cannot_be_held_is_named_and_nothing_is_left(name, settings, tensors, message, tmp_path):
    source = changed(GOLDEN / name, tmp_path / "source", settings, tensors)
    with pytest.raises(BadRequest, match=message):
        import_checkpoint(str(source), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_activations_that_are_rounded_are_named(tmp_path):
    groups = json.loads((GOLDEN / "packed-4" / "config.json").read_text())["quantization_config"]["config_groups"]
    groups["group_0"]["input_activations"] = {"num_bits": 8, "type": "int"}
    source = changed(GOLDEN / "packed-4", tmp_path / "source", {"config_groups": groups})
    with pytest.raises(Misfit, match="'input_activations'"):
        import_checkpoint(str(source), tmp_path / "out")


def test_tensors_nobody_asks_for_and_tensors_that_lack_are_refused(tmp_path):
    def more(held):
        held["model.layers.0.extra.weight"] = torch.zeros(3)

    def less(held):
        del held["model.norm.weight"]

    for number, (change, message) in enumerate(
        [(more, "'model.layers.0.extra.weight'"), (less, "lack 'model.norm.weight'")]
    ):
        source = changed(GOLDEN / "awq-4", tmp_path / str(number), None, change)
        with pytest.raises(FormatError, match=message):
            import_checkpoint(str(source), tmp_path / "out")


def test_an_interrupted_import_goes_on(tmp_path):
    def stop(done, total, layer):
        raise KeyboardInterrupt

    import_checkpoint(str(GOLDEN / "awq-4"), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(str(GOLDEN / "awq-4"), tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists() and len(list((tmp_path / ".out.partial").glob("part-*"))) == 1
    import_checkpoint(str(GOLDEN / "awq-4"), tmp_path / "out")
    whole, out = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("whole", "out"))
    assert whole == out and not (tmp_path / ".out.partial").exists()


def test_the_command(tmp_path, capsys):
    before = {path: path.read_bytes() for path in (GOLDEN / "awq-4").iterdir()}
    assert cli.main(["quantize", str(GOLDEN / "awq-4"), str(tmp_path / "out"), "--from-quantized", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bits_per_weight_linears"] == 4.75 and found["method"] == "imported" and len(found["report"]) == 14
    assert {path: path.read_bytes() for path in (GOLDEN / "awq-4").iterdir()} == before
    assert cli.main(["quantize", str(GOLDEN / "awq-4"), str(tmp_path / "two"), "--from-quantized", "--bits", "3"]) == 2
    assert "--bits chooses how to quantize" in capsys.readouterr().err
    assert cli.main(["quantize", str(tmp_path / "out"), str(tmp_path / "two"), "--from-quantized"]) == 2
    assert "is an hf-lowbit checkpoint already" in capsys.readouterr().err
