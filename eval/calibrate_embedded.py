"""Makes what ships with the embedded model for detecting: its calibration, and texts of its own to try the page on.

    python eval/calibrate_embedded.py BOOKS.txt [--out DIR]

BOOKS.txt is public-domain prose the embedded model was not trained on, parts of eight books one behind the other. Pieces of
it are people's texts. No text goes into the file: it holds scores, thresholds and the hundred commonest words. It has no
machines' texts: what the model samples at temperature 1 scores as people's do (``results/detection_own_embedded.json``), so
no score could speak for a person. Writes ``detector_calibration.json`` and ``detector_examples.json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from own_texts import BOOKS, Source, continuations, people
from transformers import AutoTokenizer

from hf_lowbit import SpotDetector
from hf_lowbit.demo import embedded_model
from hf_lowbit.detect.calibration import FILE_NAME

# Tokens of each text and how many there are: as many as the text is long enough for, most of them for the longest bin.
LENGTHS = {660: 110, 300: 110, 170: 120}
FPR = 0.01
EXAMPLES = {"a model, temperature 0.7": "T=0.7", "a model, first choices": "greedy", "a model, temperature 1": "T=1.0"}


def main() -> None:
    """Calibrate and save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("books")
    parser.add_argument("--out", default=str(embedded_model()))
    args = parser.parse_args()
    place, out = embedded_model(), Path(args.out)
    source = Source.read(args.books, AutoTokenizer.from_pretrained(place))
    human, groups = people(source, LENGTHS)
    detector = SpotDetector.from_pretrained(place)
    detector.calibrate(human, FPR, groups=groups, language="en", source=f"prose of {BOOKS} public-domain books")
    assert detector.calibration is not None
    detector.calibration.save(out / FILE_NAME)
    for found in detector.calibration.bins:
        print(found.low, found.high, len(found.human["spot"]), found.thresholds[detector.score], found.bounds)
    written = {}
    for label, how in EXAMPLES.items():
        (written[label],) = continuations(detector.scorer.model, source, how, 1, length=180, seed=3)
    (out / "detector_examples.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
