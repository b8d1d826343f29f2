"""``LowBitCache``: a cache for ``generate`` that keeps every token and spends bits by importance."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, Cache, get_layer_types_and_kwargs

from hf_lowbit.errors import BadRequest
from hf_lowbit.kv.function import register
from hf_lowbit.kv.layer import LowBitLayer
from hf_lowbit.kv.settings import ATTENTION, CacheSettings

if TYPE_CHECKING:
    from hf_lowbit.kv.report import Report

FULL = "full_attention"


class LowBitCache(Cache):
    """Mixed-precision KV cache: nothing is evicted, important tokens get more bits.

    ``model.generate(**inputs, past_key_values=LowBitCache(model.config))`` is all there is to do. Layers with a sliding
    window or linear attention keep the host's own caches. A config that says ``sdpa`` is set to the attention function of
    this package, which for other caches is ``sdpa`` itself; with any other attention the cache is decoded whole at every
    step, as :meth:`report` says.

    Args:
        config: of the model.
        settings: fields of :class:`~hf_lowbit.kv.settings.CacheSettings` by name: ``high_bits``, ``low_bits``,
            ``important``, ``recent``, ...

    Raises:
        BadRequest: a setting out of range, or a config without layers, heads or positions to go by.
    """

    def __init__(self, config: Any, **settings: Any) -> None:
        self.settings = CacheSettings.from_json(settings)
        self.config = _text_config(config)
        types, options = get_layer_types_and_kwargs(self.config)
        for number in self.settings.layers:
            if int(number) >= len(types):
                raise BadRequest(f"layers names layer {number}, the model has {len(types)} (0 to {len(types) - 1}).")
        limit = getattr(self.config, "max_position_embeddings", None)
        self.fallbacks: dict[int, str] = {}
        layers: list[Any] = []
        for number, (kind, kwargs) in enumerate(zip(types, options, strict=True)):
            if kind == FULL:
                layers.append(LowBitLayer(self.settings.for_layer(number, len(types)), limit))
            else:
                self.fallbacks[number] = kind
                layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**kwargs))
        if (width := getattr(self.config, "head_dim", None)) and FULL in types:
            for layer in layers:
                if isinstance(layer, LowBitLayer):
                    layer.settings.check_head(width)
        super().__init__(layers=layers)
        if FULL in types and self.config._attn_implementation in (None, "sdpa"):
            register()
            self.config._attn_implementation = ATTENTION

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Add tokens ``[batch, heads, n, dim]`` to a layer.

        Raises:
            BadRequest: tokens of another model, batch or length than the cache can take; it stays as it was.
        """
        self._check(key_states, layer_idx)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def low_bit_layers(self) -> dict[int, LowBitLayer]:
        """The layers that are not left to the host, by number."""
        return {number: layer for number, layer in enumerate(self.layers) if isinstance(layer, LowBitLayer)}

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest ``-tokens_to_remove`` tokens of every layer.

        Raises:
            BadRequest: a positive number, or more than every layer still holds as rows; nothing has changed then.
        """
        for layer in self.low_bit_layers().values():
            layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def nbytes(self) -> int:
        """Bytes of all tensors the cache holds, room for more tokens included."""
        return self.report().bytes

    def report(self) -> Report:
        """What is stored at how many bits, and what was moved down when; prints as a table."""
        from hf_lowbit.kv.report import report

        return report(self)

    def heatmap(self, path: str | Path, sequence: int = 0) -> Path:
        """Draw importance by layer and position into a ``.png`` or ``.html`` file."""
        from hf_lowbit.kv.heatmap import draw

        return draw(self, Path(path), sequence)

    def save(self, path: str | Path) -> Path:
        """Write the cache to a safetensors file, for a prompt that is used again."""
        from hf_lowbit.kv.storage import save

        return save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, config: Any, device: str | torch.device = "cpu") -> LowBitCache:
        """Read a cache that :meth:`save` wrote, for the same model, onto the device that model is on.

        Raises:
            FormatError: the file is no such cache, or of another model.
        """
        from hf_lowbit.kv.storage import load

        return load(Path(path), config, torch.device(device))

    @torch.compiler.disable
    def _check(self, keys: Tensor, number: int) -> None:
        if number >= len(self.layers):
            raise BadRequest(f"this cache has {len(self.layers)} layers, layer {number} was given: is it another model's?")
        layers = self.low_bit_layers()
        if number == min(layers, default=-1) and len({layer.length for layer in layers.values()}) > 1:
            raise BadRequest(
                "the layers of this cache differ in length: a forward pass was broken off. Call reset() or crop it."
            )


def _text_config(config: Any) -> Any:
    if not hasattr(config, "get_text_config"):
        raise BadRequest(f"LowBitCache needs the model's config (model.config), got {type(config).__name__}.")
    text = config.get_text_config(decoder=True)
    for names in (("num_hidden_layers",), ("num_attention_heads",)):
        if not any(getattr(text, name, None) for name in names):
            raise BadRequest(
                f"the config ({type(text).__name__}) has no {names[0]}: LowBitCache cannot tell the model's layers."
            )
    return text
