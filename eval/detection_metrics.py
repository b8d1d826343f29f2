"""How well scores tell machines' texts from people's, with bootstrap intervals; larger scores mean a machine."""

from __future__ import annotations

import math

import numpy as np

RESAMPLES = 500


def auroc(human: np.ndarray, machine: np.ndarray) -> float:
    """Share of pairs in which the machine's text scores higher, ties counting half."""
    ordered = np.sort(human)
    below = np.searchsorted(ordered, machine, side="left")
    tied = np.searchsorted(ordered, machine, side="right") - below
    return float((below + tied / 2).mean() / len(human))


def power(human: np.ndarray, machine: np.ndarray, fpr: float) -> float:
    """Share of machines' texts beyond the conformal threshold that the human texts set for ``fpr``."""
    k = min(len(human), math.ceil((len(human) + 1) * (1 - fpr) - 1e-9))
    return float((machine > np.sort(human)[k - 1]).mean())


def summary(human: np.ndarray, machine: np.ndarray) -> dict[str, object]:
    """AUROC, TPR at 1 % and 5 % FPR, each with a 95 % interval over resampled texts, and the numbers of texts."""
    draw = np.random.default_rng(0)
    drawn = [
        (human[draw.integers(len(human), size=len(human))], machine[draw.integers(len(machine), size=len(machine))])
        for _ in range(RESAMPLES)
    ]
    measures = {"auroc": auroc, "tpr_1": lambda h, m: power(h, m, 0.01), "tpr_5": lambda h, m: power(h, m, 0.05)}
    out: dict[str, object] = {"human": len(human), "machine": len(machine)}
    for name, measure in measures.items():
        low, high = np.percentile([measure(h, m) for h, m in drawn], [2.5, 97.5])
        out[name] = [round(value, 4) for value in (measure(human, machine), float(low), float(high))]
    return out


def binomial_interval(hits: int, texts: int) -> tuple[float, float]:
    """Clopper-Pearson 95 % interval of a share, by bisection over the binomial tail."""

    def tail(p: float, at_least: int) -> float:
        logs = [
            math.lgamma(texts + 1) - math.lgamma(k + 1) - math.lgamma(texts - k + 1) + k * math.log(p)
            + (texts - k) * math.log1p(-p) for k in range(at_least, texts + 1)
        ]  # fmt: skip
        return math.fsum(map(math.exp, logs))

    def where(at_least: int, share: float) -> float:
        low, high = 1e-12, 1 - 1e-12
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if tail(middle, at_least) < share else (low, middle)
        return low

    return (0.0 if hits == 0 else where(hits, 0.025), 1.0 if hits == texts else where(hits + 1, 0.975))
