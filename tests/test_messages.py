"""Bad requests: each ends with one line that says what was asked and what to do, the right exit code, and no debris."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    JetMoeConfig,
    JetMoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_lowbit import LowBitConfig, demo, quantize
from hf_lowbit.cli import main
from hf_lowbit.errors import BadRequest, FallbackError

_spec = importlib.util.spec_from_file_location("commands", Path(__file__).with_name("commands.py"))
commands = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(commands)
refused = commands.refused

SOURCE = str(demo.embedded_model())
TEXT = str(demo.held_out_text())
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """Small dense checkpoints: read them, never write to them."""
    folder = tmp_path_factory.mktemp("sources")
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 256}
    llama = {"num_attention_heads": 2, "num_key_value_heads": 1} | size
    jetmoe = {"num_key_value_heads": 2, "kv_channels": 16, "num_local_experts": 4, "num_experts_per_tok": 2} | size
    gpt2 = {"n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    LlamaForCausalLM(LlamaConfig(**llama)).save_pretrained(folder / "llama")
    JetMoeForCausalLM(JetMoeConfig(**jetmoe)).save_pretrained(folder / "jetmoe")
    GPT2LMHeadModel(GPT2Config(**gpt2, vocab_size=4096, n_positions=32)).save_pretrained(folder / "short")
    GPT2LMHeadModel(GPT2Config(**gpt2, vocab_size=300, n_positions=600)).save_pretrained(folder / "narrow")
    GPT2LMHeadModel(GPT2Config(**gpt2, vocab_size=5000, n_positions=600)).save_pretrained(folder / "wide")
    for name, file in [(name, file) for name in ("short", "narrow") for file in TOKENIZER]:
        shutil.copy(demo.embedded_model() / file, folder / name)
    return folder


WORDS = [
    ("--method codebok", "unknown method 'codebok'", "Did you mean 'codebook'?"),
    ("--method zzz", "unknown method 'zzz'", "Known: codebook"),
    ("--levels unifrm", "unknown level family 'unifrm'", "Did you mean 'uniform'?"),
    ("--method powerquant --levels uniform", "'powerquant' takes levels power", "got 'uniform'"),
    ("--method ternary", "'ternary' works at 2 to 2 bits", "got bits=4"),
    ("--method gptq", "'gptq' fits codes to calibration data and was given none", "--calibration FILE", "codebook"),
    ("--method jlcm", "'jlcm' fits codes to calibration data", "Methods that need none"),
    ("--override down_proj:method=gptq", "'gptq' fits codes to calibration data", "--calibration FILE"),
    ("--method rtn --calibration text.txt", "method 'rtn' does not use any; leave it out or use gptq"),
    ("--sequences 8", "how much of the calibration text", "--calibration FILE"),
    ("--sequences 0", "'0' is not a whole number of 1 or more"),
    ("--method gptq --option dampng=1", "unknown option of method 'gptq' 'dampng'", "Did you mean 'damping'?"),
    ("--method gptq --option order=x", "unknown value of option 'order': 'x'", "activation, given"),
    ("--method gptq --option sweeps=1.5", "option 'sweeps' takes a whole number, got 1.5"),
    ("--method gptq --option damping=no", "option 'damping' takes a value like 0.01, got 'no'"),
    ("--method gptq --option damping=-1", "option 'damping' cannot be negative, got -1"),
    ("--method gptq --option damping", "'damping' is not KEY=VALUE"),
    ("--method rtn --option damping=1", "method 'rtn' has no options, got 'damping'"),
    ("--bits 0", "bits must be a whole number from 1 to 8", "got 0"),
    ("--bits 9", "bits must be a whole number from 1 to 8", "got 9"),
    ("--bits 2.5", "bits=2.5", "bit allocator", "use 1 to 8"),
    ("--bits nan", "bits=nan", "use 1 to 8"),
    ("--bits four", "argument --bits: 'four' is not a number", "hf-lowbit quantize --help"),
    ("--group-size 0", "group_size must be a whole number from 8", "-1 for one scale per row", "got 0"),
    ("--group-size x", "argument --group-size", "'x'"),
    ("--scale-bits 7", "scale_bits must be 16, 8 or 6", "got 7"),
    ("--outliers 0.5", "0 to 0.1", "got 0.5"),
    ("--residual-terms 9", "residual_terms must be a whole number from 1 to 4", "got 9"),
    ("--seed -1", "seed", "got -1"),
    ("--method gptq --calibration no.txt", "cannot load a tokenizer"),
    ("--transform rotation", "unknown transform 'rotation'", "Known: awq"),
    ("--transform awq", "transform 'awq' needs calibration data", "--calibration FILE"),
    ("--transform awq:grid=x", "setting 'grid' of transform 'awq' takes a value like 20"),
    ("--transform outlier_suppression_plus", "fitted to how activations are rounded", "--activation-bits"),
    ("--activation-bits 16", "activation_bits must be a whole number from 2 to 8", "got 16"),
    ("--activation per=token", "--activation says how activations are rounded", "--activation-bits N"),
    ("--activation-bits 8 --activation per=row", "unknown activation granularity 'row'", "Known: group, tensor, token"),
    ("--activation-bits 8 --activation per=tensor --activation static=true", "static activation quantization needs"),
    ("--target-size 2GB", "target_size='2GB'", "the bit allocator is not part of this release"),
    ("--override down_proj", "'down_proj' is not PATTERN:KEY=VALUE", "down_proj:bits=6"),
    ("--override down_proj:bit=6", "unknown setting 'bit'", "Did you mean 'bits'?"),
    ("--override down_proj:bits=99", "bits must be a whole number from 1 to 8", "got 99"),
    ("--override down_proj:levels=5", "levels must be a name", "got 5"),
    ("--override down_pro:bits=6", "unknown module 'down_pro'", "Did you mean 'down_proj'?"),
    ("--skip lm_hed", "unknown module 'lm_hed'", "Did you mean 'lm_head'?"),
    ("--bitz 4", "unknown argument '--bitz'", "Did you mean '--bits'?"),
    ("--bit 4", "unknown argument '--bit'", "Did you mean '--bits'?"),
    ("extra", "unknown argument 'extra'", "Known: --activation-bits"),
]


@pytest.mark.parametrize(("options", "parts"), [(row[0], row[1:]) for row in WORDS], ids=[row[0] for row in WORDS])
def test_quantize_refuses(options, parts, refused, sources, tmp_path):
    refused(2, ["quantize", sources / "llama", tmp_path / "new" / "out", *options.split()], *parts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there(refused):
    refused(2, ["eval", SOURCE, "--text", TEXT, "--device", "cuda:1"], "'cuda:1'", "no CUDA device")
    with pytest.raises(BadRequest, match="no CUDA device here"):
        AutoModelForCausalLM.from_pretrained(SOURCE, quantization_config=LowBitConfig(method="rtn"), device_map="cuda")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": "four"}, "bits must be a whole number from 1 to 8 .*, got 'four'"),
        ({"bits": True}, "bits must be a whole number"),
        ({"bits": None}, "bits must be a whole number"),
        ({"group_sise": 64}, "unknown setting 'group_sise'. Did you mean 'group_size'?"),
        ({"method": 4}, "method must be a name, got 4"),
        ({"method": ["rtn"]}, "method must be a name"),
        ({"kv_cache": {"bits": 4}}, "KV cache is not part of this release; leave kv_cache out"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert must be a list of patterns, got 'lm_head'"),
        ({"overrides": ["down_proj"]}, "overrides must be a mapping"),
        ({"overrides": {"down_proj": 6}}, "overrides must be a mapping of patterns to mappings of settings, got 6"),
        ({"strict": "no"}, "strict must be True or False, got 'no'"),
        ({"quantize_embeddings": "false"}, "quantize_embeddings must be True or False"),
    ],
    ids=str,
)
def test_the_config_refuses(settings, message):
    with pytest.raises(BadRequest, match=message):
        LowBitConfig(**settings)


def test_whole_floats_are_whole_numbers():
    assert LowBitConfig(bits=4.0).bits == 4  # as JSON and command lines write them


@pytest.mark.parametrize(("arguments", "parts"), [([], "COMMAND"), (["quantiz"], "'quantiz'"), (["eval", "x"], "--text")])
def test_an_incomplete_command_line(arguments, parts, refused):
    refused(2, arguments, parts, "--help")


def test_a_destination_that_cannot_be_used(refused, sources, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for place in ("full", "file"):
        refused(2, ["quantize", sources / "llama", tmp_path / place], f"{place} exists", "Choose another name or remove it")
    # A file where its parent should be: nobody can write there, root included.
    refused(2, ["quantize", sources / "llama", tmp_path / "file" / "out"], "cannot be written", "Choose a directory")
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"


def test_a_source_that_is_none(refused, sources, tmp_path):
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    refused(2, ["quantize", tmp_path / "nowhere", out], "nowhere", "neither a directory here nor a Hub id")
    refused(2, ["quantize", "nowhere", out], "'nowhere'", "Hub id (user/name)")
    refused(2, ["quantize", tmp_path / "empty", out], "no config.json", "not a model checkpoint")
    for command in (["inspect"], ["eval", "--text", TEXT]):
        refused(2, [*command, tmp_path / "nowhere"], "nowhere")
        refused(2, [*command, tmp_path / "empty"], "no config.json")
    refused(2, ["inspect", "user/name"], "'user/name' is not a directory here", "Download")
    refused(2, ["inspect", sources / "llama"], "not an hf-lowbit checkpoint", "no quantization method")


def test_quantizing_what_is_quantized(refused, sources, tmp_path):
    done = tmp_path / "done"
    assert main(["quantize", str(sources / "llama"), str(done), "--method", "rtn"]) == 0
    refused(2, ["quantize", done, tmp_path / "again", "--bits", "3"], "done' is quantized already", "quantize the original")
    with pytest.raises(BadRequest, match=r"quantized already; dequantize\(\) it first"):
        quantize(AutoModelForCausalLM.from_pretrained(done), LowBitConfig(method="rtn"))
    other = tmp_path / "other"
    shutil.copytree(sources / "llama", other)
    settings = json.loads((other / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (other / "config.json").write_text(json.dumps(settings))
    refused(2, ["quantize", other, tmp_path / "again"], "is quantized already")
    refused(2, ["inspect", other], "not an hf-lowbit checkpoint", "names 'gptq'")


def test_strict_names_what_would_stay_in_high_precision(refused, sources, tmp_path):
    parts = ("strict: 4 matrices would stay in high precision", "JetMoeParallelExperts.weight is not a linear layer")
    refused(1, ["quantize", sources / "jetmoe", tmp_path / "out", "--method", "rtn", "--strict"], *parts)
    with pytest.raises(FallbackError, match="input_linear"):
        AutoModelForCausalLM.from_pretrained(sources / "jetmoe", quantization_config=LowBitConfig(method="rtn", strict=True))
    skipped = ["--skip", "input_linear", "--skip", "output_linear"]  # asked for, so no longer a fallback
    assert main(["quantize", str(sources / "jetmoe"), str(tmp_path / "out"), "--method", "rtn", "--strict", *skipped]) == 0


def test_a_text_that_cannot_be_measured(refused, tmp_path):
    evaluate = ["eval", SOURCE, "--text"]
    for name, data in {"latin": "café au lait ".encode("latin-1") * 9, "empty": b"", "one": b"a"}.items():
        (tmp_path / name).write_bytes(data)
    refused(2, [*evaluate, tmp_path / "nowhere"], "cannot read", "nowhere", "No such file")
    refused(2, [*evaluate, tmp_path], "cannot read", "Is a directory")
    refused(2, [*evaluate, tmp_path / "latin"], "not UTF-8 text", "at byte 3")
    refused(2, [*evaluate, tmp_path / "empty"], "the text has 0 tokens", "at least 2")
    refused(2, [*evaluate, tmp_path / "one"], "the text has 1 tokens", "at least 2")
    for window in ("1", "0", "-4"):
        refused(2, [*evaluate, TEXT, "--window", window], "a window needs at least 2 tokens", f"got {window}")
    refused(2, [*evaluate, TEXT, "--window", "4000"], "a window of 4000 tokens", "the model takes 1024", "--window 1024")
    refused(2, [*evaluate, TEXT, "--window", "wide"], "--window", "'wide'")
    for count in ("0", "-5", "few"):
        refused(2, [*evaluate, TEXT, "--characters", count], "--characters", f"'{count}' is not a whole number of 1 or more")


def test_models_that_do_not_fit_the_text_or_each_other(refused, sources):
    text = ["--text", TEXT, "--characters", "2000"]
    refused(2, ["eval", sources / "short", *text], "a window of 512 tokens", "Use --window 32")
    refused(2, ["eval", sources / "narrow", *text], "the model knows 300 tokens", "not of one checkpoint")
    refused(2, ["eval", sources / "llama", *text], "cannot load a tokenizer", "llama")
    reference = ["--window", "32", "--reference", sources / "llama"]
    refused(2, ["eval", sources / "short", *text, *reference], "the model knows 256 tokens")
    wide = ["--reference", sources / "wide"]
    refused(2, ["eval", SOURCE, *text, *wide], "vocabularies of 4096 and 5000 tokens", "KL needs one")
    refused(2, ["eval", SOURCE, "--text", TEXT, "--reference", sources / "nowhere"], "nowhere", "neither a directory here")
