"""``hf-lowbit push`` against a loopback Hub: after every failure nothing is there, and the same command then succeeds."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hf_lowbit import demo
from hf_lowbit.cli import main
from hf_lowbit.plugin.checkpoint import quantize_checkpoint
from hf_lowbit.plugin.config import LowBitConfig

_spec = importlib.util.spec_from_file_location("hub_server", Path(__file__).with_name("hub_server.py"))
hub_server = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hub_server)

TOKEN = "hf_secretsecretsecret"
RETRIES = 6  # how often the Hub's client asks before it gives up
# Commands in one process, since importing takes seconds; waits between retries are shortened.
CLIENT = """
import contextlib, functools, io, json, sys
import huggingface_hub.lfs as lfs
from hf_lowbit.cli import main
lfs.http_backoff = functools.partial(lfs.http_backoff, base_wait_time=0.01, max_wait_time=0.01)
for line in sys.argv[1:]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(json.loads(line))
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""
PULL = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
found = {}
for name, source in (("there", "user/plain"), ("here", sys.argv[1])):
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    ids = AutoTokenizer.from_pretrained(source)("It was a dark night", return_tensors="pt").input_ids
    with torch.no_grad():
        found[name] = model(ids).logits.contiguous()
    out = model.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert type(out.past_key_values).__name__ == "LowBitCache", type(out.past_key_values)
    assert model.hf_quantizer.steps, "the transform is not known any more"
save_file(found, sys.argv[2])
model.push_to_hub("user/model", private=True)
"""
# repository -> what is refused, the exit code, and what the message says.
FAILURES = {
    "unknown": (("POST", "/repos/create", 401, 1), 2, ["401", "hf auth login", "HF_TOKEN"]),
    "denied": (("POST", "/repos/create", 403, 1), 2, ["403", "write permission"]),
    "readonly": (("POST", "/commit/", 403, 1), 2, ["403", "write permission"]),
    "broken": (("POST", "/commit/", 500, 1), 1, ["500", "Hub is in trouble", "Push again"]),
    "storage": (("PUT", "/large/upload", 503, RETRIES), 1, ["503", "Push again"]),
    "large": (("PUT", "/large/upload", 413, 1), 1, ["413", "no room"]),
    "full": (("PUT", "/large/upload", 507, 1), 1, ["507", "no room"]),
    "unpaid": (("POST", "/info/lfs/objects/batch", 402, 1), 1, ["402", "no room"]),
    "race": (("POST", "/commit/", 412, 1), 1, ["412", "Someone else", "Push again"]),
    "cut": (("PUT", "/large/upload", 0, RETRIES), 1, ["connection broke", "Push again"]),
}  # fmt: skip


def environment(hub, home: Path) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    clean |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    return clean | {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "1"}


def run_client(script: str, hub, home: Path, *arguments: str) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=environment(hub, home), capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert TOKEN not in done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def hub():
    with hub_server.FakeHub() as server:
        yield server
        server.released.set()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Rotated, with a low-bit cache by default, and made from a directory whose README states a licence."""
    root = tmp_path_factory.mktemp("push")
    shutil.copytree(demo.embedded_model(), root / "original", ignore=shutil.ignore_patterns("*.py", "__pycache__", "*.txt"))
    (root / "original" / "README.md").write_text("---\nlicense: cc0-1.0\n---\n# Books\n", encoding="utf-8")
    config = LowBitConfig(method="rtn", transforms=["hadamard"], kv_cache={"low_bits": 4})
    quantize_checkpoint(str(root / "original"), root / "made", config)
    (root / "made" / "notes.bin").write_bytes(b"not to be shared")
    return root / "made"


@pytest.fixture(scope="module")
def measured(checkpoint, tmp_path_factory) -> Path:
    """The same checkpoint with what ``eval --json`` said beside it."""
    folder = tmp_path_factory.mktemp("measured") / "made"
    shutil.copytree(checkpoint, folder)
    text = ["--text", str(demo.held_out_text()), "--characters", "2000", "--window", "64"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["eval", str(folder), *text, "--reference", str(demo.embedded_model()), "--json"]) == 0
    (folder / "eval.json").write_text(out.getvalue(), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def outcomes(hub, checkpoint, measured, tmp_path_factory) -> dict[str, tuple[int, str, str]]:
    """Every push done, in one process: the failing ones, each again, and the plain ones."""
    folder = tmp_path_factory.mktemp("client")
    hub.repos["user/public"] = hub_server.Repo()
    commands = {}
    for name, (failure, _, _) in FAILURES.items():
        hub.fail[f"user/{name}"] = failure
        for time in ("first", "again"):
            commands[f"{name}, {time}"] = ["push", str(checkpoint), f"user/{name}", "--json"]
    hub.fail["user/branch"] = ("PUT", "/large/upload", 413, 1)
    hub.fail["user/nobranch"] = ("PUT", "/large/upload", 413)
    commands["nobranch"] = ["push", str(checkpoint), "user/nobranch", "--revision", "v2"]
    for time in ("first", "again"):
        commands[f"branch, {time}"] = ["push", str(checkpoint), "user/branch", "--revision", "v2"]
    for time in ("first", "again"):
        commands[f"plain, {time}"] = ["push", str(measured), "user/plain", "--private", "--base-model", "user/original"]
    hub.repos["user/original"] = hub_server.Repo(files={"README.md": b"---\nlicense: mit\n---\n# Original\n"})
    bare = folder / "bare"  # from a directory that states no licence
    quantize_checkpoint(str(demo.embedded_model()), bare, LowBitConfig(method="rtn", quantize_embeddings=False))
    commands["licensed"] = ["push", str(bare), "licensed", "--base-model", "user/original"]
    commands["public"] = ["push", str(checkpoint), "user/public", "--private"]
    done = run_client(CLIENT, hub, folder / "home", *map(json.dumps, commands.values()))
    results = [json.loads(line) for line in done.stdout.splitlines()]
    return {name: tuple(result) for name, result in zip(commands, results, strict=True)}


def card_of(repo) -> tuple[dict, str]:
    _, front, body = repo.files["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(front), body


@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_push_says_what_to_do_and_the_next_one_succeeds(name, outcomes, hub, checkpoint):
    _, code, parts = FAILURES[name]
    found, out, err = outcomes[f"{name}, first"]
    assert (found, out) == (code, "")
    (line,) = [line for line in err.splitlines() if line.startswith("hf-lowbit: ")]
    for part in [*parts, "Nothing was published", f"user/{name}"]:
        assert part in line
    assert TOKEN not in err and "Bearer hf_" not in err  # the server's refusal repeats it
    again, out, _ = outcomes[f"{name}, again"]
    assert again == 0
    repo = hub.repos[f"user/{name}"]
    ((added, _),) = repo.commits  # the failed attempt left none
    assert set(added) == {file["name"] for file in json.loads(out)["files"]} | {"README.md"}
    assert added["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
    assert len(repo.uploads) == 1  # what had arrived was not sent again


def test_a_branch_appears_only_with_its_commit(outcomes, hub):
    assert outcomes["branch, first"][0] == 1
    assert outcomes["branch, again"][0] == 0
    assert hub.repos["user/branch"].branches == ["main", "v2"]
    assert len(hub.repos["user/branch"].commits) == 1


def test_a_failed_push_to_a_new_branch_leaves_no_branch(outcomes, hub):
    assert outcomes["nobranch"][0] == 1
    assert hub.repos["user/nobranch"].branches == ["main"]


def test_what_is_there_is_not_sent_again(outcomes, hub):
    assert (outcomes["plain, first"][0], outcomes["plain, again"][0]) == (0, 0)
    repo = hub.repos["user/plain"]
    assert (len(repo.commits), len(repo.uploads)) == (1, 1)
    assert repo.private


def test_only_what_belongs_to_a_checkpoint_is_sent(outcomes, hub):
    names = set(hub.repos["user/plain"].files)
    assert {"config.json", "model.safetensors", "tokenizer.json", "quantization_report.json", "eval.json"} <= names
    assert "notes.bin" not in names
    assert "left out: notes.bin" in outcomes["plain, first"][1]


def test_a_public_repository_is_not_used_for_what_is_private(outcomes, hub):
    code, _, err = outcomes["public"]
    assert code == 2
    assert "exists and is public" in err
    assert hub.repos["user/public"].commits == []


def test_the_card_shows_what_was_measured_and_where_it_comes_from(outcomes, hub, measured):
    front, body = card_of(hub.repos["user/plain"])
    result = json.loads((measured / "eval.json").read_text())
    assert front["base_model"] == "user/original" and front["base_model_relation"] == "quantized"
    assert (front["library_name"], front["license"]) == ("transformers", "cc0-1.0")
    assert {"hf-lowbit", "quantized", "rtn", "4-bit"} <= set(front["tags"])
    for number in (f"{result['perplexity']:.3f}", f"{result['reference_perplexity']:.3f}", f"{result['kl']:.5f}"):
        assert number in body
    for part in ("held_out.txt", "hadamard", "KV cache", "no data was used", "made by: hf-lowbit", "## Limits"):
        assert part in body
    assert str(measured.parent) not in body  # no path of this machine
    front, body = card_of(hub.repos["user/large"])
    assert "base_model" not in front
    assert "Not measured." in body and "`original`" in body


def test_the_licence_of_an_original_on_the_hub_is_passed_on(outcomes, hub):
    assert outcomes["licensed"][0] == 0
    front, body = card_of(hub.repos["user/licensed"])
    assert front["license"] == "mit"
    assert "does not state one" not in body
    assert 'from_pretrained("user/licensed")' in body  # the user was left out of the command
    assert "licence: mit" in outcomes["licensed"][1]
    assert "does not state one" not in card_of(hub.repos["user/large"])[1]  # cc0-1.0


def test_a_pull_gives_the_same_model_and_push_to_hub_the_same_card(outcomes, hub, measured, tmp_path):
    run_client(PULL, hub, tmp_path / "home", str(measured), str(tmp_path / "logits.st"))
    logits = load_file(tmp_path / "logits.st")
    assert torch.equal(logits["there"], logits["here"])
    repo = hub.repos["user/model"]
    assert repo.private and len(repo.commits) == 1
    front, body = card_of(repo)
    result = json.loads((measured / "eval.json").read_text())
    assert f"{result['kl']:.5f}" in body
    assert front["license"] == "cc0-1.0"
    assert repo.files["model.safetensors"] == (measured / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_killed_push_leaves_nothing_and_the_next_one_succeeds(hub, checkpoint, tmp_path):
    hub.fail["user/killed"] = ("PUT", "/large/upload", hub_server.STALL, 1)
    command = [sys.executable, "-m", "hf_lowbit.cli", "push", str(checkpoint), "user/killed"]
    with subprocess.Popen(command, env=environment(hub, tmp_path), stderr=subprocess.PIPE, text=True) as run:
        assert hub.stalled.wait(100)
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "nothing was published" in err and "Traceback" not in err
    assert hub.repos["user/killed"].commits == []
    hub.released.set()
    done = run_client(CLIENT, hub, tmp_path, json.dumps(["push", str(checkpoint), "user/killed"]))
    assert json.loads(done.stdout)[0] == 0
    assert len(hub.repos["user/killed"].commits) == 1


def test_a_damaged_checkpoint_is_refused_before_anything_is_asked(hub, checkpoint, tmp_path, capsys):
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint, folder)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-100] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    before = hub.requests
    assert main(["push", str(folder), "user/damaged"]) == 1
    assert "damaged (checksum)" in capsys.readouterr().err
    assert hub.requests == before


def test_a_dry_run_asks_nobody(hub, measured, capsys):
    before = hub.requests
    assert main(["push", str(measured), "user/dry", "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert hub.requests == before
    assert (found["commit"], found["measurements"], found["license"]) == (None, 1, "cc0-1.0")
    assert "user/dry" in found["card"] and found["left_out"] == ["notes.bin"]


def test_measurements_of_another_checkpoint_are_refused(measured, tmp_path, capsys):
    other = tmp_path / "other"
    quantize_checkpoint(str(demo.embedded_model()), other, LowBitConfig(method="rtn", bits=3))
    arguments = ["push", str(other), "user/other", "--dry-run", "--results", str(measured / "eval.json")]
    assert main(arguments) == 2
    assert "was measured on another checkpoint" in capsys.readouterr().err
    (tmp_path / "none.json").write_text("[]")
    assert main([*arguments[:-1], str(tmp_path / "none.json")]) == 2
    assert "is not what `hf-lowbit eval --json` prints" in capsys.readouterr().err
