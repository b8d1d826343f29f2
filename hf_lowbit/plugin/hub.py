"""Sharing: the model card, and a push that uploads card and weights in one commit."""

from __future__ import annotations

import re
import tempfile
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_lowbit.format.serialize import sort_headers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CARD = """\
# {name}

Quantized with hf-lowbit: method `{method}`, {bits} bits, groups of {group_size}.

| | |
|---|---|
{rows}

## Load it

```bash
pip install hf-lowbit
```
```python
from transformers import AutoModelForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel
model = AutoModelForCausalLM.from_pretrained("{name}")
```

**hf-lowbit must be installed.** Without it Transformers warns that it does not know the quantization type `hf_lowbit`, skips
the quantized weights and returns a model with random ones.
"""


def model_card(model: PreTrainedModel, name: str, base_model: str | None = None) -> str:
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


def give_card(model: PreTrainedModel) -> None:
    """Make ``model.push_to_hub`` upload our model card, on this instance only."""
    model.add_model_tags(["hf-lowbit"])
    model.push_to_hub = types.MethodType(push_to_hub, model)


def push_to_hub(
    model: PreTrainedModel,
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

    The arguments are those of ``PreTrainedModel.push_to_hub``. Weights, config and card appear together or not at all, and
    weights a former push left under other names go: a reader would prefer a stale ``model.safetensors`` to new shards.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
    from huggingface_hub.errors import RemoteEntryNotFoundError

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    try:
        card = ModelCard.load(api.hf_hub_download(repo_id, "README.md", revision=revision))
    except RemoteEntryNotFoundError:  # the server said so; a card that merely cannot be fetched now must not be replaced
        source = getattr(model.config, "_name_or_path", "")
        hub_source = source if source.count("/") == 1 and not Path(source).exists() else None
        card = ModelCard(model_card(model, repo_id, hub_source))
    known = card.data.tags or []
    known = [known] if isinstance(known, str) else known
    card.data.tags = [*known, *(tag for tag in [*(model.model_tags or []), *(tags or [])] if tag not in known)]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        sort_headers(folder)  # the same model is the same bytes, which the Hub then does not take again
        card.save(str(Path(folder) / "README.md"))
        files = {file.name: str(file) for file in sorted(Path(folder).iterdir())}
        stored = api.list_repo_files(repo_id, revision=revision)
        stale = [name for name in stored if name not in files and _holds_weights(name)]
        # Not upload_folder, which may spread one folder over several commits.
        return api.create_commit(
            repo_id,
            [CommitOperationDelete(name) for name in stale] + [CommitOperationAdd(*item) for item in files.items()],
            commit_message=commit_message or f"Upload {type(model).__name__} quantized with hf-lowbit",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def _holds_weights(name: str) -> bool:
    """Whether ``save_pretrained`` gives weights, or their index, this name."""
    return re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", name) is not None
