"""``method="auto"``: the best recipe measured at each width that fits into a time budget."""

from __future__ import annotations

import copy
from typing import Any

from hf_lowbit.errors import BadRequest
from hf_lowbit.plugin.config import AUTO, AUTO_OPTIONS, IMPORTED, LowBitConfig
from hf_lowbit.plugin.plan import plan_model

# Best first, by KL on the 4 M reference model (eval/results/quality_calibrated_books4m.json); 1 bit is taken as 2.
RECIPES: dict[int, tuple[tuple[str, dict[str, Any]], ...]] = {
    1: (("gumbel", {}), ("gptq", {})),
    2: (("gumbel", {}), ("gptq", {})),
    3: (("jlcm", {}), ("gptq", {})),
    4: (("jlcm", {}), ("gptq", {})),
}
# Above 4 bits learning was not measured, and what is left of the error is small.
ABOVE: tuple[tuple[str, dict[str, Any]], ...] = (("gptq", {}),)
WITHOUT_DATA = "codebook"


def resolve(config: LowBitConfig, model: Any) -> LowBitConfig:
    """A config with ``auto`` replaced by a method: the first recipe of its width whose estimate fits the budget.

    Args:
        config: its options may say ``minutes``; returned as it is where its method is not ``auto``.
        model: on any device, meta included.

    Raises:
        BadRequest: the method of imported checkpoints, which makes nothing.
    """
    if config.method == IMPORTED:
        raise BadRequest(
            f"method {IMPORTED!r} marks what `hf-lowbit quantize SRC DST --from-quantized` took over; it quantizes nothing. "
            "Choose a method (hf-lowbit doctor lists them)."
        )
    if config.method != AUTO:
        return config
    found = copy.deepcopy(config)
    minutes = float(found.options.get("minutes", AUTO_OPTIONS["minutes"]))
    if config.calibration is None:
        found.method, found.options = WITHOUT_DATA, {}
        return found
    recipes = RECIPES.get(int(config.bits), ABOVE)
    for method, options in recipes:
        found.method, found.options = method, dict(options)
        if plan_model(model, found).seconds <= 60 * minutes:
            break
    found.post_init()
    return found
