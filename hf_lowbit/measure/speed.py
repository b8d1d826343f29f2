"""How fast a model decodes and reads prompts, and what the machine's memory would allow."""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import torch
from torch import Tensor

# Far beyond every last-level cache, and summed in a few hundredths of a second.
PROBE_BYTES = 512 << 20


class _Clock:
    """Stands in for a text streamer: notes when each token leaves ``generate``."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to flush."""


def random_ids(model: Any, batch: int, length: int) -> Tensor:
    """Token ids int64 ``[batch, length]`` any tokenizer could have made; the same on every call."""
    vocabulary = model.get_input_embeddings().num_embeddings
    draw = torch.Generator().manual_seed(0)
    return torch.randint(3, vocabulary, (batch, length), generator=draw).to(model.device)


def decode_rate(model: Any, batch: int, prompt: int = 16, tokens: int = 32) -> float:
    """Tokens per second of greedy ``generate``, all sequences of the batch together.

    The median over ``tokens`` steps behind a random prompt; reading the prompt and the first two steps do not count.
    """
    clock, ids = _Clock(), random_ids(model, batch, prompt)
    # Nothing ends a sequence: forbidding its end for so long instead would cost the host a millisecond a token.
    settings = copy.deepcopy(model.generation_config)
    settings.update(max_new_tokens=tokens + 3, do_sample=False, eos_token_id=None, pad_token_id=0)
    model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=clock)
    # The prompt itself is put first.
    steps = [after - before for before, after in zip(clock.times[3:], clock.times[4:], strict=False)]
    return batch / statistics.median(steps)


@torch.inference_mode()
def prefill_rate(model: Any, length: int = 128, repeats: int = 3) -> float:
    """Prompt tokens per second of one forward pass over ``length`` random tokens; the fastest of some repeats."""
    ids = random_ids(model, 1, length)
    best = float("inf")
    for _ in range(repeats):
        begun = time.perf_counter()
        model(input_ids=ids, use_cache=True, logits_to_keep=1).logits.flatten()[0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - begun)
    return length / best


def read_bandwidth(repeats: int = 8, device: torch.device | str = "cpu") -> float:
    """Bytes per second torch reads from the memory of a device: the fastest of some sums over half a gigabyte."""
    block = torch.ones(PROBE_BYTES // 4, device=device)
    best = float("inf")
    for _ in range(repeats):
        begun = time.perf_counter()
        block.sum().item()
        best = min(best, time.perf_counter() - begun)
    return PROBE_BYTES / best
