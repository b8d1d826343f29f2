"""What every transform keeps: the function, the way back, and its place in the order."""

from __future__ import annotations

import exact
import pytest
import torch
import transform_table
from transform_table import IDS, WINDOWS, uneven

from hf_lowbit import LowBitConfig, quantize
from hf_lowbit.errors import BadRequest, WeightError
from hf_lowbit.kernels import cpu
from hf_lowbit.plugin.compress import prepare_targets
from hf_lowbit.plugin.ranges import ModelRanges
from hf_lowbit.plugin.rewrite import rewrite, unrounded
from hf_lowbit.transforms import TRANSFORMS

CASES = [pytest.param(entry, family, id=f"{entry.name}-{family}") for entry, family in transform_table.CASES]
REWRITING = [case for case in CASES if TRANSFORMS[case.values[0].name].kind != "range"]


def test_every_transform_has_a_row():
    assert {entry.name for entry in transform_table.ROWS} == set(TRANSFORMS)


@torch.no_grad()
@pytest.mark.parametrize(("entry", "family"), REWRITING)
def test_the_function_stays_and_undoing_brings_the_weights_back(entry, family):
    model, config = uneven(family), entry.config
    before = model(IDS).logits
    stored = {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}
    done = rewrite(model, config, prepare_targets(model, config), config.calibration)
    with unrounded(model, done.intakes):
        off = (model(IDS).logits - before).abs()
    assert float(off.max()) < 1e-3 if entry.exact else float(off.norm() / before.norm()) < 0.3
    assert done.steps
    assert {step["transform"] for step in done.steps} == {entry.name}
    for step in reversed(done.bench.steps):
        step.inverse().apply(done.bench.weights)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        torch.testing.assert_close(parameter.detach(), stored[name], rtol=1e-4, atol=1e-5)


# Two heads on one key-value head and a tied head, norms behind the sums, and norms that write into the stream.
QUICK = ("llama-tied-biased", "bert", "gemma2")
EXACT = [entry for entry in transform_table.ROWS if entry.exact and TRANSFORMS[entry.name].kind != "range"]


@torch.no_grad()
@pytest.mark.parametrize("entry", EXACT, ids=lambda entry: entry.name)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in exact.MODELS]
)
def test_the_function_stays_whatever_the_architecture(name, entry):
    model, config = exact.make_model(name).float(), entry.config
    before = model(input_ids=exact.IDS)[0]
    done = rewrite(model, config, prepare_targets(model, config), config.calibration)
    assert done.steps
    with unrounded(model, done.intakes):
        assert float((model(input_ids=exact.IDS)[0] - before).abs().max()) < 1e-3


@torch.no_grad()
def test_a_dequantized_model_computes_the_same_without_rounding_and_remembers():
    model = uneven("llama")
    config = LowBitConfig(method="rtn", bits=8, transforms=["hadamard"])
    dense, low = model(IDS).logits, quantize(model, config)
    with cpu.arithmetic("exact"):
        found = low(IDS).logits
    plain = low.dequantize()
    torch.testing.assert_close(plain(IDS).logits, found, rtol=1e-3, atol=1e-3)
    assert (found - dense).norm() / dense.norm() < 0.04
    with pytest.raises(BadRequest, match=r"'hadamard' was applied to this model before .* Start from the original"):
        quantize(plain, config)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"transforms": ["gama_migration"]}, ("unknown transform 'gama_migration'", "Did you mean 'gamma_migration'?")),
        ({"transforms": ["awq", "awq"]}, ("'awq' is asked for twice",)),
        ({"transforms": ["hadamard", "awq"]}, ("'awq' cannot come after 'hadamard'", "Put 'awq' first")),
        ({"transforms": [{"name": "awq", "gird": 3}]}, ("unknown setting of transform 'awq' 'gird'", "'grid'")),
        ({"transforms": [{"name": "smoothquant", "alpha": "x"}]}, ("takes a value like 0.5, got 'x'",)),
        ({"transforms": ["outlier_suppression_plus"]}, ("fitted to how activations are rounded", "--activation-bits")),
        ({"transforms": ["token_wise_clipping"], "activation_bits": 8}, ("chooses static ranges", "static=True")),
        ({"activation_bits": 16}, ("activation_bits must be a whole number from 2 to 8", "got 16")),
        ({"activation_bits": {"bits": 8, "static": True}}, ("a step per token cannot be static", "per='tensor'")),
        ({"activation_bits": {"bit": 8}}, ("unknown activation setting 'bit'", "'bits'")),
    ],
)
def test_what_cannot_be_is_refused_in_words(settings, words):
    with pytest.raises(BadRequest) as error:
        LowBitConfig(**settings)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_requests_that_need_data_or_find_nothing_are_refused():
    with pytest.raises(BadRequest, match="'awq' needs calibration data and was given none"):
        quantize(uneven("llama"), LowBitConfig(transforms=["awq"]))
    static = {"bits": 8, "per": "tensor", "static": True}
    with pytest.raises(BadRequest, match="static activation quantization needs calibration data"):
        quantize(uneven("llama"), LowBitConfig(activation_bits=static))
    for settings in ({"transforms": ["awq"]}, {"transforms": ["gamma_migration"]}, {"activation_bits": static}):
        with pytest.raises(BadRequest, match=r"needs at least 128 tokens of calibration text .* got 32"):
            quantize(uneven("llama"), LowBitConfig(method="rtn", calibration=WINDOWS[:1], **settings))


@torch.no_grad()
def test_gains_of_zero_are_refused_by_what_cannot_do_without():
    model = uneven("llama")
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.zero_()
    with pytest.raises(BadRequest, match=r"'gamma_migration' found nothing .* most of its gains are zero"):
        quantize(model, LowBitConfig(method="rtn", transforms=["gamma_migration"]))
    model = uneven("llama")
    model.model.layers[1].input_layernorm.weight[[5, 7]] = 0
    stored = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for name in ("hadamard", "resq"):
        config = next(row.config for row in transform_table.ROWS if row.name == name)
        with pytest.raises(BadRequest, match=r"layers.1.input_layernorm.weight holds 2 gains of zero, .*cannot be rotated"):
            quantize(model, config)
        assert all(torch.equal(parameter, stored[n]) for n, parameter in model.named_parameters())


@torch.no_grad()
def test_what_float16_cannot_hold_any_more_is_refused_by_name():
    model = uneven("llama").half()
    model.model.norm.weight[:] = 2e4
    model.lm_head.weight.mul_(100)
    config = LowBitConfig(method="rtn", bits=8, transforms=["hadamard"], quantize_embeddings=False)
    with pytest.raises(WeightError, match=r"lm_head.weight: transforms made it as large as .*float16 cannot hold"):
        quantize(model, config)


def test_a_model_that_cannot_be_followed_is_refused_by_name():
    class Puzzling(type(uneven("llama"))):
        def forward(self, pixels):  # takes no token ids
            return pixels

    model = Puzzling(uneven("llama").config)
    with pytest.raises(BadRequest, match=r"transforms cannot follow Puzzling: TypeError: .* Leave transforms out"):
        quantize(model, LowBitConfig(method="rtn", transforms=["hadamard"]))


@torch.no_grad()
def test_gains_that_are_negative_or_zero_keep_the_function():
    model = uneven("opt")
    for name, parameter in model.named_parameters():
        if "layer_norm.weight" in name:
            parameter[::7] *= -1
            parameter[3] = 0
    before = model(IDS).logits
    config = LowBitConfig(method="rtn", bits=8, transforms=["gamma_migration"])
    done = rewrite(model, config, prepare_targets(model, config), None)
    assert done.steps
    assert float((model(IDS).logits - before).abs().max()) < 1e-3
    norm = next(parameter for name, parameter in model.named_parameters() if "self_attn_layer_norm.weight" in name)
    assert float(norm.min()) > -1e-3  # signs have moved as well
    assert float(norm[3]) == 0
    assert float(norm.median()) == pytest.approx(1.0)


def test_a_tied_head_is_given_its_own_table_and_that_is_said(caplog):
    model = uneven("llama-tied-172")
    quantize(model, LowBitConfig(method="rtn", bits=8, transforms=["hadamard"]))
    assert not model.config.tie_word_embeddings
    assert "the head gets its own, 65,536 bytes more" in caplog.text


@torch.no_grad()
def test_static_ranges_are_those_of_the_calibration_text():
    spec = {"bits": 8, "per": "tensor", "static": True}
    settings = {
        "method": "rtn",
        "bits": 8,
        "group_size": -1,
        "scale_bits": 16,
        "activation_bits": spec,
        "quantize_embeddings": False,
    }
    low = quantize(uneven("llama"), LowBitConfig(**settings, calibration=WINDOWS))
    module = low.model.layers[0].self_attn.q_proj
    assert module.simulated is None  # so that the steps in force must be those that were found, not what preparing saw
    seen: list[torch.Tensor] = []
    dense = uneven("llama")
    dense.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    dense(WINDOWS)
    step = (seen[0].max() - seen[0].min()) / 255
    torch.testing.assert_close(module.activation.step.view(torch.float32), step[None], rtol=1e-4, atol=0)
    assert torch.equal(module.prepared()[1].parts[0].steps[0], module.activation.step.view(torch.float32))
    expected = dense(IDS).logits
    assert (low(IDS).logits - expected).norm() / expected.norm() < 0.1


@pytest.mark.parametrize(
    ("windows", "length", "judged", "learned"),
    [(8, 32, 4, 4), (128, 32, 16, 112), (32, 128, 4, 28), (128, 512, 4, 124), (2, 64, 4, 1)],
)
def test_ranges_are_judged_on_windows_they_are_not_learned_on(windows, length, judged, learned):
    bench = ModelRanges({}, 8, windows=torch.zeros(windows, length, dtype=torch.int64))
    assert (bench.judged, bench.batches()) == (judged, learned)


@torch.no_grad()
def test_a_transform_that_would_lose_leaves_every_site_and_is_no_error():
    model = uneven("llama")
    for name, parameter in model.named_parameters():
        if "layernorm" in name:  # outliers of the norms undo those of the columns that read them
            parameter.mul_(torch.where(torch.arange(64) == 3, 1e-3, 1.0))
            owner = model.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
            readers = ("q_proj", "k_proj", "v_proj") if "input" in name else ("gate_proj", "up_proj")
            block = owner.self_attn if "input" in name else owner.mlp
            for reader in readers:
                getattr(block, reader).weight[:, 3] *= 1e3
    config = LowBitConfig(method="rtn", bits=8, activation_bits=8, transforms=["gamma_migration"], calibration=WINDOWS)
    done = rewrite(model, config, prepare_targets(model, config), WINDOWS)
    folded = {step["site"] for step in done.steps}
    assert all(
        "costs less where it is" in row["left_alone"]
        for row in done.left_alone
        if row["name"] not in folded and "layers" in row["name"]
    )
