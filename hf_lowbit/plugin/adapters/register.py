"""Makes PEFT know low-bit layers; importing it, after PEFT, is what registers. ``hf_lowbit/autoload.py`` does.

PEFT 0.21 has no registry: which class of adapter serves which layer, and what ``target_modules="all-linear"`` means, are
functions of its own. Each is wrapped here so that low-bit layers get our classes and all others what they got before.
"""

from __future__ import annotations

from typing import Any

from peft.tuners import tuners_utils
from peft.tuners.lora import model as lora_model
from peft.tuners.miss import model as miss_model
from torch import nn

from hf_lowbit.plugin.adapters.layers import LowBitLoraLinear, LowBitMissLinear
from hf_lowbit.plugin.modules import LowBitLinear
from hf_lowbit.plugin.targets import ends_of

_dispatch_lora = lora_model.dispatch_hqq
_miss_class = miss_model._get_tuner_layer_class
_replace_in_miss = miss_model.MissModel._replace_module
_all_linear = tuners_utils._maybe_include_all_linear_layers


def _low_bit(target: Any) -> bool:
    """Whether a layer, or the layer an adapter of another kind wraps, is a low-bit one."""
    return isinstance(target.get_base_layer() if hasattr(target, "get_base_layer") else target, LowBitLinear)


def _dispatch(target: nn.Module, adapter_name: str, config: Any, **settings: Any) -> nn.Module | None:
    if _low_bit(target):
        return LowBitLoraLinear(target, adapter_name, config=config, **settings)
    return _dispatch_lora(target, adapter_name, config=config, **settings)


def _tuner_class(target: nn.Module) -> Any:
    return LowBitMissLinear if isinstance(target, LowBitLinear) else _miss_class(target)


def _replace(self: Any, parent: nn.Module, child_name: str, new_module: Any, child: Any) -> None:
    if isinstance(new_module, LowBitLinear):  # on unloading; it has kept its record, and has no dense weight to hand over
        setattr(parent, child_name, new_module)
    else:
        _replace_in_miss(self, parent, child_name, new_module, child)


def _include_all_linear(peft_config: Any, model: nn.Module) -> Any:
    asked = getattr(peft_config, "target_modules", None)
    peft_config = _all_linear(peft_config, model)
    if isinstance(asked, str) and asked.lower() == tuners_utils.INCLUDE_LINEAR_LAYERS_SHORTHAND:
        head = ends_of(model)[1]
        ours = {name for name, module in model.named_modules() if isinstance(module, LowBitLinear) and module is not head}
        # A layer that an adapter wraps already is named by its wrapper, which PEFT has found.
        ours = {name for name in ours if not name.endswith("base_layer")}
        peft_config.target_modules = set(peft_config.target_modules) | ours
    return peft_config


lora_model.dispatch_hqq = _dispatch
miss_model._get_tuner_layer_class = _tuner_class
miss_model.MissModel._replace_module = _replace
tuners_utils._maybe_include_all_linear_layers = _include_all_linear
