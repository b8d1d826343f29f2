"""``SpotDetector``: a detector made of any causal LM that ``from_pretrained`` opens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_lowbit.detect.calibration import FILE_NAME, Calibration, check_detector
from hf_lowbit.detect.detector import Detector
from hf_lowbit.detect.scores import DEFAULT
from hf_lowbit.detect.scoring import Scorer
from hf_lowbit.errors import BadRequest
from hf_lowbit.plugin.checkpoint import load_model, load_tokenizer
from hf_lowbit.plugin.config import LowBitConfig
from hf_lowbit.plugin.identity import tokenizer_fingerprint, weights_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Raised when what a score means changes: statistics, windows, or how a text is cleaned.
READING = 1


class SpotDetector(Detector):
    """Says who wrote a text, a person or a language model, or abstains (SPOT, arXiv 2405.20505, and its peers)::

    spot = SpotDetector.from_pretrained("DIR or Hub id")
    spot.calibrate(human_texts, fpr=0.01)
    spot.detect(["...", long_document])
    """

    @classmethod
    def from_pretrained(
        cls,
        model: PreTrainedModel | str | Path,
        *,
        tokenizer: Any = None,
        observer: PreTrainedModel | LowBitConfig | str | Path | None = None,
        calibration: Calibration | str | Path | None = None,
        quantization_config: LowBitConfig | None = None,
        score: str = DEFAULT,
        dtype: str = "float32",
        device: str = "cpu",
        window: int = 512,
        skip: int = 10,
    ) -> SpotDetector:
        """A detector from a checkpoint or a loaded model.

        Args:
            model: any causal LM, quantized or not: a directory, a Hub id, or a model in memory with its ``tokenizer``.
            tokenizer: of the model; None loads the one beside it.
            observer: a second model of the same tokenizer, for Binoculars: the model's own low-bit version, say. A
                ``LowBitConfig`` makes it from ``model``.
            calibration: a calibration or its file. None takes the checkpoint's own (``detector_calibration.json`` in its
                directory) if it holds for the detector as it is loaded here.
            quantization_config: quantizes the model while loading.
            score: name of the score verdicts rest on.
            dtype: of the model's arithmetic; ``auto`` takes the checkpoint's.
            device: to run on.
            window: tokens read at once.
            skip: tokens at the start of a text that are context only.

        Raises:
            BadRequest: nothing there, no tokenizer, vocabularies that differ, or a calibration of another detector.
            FormatError: a damaged checkpoint or calibration.
        """
        place = str(model) if isinstance(model, str | Path) else None
        if place is None and tokenizer is None:
            raise BadRequest("a model in memory was given without its tokenizer; pass it as tokenizer=.")
        loaded: Any = model if place is None else load_model(place, dtype, device, quantization_config)
        tokenizer = tokenizer or load_tokenizer(place or "")
        second = _observer(observer, place, dtype, device)
        scorer = Scorer(loaded.eval(), tokenizer, second, window, skip)
        name = place if place is not None else (loaded.name_or_path or type(loaded).__name__)
        detector = cls(scorer, _identity(name, scorer), score=score)
        if isinstance(calibration, str | Path):
            calibration = Calibration.load(calibration)
        if calibration is not None:
            detector.use(calibration)
        elif place is not None and (own := Path(place) / FILE_NAME).is_file():
            detector._use_if_it_holds(Calibration.load(own))
        return detector

    def _use_if_it_holds(self, calibration: Calibration) -> None:
        try:
            check_detector(calibration.detector, self.identity)
        except BadRequest:
            return  # loaded in another way than it was calibrated: scores only, and the verdicts say so
        self.calibration = calibration


def _observer(asked: Any, place: str | None, dtype: str, device: str) -> Any:
    if isinstance(asked, LowBitConfig):
        if place is None:
            raise BadRequest("observer=LowBitConfig(...) needs the checkpoint to quantize; give the detector as a path.")
        return load_model(place, dtype, device, asked)
    if isinstance(asked, str | Path):
        return load_model(str(asked), dtype, device)
    return asked if asked is None else asked.eval()


def _identity(name: str, scorer: Scorer) -> dict[str, Any]:
    """All that scores depend on, as JSON values."""
    return {
        "name": Path(name).name,
        **_model_identity(scorer.model),
        "observer": None if scorer.observer is None else _model_identity(scorer.observer),
        "tokenizer": tokenizer_fingerprint(scorer.tokenizer),
        "window": scorer.window,
        "skip": scorer.skip,
        "reading": READING,
    }


def _model_identity(model: Any) -> dict[str, Any]:
    return {
        "weights": weights_fingerprint(model),
        "quantization": _quantization(model),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _quantization(model: Any) -> str | None:
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return None
    if isinstance(config, LowBitConfig):
        return f"{config.method}, {config.bits} bits, groups of {config.group_size}"
    values = config if isinstance(config, dict) else config.to_dict()
    return str(values.get("quant_method"))
