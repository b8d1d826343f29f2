"""The model card: what a low-bit checkpoint is, how to load it, what was measured, its origin, its limits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_lowbit.errors import BadRequest
from hf_lowbit.format.ledger import ledger
from hf_lowbit.plugin.identity import checkpoint_identity
from hf_lowbit.plugin.origin import LICENCE

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

    from hf_lowbit.format.serialize import Record
    from hf_lowbit.plugin.checkpoint import Contents

# A card that begins so is written anew by every push; any other keeps its words.
OURS = "<!-- Written by hf-lowbit at every push. Remove this line to keep your own words. -->"
RESULTS = "eval*.json"
NO_LICENCE = "- licence: the original does not state one where it could be read"

BODY = """\
{mark}

# {name}

{base}, quantized to {bits} bits with [hf-lowbit](https://pypi.org/project/hf-lowbit/), method `{method}`.

{sizes}

## Load it

```bash
pip install hf-lowbit
```
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")
```

**hf-lowbit must be installed.** Without it Transformers warns that it does not know the quantization type `hf_lowbit`, skips
the quantized weights and returns a model with random ones.{cache}

## Measured

{measured}

## How it was made

{made}

## Limits

- What was measured holds for texts and tasks like those named above; anything else was not looked at.
- Quantization changes answers. What the original gets wrong, and the terms it comes under, stay as they are.
- On CPUs the kernels round activations to 8 bits by default for codes of 4 bits and less
  (`HF_LOWBIT_CPU_ARITHMETIC=exact` does not).
- The GPU kernels (Triton) were not yet timed on a GPU; where they do not apply, weights are decoded before each product.
"""


def build_card(
    name: str, contents: Contents, origin: dict[str, Any], results: Sequence[dict[str, Any]], base_model: str | None = None
) -> ModelCard:
    """The card of a checkpoint.

    Args:
        name: repository it goes to.
        contents: what its files hold.
        origin: what its config.json says it was made from.
        results: objects ``hf-lowbit eval --json`` printed for it; see :func:`check_results`.
        base_model: Hub id of the original, where ``origin`` names only a directory.
    """
    from huggingface_hub import ModelCard, ModelCardData

    config, base = contents.config, base_model or origin.get("hub_id")
    more: dict[str, Any] = {key: origin[key] for key in LICENCE if key in origin}
    if base:
        more["base_model_relation"] = "quantized"
    data = ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hf-lowbit", "quantized", f"{config.bits}-bit", config.method],
        **more,
    )
    text = BODY.format(
        mark=OURS,
        name=name,
        base=f"[{base}](https://huggingface.co/{base})" if base else f"A model from the directory `{_directory(origin)}`",
        bits=config.bits,
        method=config.method,
        sizes=_sizes(contents),
        cache=_cache(config.kv_cache),
        measured=_measured(results),
        made=_made(contents, origin, base),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def read_results(files: Sequence[str | Path]) -> list[tuple[str, dict[str, Any]]]:
    """Stored output of ``hf-lowbit eval --json``, with the name of its file.

    Raises:
        BadRequest: one that cannot be read, or holds something else.
    """
    found = []
    for file in map(Path, files):
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
            value["manifest"]["model"]["name"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadRequest(
                f"{file} is not what `hf-lowbit eval --json` prints ({error!r}). Measure again with this release: "
                f"hf-lowbit eval DIR --text FILE --json > {file}"
            ) from error
        found.append((str(file), value))
    return found


def is_of(result: dict[str, Any], record: Record) -> bool:
    """Whether a measurement was made on this very checkpoint."""
    return checkpoint_identity(record).items() <= result["manifest"]["model"].items()


def check_results(found: Sequence[tuple[str, dict[str, Any]]], record: Record) -> list[dict[str, Any]]:
    """The measurements, if all are of this checkpoint.

    Raises:
        BadRequest: naming the file that is of another.
    """
    for file, value in found:
        if not is_of(value, record):
            raise BadRequest(
                f"{file} was measured on another checkpoint ({value['manifest']['model']['name']!r}: its matrices differ). "
                "Measure this one, or remove that file."
            )
    return [value for _, value in found]


def _sizes(contents: Contents) -> str:
    blocks = ledger(contents.record.block_layouts).bits_per_weight
    config = contents.config
    return _table(
        ("", ""),
        [
            ("method", f"`{config.method}`, {config.bits} bits, groups of {config.group_size}"),
            ("files", f"{contents.file_bytes / 1e6:,.2f} MB"),
            ("bits per weight, quantized matrices inside blocks (all metadata counted)", f"{blocks:.3f}"),
            ("bits per weight, whole model", f"{contents.bits_per_weight_model:.3f}"),
            ("matrices quantized", f"{len(contents.record.layouts)}"),
            ("tensors in high precision", f"{len(contents.dense)}"),
        ],
    )


def _cache(settings: dict[str, Any] | None) -> str:
    if settings is None:
        return ""
    values = ", ".join(f"{key}={value}" for key, value in settings.items())
    return f"\n\n`generate` uses hf-lowbit's mixed-precision KV cache by default ({values})."


def _measured(results: Sequence[dict[str, Any]]) -> str:
    if not results:
        return (
            "Not measured. `hf-lowbit eval DIR --text FILE --reference ORIGINAL --json > DIR/eval.json` does it, "
            "and the next push shows it here."
        )
    parts = [_tasks(result) if "tasks" in result else _text(result) for result in results]
    versions = results[-1]["manifest"]["versions"]
    return "\n\n".join([*parts, "Measured with " + ", ".join(f"{name} {found}" for name, found in versions.items()) + "."])


def _text(result: dict[str, Any]) -> str:
    about = result["manifest"]["text"]
    rows = [("perplexity", f"{result['perplexity']:.3f}")]
    if result["kl"] is not None:
        rows += [
            ("perplexity of the original", f"{result['reference_perplexity']:.3f}"),
            ("KL to the original, nats per token", f"{result['kl']:.5f}"),
            ("same most likely token", f"{100 * result['top1_agreement']:.1f} %"),
        ]
    heading = f"`{about['file']}`, {result['tokens']:,} tokens in windows of {about['window']}"
    return _table((heading, ""), rows)


def _tasks(result: dict[str, Any]) -> str:
    from hf_lowbit.plugin.evaluate import table

    columns, cells = table(result["tasks"])
    limit = result["manifest"]["limit"]
    note = f"First {limit} documents of each task. " if limit else ""
    return f"{_table(columns, cells)}\n\n{note}Intervals are paired bootstraps over documents, p-values are not corrected."


def _made(contents: Contents, origin: dict[str, Any], base: str | None) -> str:
    config, record = contents.config, contents.record
    revision = f", revision `{origin['revision']}`" if origin.get("revision") else ""
    lines = [f"- original: {base}{revision}" if base else f"- original: a directory named `{_directory(origin)}`"]
    lines.append(f"- made by: {origin.get('made_by', 'an earlier release of hf-lowbit')}")
    lines.append(f"- settings: scales of {config.scale_bits} bits, seed {config.seed}, {_settings(config)}")
    lines.append(f"- calibration: {_calibration(config.calibration)}")
    steps = list(dict.fromkeys(step["transform"] for step in record.transforms))
    lines.append(f"- transforms: {', '.join(steps)} ({len(record.transforms)} steps)" if steps else "- transforms: none")
    reasons = sorted(set(record.kept.values()))
    lines += [f"- kept in high precision: {reason}" for reason in reasons]
    lines.append(f"- plan: `{checkpoint_identity(record)['plan'][:16]}`, format version {record.format_version}")
    if "license" not in origin:
        lines.append(f"{NO_LICENCE}, so none is stated here; look there")
    return "\n".join(lines)


def _settings(config: Any) -> str:
    found = {
        "levels": config.levels,
        "outliers": config.outliers or None,
        "residual terms": config.residual_terms if config.residual_terms > 1 else None,
        "activation bits": config.activation_bits,
        "overrides": config.overrides or None,
        "options": config.options or None,
    }
    given = [f"{name} `{value}`" for name, value in found.items() if value is not None]
    return ", ".join([*given, "embedding and head " + ("quantized" if config.quantize_embeddings else "kept")])


def _calibration(source: Any) -> str:
    if source is None:
        return "none, no data was used"
    if not isinstance(source, dict):
        return f"`{source}`"
    return ", ".join(f"{key} `{value}`" for key, value in source.items())


def _directory(origin: dict[str, Any]) -> str:
    return str(origin.get("directory", "unknown"))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
