"""Adapter layers over a low-bit one, as PEFT's own over ``nn.Linear`` but for the dense weight, which is decoded on demand.

``merge`` keeps an adapter as the low-rank term of the record: the codes stay as they are, ``unmerge`` gives back the record
from before bit by bit, and a merged layer runs on the kernels of any other. What a low-rank term cannot express is refused.
Gradients of rounded inputs are straight-through, as the layer's own; adapters themselves see inputs that are not rounded.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.miss.layer import MissLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from hf_lowbit.errors import BadRequest
from hf_lowbit.format.tensor import LowBitTensor
from hf_lowbit.plugin.adapters.low_rank import Factors, refuse_intake, with_low_rank
from hf_lowbit.plugin.modules import LowBitLinear

# Ways of PEFT to start a LoRA that read no weight of the base layer while it is built.
STARTS = (True, False, "gaussian", "eva")


class KeepsMerged:
    """``merge`` and ``unmerge`` of an adapter layer by the low-rank term of its record."""

    get_base_layer: Any
    merged_adapters: list[str]
    _before: LowBitTensor | None = None

    def factors(self, adapter: str) -> Factors | None:
        """The update of an adapter as a product; None where it has none here.

        Raises:
            BadRequest: it is no product of low rank.
        """
        raise NotImplementedError

    def exact(self, adapter: str, weight: Tensor) -> Tensor:
        """``weight`` ``[out, in]`` as the adapter makes it."""
        found = self.factors(adapter)
        return weight if found is None else weight + found.b @ found.a

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Keep adapters, the active ones unless named, as the record's low-rank term.

        Raises:
            BadRequest: an update that is no product of low rank, or inputs that are rounded; nothing is changed then.
            ValueError: ``safe_merge`` and an update that is not finite.
        """
        base = self.get_base_layer()
        found = {name: self.factors(name) for name in check_adapters_to_merge(self, adapter_names)}
        products = {name: product for name, product in found.items() if product is not None}
        if products:
            refuse_intake(base, "a low-rank term would see what reaches the codes, not inputs as they come")
        for name, product in products.items():
            if safe_merge and not all(bool(torch.isfinite(part).all()) for part in product):
                raise ValueError(f"adapter {name!r} holds NaN or infinity; it was not merged.")
        for name, product in products.items():
            record = base.lowbit()
            merged = with_low_rank(record, product)
            self._before = self._before or record
            base.put("weight", merged)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """The record from before any adapter was merged, bit by bit."""
        if self._before is not None:
            self.get_base_layer().put("weight", self._before)
        self._before = None
        self.merged_adapters.clear()


class DenseView(nn.Linear):
    """The dense layer that a low-bit one stands for, for the length of a computation."""

    def __init__(self, base: LowBitLinear) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight = nn.Parameter(base.matrix(torch.float32), requires_grad=False)
        self.bias = base.bias  # type: ignore[assignment]


class LowBitDoraLayer(DoraLinearLayer):
    """DoRA's magnitudes; the norms of rows are those of the decoded matrix."""

    def update_layer(self, *, base_layer: LowBitLinear, **settings: Any) -> None:
        """Magnitudes that change nothing."""
        super().update_layer(base_layer=DenseView(base_layer), **settings)

    def forward(self, x: Tensor, *, base_layer: LowBitLinear, **settings: Any) -> Tensor:
        """What DoRA adds to the layer's output."""
        return super().forward(x, base_layer=DenseView(base_layer), **settings)


class LowBitDora(DoraLinearVariant):
    """DoRA on a low-bit layer."""

    @staticmethod
    def init(module: Any, adapter_name: str, **settings: Any) -> None:
        """Give the adapter its magnitudes."""
        layer = LowBitDoraLayer(fan_in_fan_out=False)
        layer.update_layer(
            base_layer=module.get_base_layer(),
            lora_A=module.lora_A[adapter_name].weight,
            lora_B=module.lora_B[adapter_name].weight,
            scaling=module.scaling[adapter_name],
        )
        module.lora_magnitude_vector[adapter_name] = layer


class LowBitLoraLinear(KeepsMerged, LoraLinear):
    """LoRA and DoRA on a low-bit layer."""

    @property
    def lora_variants(self) -> dict:
        """What PEFT may ask of this class."""
        return {(): None, ("use_dora",): LowBitDora}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **settings: Any) -> None:
        """Add an adapter.

        Raises:
            BadRequest: a start that would have to change dense base weights.
        """
        start = config.init_lora_weights
        if start not in STARTS:
            raise BadRequest(
                f"init_lora_weights={start!r} reads or changes dense base weights, which a low-bit layer does not have. Use "
                "hf_lowbit.plugin.adapters.adapt(model, config, init='loftq', source=ORIGINAL), or init_lora_weights=True."
            )
        self.fan_in_fan_out = False  # the record is [out, in], whatever the module it replaced was
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **settings)

    def factors(self, adapter: str) -> Factors | None:
        """``B`` times its scaling, and ``A``."""
        if adapter not in self.lora_A:
            return None
        if adapter in self.lora_variant:
            raise BadRequest(
                f"adapter {adapter!r} is a DoRA: it rescales whole rows of the matrix, which no low-rank term expresses. "
                "Merge it with how='resolve' or how='dense'."
            )
        refuse_bias(self.lora_bias[adapter], adapter)
        b = self.lora_B[adapter].weight.detach().float() * self.scaling[adapter]
        return Factors(b, self.lora_A[adapter].weight.detach().float())

    def exact(self, adapter: str, weight: Tensor) -> Tensor:
        """``W + s B A``, for DoRA times magnitude over norm."""
        if adapter not in self.lora_variant:
            return super().exact(adapter, weight)
        refuse_bias(self.lora_bias[adapter], adapter)
        new = weight + self.get_delta_weight(adapter).detach().float()
        magnitude = self.lora_magnitude_vector[adapter].weight.detach().float()
        return new * (magnitude / new.norm(dim=1))[:, None]


class DecodedWeight(QuantizationBackend):
    """Gives PEFT the decoded matrix where an adapter multiplies by it (``init_weights="bat"``)."""

    supports_merge = True
    layer_type = "linear"
    backend_name = "hf_lowbit"

    def get_base_weight(self, base_layer: Any) -> Tensor:
        """float32 ``[out, in]``."""
        return base_layer.matrix(torch.float32)


class LowBitMissLinear(KeepsMerged, MissLinear):
    """MiSS, which PEFT called Bone before, on a low-bit layer: plain, ``mini`` and ``bat``."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, r: int = 0, **settings: Any) -> None:
        super().__init__(base_layer, adapter_name, config, r, **settings)
        self.quantization_backend = DecodedWeight()

    def update_layer(self, adapter_name: str, r: int, config: Any, **settings: Any) -> None:
        """Add an adapter.

        Raises:
            BadRequest: ``bat`` where inputs are rounded.
        """
        if config.init_weights == "bat":
            refuse_intake(self.get_base_layer(), "MiSS with init_weights='bat' would skip that")
        super().update_layer(adapter_name, r, config=config, **settings)

    def factors(self, adapter: str) -> Factors | None:
        """The block, and which input falls into which of its rows."""
        if adapter not in self.miss_block:
            return None
        if self.miss_fn == "bat":
            raise BadRequest(
                f"adapter {adapter!r} is a MiSS with init_weights='bat': it multiplies the matrix, which no low-rank term "
                "expresses. Merge it with how='resolve' or how='dense'."
            )
        block = self.miss_block[adapter].detach().float()
        if self.miss_fn == "mini":
            block = block.repeat(1, self.out_features // self.miss_mini_r[adapter])
        rank = block.shape[0]
        places = torch.arange(self.in_features, device=block.device) % rank
        return Factors(block.T.contiguous(), torch.eye(rank, device=block.device)[:, places])

    def exact(self, adapter: str, weight: Tensor) -> Tensor:
        """Every length-r piece of a row with the block added; for ``bat`` multiplied first."""
        if adapter in self.miss_block and self.miss_fn == "bat":
            return weight + self.get_delta_weight(adapter, weight).detach().float()
        return super().exact(adapter, weight)


def refuse_bias(there: bool, adapter: str) -> None:
    """Refuse an adapter that changes biases, too.

    Raises:
        BadRequest: it does.
    """
    if operator.truth(there):
        raise BadRequest(f"adapter {adapter!r} has lora_bias=True; biases are not merged. Train it with lora_bias=False.")
