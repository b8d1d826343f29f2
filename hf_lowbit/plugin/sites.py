"""Blocks and sites of a Transformers model, as the pipeline wants them: found by structure, opened as float32 copies."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_lowbit.errors import BadRequest
from hf_lowbit.pipeline.blocks import Block, OpenBlock, Sink
from hf_lowbit.plugin.experts import LowBitExperts, is_experts, to_low_bit

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ModelSite:
    """One matrix or stack of an open block.

    Args:
        name: full parameter name in the model.
        local: name within the block.
        module: its owner, in the working copy.
    """

    def __init__(self, name: str, local: str, module: nn.Module) -> None:
        self.name, self.local, self.module = name, local, module
        self.stacked = isinstance(module, LowBitExperts)
        self._flipped = is_flipped(module)

    @property
    def parameter(self) -> nn.Parameter:
        """The dense parameter in the working copy, in the module's own order of axes."""
        return self.module.get_parameter(self.local.rpartition(".")[2])

    def turned(self, values: Tensor) -> Tensor:
        """From the module's order of axes to ``[.., out, in]``, or back."""
        return values.transpose(-1, -2) if self._flipped else values

    def watch(self, sink: Sink) -> Any:
        """Call ``sink`` with the inputs of every use, until the returned handle's ``remove``."""
        if isinstance(self.module, LowBitExperts):
            return self.module.watch(self.local.rpartition(".")[2], sink)
        return self.module.register_forward_pre_hook(lambda module, args: sink(0, args[0]))


class Shards:
    """Reads parameters from safetensors files by name, so that no more of a model than one block is ever in memory.

    The host maps a file as a whole and keeps the pages it has touched for as long as any tensor of the file lives;
    a block read here is copied and its mapping closed.

    Args:
        files: of the checkpoint; names that are not found in them are taken from the model.
    """

    def __init__(self, files: Sequence[Path] = ()) -> None:
        self._where: dict[str, Path] = {}
        for file in files:
            with safe_open(str(file), framework="pt") as handle:
                self._where |= dict.fromkeys(handle.keys(), file)

    def shape(self, name: str) -> list[int] | None:
        """Shape of a stored tensor, None where the files hold none of that name."""
        if name not in self._where:
            return None
        with safe_open(str(self._where[name]), framework="pt") as handle:
            return list(handle.get_slice(name).get_shape())

    def read(self, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """float32 copies of parameters (full name -> the model's own tensor)."""
        out = {}
        for file in {self._where[name] for name in names if name in self._where}:
            with safe_open(str(file), framework="pt") as handle:
                for name, known in names.items():
                    if self._where.get(name) == file and handle.get_slice(name).get_shape() == list(known.shape):
                        out[name] = handle.get_tensor(name).to(torch.float32, copy=True)
        return out | {n: t.detach().to("cpu", torch.float32, copy=True) for n, t in names.items() if n not in out}


def find_blocks(model: PreTrainedModel, chosen: Sequence[str], shards: Shards) -> list[Block]:
    """The repeated layers of a model that hold the chosen parameters, in running order.

    They are the entries of the ``ModuleList`` that holds most of the chosen weights.

    Raises:
        BadRequest: no such list.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            inside = sum(model.get_parameter(full).numel() for full in chosen if full.startswith(f"{name}."))
            if inside and (best is None or inside > best[0]):
                best = (inside, name, module)
    if best is None:
        raise BadRequest(
            f"{type(model).__name__} has no list of repeated layers to go through block by block. "
            "Use a data-free method through from_pretrained."
        )
    blocks = []
    for number, module in enumerate(best[2]):
        name = f"{best[1]}.{number}"
        sites = tuple(full for full in chosen if full.startswith(f"{name}."))
        open_it = partial(_open, number, module, name, sites, shards)
        blocks.append(Block(name, module, sites, open_it, partial(_weight, model, shards)))
    return blocks


def _weight(model: PreTrainedModel, shards: Shards, full: str) -> Tensor:
    values = shards.read({full: model.get_parameter(full)})[full]
    return values.transpose(-1, -2) if is_flipped(model.get_submodule(full.rpartition(".")[0])) else values


def is_flipped(module: nn.Module) -> bool:
    """Whether a module holds its weights ``[.., in, out]``."""
    return isinstance(module, Conv1D) or bool(getattr(module, "is_transposed", False))


def _open(number: int, module: nn.Module, prefix: str, sites: Sequence[str], shards: Shards) -> OpenBlock:
    """A float32 copy of a block, its stacked experts able to show their inputs."""
    named = {f"{prefix}.{name}": tensor for name, tensor in module.named_parameters()}
    values = shards.read(named)
    memo: dict[int, Any] = {id(t): nn.Parameter(values[n], requires_grad=False) for n, t in named.items()}
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.float() if buffer.is_floating_point() else buffer.clone()
    forward = module.__dict__.pop("forward", None)  # the recorder's stand-in, while it runs
    try:
        opened = copy.deepcopy(module, memo)
    finally:
        if forward is not None:
            module.__dict__["forward"] = forward
    opened.eval()
    for part in list(opened.modules()):
        if is_experts(part) and not isinstance(part, LowBitExperts):
            to_low_bit(part)
    found = {}
    for full in sites:
        local = full.removeprefix(f"{prefix}.")
        found[full] = ModelSite(full, local, opened.get_submodule(local.rpartition(".")[0]))
    return OpenBlock(number, opened, found)
