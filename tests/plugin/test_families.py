"""Every promised model family goes the whole road: quantize on the fly, save, reload, dequantize."""

from __future__ import annotations

import families
import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_lowbit import LowBitConfig, explain, quantize
from hf_lowbit.kernels import cpu

IDS = (torch.arange(24).view(2, 12) * 7) % 240 + 3
CONFIG = {"method": "rtn", "bits": 8}


@pytest.fixture(scope="module", params=list(families.FAMILIES))
def road(request, tmp_path_factory):
    """One family: the dense model, the model quantized on the fly, and the directory it was saved to."""
    folder = tmp_path_factory.mktemp(request.param)
    dense = families.make_model(request.param)
    dense.save_pretrained(folder / "dense")
    low = AutoModelForCausalLM.from_pretrained(folder / "dense", quantization_config=LowBitConfig(**CONFIG)).eval()
    low.save_pretrained(folder / "low")
    return request.param, dense, low, folder / "low"


@torch.no_grad()
def test_eight_bits_stay_close_to_the_original(road):
    _, dense, low, _ = road
    expected, got = dense(IDS).logits, low(IDS).logits
    # 8-bit codes leave about 0.4 % per matrix; a wrongly transposed or swapped one leaves more than 100 %.
    assert (got - expected).norm() / expected.norm() < 0.04


@torch.no_grad()
def test_reload_is_bit_exact_and_generates(road):
    _, _, low, saved = road
    again = AutoModelForCausalLM.from_pretrained(saved).eval()
    assert torch.equal(again(IDS).logits, low(IDS).logits)
    tokens = again.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    assert tokens.shape == (2, 15)


@torch.no_grad()
def test_quantizing_in_memory_gives_the_same_model(road):
    name, _, low, _ = road
    assert torch.equal(quantize(families.make_model(name), LowBitConfig(**CONFIG))(IDS).logits, low(IDS).logits)


@torch.no_grad()
def test_dequantize_leaves_a_plain_model(road, tmp_path):
    _, dense, low, saved = road
    plain = AutoModelForCausalLM.from_pretrained(saved).eval().dequantize(torch.float32)
    assert not hasattr(plain.config, "quantization_config")
    assert [n for n, _ in plain.named_modules()] == [n for n, _ in dense.named_modules()]
    assert set(plain.state_dict()) == set(dense.state_dict())
    # Not bit-exact for every family: an expert stack goes through the host's own grouped matmul again.
    with cpu.arithmetic("exact"):
        torch.testing.assert_close(plain(IDS).logits, low(IDS).logits, rtol=1e-4, atol=1e-5)
    plain.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is type(dense)
    torch.testing.assert_close(again(IDS).logits, plain(IDS).logits, rtol=0, atol=0)


def test_every_large_matrix_is_low_bit_or_explained(road):
    name, dense, low, _ = road
    report = explain(low)
    covered = {line.name for line in report.tensors} | set(report.kept)
    tied = dense.all_tied_weights_keys
    for full, parameter in dense.named_parameters():
        if parameter.ndim >= 2 and not full.endswith("bias"):
            assert full in covered or full in tied, f"{full} of {name} is in no list"
    stacks = [line for line in report.tensors if len(line.shape) == 3]
    assert bool(stacks) == ("moe" in name or name in ("mixtral", "gpt-oss"))
