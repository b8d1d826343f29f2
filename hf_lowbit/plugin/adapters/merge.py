"""A saved adapter merged into a low-bit checkpoint, in one of three ways, each with the error it adds.

* ``keep``: the update becomes the record's low-rank term, the codes stay; what is lost is the rounding of factors to fp16.
* ``resolve``: the sum is quantized again by a data-free method, with a quantization error of its own.
* ``dense``: the whole model becomes a dense checkpoint; what is lost is the rounding to bfloat16.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowbit.errors import BadRequest, unknown_name
from hf_lowbit.format.serialize import sort_headers
from hf_lowbit.format.spec import Spec
from hf_lowbit.pipeline.workspace import Workspace
from hf_lowbit.plugin.adapters.low_rank import distance, total
from hf_lowbit.plugin.checkpoint import is_low_bit, load_model, load_tokenizer
from hf_lowbit.plugin.dense import dense_linear
from hf_lowbit.plugin.modules import LowBitLinear
from hf_lowbit.solvers import SOLVERS, solve, without_data

WAYS = ("keep", "resolve", "dense")
KINDS = ("LORA", "MISS")
# The file that says what merging cost, matrix by matrix.
REPORT = "merge_report.json"


@dataclass(frozen=True)
class Merged:
    """One adapted matrix after a merge.

    Attributes:
        name: module.
        error: relative Frobenius error of the stored matrix against the exact sum.
        update: size of the adapter's update, relative to the same sum.
        norm: of the sum.
    """

    name: str
    error: float
    update: float
    norm: float


@dataclass(frozen=True)
class MergeReport:
    """What a merge did; ``error`` and ``update`` are over all adapted matrices."""

    how: str
    rows: list[Merged]

    @property
    def error(self) -> float:
        """Relative error the merge added."""
        return total([vars(row) for row in self.rows], "error")

    @property
    def update(self) -> float:
        """Relative size of what the adapter changes."""
        return total([vars(row) for row in self.rows], "update")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        rows = [{key: value for key, value in vars(row).items() if key != "norm"} for row in self.rows]
        return {"how": self.how, "error": self.error, "update": self.update, "matrices": rows}


def merge_checkpoint(
    source: str, adapter: str, destination: str | Path, how: str = "keep", method: str | None = None
) -> MergeReport:
    """Merge a saved PEFT adapter into a low-bit checkpoint as a new directory, which appears whole or not at all.

    Args:
        source: directory or Hub id of the low-bit checkpoint; only read.
        adapter: directory or Hub id of the adapter.
        destination: directory to write; must not hold anything yet.
        how: ``keep``, ``resolve`` or ``dense``.
        method: of ``resolve``: a data-free method; by default each matrix's own, or what fits its levels without data.

    Raises:
        BadRequest: something is missing, taken, of another kind, or cannot be merged this way; the message names one that
            can.
        LowBitError: loading or writing failed.
    """
    if how not in WAYS:
        raise BadRequest(unknown_name("way to merge", how, WAYS))
    if method is not None and how != "resolve":
        raise BadRequest(f"--method says how matrices are quantized again; it goes with --how resolve, not {how}.")
    if method is not None and method not in SOLVERS:
        raise BadRequest(unknown_name("method", method, SOLVERS))
    if method is not None and not SOLVERS[method].optional:
        raise BadRequest(f"method {method!r} needs calibration data, which merging has none of; use codebook, say.")
    config = _adapter_config(adapter)
    with Workspace.open(destination, {"merge": how}) as work:
        # A bfloat16 model holds bfloat16 norms and biases, as its dense checkpoint is to.
        adapted = _load(source, adapter, config, "bfloat16" if how == "dense" else "auto")
        report = MergeReport(how, list(_merge(adapted, how, method)))
        model = adapted.unload()
        if how == "dense":
            model = model.dequantize(torch.bfloat16)
        tokenizer = None
        with suppress(BadRequest):  # weights without a tokenizer are a checkpoint all the same
            tokenizer = load_tokenizer(source)
        work.finish(partial(_write, model, tokenizer, report))
    return report


def _adapter_config(adapter: str) -> Any:
    """The config of an adapter that can be merged.

    Raises:
        BadRequest: there is none, or it is of another kind.
    """
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise BadRequest('merging an adapter needs PEFT: pip install "hf-lowbit[peft]"') from error
    try:
        config = PeftConfig.from_pretrained(adapter)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BadRequest(f"{adapter!r} is no PEFT adapter: {' '.join(str(error).split())[:200]}") from error
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind not in KINDS:
        raise BadRequest(f"{adapter!r} is a {kind} adapter; LoRA, DoRA and MiSS adapters can be merged.")
    if getattr(config, "modules_to_save", None):
        raise BadRequest(f"{adapter!r} holds whole modules ({', '.join(config.modules_to_save)}), which are not merged.")
    if getattr(config, "bias", "none") != "none":
        raise BadRequest(f"{adapter!r} changes biases (bias={config.bias!r}), which are not merged.")
    return config


def _load(source: str, adapter: str, config: Any, dtype: str) -> Any:
    from peft import PeftModel

    if Path(source).exists() and not is_low_bit(source):
        raise BadRequest(f"{source!r} is not a low-bit checkpoint; PEFT's own merge_and_unload merges into dense ones.")
    model = load_model(source, dtype=dtype)
    if not getattr(model, "hf_quantizer", None):
        raise BadRequest(f"{source!r} is not a low-bit checkpoint; PEFT's own merge_and_unload merges into dense ones.")
    try:
        return PeftModel.from_pretrained(model, adapter, config=config)
    except (RuntimeError, ValueError, OSError) as error:
        if isinstance(error, BadRequest):
            raise
        reason = " ".join(str(error).split())[:300]
        raise BadRequest(f"adapter {adapter!r} does not fit {source!r}: {reason}") from error


@torch.no_grad()
def _merge(adapted: Any, how: str, method: str | None) -> Any:
    """Merge every adapted layer in place; yields a row for each."""
    model = adapted.get_base_model()
    (adapter,) = adapted.peft_config
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "merged_adapters")}
    resolve = partial(_resolve, model.config.quantization_config, method)
    ways: dict[str, Callable[[str, Any, Tensor], Tensor]] = {"keep": _keep, "resolve": resolve, "dense": _dense}
    for name, layer in layers.items():
        if type(layer.base_layer) is nn.Linear:
            yield _merge_dense_layer(name, layer)
            continue
        if not isinstance(layer.base_layer, LowBitLinear):
            raise BadRequest(f"{name!r} is a {type(layer.base_layer).__name__}, into which adapters are not merged.")
        weight = layer.base_layer.matrix(torch.float32)
        exact = layer.exact(adapter, weight)
        found = ways[how](name, layer, exact)
        yield Merged(name, distance(found, exact), distance(weight, exact), float(exact.norm()))


def _keep(name: str, layer: Any, exact: Tensor) -> Tensor:
    try:
        layer.merge()
    except BadRequest as error:
        raise BadRequest(f"{name}: {error}") from error
    return layer.base_layer.matrix(torch.float32)


def _resolve(config: Any, method: str | None, name: str, layer: Any, exact: Tensor) -> Tensor:
    base = layer.base_layer
    layout = base.activation.layout if base.activation is not None else None
    if layout is not None and (layout.shifted or layout.scaled or layout.rotated or layout.members):
        raise BadRequest(f"{name}: transforms rewrite its inputs, so its matrix cannot be quantized alone. Use how='dense'.")
    spec: Spec = config.spec(name)
    spec = without_data(spec) if method is None else replace(spec, method=method, levels=None, options={})
    base.put("weight", solve(exact, spec))
    return base.matrix(torch.float32)


def _dense(name: str, layer: Any, exact: Tensor) -> Tensor:
    base, rounded = layer.base_layer, exact.to(torch.bfloat16)
    layer.base_layer = dense_linear(base, rounded.T.contiguous() if base.transposed else rounded)
    return rounded


def _merge_dense_layer(name: str, layer: Any) -> Merged:
    """A layer that was left in high precision: PEFT's own merge in float32, then the dtype it has."""
    base = layer.base_layer
    before = base.weight.data
    base.weight.data = before.to(torch.float32, copy=True)
    layer.merge(safe_merge=True)
    exact = base.weight.data
    base.weight.data = exact.to(before.dtype)
    return Merged(name, distance(base.weight.data, exact), distance(before, exact), float(exact.norm()))


def _write(model: Any, tokenizer: Any, report: MergeReport, folder: Path) -> None:
    model.save_pretrained(folder)
    sort_headers(folder)
    (folder / REPORT).write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
