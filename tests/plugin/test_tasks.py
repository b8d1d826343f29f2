"""``eval --tasks``: scores recomputed by hand, answers paired by document, everything that matters in the manifest."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'hf-lowbit[eval]'")

from hf_lowbit import demo
from hf_lowbit.cli import main
from hf_lowbit.errors import LowBitError
from hf_lowbit.kernels import cpu
from hf_lowbit.measure.tasks import Tasks, rows_of
from hf_lowbit.plugin import checkpoint
from hf_lowbit.plugin.config import LowBitConfig
from hf_lowbit.plugin.evaluate import Setting, run_model
from hf_lowbit.plugin.identity import checkpoint_identity

_spec = importlib.util.spec_from_file_location("commands", Path(__file__).parents[1] / "commands.py")
commands = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(commands)
refused = commands.refused
SOURCE = str(demo.embedded_model())
NAMES = "tiny_choice,tiny_write,tiny_ends,tiny_pages"
LOCAL = Path(__file__).parents[2] / "eval" / "tasks"


@pytest.fixture(scope="module")
def files(load_test_module):
    return load_test_module("plugin/task_files.py")


@pytest.fixture(scope="module")
def folder(files, tmp_path_factory) -> str:
    return str(files.write_tasks(tmp_path_factory.mktemp("data") / "tasks"))


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Data sets are cached in a directory of this test."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="module")
def low(tmp_path_factory) -> str:
    """Two bits by rounding, which answers badly enough to differ."""
    target = tmp_path_factory.mktemp("low") / "rtn-2"
    checkpoint.quantize_checkpoint(SOURCE, target, LowBitConfig(method="rtn", bits=2))
    return str(target)


def run(capsys, *arguments: object) -> str:
    """Standard output of a command that succeeds."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


@pytest.fixture(scope="module")
def found(low, folder) -> dict:
    """What ``eval --json`` says of it beside the original."""
    out = io.StringIO()
    command = ["eval", low, "--tasks", NAMES, "--tasks-dir", folder, "--reference", SOURCE, "--batch", "4", "--json"]
    with contextlib.redirect_stdout(out), cpu.arithmetic("exact"):
        assert main(command) == 0
    return json.loads(out.getvalue())


def by_name(found: dict) -> dict:
    return {(row["task"], row["metric"]): row for row in found["tasks"]}


def log_likelihood(model, tokenizer, context: str, text: str) -> float:
    """Nats of ``text`` after ``context``, by one plain forward pass."""
    whole = tokenizer(context + text).input_ids if context else [tokenizer.bos_token_id, *tokenizer(text).input_ids]
    start = len(tokenizer(context).input_ids) if context else 1
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(logs[place - 1, whole[place]].item() for place in range(start, len(whole)))


@pytest.fixture
def exact():
    """Rounded activations would amplify what two ways to sum attention differ by; ``found`` was computed so, too."""
    with cpu.arithmetic("exact"):
        yield


@pytest.mark.usefixtures("exact")
def test_scores_are_those_of_plain_forward_passes(found, low, files):
    rows = by_name(found)
    tokenizer = checkpoint.load_tokenizer(SOURCE)
    for source, key in ((low, "score"), (SOURCE, "reference")):
        model = checkpoint.load_model(source, "float32")
        likely = [[log_likelihood(model, tokenizer, row["q"], choice) for choice in row["choices"]] for row in files.CHOICES]
        right = [scores.index(max(scores)) == row["gold"] for scores, row in zip(likely, files.CHOICES, strict=True)]
        assert rows["tiny_choice", "acc"][key] == sum(right) / len(right)
        ends = [log_likelihood(model, tokenizer, row["q"], " " + row["a"]) for row in files.ENDS]
        assert rows["tiny_ends", "perplexity"][key] == pytest.approx(math.exp(-sum(ends) / len(ends)), rel=1e-3)
        nats = sum(log_likelihood(model, tokenizer, "", row["page"]) for row in files.PAGES)
        size = sum(len(row["page"].encode()) for row in files.PAGES)
        assert rows["tiny_pages", "byte_perplexity"][key] == pytest.approx(math.exp(-nats / size), rel=1e-4)


def test_answers_are_paired(found):
    for (_, metric), row in by_name(found).items():
        assert row["difference"] == pytest.approx(row["score"] - row["reference"])
        assert row["interval"][0] <= row["difference"] <= row["interval"][1]
        if metric in ("acc", "exact_match"):
            assert row["only_score"] - row["only_reference"] == pytest.approx(row["difference"] * row["documents"])
            assert 0 < row["p_value"] <= 1
        else:
            assert row["p_value"] is None and row["only_score"] is None
    rows = by_name(found)
    assert rows["tiny_pages", "byte_perplexity"]["recovery"] < 90
    assert rows["tiny_pages", "byte_perplexity"]["interval"][0] > 0  # every page is predicted worse
    assert rows["tiny_choice", "acc"]["reference"] == 1


def test_the_manifest_says_what_the_scores_depend_on(found, low):
    manifest, inspected = found["manifest"], checkpoint.read_contents(low)
    for name in ("lm_eval", "transformers", "torch", "tokenizers", "hf-lowbit"):
        assert manifest["versions"][name] == version(name)
    assert manifest["tasks"]["tiny_choice"]["version"] == 0.1
    assert manifest["tasks"]["tiny_choice"]["documents"] == 8
    assert {task["num_fewshot"] for task in manifest["tasks"].values()} == {0}
    assert (manifest["limit"], manifest["batch_size"], manifest["dtype"], manifest["device"]) == (None, 4, "float32", "cpu")
    assert manifest["chat_template"] == {"applied": False, "sha256": None}
    assert manifest["add_bos"] is False
    assert set(manifest["seeds"]) >= {"random_seed", "fewshot_random_seed", "bootstrap_seed"}
    assert checkpoint_identity(inspected.record).items() <= manifest["model"].items()
    assert manifest["model"]["name"] == "rtn-2"  # of a directory only its name
    assert manifest["reference"]["tokenizer"] == manifest["tokenizer"]
    assert found["bytes"] == inspected.file_bytes


def test_a_limit_takes_the_first_documents_and_is_told(capsys, low, folder, found):
    limited = json.loads(run(capsys, "eval", low, "--tasks", "tiny_choice", "--tasks-dir", folder, "--limit", 3, "--json"))
    (row,) = limited["tasks"]
    assert row["documents"] == 3 and "reference" not in row
    assert row["score_interval"][0] <= row["score"] <= row["score_interval"][1]
    assert limited["manifest"]["limit"] == 3
    whole = found["manifest"]["tasks"]["tiny_choice"]
    assert limited["manifest"]["tasks"]["tiny_choice"]["documents_sha256"] != whole["documents_sha256"]
    assert limited["manifest"]["tasks"]["tiny_choice"]["config_sha256"] == whole["config_sha256"]


def test_a_model_against_itself_and_the_printed_table(capsys, folder):
    out = run(capsys, "eval", SOURCE, "--tasks", "tiny_ends", "--tasks-dir", folder, "--reference", SOURCE)
    lines = [line for line in out.splitlines() if "tiny_ends" in line and "│" in line]
    assert len(lines) == 2
    for line in lines:
        assert "100.0 %" in line
        assert "+0.0000 to +0.0000" in line
    assert "McNemar p" in out


def test_runs_of_other_documents_are_not_paired(low, folder):
    tasks = Tasks(["tiny_choice"], folder)
    first, second = (run_model(tasks, low, Setting(limit=limit))[0] for limit in (3, 4))
    with pytest.raises(LowBitError, match="were not asked the same"):
        rows_of(first, second)


def test_bad_requests(tmp_path, refused, folder, monkeypatch):
    refused(2, ["eval", SOURCE], "give --text FILE", "or --tasks")
    refused(2, ["eval", SOURCE, "--text", "x", "--tasks", "a"], "one of them a run")
    refused(2, ["eval", SOURCE, "--text", "x", "--limit", "3"], "--limit goes with --tasks, and --text was given")
    refused(2, ["eval", SOURCE, "--tasks", "a", "--window", "3"], "--window goes with --text, and --tasks was given")
    refused(2, ["eval", SOURCE, "--tasks", ","], "names no task")
    refused(2, ["eval", SOURCE, "--tasks", "tiny_choice", "--tasks-dir", tmp_path], "holds no task")
    Path(folder, "lost.yaml").write_text(
        "task: lost\ndataset_path: json\ndataset_kwargs: {data_files: {test: nowhere.jsonl}}\n"
    )
    refused(2, ["eval", SOURCE, "--tasks", "lost", "--tasks-dir", folder], "the data of lost cannot be had", "nowhere.jsonl")
    Path(folder, "lost.yaml").unlink()
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    refused(2, ["eval", SOURCE, "--tasks", "a"], "--tasks needs lm-eval", "pip install 'hf-lowbit[eval]'")


def test_an_unknown_task_is_refused_with_the_nearest(folder, refused, monkeypatch):
    from lm_eval.tasks import TaskManager

    stock = TaskManager.__init__
    # All of lm-eval's own YAML files take half a minute to read.
    monkeypatch.setattr(
        TaskManager, "__init__", lambda self, **options: stock(self, **options | {"include_defaults": False})
    )
    refused(
        2, ["eval", SOURCE, "--tasks", "tiny_choise", "--tasks-dir", folder], "unknown task 'tiny_choise'", "tiny_choice"
    )


ENDINGS = {"text": ["ice", "iron"], "label": ["A", "B"]}
LOCAL_ROWS = {
    "arc_easy": {"question": "What melts in the sun?", "choices": ENDINGS, "answerKey": "A"},
    "openbookqa": {"question_stem": "In the sun melts", "choices": ENDINGS, "answerKey": "A"},
    "piqa": {"goal": "Open a door.", "sol1": "Turn the handle.", "sol2": "Eat the handle.", "label": 0},
    "winogrande": {"sentence": "Ann thanked Eve because _ had helped.", "option1": "Ann", "option2": "Eve", "answer": "2"},
    "hellaswag_1k": {
        "activity_label": "Fishing", "ctx_a": "A man sits by a lake.", "ctx_b": "he",
        "endings": ["[step] waits.", "flies.", "sings.", "melts."], "label": "0",
    },
    "blimp_100per": {"sentence_good": "The cats sleep.", "sentence_bad": "The cats sleeps.", "pair_id": 1},
    "lambada_openai": {"text": "She opened the old door and went into the house"},
}  # fmt: skip


def test_the_tasks_of_the_checkout_read_their_files(tmp_path, monkeypatch, refused):
    monkeypatch.delenv("HF_LOWBIT_TASK_DATA", raising=False)
    refused(2, ["eval", SOURCE, "--tasks", "local_piqa", "--tasks-dir", LOCAL], "set HF_LOWBIT_TASK_DATA", "piqa.jsonl")
    for name, row in (LOCAL_ROWS | {"arc_challenge": LOCAL_ROWS["arc_easy"]}).items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join([json.dumps(row)] * 2), encoding="utf-8")
    monkeypatch.setenv("HF_LOWBIT_TASK_DATA", str(tmp_path))
    run, manifest = run_model(Tasks(["local"], LOCAL), SOURCE, Setting(batch=8))
    assert len(manifest["tasks"]) == len(list(LOCAL.glob("*.yaml"))) == 9
    assert {metric.task for metric in run.metrics} == set(manifest["tasks"])
    assert all(len(metric.values) == 2 and math.isfinite(metric.score) for metric in run.metrics)
