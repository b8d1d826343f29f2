"""Exports: the target's own library reads what was written, and reads the same numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_lowbit import LowBitConfig, cli, demo
from hf_lowbit.errors import BadRequest
from hf_lowbit.exchange import TARGETS, Misfit
from hf_lowbit.exchange.gguf_blocks import block_of
from hf_lowbit.format import Spec
from hf_lowbit.plugin.checkpoint import load_model, quantize_checkpoint
from hf_lowbit.plugin.export import export_checkpoint
from hf_lowbit.plugin.foreign import import_checkpoint
from hf_lowbit.solvers import solve

GOLDEN = Path(__file__).parent / "golden"
IDS = torch.arange(1, 60)[None]
PLAIN = {"method": "rtn", "levels": "uniform", "scale_bits": 16}


def logits(path: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(IDS).logits


def decoded(path: Path) -> torch.nn.Module:
    """One of our checkpoints as a dense model."""
    return load_model(str(path), "float32").dequantize()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A random Llama of 45,000 weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 96, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, tie_word_embeddings=True, initializer_range=0.1))
    target = tmp_path_factory.mktemp("export") / "tiny"
    model.half().save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """The embedded model in 4-bit integers, groups of 32, fp16 scales; embeddings dense."""
    target = tmp_path_factory.mktemp("export") / "plain"
    quantize_checkpoint(str(demo.embedded_model()), target, LowBitConfig(**PLAIN, quantize_embeddings=False))
    return target


@pytest.fixture(scope="module")
def wanted(plain) -> torch.Tensor:
    with torch.no_grad():
        return decoded(plain)(IDS).logits


def test_pack_quantized_gives_transformers_the_same_logits(plain, wanted, tmp_path):
    pytest.importorskip("compressed_tensors")
    found = export_checkpoint(plain, tmp_path / "out", "compressed-tensors", "float32")
    assert found.forms == {"4 bits, groups of 32": 28}
    assert torch.equal(logits(tmp_path / "out"), wanted)


def test_widths_and_groupings_side_by_side(tiny, tmp_path):
    pytest.importorskip("compressed_tensors")
    config = LowBitConfig(
        method="rtn", levels="integer", scale_bits=6, quantize_embeddings=False, modules_to_not_convert=["layers.1.mlp"],
        overrides={"down_proj": {"bits": 8, "group_size": -1, "scale_bits": 16}, "q_proj": {"bits": 3}},
    )  # fmt: skip
    quantize_checkpoint(str(tiny), tmp_path / "low", config)
    with pytest.raises(Misfit, match=r"gate_proj\.weight: scale is not exact in float16; .*--dtype float32"):
        export_checkpoint(tmp_path / "low", tmp_path / "out", "compressed-tensors")
    found = export_checkpoint(tmp_path / "low", tmp_path / "out", "compressed-tensors", "float32")
    assert len(found.forms) == 3 and sum(found.forms.values()) == 11
    with torch.no_grad():
        assert torch.equal(logits(tmp_path / "out"), decoded(tmp_path / "low")(IDS).logits)


@pytest.mark.parametrize("name", ["packed-4", "packed-8-zero-points", "gptq-4-act-order", "gptq-3-rows"])
def test_what_was_imported_is_exported_as_it_was(name, tmp_path):
    import_checkpoint(str(GOLDEN / name), tmp_path / "ours")
    to = "gptq" if name.startswith("gptq") else "compressed-tensors"
    export_checkpoint(tmp_path / "ours", tmp_path / "out", to)
    before, after = (load_file(folder / "model.safetensors") for folder in (GOLDEN / name, tmp_path / "out"))
    assert before.keys() == after.keys()
    for tensor, value in before.items():
        assert torch.equal(after[tensor], value.to(after[tensor].dtype)), tensor
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    given = json.loads((GOLDEN / name / "config.json").read_text())["quantization_config"]
    if to == "gptq":
        columns = 64
        assert settings["group_size"] == (columns if given["group_size"] == -1 else given["group_size"])
        assert [settings[k] for k in ("bits", "sym", "desc_act")] == [given[k] for k in ("bits", "sym", "desc_act")]


def unpacked_gptq(held: dict, module: str, bits: int) -> torch.Tensor:
    """A matrix by the public layout: ``scales[g] * (q - (z + 1))``, codes along the inputs, lowest bits first."""
    mask = (1 << bits) - 1

    def lanes(words):
        return torch.stack([(words.long() >> (bits * k)) & mask for k in range(32 // bits)], -1)

    q = lanes(held[f"{module}.qweight"]).permute(0, 2, 1).flatten(0, 1)
    z = lanes(held[f"{module}.qzeros"]).flatten(1) + 1
    g = held[f"{module}.g_idx"].long()
    return ((q - z[g]) * held[f"{module}.scales"].float()[g]).T


def test_gptq_by_an_unpacker_of_its_own(tiny, tmp_path):
    """No library that reads the format installs on a CPU beside this Transformers."""
    config = LowBitConfig(**PLAIN, quantize_embeddings=False, overrides={"up_proj": {"bits": 6, "group_size": 64}})
    quantize_checkpoint(str(tiny), tmp_path / "low", config)
    found = export_checkpoint(tmp_path / "low", tmp_path / "out", "gptq")
    assert found.forms == {"8 bits, groups of 32": 14}  # one width for all: the narrowest that holds each
    held, model = load_file(tmp_path / "out" / "model.safetensors"), decoded(tmp_path / "low")
    for module in [name.removesuffix(".qweight") for name in held if name.endswith("qweight")]:
        assert torch.equal(unpacked_gptq(held, module, 8), model.get_submodule(module).weight), module


def test_every_gguf_block_decodes_to_its_record():
    gguf = pytest.importorskip("gguf")
    weight, seen = torch.randn(3, 512, generator=torch.Generator().manual_seed(0)), set()
    for levels, bits, group, scale_bits in product(
        ("uniform", "integer", "affine", "e2m1"), (3, 4, 5, 6, 8), (16, 32, 64), (16, 8, 6)
    ):
        if levels == "e2m1" and bits != 4:
            continue
        record = solve(weight, Spec("rtn", bits, group, levels, scale_bits))
        try:
            name, encoded = block_of(record)
        except Misfit:
            continue
        kind = gguf.GGMLQuantizationType[name]
        assert torch.equal(torch.from_numpy(gguf.quants.dequantize(encoded.numpy(), kind)), record.dequantize()), (
            record.layout
        )
        seen.add(name)
    assert seen == {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K"}


def read_gguf(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors as float32, and the fields, as the gguf package reads them."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(path)
    tensors = {}
    for one in reader.tensors:
        values = gguf.quants.dequantize(one.data, one.tensor_type)
        tensors[one.name] = torch.from_numpy(values.copy()).view(*reversed(one.shape.tolist()))
    return tensors, {name: entry.contents() for name, entry in reader.fields.items()}


def test_a_gguf_file_holds_every_number_and_the_tokenizer(tmp_path):
    config = LowBitConfig(**PLAIN, overrides={"up_proj": {"levels": "affine"}})
    quantize_checkpoint(str(demo.embedded_model()), tmp_path / "low", config)
    found = export_checkpoint(tmp_path / "low", tmp_path / "out.gguf", "gguf")
    assert found.forms == {"Q8_0": 1, "Q4_0": 24, "Q4_1": 4} and not found.notes
    tensors, fields = read_gguf(tmp_path / "out.gguf")
    model = decoded(tmp_path / "low")
    layer, heads = model.model.layers[2], {"q": 4, "k": 2}
    assert torch.equal(tensors["token_embd.weight"], model.model.embed_tokens.weight)
    assert torch.equal(tensors["blk.2.ffn_down.weight"], layer.mlp.down_proj.weight)
    assert torch.equal(tensors["blk.2.ffn_up.weight"], layer.mlp.up_proj.weight)
    assert torch.equal(tensors["blk.2.attn_norm.weight"], layer.input_layernorm.weight)
    for part, count in heads.items():
        # Pairs of channels that rotate together lie side by side in the file, half a head apart in the model.
        stored = tensors[f"blk.2.attn_{part}.weight"].view(count, -1, 2, 256)
        again = torch.cat((stored[:, :, 0], stored[:, :, 1]), 1).flatten(0, 1)
        assert torch.equal(again, getattr(layer.self_attn, f"{part}_proj").weight)
    assert len(tensors) == 1 + 4 * 9 + 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "low")
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert fields["llama.attention.head_count_kv"] == 2 and fields["llama.rope.freq_base"] == 10000.0


def test_a_tokenizer_without_counterpart_is_said(plain, tmp_path, capsys):
    pytest.importorskip("gguf")
    source = tmp_path / "low"
    source.mkdir()
    for file in plain.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    held = json.loads((source / "tokenizer.json").read_text())
    held["pre_tokenizer"] = {"type": "Whitespace"}
    (source / "tokenizer.json").write_text(json.dumps(held))
    assert cli.main(["export", str(source), str(tmp_path / "out.gguf"), "--to", "gguf"]) == 0
    assert "takes token numbers only: its split pattern is none" in capsys.readouterr().out
    assert read_gguf(tmp_path / "out.gguf")[1]["tokenizer.ggml.model"] == "none"


def test_dense_is_an_ordinary_checkpoint(plain, wanted, tmp_path):
    export_checkpoint(plain, tmp_path / "out", "dense", "float32")
    assert torch.equal(logits(tmp_path / "out"), wanted)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a b").input_ids
    export_checkpoint(plain, tmp_path / "half", "dense", "bfloat16")
    held = load_file(tmp_path / "half" / "model.safetensors")
    assert {value.dtype for value in held.values()} == {torch.bfloat16}


def test_transforms_are_multiplied_into_dense_weights_and_nowhere_else(tiny, tmp_path):
    config = LowBitConfig(**PLAIN, transforms=["hadamard"])
    quantize_checkpoint(str(tiny), tmp_path / "low", config)
    with pytest.raises(Misfit, match=r"down_proj: what a transform does to inputs .* only --to dense multiplies it in"):
        export_checkpoint(tmp_path / "low", tmp_path / "out", "compressed-tensors", "float32")
    export_checkpoint(tmp_path / "low", tmp_path / "out", "dense", "float32")
    with torch.no_grad():
        assert torch.equal(logits(tmp_path / "out"), decoded(tmp_path / "low")(IDS).logits)


@pytest.mark.parametrize(
    ("settings", "to", "message"),
    [
        ({"method": "codebook", "levels": None}, "gguf", r"embed_tokens\.weight: levels is fitted; .*--levels uniform"),
        ({"outliers": 0.01}, "gguf", "outliers is .*--outliers 0"),
        ({"residual_terms": 2}, "gguf", "residual_terms is 2; it must be 1"),
        ({"group_size": 16}, "gguf", "group_size is 16; it must be a multiple of 32"),
        ({}, "gptq", r"embed_tokens\.weight: a value is not exact in float16; .*--no-quantize-embeddings"),
        ({"levels": "affine", "quantize_embeddings": False}, "gptq", "offset is no whole number of steps"),
        ({"scale_bits": 8, "quantize_embeddings": False}, "gptq", "scale is not exact in float16"),
        ({"activation_bits": 8}, "dense", "activation_bits is 8; inputs that are rounded"),
    ],
)
def test_what_a_target_lacks_is_named_and_nothing_is_left(settings, to, message, tiny, tmp_path):
    quantize_checkpoint(str(tiny), tmp_path / "low", LowBitConfig(**{**PLAIN, **settings}))
    with pytest.raises(Misfit, match=message):
        export_checkpoint(tmp_path / "low", tmp_path / "out", to)
    assert [path.name for path in tmp_path.iterdir()] == ["low"]


@pytest.mark.parametrize("to", TARGETS)
def test_an_interrupted_export_leaves_nothing(to, tiny, tmp_path):
    def stop(done, total, name):
        if done == 5:
            raise KeyboardInterrupt

    quantize_checkpoint(str(tiny), tmp_path / "low", LowBitConfig(**PLAIN, quantize_embeddings=False))
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(tmp_path / "low", tmp_path / "out", to, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["low"]


@pytest.mark.parametrize("target", TARGETS)
def test_plan_answers_and_its_advice_holds(target, tiny, capsys):
    source = str(tiny)
    advice = TARGETS[target].advice.split()
    assert cli.main(["plan", source, *advice, "--for", target, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)["export"]
    assert answer["exportable"] and answer["reason"] is None and sum(answer["forms"].values()) >= 14
    assert cli.main(["plan", source, "--method", "codebook", "--for", target]) == 0
    said = capsys.readouterr().out
    assert ("can be written as dense" in said) if target == "dense" else (TARGETS[target].advice in said)


def test_the_command_its_refusals_and_the_source(plain, tmp_path, capsys):
    before = {path: path.read_bytes() for path in plain.iterdir()}
    assert cli.main(["export", str(plain), str(tmp_path / "out"), "--to", "dense", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["forms"] == {"float16": 28}
    assert {path: path.read_bytes() for path in plain.iterdir()} == before
    for arguments, message in (
        (["--to", "dense"], "exists and is not an empty directory"),
        (["--to", "gguff"], "Did you mean 'gguf'"),
        (["--to", "dense", "--dtype", "int8"], "dtype 'int8' cannot be exported in"),
        (["--to", "gguf"], "exists already. --to gguf writes one file"),
    ):
        assert cli.main(["export", str(plain), str(tmp_path / "out"), *arguments]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(BadRequest, match="is not an hf-lowbit checkpoint"):
        export_checkpoint(demo.embedded_model(), tmp_path / "two", "dense")


LLAMA_CPP = """
import sys, json
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=256, logits_all=True, verbose=False, n_threads=2)
ids = model.tokenize(sys.argv[2].encode(), add_bos=False)
model.eval(ids)
text = model.create_completion(sys.argv[2], max_tokens=16, temperature=0.0)["choices"][0]["text"]
print(json.dumps({"ids": list(ids), "logits": [list(map(float, row)) for row in model.scores[: len(ids)]], "text": text}))
"""


@pytest.mark.slow
def test_llama_cpp_says_what_we_say(plain, tmp_path):
    """In the interpreter ``HF_LOWBIT_PEERS`` names, which has llama-cpp-python; by default this one."""
    peers = os.environ.get("HF_LOWBIT_PEERS", sys.executable)
    if subprocess.run([peers, "-c", "import llama_cpp"], capture_output=True).returncode:
        pytest.skip("llama-cpp-python is not installed in this interpreter, nor does HF_LOWBIT_PEERS name one that has it")
    export_checkpoint(plain, tmp_path / "out.gguf", "gguf")
    text = "It was a bright cold day in April, and the old man said: 'We'll see 1234 ships.'"
    run = subprocess.run(
        [peers, "-c", LLAMA_CPP, str(tmp_path / "out.gguf"), text], capture_output=True, text=True, check=True
    )
    found = json.loads(run.stdout.splitlines()[-1])
    model, tokenizer = decoded(plain), AutoTokenizer.from_pretrained(plain)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    assert found["ids"] == inputs.input_ids[0].tolist()
    with torch.no_grad():
        ours = model(**inputs).logits[0].log_softmax(-1)
        out = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs.input_ids.shape[1] :]
    theirs = torch.tensor(found["logits"]).log_softmax(-1)
    # Their products round activations to 8 bits per 32.
    assert float((ours.exp() * (ours - theirs)).sum(-1).mean()) < 1e-3
    assert found["text"] == tokenizer.decode(out)
