"""Checkpoints on disk: quantize one into another, load one, say what is in one."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hf_lowbit._version import __version__
from hf_lowbit.errors import BadRequest, FormatError, LowBitError, WeightError
from hf_lowbit.format.serialize import ACTIVATION, Record, read_record, sort_headers
from hf_lowbit.measure.perplexity import vocabulary_of
from hf_lowbit.pipeline.run import MemoryStore, Report
from hf_lowbit.pipeline.share import Share
from hf_lowbit.pipeline.workspace import Workspace, fingerprint_of_files
from hf_lowbit.plugin.auto import resolve
from hf_lowbit.plugin.compress import (
    Progress,
    calibration_for,
    check_calibration,
    compress,
    fingerprint,
    prepare_targets,
    with_provenance,
)
from hf_lowbit.plugin.config import QUANT_METHOD, LowBitConfig
from hf_lowbit.plugin.explain import Explanation, explain
from hf_lowbit.plugin.quantize import finish

_LOG = logging.getLogger(__name__)
# The file that says how each matrix was solved.
REPORT = "quantization_report.json"


def show_progress(on: bool) -> None:
    """Turn the host's progress bars (loading, and with it quantizing) on or off."""
    from transformers.utils import logging

    (logging.enable_progress_bar if on else logging.disable_progress_bar)()


def load_model(source: str, dtype: str = "auto", device: str = "cpu", config: LowBitConfig | None = None) -> Any:
    """A causal LM in eval mode from a directory or Hub id, quantized on the way if ``config`` is given.

    Raises:
        BadRequest: nothing there, a device that is not, or ``config`` for a model that is quantized already.
        FormatError: a damaged or newer checkpoint, or one whose config and weights do not belong together.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoModelForCausalLM

    if device != "cpu" and device.split(":")[0] == "cuda" and not torch.cuda.is_available():
        raise BadRequest(f"device {device!r} was asked for, but torch finds no CUDA device here. Use --device cpu.")
    _check_source(source)
    # Told of what is missing or of another size, the host goes on with random weights; here that is an error.
    options: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    options["dtype"] = dtype if dtype == "auto" else getattr(torch, dtype)
    if device != "cpu":
        options["device_map"] = device
    if config is not None:
        options["quantization_config"] = config
    try:
        if _quantization_config(source) and config is not None:
            raise BadRequest(f"{source!r} is quantized already; quantize the original it was made from.")
        model, info = AutoModelForCausalLM.from_pretrained(source, **options)
    except LowBitError:
        raise
    except (SafetensorError, json.JSONDecodeError) as error:
        raise FormatError(f"{source}: a file is damaged or incomplete ({error}). Fetch it again.") from error
    except StrictDataclassError as error:
        raise FormatError(f"{source}/config.json is damaged: {_first_lines(error)}") from error
    except (OSError, ValueError, ImportError) as error:
        raise BadRequest(f"cannot load {source!r}: {_first_lines(error)}") from error
    except RuntimeError as error:
        raise LowBitError(f"loading {source!r} failed: {_first_lines(error)}") from error
    _check_complete(source, info)
    return model.eval()


def _check_complete(source: str, info: dict[str, Any]) -> None:
    if info["mismatched_keys"]:
        name, stored, wanted = min(info["mismatched_keys"])
        raise FormatError(
            f"{source}: config.json makes {name!r} {list(wanted)}, the file holds {list(stored)}. "
            "Config and weights are not of one checkpoint."
        )
    if missing := info["missing_keys"]:
        raise FormatError(
            f"{source}: the files lack {min(missing)!r} ({len(missing)} missing in all), which config.json asks for. "
            "Config and weights are not of one checkpoint, or a file is missing."
        )


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        BadRequest: there is none.
        LowBitError: there is one, but it is damaged or needs a package that is not installed.
    """
    from transformers import AutoTokenizer

    _check_source(source)
    try:
        return AutoTokenizer.from_pretrained(source)
    except ImportError as error:
        raise LowBitError(f"the tokenizer of {source!r} needs another package: {_first_lines(error)}") from error
    except Exception as error:  # a damaged file raises whatever its reader tripped over, bare Exception included
        if isinstance(error, OSError) or type(error) is ValueError:
            raise BadRequest(f"cannot load a tokenizer from {source!r}: {_first_lines(error)}") from error
        raise FormatError(f"{source}: the tokenizer is damaged ({_first_lines(error)}). Fetch it again.") from error


def quantize_checkpoint(
    source: str,
    destination: str | Path,
    config: LowBitConfig,
    restart: bool = False,
    progress: Progress | None = None,
) -> tuple[Explanation, Report]:
    """Quantize a checkpoint into a new directory, which appears whole or not at all.

    A run that was killed goes on where it stood when it is started again. Started by ``torchrun`` or ``accelerate
    launch``, the processes share the work and the first one writes.

    Args:
        restart: throw away what a killed run finished.
        progress: called after each block.

    Returns:
        The explanation of the model, and a row for each matrix.

    Raises:
        BadRequest: the destination exists and is not empty, cannot be written, or another run works on it; what was finished
            belongs to another run; the source is quantized already; calibration data is missing or unfit.
        LowBitError: loading or solving failed, or the disk is full; finished blocks are kept.
    """
    check_calibration(config)
    _check_source(source)
    quantized = Path(source).exists() and bool(_quantization_config(source))
    model = None if quantized else load_model(source)
    if quantized or getattr(model, "is_quantized", False):
        raise BadRequest(f"{source!r} is quantized already; quantize the original it was made from.")
    config = resolve(config, model)
    targets = prepare_targets(model, config)
    tokenizer = None  # weights without a tokenizer are a checkpoint all the same
    with suppress(BadRequest):
        tokenizer = load_tokenizer(source)
    calibration = calibration_for(model, config, tokenizer)
    files = weight_files(source)
    identity = fingerprint(config, targets, calibration) | {"model": fingerprint_of_files(files), "version": __version__}
    with Share() as share:
        if share.rank:
            outcome = compress(model, config, targets, calibration, MemoryStore(), files, progress, share)
            share.wait()  # what the first process writes is there when all return
            return explain(model), outcome.report
        with Workspace.open(destination, identity, restart) as work:
            for note in work.notes:
                _LOG.warning(note)
            try:
                outcome = compress(model, config, targets, calibration, work, files, progress, share)
            except WeightError:
                work.discard()  # asked for the same again, it would fail the same
                raise
            finish(model, with_provenance(config, calibration), targets, outcome)
            explanation = explain(model)
            work.finish(partial(_write, model, tokenizer, outcome.report))
        share.wait()
    return explanation, outcome.report


def _write(model: Any, tokenizer: Any, report: Report, folder: Path) -> None:
    model.save_pretrained(folder)
    sort_headers(folder)
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in report]
    (folder / REPORT).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    try:
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizers library raises bare ones
        raise OSError(error) from error


def weight_files(source: str) -> list[Path]:
    """The safetensors files of a checkpoint, downloaded already where ``source`` is a Hub id.

    Raises:
        BadRequest: there are none.
    """
    folder = Path(source)
    if not folder.exists():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(source, local_files_only=True, allow_patterns=["*.safetensors"]))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BadRequest(
            f"{source!r} holds no safetensors files. Load and save it with save_pretrained once, then use that."
        )
    return files


@dataclass(frozen=True)
class Contents:
    """What the files of a quantized checkpoint hold; ``headers + tensors == file_bytes``."""

    config: LowBitConfig
    record: Record
    file_bytes: int
    header_bytes: int
    weights: int
    dense: dict[str, int]  # name -> bytes of tensors in high precision

    @property
    def bits_per_weight_model(self) -> float:
        """All file bits, headers included, per logical weight."""
        return 8 * self.file_bytes / self.weights


def read_contents(directory: str | Path) -> Contents:
    """Read headers, check every checksum, and count every byte of a quantized checkpoint.

    Raises:
        BadRequest: not a directory, or not one of ours.
        FormatError: damaged, incomplete, inconsistent or too new.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise BadRequest(f"{str(directory)!r} is not a directory here. Download the checkpoint first: hf download.")
    _check_source(str(folder))
    settings = _quantization_config(str(folder))
    if settings.get("quant_method") != QUANT_METHOD:
        method = repr(settings["quant_method"]) if "quant_method" in settings else "no quantization method"
        raise BadRequest(f"{folder} is not an hf-lowbit checkpoint: its config.json names {method}.")
    try:
        config = LowBitConfig.from_dict(settings)
    except BadRequest as error:
        raise FormatError(f"{folder}/config.json: {error}") from error
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FormatError(f"{folder} holds no safetensors file.")
    record = read_record(files)
    packed = {f"{name}_{stored}" for name, layout in record.layouts.items() for stored in layout.fields}
    inputs = {f"{name}.{ACTIVATION}.{stored}" for name, layout in record.activations.items() for stored in layout.fields}
    dense: dict[str, int] = {}
    weights, total, headers = sum(layout.numel for layout in record.layouts.values()), 0, 0
    for file in files:
        total += file.stat().st_size
        headers += 8 + int.from_bytes(file.open("rb").read(8), "little")
        with safe_open(str(file), framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - a file handle, not a dict
                if name not in packed:
                    tensor = handle.get_tensor(name)
                    dense[name] = tensor.numel() * tensor.element_size()
                    weights += 0 if name in inputs else tensor.numel()
    return Contents(config, record, total, headers, weights, dense)


def _check_source(source: str) -> None:
    path = Path(source)
    looks_local = path.is_absolute() or source.startswith(".") or source.count("/") != 1
    if not path.exists() and looks_local:
        raise BadRequest(f"{source!r} is neither a directory here nor a Hub id (user/name).")
    if path.exists() and not (path / "config.json").is_file():
        raise BadRequest(f"{source!r} holds no config.json, so it is not a model checkpoint.")


def _first_lines(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines()[:3] if line.strip())


def is_low_bit(source: str) -> bool:
    """Whether a local directory's config names our quantization method; False for a Hub id.

    Raises:
        BadRequest: neither a checkpoint here nor a Hub id.
        FormatError: its config.json is damaged.
    """
    _check_source(source)
    return Path(source).exists() and _quantization_config(source).get("quant_method") == QUANT_METHOD


def _quantization_config(source: str) -> dict[str, Any]:
    if not Path(source).exists():
        from transformers import PretrainedConfig

        return PretrainedConfig.get_config_dict(source)[0].get("quantization_config") or {}
    file = Path(source) / "config.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")).get("quantization_config") or {})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise FormatError(f"{file} is damaged ({error}). Fetch it again.") from error


def check_fits(model: Any, ids: torch.Tensor, window: int) -> None:
    """Refuse tokens or windows a model has no place for.

    Raises:
        BadRequest: naming what the model takes.
    """
    vocabulary, largest = vocabulary_of(model), int(ids.max())
    if largest >= vocabulary:
        raise BadRequest(
            f"the tokenizer makes token {largest}, the model knows {vocabulary} tokens. Tokenizer and model are not of one "
            "checkpoint."
        )
    places = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(places, int) and 0 < places < window:
        raise BadRequest(f"a window of {window} tokens was asked for, the model takes {places}. Use --window {places}.")


def tokenize(tokenizer: Any, text: str) -> torch.Tensor:
    """Token ids ``[n]`` of a text of any length, without special tokens and without the length warning."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.int64)
