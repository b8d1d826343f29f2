"""Sharing: a push that uploads weights, config, tokenizer and card in one commit, or nothing."""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
import types
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_lowbit.errors import BadRequest
from hf_lowbit.format.serialize import sort_headers
from hf_lowbit.plugin import card as cards
from hf_lowbit.plugin.hub_errors import in_plain_words
from hf_lowbit.plugin.origin import LICENCE, MADE_FROM, licence_of

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelCard
    from transformers import PreTrainedModel

# What a checkpoint's directory holds of use to others; pickles and unknown files stay at home.
SHARED = {".safetensors", ".json", ".jinja", ".txt", ".model"}
CARD = "README.md"


@dataclass(frozen=True)
class Package:
    """A checked checkpoint, ready to be sent.

    Attributes:
        name: repository the card was written for.
        files: path in the repository -> file, without the card.
        left_out: files of the directory that are not sent.
        card: of the checkpoint.
        hub_id: of the original on the Hub, if known.
        own_card: whether ``card`` is ours, not a README.md of the directory.
        measured: how many stored measurements the card shows.
    """

    name: str
    files: dict[str, Path]
    left_out: list[str]
    card: ModelCard
    hub_id: str | None
    own_card: bool
    measured: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; ``license`` is None where the card states none."""
        files = [{"name": name, "bytes": path.stat().st_size} for name, path in self.files.items()]
        licence = self.card.data.to_dict().get("license")
        return {"files": files, "left_out": self.left_out, "measurements": self.measured, "license": licence}


def pack(
    folder: str | Path,
    repo_id: str,
    results: list[Path] | None = None,
    found: list[dict[str, Any]] | None = None,
    base_model: str | None = None,
) -> Package:
    """Check a low-bit checkpoint, every checksum included, and write its card; nothing is sent.

    Args:
        folder: the checkpoint.
        repo_id: where it is to go.
        results: stored output of ``hf-lowbit eval --json``; None takes ``eval*.json`` in the folder.
        found: measurements in memory, in their place.
        base_model: Hub id of the original, if the checkpoint does not know it.

    Raises:
        BadRequest: no low-bit checkpoint, or measurements of another one.
        FormatError: a damaged one.
    """
    from huggingface_hub import ModelCard

    from hf_lowbit.plugin.checkpoint import read_contents  # which imports the quantizer, which imports this

    folder = Path(folder)
    contents = read_contents(folder)
    if found is None:
        stored = cards.read_results(sorted(folder.glob(cards.RESULTS)) if results is None else results)
        found = cards.check_results(stored, contents.record)
    origin = json.loads((folder / "config.json").read_text(encoding="utf-8")).get(MADE_FROM) or {}
    own = not (folder / CARD).is_file()
    card = cards.build_card(repo_id, contents, origin, found, base_model) if own else ModelCard.load(folder / CARD)
    inside = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != CARD]
    names = {path.relative_to(folder).as_posix(): path for path in inside}
    chosen = {name for name, path in names.items() if path.suffix in SHARED and not re.search(r"(^|/)\.", name)}
    files = {name: path for name, path in names.items() if name in chosen}
    hub_id = base_model or origin.get("hub_id")
    return Package(repo_id, files, sorted(names.keys() - chosen), card, hub_id, own, len(found) if own else 0)


def push(
    package: Package,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    tags: list[str] | None = None,
) -> Any:
    """Send a package in one commit; what the Hub holds already is not sent again.

    Weights that a former push left under other names go in the same commit: a reader would prefer a stale
    ``model.safetensors`` to new shards. A card in the repository that was not written here keeps its words and gains tags.

    Returns:
        The Hub's ``CommitInfo``.

    Raises:
        BadRequest: the Hub does not let this user do that, or the repository is public and ``private`` was asked.
        LowBitError: the Hub or the connection failed. Nothing was published either way.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token)
    with in_plain_words(repo_id, token):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.repo_info(repo_id).private:
            raise BadRequest(
                f"{repo_id!r} exists and is public, and private was asked for. Use another name, or make it private there."
            )
        branch = revision if revision is None or not revision.startswith("refs/") else None
        stored, new_branch = _stored(api, repo_id, revision)
        at = None if new_branch else revision
        with tempfile.TemporaryDirectory() as temporary:
            readme = Path(temporary) / CARD
            _final_card(api, package, repo_id, at, CARD in stored, tags or []).save(readme)
            adds = [CommitOperationAdd(name, str(path)) for name, path in {**package.files, CARD: readme}.items()]
            # Content first: until the one commit below it belongs to no file, and a push that is cut off is taken up here.
            api.preupload_lfs_files(repo_id, adds, revision=at, create_pr=create_pr, free_memory=False)
            if new_branch and branch is not None:
                api.create_branch(repo_id, branch=branch, exist_ok=True)
            stale = [name for name in stored if name not in package.files and _holds_weights(name)]
            return api.create_commit(
                repo_id,
                [CommitOperationDelete(name) for name in stale] + adds,
                commit_message=commit_message or "Upload a model quantized with hf-lowbit",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )


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
    """Upload a low-bit model in one commit, with its card; see :func:`push`.

    The arguments are those of ``PreTrainedModel.push_to_hub``. Measurements stored as ``eval*.json`` in the directory the
    model was loaded from are shown if they are of this model.
    """
    more = {"commit_message": commit_message, "commit_description": commit_description, "create_pr": create_pr}
    asked: dict[str, Any] = {"private": private, "token": token, "revision": revision, **more}
    if not getattr(model, "is_quantized", False):  # dequantized since
        host: Any = type(model).push_to_hub
        return host(model, repo_id, max_shard_size=max_shard_size, tags=tags, **asked)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        sort_headers(folder)  # the same model is the same bytes, which the Hub then does not take again
        package = pack(folder, repo_id, found=_measurements_of(model, folder))
        return push(package, repo_id, tags=[*(model.model_tags or []), *(tags or [])], **asked)


def _measurements_of(model: PreTrainedModel, folder: str) -> list[dict[str, Any]]:
    from hf_lowbit.format.serialize import read_record

    record = read_record(sorted(Path(folder).glob("*.safetensors")), verify=False)
    found = []
    for file in sorted(Path(model.name_or_path).glob(cards.RESULTS)) if model.name_or_path else []:
        with contextlib.suppress(BadRequest):  # anything may be called so
            found += [value for _, value in cards.read_results([file]) if cards.is_of(value, record)]
    return found


def _stored(api: HfApi, repo_id: str, revision: str | None) -> tuple[list[str], bool]:
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return api.list_repo_files(repo_id, revision=revision), False
    except RevisionNotFoundError:
        return api.list_repo_files(repo_id), True


def _final_card(api: HfApi, package: Package, repo_id: str, at: str | None, exists: bool, tags: list[str]) -> ModelCard:
    from huggingface_hub import ModelCard

    card: Any = package.card
    if exists:  # a card that cannot be fetched must not be replaced, so an error here ends the push
        held: Any = ModelCard.load(api.hf_hub_download(repo_id, CARD, revision=at))
        if package.own_card and cards.OURS not in held.text:
            tags = [*(card.data.tags or []), *tags]
            card = held
        else:
            known = card.data.to_dict()
            for key, value in held.data.to_dict().items():
                if key not in known:
                    setattr(card.data, key, value)
    if card is package.card and package.own_card:  # a bare name has got its user by now
        card.text = card.text.replace(f'("{package.name}")', f'("{repo_id}")')
    if card is package.card and package.own_card and "license" not in card.data.to_dict() and package.hub_id:
        _take_licence(api, card, package.hub_id)
    known_tags = [card.data.tags] if isinstance(card.data.tags, str) else list(card.data.tags or [])
    card.data.tags = list(dict.fromkeys([*known_tags, *tags]))
    return card


def _take_licence(api: HfApi, card: ModelCard, hub_id: str) -> None:
    """The original's licence, if its repository can be asked and says."""
    with contextlib.suppress(Exception):  # whatever keeps us from knowing it: the card says that none is stated
        found = licence_of(api.model_info(hub_id).card_data)
        for key in LICENCE:
            if key in found:
                setattr(card.data, key, found[key])
        if found:
            card.text = "\n".join(line for line in card.text.splitlines() if not line.startswith(cards.NO_LICENCE)) + "\n"


def _holds_weights(name: str) -> bool:
    """Whether ``save_pretrained`` gives weights, or their index, this name."""
    return re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", name) is not None
