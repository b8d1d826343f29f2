"""Looks at a checkpoint, and at its original where there is one, and notes what a report tells."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_lowbit import measure
from hf_lowbit._version import __version__
from hf_lowbit.detect.report import HEADLINES
from hf_lowbit.errors import BadRequest, LowBitError
from hf_lowbit.format import LowBitTensor, ledger
from hf_lowbit.plugin import checkpoint
from hf_lowbit.plugin.detector import SpotDetector
from hf_lowbit.plugin.targets import low_bit_modules
from hf_lowbit.report.facts import BINS, REACH, REPETITION_PENALTY, Continuation, Facts, Matrix, Measured, Point, Verdict

MOST_TABLES = 16
# Settings of a config that say how the checkpoint was made.
SETTINGS = ("method", "bits", "group_size", "levels", "scale_bits", "outliers", "residual_terms", "activation_bits", "seed")
Tell = Callable[[str], None]


def gather(
    directory: str,
    reference: str | None,
    text: tuple[str, str] | None,
    points: list[Point],
    prompt: str,
    tokens: int,
    window: int,
    detector: str | None,
    tell: Tell,
) -> Facts:
    """Everything there is to say about a checkpoint.

    Args:
        directory: the quantized checkpoint.
        reference: directory or Hub id of the original, or None.
        text: name and content to measure on, or None.
        points: other models, measured before.
        prompt: what both models continue.
        tokens: to generate; 0 for none.
        window: tokens per window of the measure.
        detector: directory or Hub id of the detector's model, or None for no verdicts.
        tell: told what happens.

    Raises:
        BadRequest: not one of our checkpoints, or models that do not fit together.
        FormatError: a damaged checkpoint.
    """
    contents = checkpoint.read_contents(directory)
    tell(f"loading {directory}")
    model = checkpoint.load_model(directory, "float32")
    original = None
    if reference is not None:
        tell(f"loading {reference}")
        original = checkpoint.load_model(reference, "float32")
    record, settings = contents.record, contents.config.to_dict()
    tell("decoding matrices")
    facts = Facts(
        name=Path(directory).resolve().name,
        method=contents.config.method,
        settings={name: settings[name] for name in SETTINGS if settings.get(name) is not None},
        transforms=tuple(dict.fromkeys(step["transform"] for step in record.transforms)),
        file_bytes=contents.file_bytes,
        bits_per_weight_linears=ledger(record.block_layouts).bits_per_weight,
        bits_per_weight_model=contents.bits_per_weight_model,
        bytes_by_kind=ledger(record.layouts.values()).bytes_by_kind
        | {"high precision": sum(contents.dense.values()), "headers": contents.header_bytes},
        high_precision={name: (size, record.kept.get(name, "")) for name, size in contents.dense.items()},
        matrices=tuple(matrices(model, original, record)),
        reference=Path(reference).name if reference else None,
        reference_bytes=_file_bytes(reference) if reference else None,
        points=tuple(points),
        prompt=prompt,
        versions=_versions(),
    )
    left_out: dict[str, str] = {}
    if original is None:
        left_out["Error per matrix"] = "there is no original to compare with; give --reference SRC."
    elif record.transforms:
        left_out["Error per matrix"] = "the model was rewritten before rounding, so its matrices are not the original's."
    facts = _with_measures(facts, model, original, directory, text, window, tell, left_out)
    facts = _with_texts(facts, model, original, directory, tokens, detector, tell, left_out)
    return replace(facts, left_out=left_out)


def matrices(model: Any, original: Any, record: Any) -> list[Matrix]:
    """One entry for each low-bit matrix of a model, compared with the original's where that has the same function."""
    comparable = None if record.transforms else original
    out = []
    for name, module in low_bit_modules(model):
        for parameter in module.layouts:
            full = f"{name}.{parameter}"
            out.append(_matrix(full, module.lowbit(parameter), full in record.ends, _weight(comparable, full)))
    return out


@torch.no_grad()
def _matrix(name: str, low: LowBitTensor, end: bool, weight: Tensor | None) -> Matrix:
    layout, counted, stage = low.layout, ledger(low.layout), low.layout.stages[0]
    exponent = stage.levels.exponent
    decoded = low.dequantize()
    if weight is not None and weight.shape != decoded.shape:
        weight = weight.mT if weight.mT.shape == decoded.shape else None  # GPT-2's layers hold their weights the other way
    tables = low.table()[:MOST_TABLES]
    tables = tables / tables.abs().amax(1, keepdim=True).clamp_min(1e-12)
    error = None if weight is None else float((decoded - weight).norm() / weight.norm().clamp_min(1e-12))
    # Both histograms over the same unit, so that what rounding did to the spread is seen.
    unit = (decoded if weight is None else weight).square().mean().sqrt().clamp_min(1e-12)
    return Matrix(
        name=name,
        shape=layout.shape,
        end=end,
        levels=stage.levels.family if exponent is None else f"{stage.levels.family}({exponent:g})",
        bits=stage.bits,
        group_size=stage.group_size,
        bytes=counted.bytes,
        bits_per_weight=counted.bits_per_weight,
        table=tuple(tuple(round(value, 5) for value in row) for row in tables.tolist()),
        code_shares=_code_shares(low, stage.bits),
        histogram=_histogram(decoded / unit),
        reference_histogram=None if weight is None else _histogram(weight / unit),
        error=error,
    )


def _code_shares(low: LowBitTensor, bits: int) -> tuple[float, ...]:
    counts = torch.bincount(low.codes().flatten().to(torch.int32), minlength=2**bits)
    return tuple((counts / counts.sum()).tolist())


def _histogram(values: Tensor) -> tuple[float, ...]:
    counts = torch.histc(values.float(), BINS, -REACH, REACH)
    return tuple((counts / values.numel()).tolist())


def _weight(original: Any, name: str) -> Tensor | None:
    if original is None:
        return None
    try:
        return original.get_parameter(name).detach().float()
    except AttributeError:
        return None


def _with_measures(
    facts: Facts, model: Any, original: Any, directory: str, text: Any, window: int, tell: Tell, left_out: dict[str, str]
) -> Facts:
    if text is None:
        left_out["Size against quality"] = "no text to measure on; give --reference SRC, --text FILE or both."
        return facts
    name, content = text
    tokenizer, why = _tokenizer(directory)
    if tokenizer is None:
        left_out["Size against quality"] = why
        return facts
    ids = checkpoint.tokenize(tokenizer, content)
    width = measure.windows(ids, window).shape[1]
    for one in (model, original):
        if one is not None:
            checkpoint.check_fits(one, ids, width)
    tell(f"measuring on {len(ids):,} tokens of {name}")
    if original is None:
        plain = measure.perplexity(model, ids, window)
        found = Measured(name, plain.tokens, window, plain.perplexity)
        own = Point(facts.name, facts.file_bytes, None, plain.perplexity, "measured now", own=True)
    else:
        both = measure.divergence(model, original, ids, window)
        found = Measured(name, both.tokens, window, both.perplexity, both.reference_perplexity, both.kl, both.top1_agreement)
        own = Point(facts.name, facts.file_bytes, both.kl, both.perplexity, "measured now", own=True)
    if not torch.isfinite(torch.tensor([found.perplexity, found.kl or 0.0])).all():
        raise LowBitError(f"on {name} the logits are not finite, so there is nothing to report. Check the weights.")
    return replace(facts, measured=found, points=(own, *facts.points))


def _with_texts(
    facts: Facts, model: Any, original: Any, directory: str, tokens: int, detector: str | None, tell: Tell, left_out: Any
) -> Facts:
    tokenizer, why = _tokenizer(directory)
    if tokenizer is None:
        left_out["Generation"] = left_out["Would a detector notice?"] = why
        return facts
    if not tokens:
        left_out["Generation"] = left_out["Would a detector notice?"] = "--tokens 0 asked for no text."
        return facts
    tell(f"generating {tokens} tokens")
    pairs = [(facts.name, model)] + ([] if original is None else [(facts.reference or "original", original)])
    written = tuple(continuation(label, one, tokenizer, facts.prompt, tokens) for label, one in pairs)
    facts = replace(facts, continuations=written)
    if original is None:
        left_out["The original's text"] = "there is no original to set beside it; give --reference SRC."
    if detector is None:
        left_out["Would a detector notice?"] = "--detector none asked for no verdict."
        return facts
    tell("asking the detector")
    spot = SpotDetector.from_pretrained(detector)
    found = spot.detect([one.text for one in written])
    verdicts = tuple(
        Verdict(one.label, HEADLINES[said.verdict], said.reason, said.scores.get("spot"), said.tokens)
        for one, said in zip(written, found, strict=True)
    )
    return replace(facts, detector=str(spot.identity["name"]).strip("_"), verdicts=verdicts)


def _tokenizer(directory: str) -> tuple[Any, str]:
    """The checkpoint's tokenizer, or None and why: for some models the host makes up one without a vocabulary."""
    try:
        tokenizer = checkpoint.load_tokenizer(directory)
    except BadRequest as error:
        return None, f"the checkpoint has no tokenizer ({error})"
    if not checkpoint.tokenize(tokenizer, "a text").numel():
        return None, "the checkpoint has no tokenizer of its own, and the one that stands in for it makes no token."
    return tokenizer, ""


@torch.no_grad()
def continuation(label: str, model: Any, tokenizer: Any, prompt: str, tokens: int) -> Continuation:
    """Greedy text after a prompt, token by token.

    Raises:
        BadRequest: the prompt makes no token.
    """
    ids = checkpoint.tokenize(tokenizer, prompt)[None]
    if not ids.numel():
        raise BadRequest(f"the prompt {prompt!r} makes no token. Give --prompt a few words.")
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        repetition_penalty=REPETITION_PENALTY,
        pad_token_id=0,
    )
    new = made[0, ids.shape[1] :].tolist()
    # A character may span tokens: each piece is what its token adds to the text so far.
    pieces, before = [], ""
    for end in range(1, len(new) + 1):
        whole = tokenizer.decode(new[:end], skip_special_tokens=True)
        settled = whole[:-1] if whole.endswith("\ufffd") and end < len(new) else whole
        pieces.append(settled[len(before) :])
        before = settled if settled.startswith(before) else before
    return Continuation(label, tuple(new), tuple(pieces))


def _file_bytes(source: str) -> int | None:
    try:
        return sum(file.stat().st_size for file in checkpoint.weight_files(source))
    except BadRequest:
        return None


def _versions() -> dict[str, str]:
    return {
        "hf-lowbit": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
