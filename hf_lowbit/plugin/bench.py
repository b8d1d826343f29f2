"""``bench``: how fast a model runs here, with which kernels, and how near that is to what the memory allows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hf_lowbit.errors import BadRequest
from hf_lowbit.format.ledger import ledger
from hf_lowbit.kernels import Choice
from hf_lowbit.kernels.triton_backend import Triton
from hf_lowbit.measure.speed import decode_rate, prefill_rate, read_bandwidth
from hf_lowbit.plugin.fused import fused_layers
from hf_lowbit.plugin.modules import LowBitEmbedding, LowBitTiedHead
from hf_lowbit.plugin.targets import low_bit_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Of one measurement of one candidate.
TUNE_SECONDS = 0.05


def bench(
    model: PreTrainedModel,
    batches: Sequence[int] = (1, 8),
    prompt: int = 128,
    tokens: int = 32,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure a loaded model.

    Args:
        batches: sequences decoded together.
        prompt: tokens of the prompt whose reading is timed.
        tokens: decoding steps whose median counts.
        progress: told what is measured.

    Returns:
        ``decode_tokens_per_s`` of greedy ``generate`` and ``bandwidth_share``, the weights read per second over what the
        model's device can read, both of the first batch size, and ``decode`` with all of them; ``prefill_tokens_per_s``;
        ``bytes_per_token``, the weights one decoding step reads; ``read_bandwidth_gb_s`` of the device; ``peak_bytes`` and
        ``anonymous_bytes`` of this process, None where the system does not say (on a GPU the peak allocated there);
        ``device``; ``threads``; ``kernels``; ``fused_layers``,
        how many decoder layers run as one op each.
    """
    progress("read bandwidth")
    bandwidth = read_bandwidth(device=model.device)
    weights = bytes_per_token(model)
    rows = []
    for batch in batches:
        progress(f"decoding, batch {batch}")
        rate = decode_rate(model, batch, tokens=tokens)
        share = rate / batch * weights / bandwidth
        rows.append({"batch": batch, "tokens_per_s": rate, "bandwidth_share": share})
    progress(f"reading a prompt of {prompt} tokens")
    prefill = prefill_rate(model, prompt)
    used = memory()
    if model.device.type == "cuda":
        used = {"peak": torch.cuda.max_memory_allocated(model.device)}
    return {
        "decode_tokens_per_s": rows[0]["tokens_per_s"],
        "prefill_tokens_per_s": prefill,
        "read_bandwidth_gb_s": bandwidth / 1e9,
        "bandwidth_share": rows[0]["bandwidth_share"],
        "peak_bytes": used.get("peak"),
        "anonymous_bytes": used.get("anonymous"),
        "bytes_per_token": weights,
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "decode": rows,
        "kernels": kernels(model),
        "fused_layers": sum(1 for _ in fused_layers(model)),
    }


def tune(model: PreTrainedModel, progress: Callable[[str], None] = lambda text: None) -> None:
    """Measure block sizes of the GPU kernels for a model's matrices and keep them for this user and card.

    Raises:
        BadRequest: none of its matrices runs on the GPU kernels.
    """
    from hf_lowbit.kernels import triton_configs, triton_tune

    found, reasons = [], Counter[str]()
    for _, module in low_bit_modules(model):
        for parameter, layout in module.layouts.items():
            choice = module.choice(parameter)
            if choice.backend.name != Triton.name:
                reasons[dict(choice.refused).get(Triton.name, f"the model is on {model.device.type}")] += 1
            elif len(layout.shape) == 2:
                found.append(module.prepared(parameter)[1])
    if not found:
        why = "; ".join(f"{count}: {reason}" for reason, count in reasons.most_common()) or "it has no low-bit matrix"
        raise BadRequest(f"--tune measures block sizes of the GPU kernels, which run no matrix of this model ({why}).")
    file = triton_configs.user_file()
    triton_tune.tune(found, (1, 16, 512), model.dtype, TUNE_SECONDS, file, progress)
    progress(f"kept in {file}")


def bytes_per_token(model: PreTrainedModel) -> int:
    """Stored bytes of all weights that one decoding step reads in full: all but input tables that no head shares."""
    tied = {id(module.embedding) for module in model.modules() if isinstance(module, LowBitTiedHead)}
    total = 0
    for _, module in low_bit_modules(model):
        if not isinstance(module, LowBitEmbedding) or id(module) in tied:
            total += sum(ledger(layout).bytes for layout in module.layouts.values())
    table = getattr(model.get_input_embeddings(), "weight", None)
    head = getattr(model.get_output_embeddings(), "weight", None)
    for parameter in model.parameters():
        if parameter is not table or parameter is head:
            total += parameter.numel() * parameter.element_size()
    return total


def kernels(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Which backend runs how many matrices and weights, why, and what each faster one said."""
    matrices: Counter[Choice] = Counter()
    weights: Counter[Choice] = Counter()
    for _, module in low_bit_modules(model):
        for parameter, layout in module.layouts.items():
            choice = module.choice(parameter)
            matrices[choice] += 1
            weights[choice] += layout.numel
    return [
        {"backend": choice.backend.name, "reason": choice.reason, "refused": dict(choice.refused)}
        | {"matrices": count, "weights": weights[choice]}
        for choice, count in matrices.items()
    ]


def memory() -> dict[str, int]:
    """Bytes of this process by the system's count: ``anonymous`` now, ``peak`` resident so far (file pages included)."""
    found: dict[str, int] = {}
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            lines = dict(line.split(":", 1) for line in file if ":" in line)
    except OSError:  # not Linux
        return found
    for name, key in (("anonymous", "RssAnon"), ("peak", "VmHWM")):
        if key in lines:
            found[name] = int(lines[key].split()[0]) * 1024
    return found
