"""The law of the algebra: folding leaves the function unchanged, and forgetting any one reader does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from hf_lowbit.errors import BadRequest, WeightError
from hf_lowbit.plugin.rewrite import unrounded
from hf_lowbit.transforms.algebra import Rotate, RotateHeads, RotateResidual, Scale, Shift, Weights, gain_of
from hf_lowbit.transforms.graph import Site
from hf_lowbit.transforms.intake import Before, Intakes

LAW = 1e-10


NAMES = (
    *("llama", "llama-mha-biased", "llama-tied-biased", "llama-one-kv-head", "mistral", "qwen2", "qwen3-tied", "gemma2"),
    *("gemma3-tied", "phi", "phi3", "opt", "opt-post-norm", "gpt2", "gpt2-tied", "bloom", "mixtral", "qwen2-moe", "gpt-oss"),
    "bert",
)


@pytest.fixture(scope="module")
def exact(load_test_module):
    module = load_test_module("transforms/exact.py")
    assert tuple(module.MODELS) == NAMES
    return module


QUICK = ("llama", "llama-mha-biased", "phi", "gpt2", "bert")


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture(params=[*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES if name not in QUICK)])
def often(request):
    """For what takes a forward pass for each reader, or was seen in float64 already."""
    return request.param


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def orthogonal(*shape: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(*shape, shape[-1], dtype=torch.float64, generator=draw())).Q


def per_channel(site: Site, numbers: torch.Tensor) -> torch.Tensor:
    """Random numbers of the producer's channels, as the site's channels see them."""
    assert site.producer is not None
    return numbers[site.producer.channels]


def steps_of(graph):
    """A scale, and a shift and rotation where they apply, for every site that can be folded."""
    for site in graph.sites:
        if site.producer is None:
            continue
        size, through = site.producer.size, set(site.producer.through)
        factor = torch.rand(size, dtype=torch.float64, generator=draw(1)) * 3 + 0.2
        yield Scale(site, per_channel(site, factor))
        if through <= {"attention"} and all(part.bias for part in (site.producer, *site.readers)):
            yield Shift(site, per_channel(site, torch.randn(size, dtype=torch.float64, generator=draw(2))))
        if site.kind == "attention" and through == {"attention"}:
            yield RotateHeads(site, orthogonal(site.size // site.width, site.width))


def test_folding_leaves_the_function_and_the_inverse_the_weights(exact, name):
    model = exact.make_model(name)
    before, graph, weights = exact.logits(model), exact.graph_of(model), Weights.of(model)
    stored = {n: p.detach().clone() for n, p in model.named_parameters()}
    steps = list(steps_of(graph))
    assert steps
    for step in steps:
        step.apply(weights)
    assert exact.relative(exact.logits(model), before) < LAW
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, stored[n])]
    assert len(changed) >= len(steps)
    for step in reversed(steps):
        step.inverse().apply(weights)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), stored[n], rtol=1e-9, atol=1e-11)


def run_time_steps(model, graph, intakes):
    """A scale, shift and rotation that stay before each linear layer; numbers that float32 holds, as it will store them."""
    for site in graph.sites:
        factor = (torch.rand(site.size, generator=draw(1)) * 3 + 0.2).double()
        offset = torch.randn(site.size, generator=draw(2)).double()
        for reader in site.readers:
            module = model.get_submodule(reader.weight.rpartition(".")[0])
            if isinstance(module, (torch.nn.Linear, Conv1D)) and "tied" not in (site.trouble or ""):
                place = Before(intakes, reader)
                yield from (Scale(site, factor, place), Shift(site, offset, place), Rotate(place))


def test_what_stays_at_run_time_leaves_the_function(exact, often):
    model, intakes = exact.make_model(often), Intakes()
    before, weights = exact.logits(model), Weights.of(model)
    stored = {n: p.detach().clone() for n, p in model.named_parameters()}
    steps = list(run_time_steps(model, exact.graph_of(model), intakes))
    for step in steps:
        step.apply(weights)
    assert len(steps) == 3 * len(intakes) > 0
    with unrounded(model, intakes):
        assert exact.relative(exact.logits(model), before) < LAW
    for forgotten in intakes.keys() - {"pooler.dense.weight"}:  # which is not in what is compared
        with unrounded(model, {weight: intake for weight, intake in intakes.items() if weight != forgotten}):
            assert exact.relative(exact.logits(model), before) > 1e6 * LAW, f"{forgotten} does not matter"
    for step in reversed(steps):
        step.inverse().apply(weights)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), stored[n], rtol=1e-9, atol=1e-11)


def test_float32_logits_stay(exact, often):
    model = exact.make_model(often).float()
    ids = exact.IDS
    with torch.no_grad():
        before = model(input_ids=ids)[0]
        for step in steps_of(exact.graph_of(model)):
            step.apply(Weights.of(model))
        assert float((model(input_ids=ids)[0] - before).abs().max()) < 1e-3


def test_forgetting_one_reader_is_seen(exact, often):
    model = exact.make_model(often)
    before, graph = exact.logits(model), exact.graph_of(model)
    stored = {n: p.detach().clone() for n, p in model.named_parameters()}
    for site in graph.sites:
        for forgotten in site.readers if site.producer is not None else ():
            mutant = replace(site, readers=tuple(r for r in site.readers if r is not forgotten))
            factor = torch.rand(site.producer.size, dtype=torch.float64, generator=draw(1)) * 3 + 0.2
            Scale(mutant, per_channel(site, factor)).apply(Weights.of(model))
            assert exact.relative(exact.logits(model), before) > 1e6 * LAW, f"{forgotten.weight} does not matter"
            with torch.no_grad():
                for n, p in model.named_parameters():
                    p.copy_(stored[n])


ROTATABLE = ("llama", "llama-mha-biased", "qwen2", "mixtral", "qwen2-moe", "phi", "phi3", "opt", "gpt2", "gpt-oss")


@pytest.mark.parametrize("rotated", ROTATABLE)
def test_rotating_the_residual_stream_leaves_the_function(exact, rotated):
    model = exact.make_model(rotated)
    before, graph, weights = exact.logits(model), exact.graph_of(model), Weights.of(model)
    stream = graph.residual
    assert stream.trouble is None
    matrix = orthogonal(stream.size)
    if stream.centred:  # the rotation must keep the all-ones direction
        basis = torch.linalg.qr(torch.cat([torch.ones(stream.size, 1).double(), matrix[:, 1:]], 1)).Q
        inner = torch.block_diag(torch.ones(1, 1).double(), orthogonal(stream.size - 1))
        matrix = basis @ inner @ basis.T
    with pytest.raises(BadRequest, match="fold it into its readers"):
        RotateResidual(graph, matrix).apply(weights)
    for site in graph.sites:
        if site.source in stream.sites:
            Scale(site, gain_of(weights, site)).apply(weights)
    RotateResidual(graph, matrix).apply(weights)
    assert exact.relative(exact.logits(model), before) < LAW
    RotateResidual(graph, matrix).inverse().apply(weights)
    assert exact.relative(exact.logits(model), before) < LAW


@pytest.mark.parametrize(
    ("name_of", "reason"),
    [
        ("gemma2", "a norm writes into the residual stream"),
        ("gemma3-tied", "a norm writes into the residual stream"),
        ("bloom", "no matrix reads it"),
        ("bert", "also used by sum, which cannot be rewritten"),
        ("opt-post-norm", "also used by read"),
    ],
)
def test_what_is_not_understood_is_left_alone_and_said(exact, name_of, reason):
    graph = exact.graph_of(exact.make_model(name_of))
    assert reason in graph.residual.trouble
    with pytest.raises(BadRequest, match="the residual stream cannot be rotated"):
        RotateResidual(graph, orthogonal(48)).apply(Weights({}))


def test_a_tied_head_is_not_rotated_with_the_table_it_shares(exact):
    model = exact.make_model("llama-tied-biased")
    graph, weights = exact.graph_of(model), Weights.of(model)
    for site in graph.sites[:-1]:
        if site.source in graph.residual.sites:
            Scale(site, gain_of(weights, site)).apply(weights)
    stored = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(BadRequest, match=r"model.embed_tokens.weight is tied to an embedding table"):
        RotateResidual(graph, orthogonal(48)).apply(weights)
    assert all(torch.equal(p, stored[n]) for n, p in model.named_parameters())


def troubles(graph):
    return dict(graph.report())


def test_the_reasons_name_what_is_in_the_way(exact):
    sink = troubles(exact.graph_of(exact.make_model("gpt-oss")))
    assert "weights do not sum to 1" in sink["model.layers.0.self_attn.o_proj"]
    assert "sigmoid" in sink["model.layers.0.mlp.experts.down_proj"]
    assert "gelu" in troubles(exact.graph_of(exact.make_model("bert")))["encoder.layer.0.output.dense"]
    tied = troubles(exact.graph_of(exact.make_model("qwen3-tied")))
    assert tied == {"model.embed_tokens": "model.embed_tokens.weight is tied to an embedding table"}
    post = troubles(exact.graph_of(exact.make_model("bert")))
    assert "also used by sum" in post["encoder.layer.0.intermediate.dense"]


def test_every_matrix_is_read_at_one_site(exact, name):
    model = exact.make_model(name)
    graph = exact.graph_of(model)
    seen = [reader.weight for site in graph.sites for reader in site.readers]
    matrices = [n for n, p in model.named_parameters() if p.ndim > 1 and "embed" not in n and ".wte." not in n
                and ".wpe." not in n and not n.endswith("_bias")]  # fmt: skip
    assert sorted(set(seen) - set(seen).difference(matrices)) == sorted(set(matrices))
    assert len(set(seen)) == len(seen)


def test_bad_numbers_are_refused(exact):
    model = exact.make_model("opt")
    graph, weights = exact.graph_of(model), Weights.of(model)
    site = next(s for s in graph.sites if s.kind == "relu")
    with pytest.raises(BadRequest, match="negative scale does not pass a ReLU"):
        Scale(site, -torch.ones(site.size)).apply(weights)
    with pytest.raises(BadRequest, match="finite and not zero"):
        Scale(site, torch.zeros(site.size)).apply(weights)
    with pytest.raises(BadRequest, match="a shift does not pass relu"):
        Shift(site, torch.ones(site.size)).apply(weights)
    with pytest.raises(BadRequest, match="not the output of attention"):
        RotateHeads(site, torch.eye(12)[None]).apply(weights)
    heads = next(s for s in graph.sites if s.kind == "attention")
    with pytest.raises(BadRequest, match="not orthogonal"):
        RotateHeads(heads, torch.ones(4, 12, 12)).apply(weights)
    llama = exact.make_model("llama")
    shared = next(s for s in exact.graph_of(llama).sites if s.kind == "attention")
    with pytest.raises(BadRequest, match="share keys and values must be given the same number"):
        Scale(shared, torch.arange(1, shared.size + 1).double()).apply(Weights.of(llama))
    with pytest.raises(BadRequest, match=r"needs biases, .*v_proj.weight"):
        Shift(shared, torch.ones(shared.size)).apply(Weights.of(llama))
    with pytest.raises(BadRequest, match="keep the all-ones vector"):
        RotateResidual(graph, orthogonal(48)).apply(weights)


def test_float16_overflow_is_refused_by_name(exact):
    model = exact.make_model("llama").half()
    site = exact.graph_of(exact.make_model("llama")).sites[0]
    with pytest.raises(WeightError, match=r"q_proj.weight: folding would need .*float16 cannot hold"):
        Scale(site, torch.full((site.size,), 1e7)).apply(Weights.of(model))
