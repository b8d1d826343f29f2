"""What a GGUF file says beside its weights: names of tensors, sizes of the model, and the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_lowbit.errors import BadRequest
from hf_lowbit.exchange.misfit import Misfit

# model_type -> name of the architecture, and whether its rotary embeddings pair neighbours: then rows of queries and keys
# that are half a head apart are put side by side.
ARCHITECTURES = {"llama": ("llama", True), "mistral": ("llama", True), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False)}
_WORDS, _DIGITS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|", r"\p{N}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Split patterns of byte-level tokenizers, by the name the format has for them.
_SPLITS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt-2",
    f"{_WORDS}{_DIGITS}{{1,3}}{_REST}": "llama-bpe",
    f"{_WORDS}{_DIGITS}{_REST}": "qwen2",
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def library() -> Any:
    """The ``gguf`` package.

    Raises:
        BadRequest: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise BadRequest('writing GGUF needs the gguf package: pip install "hf-lowbit[gguf]"') from error
    return gguf


def architecture_of(config: Mapping[str, Any]) -> tuple[str, bool]:
    """Name of a model's architecture and whether queries and keys are interleaved.

    Raises:
        Misfit: a kind of model, or of positions, this does not write.
    """
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise Misfit("config['model_type']", repr(kind), f"models of type {', '.join(ARCHITECTURES)} can be written.")
    rope = _rope(config)
    kind_of_rope = rope.get("rope_type", rope.get("type", "default"))
    if kind_of_rope not in ("default", "linear"):
        raise Misfit("config['rope_parameters']['rope_type']", repr(kind_of_rope), "it must be 'default' or 'linear'.")
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        raise Misfit("config['sliding_window']", config["sliding_window"], "attention must reach over the whole context.")
    return ARCHITECTURES[kind]


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def head_size(config: Mapping[str, Any]) -> int:
    """Channels of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def interleaved_rows(rows: int, size: int) -> torch.Tensor:
    """Where each row of an interleaved matrix of queries or keys comes from, int64 ``[rows]``; ``size`` rows a head."""
    return torch.arange(rows).view(-1, 2, size // 2).transpose(1, 2).reshape(-1)


def names_of(architecture: str, layers: int) -> Any:
    """A function from the host's tensor names to the file's; None for one it does not know."""
    gguf = library()
    kind = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known = gguf.get_tensor_name_map(kind, layers)
    return lambda name: known.get_name(name, try_suffixes=(".weight", ".bias"))


def describe(writer: Any, config: Mapping[str, Any], name: str, tokens: int) -> None:
    """Write the sizes of a model."""
    heads, size, rope = config["num_attention_heads"], head_size(config), _rope(config)
    writer.add_name(name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(size)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0))
    if rope.get("rope_type", rope.get("type")) == "linear":
        writer.add_rope_scaling_type(library().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    writer.add_vocab_size(tokens)
    writer.add_quantization_version(library().GGML_QUANT_VERSION)


def describe_tokenizer(writer: Any, folder: Path, tokens: int) -> str | None:
    """Write the tokenizer of a checkpoint, or say that there is none and return why.

    Two kinds can be expressed: byte-level BPE under a known split pattern, and BPE with byte fallback (SentencePiece's),
    whose pieces are scored by the rank of the merge that makes them.
    """
    file = folder / "tokenizer.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    reason = _trouble(found)
    if reason is not None:
        writer.add_tokenizer_model("none")
        return reason
    model = found["model"]
    special = {entry["content"]: entry for entry in found.get("added_tokens", [])}
    ids = {**model["vocab"], **{text: entry["id"] for text, entry in special.items()}}
    text_of = {number: text for text, number in ids.items()}
    pieces = [text_of.get(number, f"[PAD{number}]") for number in range(tokens)]
    merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    types = [_type(piece, special, model, number in text_of) for number, piece in enumerate(pieces)]
    if model.get("byte_fallback"):
        ranks: dict[str, int] = {}
        for rank, merge in enumerate(merges):
            ranks.setdefault(merge.replace(" ", ""), rank)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([-float(ranks.get(piece, len(merges))) for piece in pieces])
        writer.add_add_space_prefix('"Prepend"' in json.dumps(found.get("normalizer")))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split_of(found))
        writer.add_token_merges(merges)
    writer.add_token_list(pieces)
    writer.add_token_types(types)
    _describe_special(writer, folder, found, ids)
    return None


def _trouble(found: Mapping[str, Any]) -> str | None:
    """Why a ``tokenizer.json`` cannot be expressed, or None."""
    if not found:
        return "there is no tokenizer.json"
    if found["model"].get("type") != "BPE":
        return f"its model is {found['model'].get('type')!r}, not BPE"
    if not found["model"].get("merges"):
        return "it has no merges"
    if not found["model"].get("byte_fallback") and _split_of(found) is None:
        return "its split pattern is none the format has a name for"
    return None


def _split_of(found: Mapping[str, Any]) -> str | None:
    outer = found.get("pre_tokenizer") or {}
    parts: Sequence[Mapping[str, Any]] = outer.get("pretokenizers", [outer])
    if not parts or parts[-1].get("type") != "ByteLevel" or parts[-1].get("add_prefix_space"):
        return None
    if len(parts) == 1 and parts[0].get("use_regex", True):
        return "gpt-2"
    pattern = parts[0].get("pattern", {}).get("Regex") if len(parts) == 2 and parts[0].get("type") == "Split" else None
    return _SPLITS.get(pattern) if isinstance(pattern, str) and not parts[1].get("use_regex", True) else None


def _type(piece: str, special: Mapping[str, Any], model: Mapping[str, Any], known: bool) -> int:
    if piece == model.get("unk_token"):
        return UNKNOWN
    if piece in special:
        return CONTROL if special[piece].get("special") else USER_DEFINED
    is_byte = bool(model.get("byte_fallback")) and len(piece) == 6 and piece.startswith("<0x")
    return BYTE if is_byte else NORMAL if known else USER_DEFINED


def _describe_special(writer: Any, folder: Path, found: Mapping[str, Any], ids: Mapping[str, int]) -> None:
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    named: dict[str, str] = {}
    for kind in ("bos", "eos", "unk", "pad"):
        token = settings.get(f"{kind}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and text in ids:
            named[kind] = text
            getattr(writer, f"add_{kind}_token_id")(ids[text])
    template = json.dumps(found.get("post_processor") or {})
    for kind, add in (("bos", writer.add_add_bos_token), ("eos", writer.add_add_eos_token)):
        add(kind in named and "TemplateProcessing" in template and json.dumps(named[kind]) in template)
    apart = folder / "chat_template.jinja"
    chat = apart.read_text(encoding="utf-8") if apart.is_file() else settings.get("chat_template")
    if isinstance(chat, str):
        writer.add_chat_template(chat)
