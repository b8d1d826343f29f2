"""``bench``: what it counts, and what it says of the kernels that ran."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lowbit import LowBitConfig, explain, quantize
from hf_lowbit.cli import main
from hf_lowbit.kernels import backends
from hf_lowbit.measure.speed import decode_rate, prefill_rate, random_ids, read_bandwidth
from hf_lowbit.plugin.bench import bench, bytes_per_token

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}


def model_of(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=tied)).eval()


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_reads_every_weight_but_an_untied_input_table(tied):
    model = model_of(tied)
    table = 128 * 64 * 4
    whole = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert bytes_per_token(model) == whole - (0 if tied else table)
    quantize(model, LowBitConfig(method="rtn", bits=4))
    found = explain(model)
    embedding = sum(line.bytes for line in found.tensors if "embed" in line.name)
    assert embedding > 0
    assert bytes_per_token(model) == found.bytes - (0 if tied else embedding)


def test_rates_are_those_of_the_model_that_runs():
    model = model_of(tied=True)
    seen = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True)
    assert decode_rate(model, batch=3, prompt=5, tokens=4) > 0
    assert seen == [(3, 5)] + [(3, 1)] * 6
    assert prefill_rate(model, length=7, repeats=1) > 0
    assert read_bandwidth(repeats=1) > 1e8


def test_prompts_are_the_same_each_time_and_within_the_vocabulary():
    model = model_of(tied=True)
    ids = random_ids(model, 2, 50)
    assert torch.equal(ids, random_ids(model, 2, 50)) and ids.min() >= 3 and ids.max() < 128


def test_kernels_are_named_with_every_refusal():
    model = quantize(model_of(tied=False), LowBitConfig(method="rtn", bits=4))
    found = bench(model, batches=(1,), prompt=4, tokens=2)
    assert sum(row["matrices"] for row in found["kernels"]) == len(explain(model).tensors)
    assert (
        sum(row["weights"] for row in found["kernels"]) == sum(p.numel() for p in model_of(tied=False).parameters()) - 5 * 64
    )
    for row in found["kernels"]:
        names = [backend.name for backend in backends()]
        assert list(row["refused"]) == names[: names.index(row["backend"])]
    (row,) = found["decode"]
    share = row["tokens_per_s"] * found["bytes_per_token"] / found["read_bandwidth_gb_s"] / 1e9
    assert found["bandwidth_share"] == row["bandwidth_share"] == pytest.approx(share)
    assert found["decode_tokens_per_s"] == row["tokens_per_s"]


def test_the_command_times_model_and_original(tmp_path, capsys):
    model_of(tied=True).save_pretrained(tmp_path / "dense")
    assert main(["quantize", str(tmp_path / "dense"), str(tmp_path / "low"), "--method", "rtn", "--bits", "4"]) == 0
    capsys.readouterr()
    command = ["bench", str(tmp_path / "low"), "--batch", "1", "--batch", "2", "--prompt", "6", "--tokens", "2"]
    assert main([*command, "--reference", str(tmp_path / "dense"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["batch"] for row in found["decode"]] == [row["batch"] for row in found["reference"]["decode"]] == [1, 2]
    assert found["bytes_per_token"] < found["reference"]["bytes_per_token"] and found["reference"]["kernels"] == []
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "tokens/s" in printed and f"{found['kernels'][0]['backend']}: " in printed


def test_nothing_to_time(tmp_path, capsys):
    assert main(["bench", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err
    assert main(["bench", str(tmp_path), "--batch", "0"]) == 2
    assert "'0' is not a whole number of 1 or more" in capsys.readouterr().err


def test_tuning_without_the_gpu_kernels_is_refused_in_words(tmp_path, capsys):
    quantize(model_of(tied=True), LowBitConfig(method="rtn", bits=4)).save_pretrained(tmp_path)
    assert main(["bench", str(tmp_path), "--tune"]) == 2
    said = capsys.readouterr().err
    assert "--tune measures block sizes of the GPU kernels, which run no matrix of this model" in said
    assert "the model is on cpu" in said
    if not torch.cuda.is_available():
        assert main(["bench", str(tmp_path), "--device", "cuda"]) == 2
        assert "torch finds no CUDA device here" in capsys.readouterr().err
