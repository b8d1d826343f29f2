"""Sharing: the model card, and a push that uploads card and weights in one commit."""

from __future__ import annotations

import tempfile
import types
from pathlib import Path
from typing import Any

from torch import nn

CARD = """\
# {name}

Quantized with [hf-lowbit](https://pypi.org/project/hf-lowbit/): method `{method}`, {bits} bits, groups of {group_size}.

| | |
|---|---|
{rows}

## Load it

```bash
pip install hf-lowbit
```
```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{name}")
```

**hf-lowbit must be installed.** Without it Transformers warns that it does not know the quantization type `hf_lowbit`, skips
the quantized weights and returns a model with random ones.
"""


def model_card(model: nn.Module, name: str, base_model: str | None = None) -> str:
    """Text of a model card: front matter, how the model was made, its size, and how to load it."""
    from hf_lowbit.plugin.explain import explain

    config, report = model.config.quantization_config, explain(model)
    front = ["---", "library_name: transformers", "tags:", "- hf-lowbit", f"- {config.bits}-bit", f"- {config.method}"]
    if base_model:
        front += [f"base_model: {base_model}", "base_model_relation: quantized"]
    rows = {
        "size of all tensors": f"{report.bytes / 1e6:.2f} MB",
        "bits per weight, quantized matrices (all metadata counted)": f"{report.bits_per_weight_linears:.3f}",
        "bits per weight, whole model": f"{report.bits_per_weight_model:.3f}",
        "matrices quantized / kept in high precision": f"{len(report.tensors)} / {len(report.kept)}",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    body = CARD.format(name=name, method=config.method, bits=config.bits, group_size=config.group_size, rows=table)
    return "\n".join([*front, "---", "", body])


def give_card(model: nn.Module) -> None:
    """Make ``model.push_to_hub`` upload our model card, on this instance only."""
    model.add_model_tags(["hf-lowbit"])
    model.push_to_hub = types.MethodType(push_to_hub, model)


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: list[str] | None = None,
) -> Any:
    """Upload the model in one commit, with a card unless the repository already has one.

    The arguments are those of ``PreTrainedModel.push_to_hub``. Weights, config and card appear together or not at all.
    """
    from huggingface_hub import HfApi, ModelCard
    from huggingface_hub.errors import EntryNotFoundError

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    try:
        card = ModelCard.load(repo_id, token=token)
    except EntryNotFoundError:
        source = getattr(model.config, "_name_or_path", "")
        hub_source = source if source.count("/") == 1 and not Path(source).exists() else None
        card = ModelCard(model_card(model, repo_id, hub_source))
    known = card.data.tags or []
    card.data.tags = [*known, *(tag for tag in [*(model.model_tags or []), *(tags or [])] if tag not in known)]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        card.save(str(Path(folder) / "README.md"))
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or f"Upload {type(model).__name__} quantized with hf-lowbit",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )
