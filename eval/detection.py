"""How well texts of models are told from people's: by score, dataset, generator, length, bits of the detector, and edits.

    python eval/detection.py PART ... --model DIR --books BOOKS.txt [--other DIR --stories FILE.jsonl] [--pairs DIR]

Parts: ``own`` (a model against its own texts, by decoding and length), ``bits`` (the same with the detector at 32, 8, 4, 3
and 2 bits, and Binoculars with the model's own low-bit version), ``edits``, ``calibration`` (false positives on people's
texts the threshold was not set on, by length and by group), ``cross`` (two models across, and every row of the pairs),
``speed``. Each writes ``eval/results/detection_PART[_NAME].json``; ``eval/detection_tables.py`` makes the tables of them.

``--books`` is prose the model has not read; ``--stories`` lines of JSON with a ``text``, of what ``--other`` was trained on
(TinyStories: written by GPT-3.5 and GPT-4, not by people); ``--pairs`` a directory of JSON lines with ``dataset``,
``generator``, ``human`` and ``llm``. Lengths are tokens of the detector. AUROC and TPR come with 95 % bootstrap intervals
over texts. Without arguments it runs on what is embedded in the package, where texts are few.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from detection_metrics import binomial_interval, power, summary
from own_texts import DECODING, Source, continuations, people
from results_file import write
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from hf_lowbit import LowBitConfig, SpotDetector
from hf_lowbit.demo import embedded_model, held_out_text
from hf_lowbit.detect import SCORES, Means
from hf_lowbit.detect.calibration import six_digits
from hf_lowbit.detect.clean import clean

LENGTHS = (20, 30, 40, 60, 80, 100, 140, 200)
TOKENS = 200
BITS = (32, 8, 4, 3, 2)
# Decodings that are looked at where the detector varies, and people's texts of a group.
DECODED = ("greedy", "T=0.7", "T=0.9", "T=1.0")
GROUP = 150


def statistics(detector: SpotDetector, texts: Iterable[str], length: int = TOKENS, plain: bool = True) -> list[np.ndarray]:
    """Token statistics ``[n, 6]`` of each text's first tokens; ``plain`` cleans it first, as ``detect`` does."""
    forms = [clean(text).text if plain else text for text in texts]
    return [sums.first.values for sums in detector.scorer.score(forms, keep=length)]


def scores(values: Sequence[np.ndarray], length: int | None = None) -> dict[str, np.ndarray]:
    """Scores of texts cut to a length, larger meaning a machine; texts shorter than that are left out."""
    cut = [v[:length] for v in values if length is None or len(v) >= length]
    cut = [v[np.isfinite(v[:, 0])] for v in cut]
    means = np.stack([v.astype(np.float64).mean(0) for v in cut if len(v)])
    pair = np.isfinite(means[:, -1]).all()
    return {s.name: s.sign * s.compute(Means(means)) for s in SCORES.values() if pair or not s.pair}


def compare(human: dict[str, np.ndarray], machine: dict[str, np.ndarray]) -> dict[str, dict]:
    """The summary of every score."""
    return {name: summary(human[name], machine[name]) for name in human}


@cache
def own_texts(place: str, books: str, count: int) -> Texts:
    """The texts several parts share, written once."""
    return Texts(place, books, count)


class Texts:
    """People's and a model's own texts: pieces of the books, and continuations of other places by every decoding."""

    def __init__(self, place: str, books: str, count: int) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(place)
        self.source = Source.read(books, self.tokenizer)
        self.human, self.books = people(self.source, {TOKENS + 20: count})
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
        self.machine = {how: continuations(model, self.source, how, count, TOKENS + 20) for how in DECODING}


def run_own(args: argparse.Namespace) -> dict:
    """By decoding and length."""
    texts, detector = own_texts(args.model, args.books, args.count), SpotDetector.from_pretrained(args.model)
    human = statistics(detector, texts.human)
    rows = {}
    for how, made in texts.machine.items():
        found = statistics(detector, made)
        for length in LENGTHS:
            rows[f"{how}, {length} tokens"] = compare(scores(human, length), scores(found, length))
            best = {name: row["auroc"][0] for name, row in rows[f"{how}, {length} tokens"].items()}
            print(how, length, best, flush=True)
    return rows


def run_bits(args: argparse.Namespace) -> dict:
    """The detector's own quantization; thresholds of the 32-bit detector on the others, and Binoculars pairs."""
    texts = own_texts(args.model, args.books, args.count)
    rows: dict[str, dict] = {}
    first: dict[str, np.ndarray] = {}
    for bits in BITS:
        config = None if bits == 32 else LowBitConfig(bits=bits)
        detector = SpotDetector.from_pretrained(args.model, quantization_config=config)
        human = scores(statistics(detector, texts.human), TOKENS)
        first = first or human
        for how in DECODED:
            found = compare(human, scores(statistics(detector, texts.machine[how]), TOKENS))
            for name, row in found.items():
                row["spearman"] = round(spearman(first[name], human[name]), 4)
                row["fpr_at_old_threshold"] = round(power(first[name], human[name], 0.01), 4)
            rows[f"{how}, {bits} bits"] = found
        print(bits, {how: rows[f"{how}, {bits} bits"]["spot"]["auroc"][0] for how in DECODED}, flush=True)
    for bits in (4, 3, 2):
        pair = SpotDetector.from_pretrained(args.model, observer=LowBitConfig(bits=bits))
        human = scores(statistics(pair, texts.human), TOKENS)
        for how in DECODED:
            found = scores(statistics(pair, texts.machine[how]), TOKENS)
            rows[f"{how}, pair with {bits} bits"] = {"binoculars": summary(human["binoculars"], found["binoculars"])}
        print(
            "pair",
            bits,
            {h: rows[f"{h}, pair with {bits} bits"]["binoculars"]["auroc"][0] for h in DECODED},
            flush=True,
        )
    return rows


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Rank correlation of two scorings of the same texts."""
    return float(np.corrcoef(one.argsort().argsort(), other.argsort().argsort())[0, 1])


def _some_words(share: float, change: Callable[[str, random.Random], str]) -> Callable[[str, random.Random], str]:
    def edit(text: str, draw: random.Random) -> str:
        return re.sub(r"\w+", lambda m: change(m[0], draw) if draw.random() < share else m[0], text)

    return edit


def _swap_words(text: str, draw: random.Random) -> str:
    words = text.split(" ")
    for k in range(0, len(words) - 1, 2):
        if draw.random() < 0.1:
            words[k], words[k + 1] = words[k + 1], words[k]
    return " ".join(words)


# Kinds of edits on a tenth of the words or blanks.
EDITS: dict[str, Callable[[str, random.Random], str]] = {
    "none": lambda text, draw: text,
    "words dropped": _some_words(0.1, lambda word, draw: ""),
    "words swapped": _swap_words,
    "letters swapped": _some_words(0.1, lambda w, draw: w[:1] + w[2:3] + w[1:2] + w[3:]),
    "look-alike letters": _some_words(0.1, lambda w, draw: w.translate(str.maketrans("aeo", "\u0430\u0435\u043e"))),
    "zero-width spaces": _some_words(0.1, lambda w, draw: w[:1] + "\u200b" + w[1:]),
    "double blanks": lambda text, draw: re.sub(" ", lambda m: "  " if draw.random() < 0.1 else " ", text),
    "hard line breaks": lambda text, draw: re.sub(r"(.{60,70}) ", r"\1\n", text),
}


def run_edits(args: argparse.Namespace) -> dict:
    """Machines' texts edited, against people's as they are; as they stand and cleaned as ``detect`` does."""
    texts, detector = own_texts(args.model, args.books, args.count), SpotDetector.from_pretrained(args.model)
    human = scores(statistics(detector, texts.human))
    rows = {}
    for name, edit in EDITS.items():
        draw = random.Random(0)
        edited = [edit(text, draw) for text in texts.machine["T=0.7"]]
        for plain in (True, False):
            label = f"{name}, {'cleaned' if plain else 'as it stands'}"
            rows[label] = compare(human, scores(statistics(detector, edited, plain=plain)))
            print(label, {k: row["auroc"][0] for k, row in rows[label].items()}, flush=True)
    return rows


def run_calibration(args: argparse.Namespace) -> dict:
    """False positives at 1 % on people's texts that did not set the threshold."""
    source = Source.read(args.books, AutoTokenizer.from_pretrained(args.model))
    pieces, books = people(source, {450: 215, 220: 60})
    detector = SpotDetector.from_pretrained(args.model)
    rows = {}
    halves = {"random halves": [k % 2 for k in range(len(pieces))], "other books": [book % 2 for book in books]}
    for kind, half in halves.items():
        for turn in (0, 1):
            known = [text for text, h in zip(pieces, half, strict=True) if h == turn]
            new = [text for text, h in zip(pieces, half, strict=True) if h != turn]
            detector.calibrate(known, 0.01)
            for low, high in ((60, 100), (100, 200), (200, 400), (400, 440)):
                _count_flags(rows.setdefault(f"{kind}, {low} to {high} tokens", {}), detector, _cut(source, new, low, high))
    detector = SpotDetector.from_pretrained(args.model)
    for group, texts in people_by_group(args).items():
        if detector.calibration is not None:
            _count_flags(rows.setdefault(f"shipped calibration, {group}", {}), detector, texts)
    for label, row in rows.items():
        for found in row.values():
            low, high = binomial_interval(found["flagged"], max(1, found["judged"]))
            found["fpr"] = [round(v, 5) for v in (found["flagged"] / max(1, found["judged"]), low, high)]
        print(label, {k: v for k, v in row.items() if k in ("fast_detectgpt", "spot")}, flush=True)
    return rows


def _cut(source: Source, texts: Sequence[str], low: int, high: int) -> list[str]:
    """Each text cut to a length drawn from the bin."""
    draw, out = random.Random(low), []
    for text in texts:
        ids = source.tokenizer(text, add_special_tokens=False).input_ids
        out.append(source.tokenizer.decode(ids[: draw.randrange(low, min(high, len(ids) + 1)) if len(ids) > low else None]))
    return out


def _count_flags(row: dict, detector: SpotDetector, texts: Sequence[str]) -> None:
    """Which texts every score would call a machine's; whether a text is judged at all does not depend on the score."""
    calibration = detector.calibration
    assert calibration is not None
    for one in detector.detect(texts, keep=0):
        found = calibration.bin_for(one.tokens)
        for name, value in one.scores.items():
            counts = row.setdefault(name, {"flagged": 0, "judged": 0, "outside": 0})
            judged = one.p_value is not None and found is not None
            counts["judged" if judged else "outside"] += 1
            turned = six_digits(SCORES[name].sign * value)
            counts["flagged"] += judged and found.p_value(name, turned) <= calibration.fpr


def people_by_group(args: argparse.Namespace) -> dict[str, list[str]]:
    """People's texts of other kinds than the calibration's."""
    groups: dict[str, list[str]] = {}
    if args.pairs:
        for row in pairs(args.pairs, args.rows):
            groups.setdefault(f"{row['dataset']} ({row['file']})", []).append(row["human"])
        groups = {name: list(dict.fromkeys(texts))[:GROUP] for name, texts in groups.items()}
    if args.stories:
        groups["TinyStories (GPT-3.5 and GPT-4 wrote them, not people)"] = read_stories(args.stories)[:GROUP]
    return groups


def pairs(folder: str, rows: int) -> list[dict]:
    """The first pairs of every file, dataset and generator."""
    seen: dict[tuple, int] = defaultdict(int)
    out = []
    for file in sorted(Path(folder).glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line) | {"file": file.stem}
            key = (row["file"], row["dataset"], row["generator"])
            seen[key] += 1
            if seen[key] <= rows:
                out.append(row)
    return out


def read_stories(file: str) -> list[str]:
    """The ``text`` of each line."""
    return [json.loads(line)["text"] for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]


def run_cross(args: argparse.Namespace) -> dict:
    """Texts of one model before another, and every row of the pairs, with all scores and the pair of the detector."""
    observer = LowBitConfig(bits=3)
    rows: dict[str, dict] = {}
    for place in [args.model, *([args.other] if args.other else [])]:
        name = Path(place).name
        detector = SpotDetector.from_pretrained(place, observer=observer)
        known: dict[str, np.ndarray] = {}

        def of(texts: Sequence[str], detector: SpotDetector = detector, known: dict = known) -> list[np.ndarray]:
            new = list(dict.fromkeys(text for text in texts if text not in known))
            known.update(zip(new, statistics(detector, new, length=400), strict=True))
            return [known[text] for text in texts if len(known[text]) > 30]

        for label, human, machine in _cross_texts(args, place):
            rows[f"{name}: {label}"] = compare(scores(of(human)), scores(of(machine)))
            print(f"{name}: {label}", {k: r["auroc"][0] for k, r in rows[f"{name}: {label}"].items()}, flush=True)
    return rows


def _cross_texts(args: argparse.Namespace, place: str) -> Iterable[tuple[str, list[str], list[str]]]:
    """Label, people's and machines' texts of every row for one detector."""
    if args.other and args.stories:
        makers = {args.model: None, args.other: None}
        for maker in makers:
            if maker == place:
                continue
            tokenizer = AutoTokenizer.from_pretrained(maker)
            model = AutoModelForCausalLM.from_pretrained(maker, dtype=torch.float32).eval()
            if maker == args.other:
                human = [text[:800] for text in read_stories(args.stories)]
                ids = tokenizer("\n".join(human), add_special_tokens=False, verbose=False).input_ids
                source = Source(torch.tensor(ids), torch.zeros(len(ids)), tokenizer)
            else:
                source = Source.read(args.books, tokenizer)
                human = people(source, {TOKENS + 20: 150})[0]
            for how in ("greedy", "T=0.7", "T=1.0"):
                yield f"texts of {Path(maker).name}, {how}", human, continuations(model, source, how, 150, TOKENS + 20)
    if args.pairs:
        by_row: dict[str, list[dict]] = {}
        for row in pairs(args.pairs, args.rows):
            by_row.setdefault(f"{row['dataset']}, {row['generator']} ({row['file']})", []).append(row)
        for label, found in by_row.items():
            yield label, [row["human"] for row in found], [row["llm"] for row in found]


def run_speed(args: argparse.Namespace) -> dict:
    """Tokens per second of scoring beside the plain forward pass, in turn; peak memory over the length of one text."""
    rows = {}
    text = clean(Path(args.books).read_text(encoding="utf-8")).text
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    for place, windows in [(args.model, 16), *([(args.large, 1)] if args.large else [])]:
        # A large random model has no tokenizer of its own; any whose tokens it knows serves to be timed.
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        scorer = SpotDetector.from_pretrained(model, tokenizer=tokenizer).scorer
        ids = torch.tensor(scorer.tokenizer(text[: 12 * 512 * windows], add_special_tokens=False).input_ids[: 512 * windows])
        short = [scorer.tokenizer.decode(ids[k : k + 120]) for k in range(0, len(ids) - 120, 120)]
        long = scorer.tokenizer.decode(ids)
        seconds: dict[str, list[float]] = {"plain": [], "texts of 120 tokens": [], "one long text": []}
        for _ in range(args.repeats if windows > 1 else 1):
            seconds["plain"].append(_per_token(lambda ids=ids, scorer=scorer: _plain_pass(scorer.model, ids)))
            seconds["texts of 120 tokens"].append(_per_token(lambda t=short, s=scorer: sum(x.tokens for x in s.score(t))))
            seconds["one long text"].append(_per_token(lambda t=long, s=scorer: sum(x.tokens for x in s.score([t]))))
        row = {f"{kind}, tokens/s": round(1 / float(np.median(found)), 1) for kind, found in seconds.items()}
        # Rounds are compared with themselves, since the machine's clock wanders between them.
        plain = np.array(seconds["plain"])
        row |= {f"{kind}, of plain": round(float(np.median(plain / found)), 3) for kind, found in seconds.items()}
        rows[Path(place).name] = row
        print(Path(place).name, row, flush=True)
    rows["memory"] = {f"{tokens:,} tokens, peak MB": _peak_mb(args.model, args.books, tokens) for tokens in (5_000, 100_000)}
    print(rows["memory"], flush=True)
    return rows


@torch.inference_mode()
def _plain_pass(model: torch.nn.Module, ids: torch.Tensor) -> int:
    for window in ids.split(512):
        model(input_ids=window[None], use_cache=False)
    return len(ids)


def _per_token(work: Callable[[], int]) -> float:
    begun = time.perf_counter()
    tokens = work()
    return (time.perf_counter() - begun) / tokens


PEAK = """
import sys
from hf_lowbit import SpotDetector
place, books, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
spot = SpotDetector.from_pretrained(place)
text = open(books, encoding="utf-8").read()
spot.scorer.limit = tokens
(found,) = spot.detect(text * (1_000_000 // len(text) + 1))
assert found.tokens == tokens, found.tokens
(peak,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(int(peak.split()[1]) / 1024)
"""


def _peak_mb(place: str, books: str, tokens: int) -> float:
    """Peak resident memory of a process that judges one text, whose input is equally long for every limit."""
    command = [sys.executable, "-c", PEAK, place, books, str(tokens)]
    return round(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout), 1)


PARTS = {"own": run_own, "bits": run_bits, "edits": run_edits, "calibration": run_calibration, "cross": run_cross}
PARTS["speed"] = run_speed


def main() -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--model", default=str(embedded_model()))
    parser.add_argument("--books", default=str(held_out_text()))
    parser.add_argument("--other", help="a second model, for cross")
    parser.add_argument("--large", help="a large model, for speed")
    parser.add_argument("--stories")
    parser.add_argument("--pairs")
    parser.add_argument("--rows", type=int, default=100, help="pairs of each row")
    parser.add_argument("--count", type=int, default=200, help="own texts of each kind")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--name", default="", help="added to the names of the result files")
    args = parser.parse_args()
    logging.disable_progress_bar()
    sources = {"model": Path(args.model).name, "books": Path(args.books).name}
    for part in args.parts:
        print("written to", write(f"detection_{part}{args.name}", PARTS[part](args), sources))


if __name__ == "__main__":
    main()
