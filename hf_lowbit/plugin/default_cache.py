"""Makes the cache a config asks for the one ``generate`` makes when it is given none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The host has no registry of caches; this method of a model is where it makes one.
HOOK = "_prepare_cache_for_generation"


class DefaultCache:
    """Stands in for that method of one model."""

    def __init__(self, model: PreTrainedModel, settings: Mapping[str, Any]) -> None:
        self.model, self.settings = model, dict(settings)

    def __call__(self, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any) -> Any:
        """As the host's, with a new cache where neither call nor generation config names one."""
        named = generation_config.cache_implementation not in (None, "dynamic")
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False and not named:
            model_kwargs["past_key_values"] = _cache(self.model, self.settings)
        return getattr(type(self.model), HOOK)(self.model, generation_config, model_kwargs, *args, **kwargs)


def use_low_bit_cache(model: PreTrainedModel, settings: Mapping[str, Any] | None) -> None:
    """Let ``model.generate`` use a low-bit cache of these settings by default; None leaves the host's."""
    model.__dict__.pop(HOOK, None)
    if settings is not None and hasattr(type(model), HOOK):
        _cache(model, settings)  # refuses what this model cannot have now rather than at the first token
        model.__dict__[HOOK] = DefaultCache(model, settings)


def _cache(model: PreTrainedModel, settings: Mapping[str, Any]) -> Any:
    from hf_lowbit.kv import LowBitCache  # registers its attention with the host, which must be there by then

    return LowBitCache(model.config, **settings)
