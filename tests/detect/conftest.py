"""What the detector's tests share: a model of a few lines, and the embedded one as a detector."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_lowbit import SpotDetector, demo
from hf_lowbit.detect import Detector, calibration
from hf_lowbit.detect.scoring import Scorer


class PreviousLetters:
    """A causal LM over bytes whose logits depend on the last two tokens; notes the shapes it is asked for."""

    device = torch.device("cpu")

    def __init__(self, seed: int = 0, vocabulary: int = 256, places: int = 4096) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = 2 * torch.randn(2, vocabulary, vocabulary, generator=generator)
        text = SimpleNamespace(max_position_embeddings=places, vocab_size=vocabulary)
        self.config = SimpleNamespace(get_text_config=lambda: text)
        self.shapes: list[tuple[int, int]] = []

    def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        self.shapes.append(tuple(input_ids.shape))
        before = torch.nn.functional.pad(input_ids, (1, 0))[:, :-1]
        return SimpleNamespace(logits=self.table[0][input_ids] + self.table[1][before])


class Bytes:
    """A tokenizer that makes one token of each byte of ASCII text."""

    def __call__(self, text: str, return_offsets_mapping: bool = False, **_: Any) -> Any:
        ids = list(text.encode("latin-1", errors="replace"))
        return SimpleNamespace(input_ids=ids, offset_mapping=[(k, k + 1) for k in range(len(ids))])


@pytest.fixture
def letters() -> PreviousLetters:
    return PreviousLetters()


@pytest.fixture
def scorer(letters) -> Scorer:
    return Scorer(letters, Bytes(), window=64, skip=4)


@pytest.fixture
def toy(scorer, monkeypatch) -> Detector:
    monkeypatch.setattr(calibration, "RESAMPLES", 50)
    return Detector(scorer, {"name": "toy", "weights": "a", "quantization": None})


@pytest.fixture(scope="session")
def spot() -> SpotDetector:
    """The embedded model with the calibration that ships beside it; never calibrate it."""
    return SpotDetector.from_pretrained(demo.embedded_model())


@pytest.fixture(scope="session")
def books() -> list[str]:
    """Pieces of a thousand characters of books the embedded model has not read."""
    text = demo.held_out_text().read_text(encoding="utf-8")
    return [text[start : start + 1000] for start in range(0, len(text) - 1000, 1000)]


@pytest.fixture(scope="session")
def written(spot) -> list[str]:
    """What the embedded model writes: greedily, and sampled at temperature 0.7."""
    tokenizer, model = spot.scorer.tokenizer, spot.scorer.model
    ids = tokenizer("The captain looked at the sea and", add_special_tokens=False, return_tensors="pt")
    size = {"max_new_tokens": 150, "min_new_tokens": 150, "pad_token_id": 0}
    torch.manual_seed(0)
    greedy = model.generate(**ids, **size, do_sample=False)
    sampled = model.generate(**ids, **size, do_sample=True, temperature=0.7, top_k=0)
    return [tokenizer.decode(row[0, ids.input_ids.shape[1] :]) for row in (greedy, sampled)]
