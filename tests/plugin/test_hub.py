"""Push and pull against a loopback Hub: one commit with weights, config and card, or nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

_spec = importlib.util.spec_from_file_location("hub_server", Path(__file__).with_name("hub_server.py"))
hub_server = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hub_server)

OLD_CARD = "---\nlicense: mit\ntags:\n- mine\n---\n\n# My words\n\nKept.\n"
# The client: one process, since HF_ENDPOINT is read at import and loading Transformers takes seconds.
CLIENT = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
source, logits, *pushes = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source).eval()
with torch.no_grad():
    save_file({"logits": model(torch.arange(40)[None]).logits.contiguous()}, logits)
for push in pushes:
    repo, options = json.loads(push)
    try:
        model.push_to_hub(repo, **options)
        print(json.dumps([repo, "pushed", ""]))
    except Exception as error:
        print(json.dumps([repo, type(error).__name__, str(error)]))
"""
PUSHES = [
    ("user/fresh", {}),
    ("user/again", {}),
    ("user/again", {"tags": ["second"]}),
    ("user/carded", {}),
    ("user/shards", {"max_shard_size": "500KB"}),
    ("user/shards", {}),
    ("user/branched", {"revision": "v1"}),
    ("user/broken", {}),
    ("user/unreadable", {}),
    ("user/denied", {}),
]


def run_client(script: str, hub, home: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "anything", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "1"}
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=clean | environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def hub():
    with hub_server.FakeHub() as server:
        yield server


@pytest.fixture(scope="module")
def pushed(hub, quantized, tmp_path_factory):
    """All pushes done: the outcome of each, and the logits of the model that was pushed."""
    folder = tmp_path_factory.mktemp("hub")
    for name in ("carded", "unreadable"):
        hub.repos[f"user/{name}"] = hub_server.Repo(files={"README.md": OLD_CARD.encode()})
    hub.repos["user/broken"] = hub_server.Repo()
    hub.fail["user/broken"] = ("POST", "/commit/", 500)
    hub.fail["user/unreadable"] = ("HEAD", "README.md", 403)  # a 5xx would do the same after half a minute of retries
    hub.fail["user/denied"] = ("POST", "/repos/create", 401)
    arguments = [str(quantized), str(folder / "logits.st"), *map(json.dumps, PUSHES)]
    done = run_client(CLIENT, hub, folder / "home", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert [repo for repo, _, _ in outcomes] == [repo for repo, _ in PUSHES]
    return {repo: (outcome, text) for repo, outcome, text in outcomes}, load_file(folder / "logits.st")["logits"]


def card_of(hub, repo: str) -> tuple[dict, str]:
    """Front matter and text of a repository's README."""
    _, front, body = hub.repos[repo].files["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(front), body


def test_a_push_is_one_commit_with_weights_config_and_card(hub, pushed, quantized):
    assert pushed[0]["user/fresh"] == ("pushed", "")
    ((added, removed),) = hub.repos["user/fresh"].commits
    assert set(added) == {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert removed == []
    assert added["model.safetensors"] in hub.large.values()  # by LFS, as the server asked
    assert len(added["model.safetensors"]) == (quantized / "model.safetensors").stat().st_size
    assert json.loads(added["config.json"])["quantization_config"]["quant_method"] == "hf_lowbit"


def test_the_card_says_what_it_is_and_how_to_load_it(hub, pushed):
    front, body = card_of(hub, "user/fresh")
    assert {"hf-lowbit", "quantized", "4-bit", "rtn"} <= set(front["tags"])
    assert front["library_name"] == "transformers"
    assert "base_model" not in front  # a directory on the pusher's disk is nobody's base model
    for part in (
        "method `rtn`",
        "4 bits",
        "groups of 32",
        "Not measured.",
        "pip install hf-lowbit",
        'from_pretrained("user/fresh")',
    ):
        assert part in body
    assert "must be installed" in body  # without the plugin the host loads random weights and only warns


def test_an_existing_card_keeps_its_words_and_gains_tags(hub, pushed):
    front, body = card_of(hub, "user/carded")
    assert body.strip() == "# My words\n\nKept."
    assert front["license"] == "mit"
    assert front["tags"][0] == "mine"
    assert "hf-lowbit" in front["tags"]


def test_a_card_that_cannot_be_read_is_not_replaced(hub, pushed):
    outcome, _ = pushed[0]["user/unreadable"]
    assert outcome != "pushed"
    assert hub.repos["user/unreadable"].commits == []


def test_a_push_again_is_one_more_commit(hub, pushed):
    first, second = (added for added, _ in hub.repos["user/again"].commits)
    assert set(first) == {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert set(second) <= set(first)
    front, _ = card_of(hub, "user/again")
    assert "second" in front["tags"]
    assert len(front["tags"]) == len(set(front["tags"]))


def test_the_same_model_is_pushed_as_the_same_bytes(hub, pushed):
    repos = [hub.repos[f"user/{name}"] for name in ("fresh", "again", "carded", "branched", "shards")]
    assert len({repo.files["model.safetensors"] for repo in repos}) == 1


def test_weights_of_a_former_push_under_other_names_are_removed(hub, pushed):
    (shards, _), (_, removed) = hub.repos["user/shards"].commits
    assert len([name for name in shards if name.startswith("model-")]) > 1
    assert "model.safetensors.index.json" in removed
    assert [name for name in hub.repos["user/shards"].files if name.startswith("model")] == ["model.safetensors"]


def test_a_new_branch_is_made(hub, pushed):
    assert pushed[0]["user/branched"] == ("pushed", "")
    assert hub.repos["user/branched"].branches == ["main", "v1"]


def test_a_failing_commit_raises_and_leaves_nothing(hub, pushed):
    outcome, text = pushed[0]["user/broken"]
    assert outcome == "LowBitError"
    assert "500" in text and "Nothing was published" in text
    assert hub.repos["user/broken"].files == {}


def test_a_refused_create_says_so(hub, pushed):
    outcome, text = pushed[0]["user/denied"]
    assert outcome != "pushed"
    assert "401" in text
    assert "user/denied" not in hub.repos


def test_a_pull_gives_bit_identical_logits(hub, pushed, tmp_path):
    script = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("user/fresh").eval()
with torch.no_grad():
    save_file({"logits": model(torch.arange(40)[None]).logits.contiguous()}, sys.argv[1])
"""
    done = run_client(script, hub, tmp_path / "home", str(tmp_path / "logits.st"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.equal(load_file(tmp_path / "logits.st")["logits"], pushed[1])
