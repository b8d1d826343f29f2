"""Who wrote a text, a person or a language model: zero-shot scores, their calibration, and verdicts with an error rate."""

from hf_lowbit.detect.calibration import Calibration
from hf_lowbit.detect.detector import Detector
from hf_lowbit.detect.result import Detection, Span
from hf_lowbit.detect.scores import SCORES, Means, score

__all__ = ["SCORES", "Calibration", "Detection", "Detector", "Means", "Span", "score"]
