"""The run: blocks and groups of every family by structure, three ways in with one result, and what the report says."""

from __future__ import annotations

import copy
import functools
import json
import subprocess
import sys

import families
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lowbit import LowBitConfig, demo, quantize
from hf_lowbit.cli import main
from hf_lowbit.errors import BadRequest, LowBitError
from hf_lowbit.measure import divergence
from hf_lowbit.pipeline import forward, run
from hf_lowbit.pipeline.blocks import find_groups
from hf_lowbit.pipeline.forward import Recorder
from hf_lowbit.plugin.sites import Shards, find_blocks
from hf_lowbit.plugin.targets import find_targets

IDS = torch.randint(3, 240, (5, 16), generator=torch.Generator().manual_seed(0))
METHODS = {"gptq": {}, "nupes": {"steps": 4}, "squeezellm": {}, "jlcm": {"steps": 2}}
QUICK = ["gptq", "nupes", "squeezellm"]
QKV, GATE_UP = "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "mlp.gate_proj mlp.up_proj"
LLAMA = [QKV, "self_attn.o_proj", GATE_UP, "mlp.down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SHARED = ["mlp.shared_expert.gate_proj mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj"]
GROUPS = {
    "llama": LLAMA,
    "qwen3-tied": LLAMA,
    "gemma2": LLAMA,
    "gemma3": LLAMA,
    "phi": [QKV, "self_attn.dense", "mlp.fc1", "mlp.fc2"],
    "phi3": ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"],
    "opt": [QKV, "self_attn.out_proj", "fc1", "fc2"],
    "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    "bloom": ["self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
    "mixtral": [QKV, "self_attn.o_proj", *EXPERTS],
    "qwen2-moe": [QKV, "self_attn.o_proj", *SHARED, *EXPERTS],
    "gpt-oss": [QKV, "self_attn.o_proj", *EXPERTS],
}


def config(**changes: object) -> LowBitConfig:
    return LowBitConfig(**({"method": "gptq", "bits": 3, "quantize_embeddings": False} | changes))


def blocks_of(model) -> list:
    return find_blocks(model, list(find_targets(model, LowBitConfig()).chosen), Shards())


def error_of(model, name: str) -> float:
    """Share of the logits' norm that is lost."""
    with torch.no_grad():
        expected = families.make_model(name)(IDS).logits
        return float((model(IDS).logits - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", GROUPS)
def test_sites_that_share_inputs_are_found_in_running_order(name):
    model = families.make_model(name)
    blocks = blocks_of(model)
    recorder = Recorder(model, blocks)
    batch = recorder.batch(IDS)
    groups = find_groups(blocks[1].open(), batch.hidden, batch.calls[1])
    short = [" ".join(site.removeprefix(f"{blocks[1].name}.").removesuffix(".weight") for site in g.names) for g in groups]
    assert short == GROUPS[name]
    assert all(group.seen for group in groups)


@torch.no_grad()
@pytest.mark.parametrize("name", families.FAMILIES)
def test_recorded_blocks_and_tail_are_the_model(name):
    model = families.make_model(name)
    expected, blocks = model(IDS).logits, blocks_of(model)
    recorder = Recorder(model, blocks)
    batch = recorder.batch(IDS)
    hidden = batch.hidden
    for number, block in enumerate(blocks):
        hidden = block.open()(hidden, batch.calls[number])
    torch.testing.assert_close(recorder.tail(IDS, hidden).logits, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(IDS).logits, expected)  # and the model is as it was


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_head_of_a_half_precision_model_multiplies_in_float32(dtype, monkeypatch):
    monkeypatch.setattr(forward, "HALF_ROWS", 100)  # several parts, the last one shorter
    model = families.make_model("llama").to(dtype)
    recorder = Recorder(model, blocks_of(model))
    hidden = torch.randn(1, 12, 64).to(dtype).float().requires_grad_()
    logits = recorder.tail(IDS[:1], hidden).logits
    assert logits.dtype == dtype and "forward" not in model.lm_head.__dict__
    wanted = torch.randn(logits.shape)
    (slope,) = torch.autograd.grad((logits.float() * wanted).sum(), hidden)
    exact = copy.deepcopy(model).float()
    plain = Recorder(exact, blocks_of(exact)).tail(IDS[:1], hidden).logits
    (expected,) = torch.autograd.grad((plain * wanted).sum(), hidden)
    eps = torch.finfo(dtype).eps
    assert (logits.float() - plain).abs().max() <= 4 * eps * plain.abs().max()
    assert (slope - expected).abs().max() <= 8 * eps * expected.abs().max()


@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_family_is_calibrated(name):
    plain = quantize(families.make_model(name), config(method="rtn", levels="affine"))
    model = quantize(families.make_model(name), config(levels="affine", calibration=IDS))
    assert error_of(model, name) < 0.7 * error_of(plain, name)
    rows = model.hf_quantizer.report
    sites = [site for block in blocks_of(families.make_model(name)) for site in block.sites]
    assert sorted(row["name"] for row in rows) == sorted(sites)
    assert all(row["error"] < 0.1 and row["damping"] == 0.01 and row["bits_per_weight"] > 3 for row in rows)


# Arguments that depend on the number of windows; weights stored the other way round; stacks of either kind.
@pytest.mark.parametrize("name", ["bloom", "gpt2", "mixtral", "gpt-oss"])
@pytest.mark.parametrize("method", ["nupes", "squeezellm"])
def test_families_that_differ_in_kind_are_learned_too(name, method):
    model = quantize(families.make_model(name), config(method=method, options=METHODS[method], calibration=IDS))
    assert error_of(model, name) < 0.8 * error_of(quantize(families.make_model(name), config(method="rtn")), name)
    learned = [row for row in model.hf_quantizer.report if "loss_after" in row]
    assert all(row["loss_after"] <= row["loss_before"] for row in learned)
    assert len(learned) == (2 if method == "nupes" else 0)


@pytest.fixture(scope="module")
def ways(dense, tmp_path_factory):
    """A method by all three ways in: the directory each wrote to, and the model ``from_pretrained`` gave."""

    @functools.cache
    def made(method: str) -> tuple:
        options, folder = METHODS[method], tmp_path_factory.mktemp(method)
        source = {"source": str(demo.held_out_text()), "sequences": 12, "length": 32}
        asked = {"method": method, "options": options, "bits": 3, "quantize_embeddings": False}
        data = ["--calibration", source["source"], "--sequences", "12", "--length", "32", "--no-quantize-embeddings"]
        command = ["quantize", str(dense), str(folder / "cli"), "--method", method, "--bits", "3", *data]
        assert main([*command, *(f"--option={key}={value}" for key, value in options.items())]) == 0
        loaded = AutoModelForCausalLM.from_pretrained(dense, quantization_config=LowBitConfig(calibration=source, **asked))
        loaded.save_pretrained(folder / "loaded")
        model, tokenizer = AutoModelForCausalLM.from_pretrained(dense), AutoTokenizer.from_pretrained(dense)
        quantize(model, LowBitConfig(**asked), tokenizer=tokenizer, calibration=source).save_pretrained(folder / "quantized")
        return folder, loaded.eval()

    return made


@pytest.mark.parametrize("method", [*QUICK, pytest.param("jlcm", marks=pytest.mark.slow)])
def test_three_ways_in_give_the_same_tensors(method, ways):
    folder, _ = ways(method)
    found = [load_file(folder / way / "model.safetensors") for way in ("cli", "loaded", "quantized")]
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())


RELOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
models = [AutoModelForCausalLM.from_pretrained(place).eval() for place in sys.argv[2:]]
with torch.no_grad():
    torch.save([model(torch.arange(3, 35)[None]).logits for model in models], sys.argv[1])
"""


@torch.no_grad()
def test_a_fresh_process_computes_the_same(ways, tmp_path):
    places = [str(ways(method)[0] / "cli") for method in QUICK]
    subprocess.run([sys.executable, "-c", RELOAD, str(tmp_path / "logits"), *places], check=True, timeout=120)
    for method, logits in zip(QUICK, torch.load(tmp_path / "logits"), strict=True):
        assert torch.equal(logits, ways(method)[1](torch.arange(3, 35)[None]).logits)


def test_the_saved_config_says_where_calibration_came_from_and_no_more(ways):
    folder, _ = ways("gptq")
    for way in ("cli", "loaded", "quantized"):
        saved = json.loads((folder / way / "config.json").read_text())["quantization_config"]
        carried = saved["calibration"]
        assert carried["source"] == "held_out.txt" and carried["sequences"] == 12 and carried["length"] == 32
        assert len(carried["sha256"]) == 64
        assert str(demo.held_out_text().parent) not in json.dumps(saved)
        assert LowBitConfig.from_dict(saved).to_dict()["calibration"] == carried


@pytest.mark.parametrize("method", QUICK)
def test_the_report_has_a_row_for_each_matrix(method, ways):
    folder, model = ways(method)
    written = json.loads((folder / "cli" / "quantization_report.json").read_text())
    assert [row["name"] for row in written] == [row["name"] for row in model.hf_quantizer.report]
    assert not any("seconds" in row for row in written)
    rows = [row for row in written if "bits_per_weight" in row]
    assert len(rows) == 14 and all(row["tokens"] > 0 for row in rows)
    assert len(written) == (16 if method == "nupes" else 14)  # learned blocks have a row too


@pytest.mark.parametrize("source", ["windows", "texts", "mapping"])
def test_the_users_config_is_not_changed_and_texts_are_not_saved(source, dense, tmp_path):
    text = demo.held_out_text().read_text(encoding="utf-8")[:6000]
    windows = torch.randint(3, 4000, (4, 16))
    data = {"windows": windows, "texts": [text], "mapping": {"source": [text], "length": 32}}[source]
    data = {"source": data, "length": 64} if source == "texts" else data
    asked = config(calibration=data)
    before = copy.deepcopy(asked.__dict__)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=asked)
    given = quantize(AutoModelForCausalLM.from_pretrained(dense), asked, tokenizer=AutoTokenizer.from_pretrained(dense))
    assert asked.calibration is data
    assert {k: v for k, v in asked.__dict__.items() if k != "calibration"} == {
        k: v for k, v in before.items() if k != "calibration"
    }
    for number, made in enumerate((model, given)):
        made.save_pretrained(tmp_path / str(number))
        saved = (tmp_path / str(number) / "config.json").read_text()
        carried = json.loads(saved)["quantization_config"]["calibration"]
        assert carried["source"] is None and carried["kind"] == ("tokens" if source == "windows" else "texts")
        assert text[:40] not in saved


def test_experts_with_few_tokens_take_the_statistics_of_all(monkeypatch):
    model = families.make_model("mixtral")
    with torch.no_grad():  # of four experts, the last two hardly ever win
        model.model.layers[0].mlp.gate.weight[2:] = model.model.layers[0].mlp.gate.weight[:2] - 1e-3
        model.model.layers[0].mlp.gate.weight[2:, :3] *= 0.5
    seen: list = []
    plain = run.solve
    monkeypatch.setattr(run, "solve", lambda w, spec, **rest: seen.append(rest["statistics"]) or plain(w, spec, **rest))
    low = quantize(model, config(levels="affine", calibration=IDS[:1]))
    row = next(row for row in low.hf_quantizer.report if row["name"] == "model.layers.0.mlp.experts.gate_up_proj")
    found = next(statistics for statistics in seen if len(statistics) == 4)
    counts = [each.count for each in found]
    assert sum(counts) == 2 * IDS[:1].numel() and row["tokens"] == min(counts)
    short = [each for each in found if each.count < 16]
    assert len(short) > 0 and row["fallback"].startswith(f"{len(short)} of 4 experts saw few tokens: statistics of all")
    assert all(torch.equal(each.gram, short[0].gram) and each.gram.any() for each in short)
    assert all(not torch.equal(each.gram, short[0].gram) for each in found if each.count >= 16)
    assert torch.isfinite(low(IDS).logits).all()


def test_experts_with_enough_tokens_take_their_own():
    windows = torch.randint(3, 240, (20, 16), generator=torch.Generator().manual_seed(1))
    low = quantize(families.make_model("mixtral"), config(levels="affine", calibration=windows))
    rows = low.hf_quantizer.report
    assert all("fallback" not in row and row["tokens"] >= 24 for row in rows)


def test_matrices_no_token_reaches_fall_back_and_say_so():
    model = families.make_model("llama")
    layer = model.model.layers[0]

    class Skipping(type(layer)):
        def forward(self, hidden_states, **rest):
            return hidden_states + self.self_attn.o_proj(hidden_states) * 0.1

    layer.__class__ = Skipping
    rows = {row["name"]: row for row in quantize(model, config(calibration=IDS)).hf_quantizer.report}
    unseen = rows["model.layers.0.mlp.up_proj.weight"]
    assert unseen["tokens"] == 0 and unseen["fallback"].startswith("nearest rounding")
    assert "fallback" not in rows["model.layers.0.self_attn.o_proj.weight"]
    assert "fallback" not in rows["model.layers.1.mlp.up_proj.weight"]


def test_a_block_that_yields_nan_is_named():
    model = families.make_model("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.bias = torch.nn.Parameter(torch.full((64,), float("nan")))
    with pytest.raises(LowBitError, match=r"what leads to model.layers.0.mlp.gate_proj.weight yields NaN or infinity"):
        quantize(model, config(calibration=IDS))
    last = families.make_model("llama")
    with torch.no_grad():
        last.model.layers[0].mlp.down_proj.bias = torch.nn.Parameter(torch.full((64,), float("inf")))
    with pytest.raises(LowBitError, match=r"block model.layers.0 yields NaN or infinity"):
        quantize(last, config(calibration=IDS))


def test_methods_mixed_by_overrides():
    overrides = {"down_proj": {"method": "codebook"}, "q_proj": {"method": "nupes", "options": {"steps": 2}}}
    model = quantize(families.make_model("llama"), config(calibration=IDS, overrides=overrides))
    rows = {row["name"]: row for row in model.hf_quantizer.report}
    assert "error" not in rows["model.layers.0.mlp.down_proj.weight"]
    assert "error" in rows["model.layers.0.mlp.up_proj.weight"] and "loss_after" in rows["model.layers.0"]
    with pytest.raises(BadRequest, match="cannot share a run"):
        quantize(families.make_model("llama"), config(calibration=IDS, overrides={"q_proj": {"method": "squeezellm"}}))


def test_half_precision_models_are_calibrated_in_float32():
    low = quantize(families.make_model("llama").to(torch.bfloat16), config(calibration=IDS))
    assert low.dtype == torch.bfloat16
    assert error_of(low, "llama") < 0.7 * error_of(quantize(families.make_model("llama"), config(method="rtn")), "llama")


@pytest.fixture(scope="module")
def divergences() -> dict[str, float]:
    """KL on text the calibration has not seen, with the first layer of the embedded model at 3 bits."""
    tokenizer = AutoTokenizer.from_pretrained(demo.embedded_model())
    ids = torch.tensor(tokenizer(demo.held_out_text().read_text(encoding="utf-8")).input_ids)
    half = len(ids) // 2
    seen, unseen = ids[: half // 128 * 128].view(-1, 128)[:12], ids[half : half + 1024]
    reference = AutoModelForCausalLM.from_pretrained(demo.embedded_model()).eval()
    out = {}
    for method in ("rtn", "codebook", "gptq"):
        model = AutoModelForCausalLM.from_pretrained(demo.embedded_model()).eval()
        skipped = [f"layers.{number}" for number in range(1, model.config.num_hidden_layers)]
        asked = config(method=method, modules_to_not_convert=skipped)
        low = quantize(model, asked, calibration=seen if method == "gptq" else None)
        out[method] = divergence(low, reference, unseen, 128).kl
    return out


def test_calibration_helps_on_text_it_has_not_seen(divergences):
    assert divergences["gptq"] < 0.8 * divergences["codebook"] < 0.8 * divergences["rtn"]
