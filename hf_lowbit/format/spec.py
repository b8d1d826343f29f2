"""``Spec``: what is asked for one weight matrix. Frozen, validated, and an exact JSON round trip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from hf_lowbit.errors import BadRequest, unknown_name
from hf_lowbit.format.levels import parse_levels
from hf_lowbit.format.scales import SCALE_BITS

WHOLE_ROW = -1


@dataclass(frozen=True)
class Spec:
    """How one matrix is to be stored, and by which solver.

    Attributes:
        method: name of the solver.
        bits: width of a code, 1 to 8.
        group_size: weights per scale along the input axis; -1 is one scale per row.
        levels: level family (``hf_lowbit.format.levels``); None leaves it to the solver.
        scale_bits: 16 (fp16), or 8 or 6 under one fp16 super-scale per 256 weights.
        outliers: fraction of weights kept beside the codes as fp16 corrections, 0 to 0.1.
        residual_terms: 1 to 4 additive terms, each coding what the ones before it left (REx, arXiv 2203.14645).
        seed: for solvers that draw random numbers.
        options: the method's own settings by name (``hf_lowbit.solvers`` checks them).

    Raises:
        BadRequest: any value outside those ranges.
    """

    method: str = "codebook"
    bits: int = 4
    group_size: int = 32
    levels: str | None = None
    scale_bits: int = 6
    outliers: float = 0.0
    residual_terms: int = 1
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _whole("bits", self.bits, 1, 8, "hf-lowbit stores 1 to 8 bits per code")
        if self.group_size != WHOLE_ROW:
            _whole("group_size", self.group_size, 8, 65536, "use -1 for one scale per row")
        if self.scale_bits not in SCALE_BITS:
            raise BadRequest(f"scale_bits must be 16, 8 or 6, got {self.scale_bits!r}.")
        for name, value in (("method", self.method), ("levels", self.levels)):
            if not isinstance(value, str) and (name, value) != ("levels", None):
                raise BadRequest(f"{name} must be a name, got {value!r}.")
        if self.levels is not None:
            parse_levels(self.levels, self.bits)
        if not isinstance(self.outliers, (int, float)) or not 0 <= self.outliers <= 0.1:
            raise BadRequest(f"outliers is the fraction of weights kept in fp16, 0 to 0.1, got {self.outliers!r}.")
        _whole("residual_terms", self.residual_terms, 1, 4, "1 is no residual")
        _whole("seed", self.seed, 0, 2**63 - 1, "a random seed")
        if not isinstance(self.options, Mapping):
            raise BadRequest(f"options must be a mapping of names to values, got {self.options!r}.")

    def groups_of(self, in_features: int) -> int:
        """The group size that holds for a row of ``in_features`` weights."""
        return in_features if self.group_size == WHOLE_ROW else min(self.group_size, in_features)

    def to_json(self) -> dict:
        """All fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict) -> Spec:
        """Inverse of :meth:`to_json`; an unknown key is refused with the nearest name."""
        known = [entry.name for entry in fields(cls)]
        for key in values:
            if key not in known:
                raise BadRequest(unknown_name("setting", key, known))
        return cls(**values)


def _whole(name: str, value: object, low: int, high: int, note: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise BadRequest(f"{name} must be a whole number from {low} to {high} ({note}), got {value!r}.")
