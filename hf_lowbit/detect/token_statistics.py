"""What one position of a causal LM says about the token that follows: the numbers every score is made of.

``STATISTICS`` names the columns. With ``l`` the logits of a position over ``v`` tokens, ``p = softmax(l)``, ``q`` the
distribution of a second model (the observer) and ``t`` the token that follows:

* ``originality``: rank of ``t`` over ``v``, in [0, 1). The rank counts the tokens with larger logits and half of those that
  tie with ``t``, since logits in half precision tie by the dozen (SPOT, arXiv 2405.20505, counts from float32).
* ``log_rank``: ``ln(rank + 1)``;
* ``log_probability``: ``ln p(t)``, nats;
* ``entropy``: of ``p``, nats;
* ``variance``: of ``ln p(u)`` for ``u`` drawn from ``p``, nats squared (Fast-DetectGPT, arXiv 2310.05130);
* ``cross_entropy``: ``-sum_u q(u) ln p(u)``, nats; NaN without an observer (Binoculars, arXiv 2401.12070).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowbit.errors import LowBitError

STATISTICS = ("originality", "log_rank", "log_probability", "entropy", "variance", "cross_entropy")
# Stands for minus infinity, which times a probability of zero would be NaN.
LOWEST = -1e15
# Logits worked on at a time: few enough for their float32 copies to stay in the cache, enough to keep the calls rare. On two
# cores of 2.8 GHz the statistics of 4,096 logits take 9 to 10 microseconds at 2**17 to 2**19, beside a forward pass of 80.
CHUNK = 1 << 18


def token_statistics(logits: Tensor, targets: Tensor, observer: Tensor | None = None) -> Tensor:
    """Statistics float32 ``[n, 6]``, on the CPU, in the order of ``STATISTICS``.

    Args:
        logits: ``[n, v]``, any floating dtype; computed on in float32.
        targets: int64 ``[n]``, the token that follows each position.
        observer: logits ``[n, w]`` of a second model; the first ``min(v, w)`` tokens of both are compared.

    Raises:
        LowBitError: a logit is NaN or plus infinity.
    """
    step = max(1, CHUNK // logits.shape[-1])
    parts = []
    for start in range(0, len(targets), step):
        rows = slice(start, start + step)
        found = _of_rows(logits[rows], targets[rows], None if observer is None else observer[rows])
        if not found.isfinite().all():  # perhaps only because of tokens a model rules out with minus infinity
            other = None if observer is None else observer[rows].float().clamp_min(LOWEST)
            found = _of_rows(logits[rows].float().clamp_min(LOWEST), targets[rows], other)
        parts.append(found)
    out = torch.cat(parts).cpu() if parts else torch.empty(0, len(STATISTICS) - (observer is None))
    if not out.isfinite().all():
        raise LowBitError("the detector's logits are not finite on this text. Check its weights, or load it in float32.")
    return out if observer is not None else torch.nn.functional.pad(out, (0, 1), value=float("nan"))


def _of_rows(logits: Tensor, targets: Tensor, observer: Tensor | None) -> Tensor:
    values = logits.float()
    shifted = values - values.amax(-1, keepdim=True)
    weights = shifted.exp()
    total = weights.sum(-1)
    log_total = total.log()
    target = shifted.gather(-1, targets[:, None])
    columns = [target[:, 0] - log_total]
    # In place from here on: a fresh buffer for each product would take three times as long.
    mean = weights.mul_(shifted).sum(-1) / total
    variance = (weights.mul_(shifted).sum(-1) / total - mean.square()).clamp_min(0)
    columns += [log_total - mean, variance]
    if observer is not None:
        columns.append(_cross_entropy(values, observer))
    # Signs of the differences sum to (larger) - (smaller), and v = larger + tied + smaller.
    vocabulary = values.shape[-1]
    rank = (shifted.sub_(target).sign_().sum(-1) + vocabulary - 1) / 2
    return torch.stack([rank / vocabulary, rank.log1p(), *columns], -1)


def _cross_entropy(values: Tensor, observer: Tensor) -> Tensor:
    shared = min(values.shape[-1], observer.shape[-1])
    log_p = values[:, :shared].log_softmax(-1)
    return -observer[:, :shared].float().softmax(-1).mul_(log_p).sum(-1)
