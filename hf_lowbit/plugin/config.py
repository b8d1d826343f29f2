"""``LowBitConfig``: the quantization config users write and checkpoints carry."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_lowbit.errors import BadRequest, unknown_name
from hf_lowbit.format.activations import ActivationSpec
from hf_lowbit.format.serialize import PLAIN_VERSION, REWRITTEN_VERSION, check_version
from hf_lowbit.format.spec import Spec
from hf_lowbit.kv.settings import CacheSettings
from hf_lowbit.solvers import get_solver
from hf_lowbit.solvers.registry import check_options
from hf_lowbit.transforms import Transform, parse_transforms

QUANT_METHOD = "hf_lowbit"
# The method that stands for the best one measured; resolved before anything is solved (hf_lowbit/plugin/auto.py).
AUTO = "auto"
AUTO_OPTIONS = {"minutes": 60.0}
# The method of checkpoints that another tool quantized (hf_lowbit/plugin/foreign.py); its option says which.
IMPORTED = "imported"
IMPORTED_OPTIONS = {"source": "gptq"}
SPEC_KEYS = ("method", "bits", "group_size", "levels", "scale_bits", "outliers", "residual_terms", "seed", "options")
# A tied table of 4 bits alone diverges by 0.009 nats on a 4 M Llama, all 4-bit blocks by 0.014; at 6 bits the table's
# share is 0.0006 (eval/results/quality_books4m.json).
EMBEDDING_BITS = 6
_LATER = {
    "target_size": "the bit allocator is",
}


class LowBitConfig(QuantizationConfigMixin):
    """What to do with a model, for ``from_pretrained(..., quantization_config=LowBitConfig(...))``.

    Args:
        method: a solver name (``hf-lowbit doctor`` lists them), or ``auto``: the best method measured at this width that the
            option ``minutes`` (60) allows, ``codebook`` where there is no calibration data.
        bits: code width, 1 to 8.
        group_size: weights per scale; -1 for one scale per row.
        levels: level family; None leaves it to the method.
        scale_bits: 16, or 8 or 6 under one fp16 super-scale per 256 weights.
        outliers: fraction of each matrix kept beside the codes in fp16.
        residual_terms: additive terms per matrix.
        overrides: pattern -> settings of :class:`Spec` that differ there. A pattern is a run of dotted parts of a module's
            name (``down_proj``, ``layers.0``) or a shell wildcard over the whole name; later ones win.
        modules_to_not_convert: patterns of modules to leave in high precision.
        quantize_embeddings: whether input embedding and head are quantized too; at 6 bits or more unless overridden.
        strict: raise where a large matrix would be left in high precision without having been asked.
        options: settings of the method's own; ``hf-lowbit doctor`` lists them.
        calibration: what calibrated methods are to run on: a text or JSON-lines file, the name of a data set, a list of
            texts, token windows, or a mapping with one of these as ``source`` and ``sequences``, ``length``, ``column``, ...
            A saved checkpoint carries where its calibration came from instead.
        transforms: names of rewritings to apply first, in order (``hf-lowbit doctor`` lists them), or mappings of ``name``
            and settings.
        activation_bits: bits the inputs of matrices inside blocks are rounded to, one step per token found as they come;
            or a mapping of ``bits``, ``per`` (``token``, ``tensor``, ``group``), ``static``, ``symmetric``, ``group_size``.
        kv_cache: settings of :class:`~hf_lowbit.LowBitCache` by name (``{"low_bits": 2, "important": 0.2}``), which
            ``generate`` then uses by default; ``{}`` takes its defaults, None leaves the host's cache.
        target_size: reserved; any value but the default is refused.

    Raises:
        BadRequest: an unknown name (with the nearest one), or a value out of range.
        FormatError: a config of a newer format version.
    """

    def __init__(
        self,
        method: str = "codebook",
        bits: float = 4,
        group_size: int = 32,
        levels: str | None = None,
        scale_bits: int = 6,
        outliers: float = 0.0,
        residual_terms: int = 1,
        transforms: Sequence[str | Mapping[str, Any]] = (),
        calibration: Any = None,
        activation_bits: int | Mapping[str, Any] | None = None,
        kv_cache: Mapping | None = None,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        modules_to_not_convert: Sequence[str] | None = None,
        quantize_embeddings: bool = True,
        seed: int = 0,
        target_size: str | None = None,
        strict: bool = False,
        options: Mapping[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD
        unknown.pop("quant_method", None)
        wanted = REWRITTEN_VERSION if transforms or activation_bits is not None else PLAIN_VERSION
        self.format_version = unknown.pop("format_version", wanted)
        check_version(self.format_version, "quantization_config")
        later: dict[str, Any] = {"target_size": target_size}
        for name, value in later.items():
            if value is not None and value != () and value != []:
                raise BadRequest(f"{name}={value!r}: {_LATER[name]} not part of this release; leave {name} out.")
        if unknown:
            known = [
                *SPEC_KEYS,
                *_LATER,
                "transforms",
                "activation_bits",
                "calibration",
                "kv_cache",
                "overrides",
                "modules_to_not_convert",
                "quantize_embeddings",
                "strict",
            ]
            raise BadRequest(unknown_name("setting", next(iter(unknown)), known))
        if isinstance(bits, float) and not bits.is_integer():
            raise BadRequest(f"bits={bits}: fractional bits need the bit allocator, not part of this release; use 1 to 8.")
        bits = int(bits) if isinstance(bits, float) else bits  # JSON and command lines write 4.0
        self.method, self.bits, self.group_size, self.levels = method, bits, group_size, levels
        self.scale_bits, self.outliers, self.residual_terms, self.seed = scale_bits, outliers, residual_terms, seed
        self.options = dict(_typed("options", options or {}, Mapping, "a mapping of names to values"))
        self.calibration = calibration
        self.transforms = list(_typed("transforms", transforms or [], (list, tuple), "a list of names"))
        self.activation_bits = activation_bits
        self.kv_cache = None if kv_cache is None else dict(_typed("kv_cache", kv_cache, Mapping, "a mapping of settings"))
        self.overrides = copy.deepcopy(dict(_typed("overrides", overrides or {}, Mapping, "a mapping of patterns")))
        for change in self.overrides.values():
            _typed("overrides", change, Mapping, "a mapping of patterns to mappings of settings")
        self.modules_to_not_convert = list(
            _typed("modules_to_not_convert", modules_to_not_convert or [], (list, tuple, set), "a list of patterns")
        )
        self.quantize_embeddings = _typed("quantize_embeddings", quantize_embeddings, bool, "True or False")
        self.strict = _typed("strict", strict, bool, "True or False")
        self.post_init()

    def post_init(self) -> None:
        """Check every spec this config can produce."""
        if self.method == AUTO:
            check_options(AUTO, AUTO_OPTIONS, self.options)
        if self.method == IMPORTED:
            check_options(IMPORTED, IMPORTED_OPTIONS, self.options)
        for spec in self.specs():
            get_solver(spec)
        if self.kv_cache is not None:
            self.kv_cache = CacheSettings.from_json(self.kv_cache).to_json()
        rounding = self.activation_spec()
        for entry, _ in self.parsed_transforms():
            if entry.needs == "rounding" and rounding is None:
                raise BadRequest(
                    f"transform {entry.name!r} is fitted to how activations are rounded: give activation_bits "
                    "(--activation-bits) too, or use awq or smoothquant."
                )
            if entry.kind == "range" and (rounding is None or not rounding.static):
                raise BadRequest(
                    f"transform {entry.name!r} chooses static ranges: give activation_bits with static=True "
                    "(--activation-bits 8 --activation per=tensor --activation static=true)."
                )

    def activation_spec(self) -> ActivationSpec | None:
        """How activations are rounded; None not at all."""
        return ActivationSpec.parse(self.activation_bits)

    def parsed_transforms(self) -> list[tuple[Transform, dict[str, Any]]]:
        """The transforms and their settings."""
        return parse_transforms(self.transforms)

    def specs(self) -> list[Spec]:
        """The config's own spec, and what each override makes of it."""
        return [self.spec(), *(self._changed(change) for change in self.overrides.values())]

    def spec(self, name: str | None = None, embedding: bool = False) -> Spec:
        """The spec for module ``name``: the last matching override wins over the config's own settings."""
        change: dict[str, Any] = {}
        for pattern, settings in self.overrides.items():
            if name is not None and matches(name, pattern):
                change |= settings
        if embedding and "bits" not in change and self.bits < EMBEDDING_BITS:
            change = {"bits": self._embedding_bits()} | change
        return self._changed(change)

    def to_dict(self) -> dict[str, Any]:
        """JSON values only; what ``config.json`` gets. Calibration texts and windows in memory are left out."""
        values = {key: value for key, value in self.__dict__.items() if key != "calibration"}
        source = self.calibration
        if isinstance(source, Mapping):
            source = {key: _plain(value) for key, value in source.items()}
        return copy.deepcopy(values) | {"calibration": source if isinstance(source, dict) else _plain(source)}

    def _embedding_bits(self) -> int:
        """Six bits, or the width asked for where the method or its levels cannot go up to six."""
        try:
            get_solver(self._changed({"bits": EMBEDDING_BITS}))
        except BadRequest:
            return self.bits
        return EMBEDDING_BITS

    def _changed(self, change: Mapping[str, Any]) -> Spec:
        own = {key: getattr(self, key) for key in SPEC_KEYS}
        if self.method == AUTO:  # not resolved yet: what holds for any width and family
            own |= {"method": "codebook" if self.calibration is None else "gptq", "options": {}}
        if self.method == IMPORTED:
            own |= {"method": "rtn", "options": {}}
        if change.get("method", self.method) != self.method:
            own["options"] = {}  # they are of the other method
        return Spec.from_json(own | dict(change))


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (str, int, float)) else "in memory"


def _typed(name: str, value: Any, kind: Any, wanted: str) -> Any:
    if not isinstance(value, kind):
        raise BadRequest(f"{name} must be {wanted}, got {value!r}.")
    return value


def matches(name: str, pattern: str) -> bool:
    """Whether a dotted name is meant by a pattern: a run of its parts (``layers.0``), or a wildcard over all of it."""
    return f".{pattern}." in f".{name}." or fnmatch.fnmatchcase(name, pattern)
