"""The command line: parse and hand over. Exit code 0, 1 (the work failed) or 2 (the request cannot be served)."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from hf_lowbit import commands
from hf_lowbit._version import __version__
from hf_lowbit.errors import BadRequest, LowBitError, unknown_name


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    try:
        args, unknown = build_parser().parse_known_args(arguments)
        if unknown:
            options = re.findall(r"--[a-z-]+", args.parser.format_usage())
            raise BadRequest(unknown_name("argument", unknown[0], options))
        args.run(args)
    except BadRequest as error:
        return _fail(error, 2)
    except LowBitError as error:
        return _fail(error, 1)
    except KeyboardInterrupt as interruption:
        return _fail(str(interruption) or "interrupted; nothing was left behind.", 130)
    except BrokenPipeError:  # the reader of our output closed it, as `head` does
        sys.stderr.close()
        return 1
    return 0


def _fail(error: object, code: int) -> int:
    print(f"hf-lowbit: {error}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    """Reports a bad command line as every other bad request is reported."""

    def error(self, message: str) -> NoReturn:
        raise BadRequest(f"{message}. Run `{self.prog} --help` for what it takes.")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    # Abbreviated options would change their meaning as options are added.
    parser = _Parser(prog="hf-lowbit", description="Low-bit language models through Transformers.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"hf-lowbit {__version__}")
    added = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = _command(added, "demo", commands.run_demo, "quantize the embedded model every way and compare")
    demo.add_argument("--keep", metavar="DIR", help="keep the quantized checkpoints there")

    quantize = _command(added, "quantize", commands.run_quantize, "quantize a checkpoint into a new directory")
    quantize.add_argument("source", metavar="SRC", help="directory or Hub id of the model")
    quantize.add_argument("destination", metavar="DST", help="directory to write; must not hold anything yet")
    _add_method_options(quantize)
    quantize.add_argument("--restart", action="store_true", help="throw away what a killed run finished")
    quantize.add_argument(
        "--from-quantized",
        action="store_true",
        help="take over a GPTQ, AWQ, bitsandbytes NF4 or compressed-tensors checkpoint as it is, number for number",
    )

    merge = _command(
        added, "merge", commands.run_merge, "merge a PEFT adapter into a quantized checkpoint, as a new directory"
    )
    merge.add_argument("source", metavar="DIR", help="directory or Hub id of the quantized model; only read")
    merge.add_argument("adapter", metavar="ADAPTER", help="directory or Hub id of the adapter")
    merge.add_argument("destination", metavar="OUT", help="directory to write; must not hold anything yet")
    merge.add_argument(
        "--how",
        default="keep",
        help="keep: as the format's low-rank term, codes untouched (the default); resolve: quantize the sums again; "
        "dense: a dense bfloat16 checkpoint",
    )
    merge.add_argument("--method", help="data-free solver for --how resolve; each matrix's own unless given")

    plan = _command(added, "plan", commands.run_plan, "say what quantizing would need: peak memory, time, final size")
    plan.add_argument("source", metavar="SRC", help="directory or Hub id of the model; only its config is read")
    plan.add_argument("--for", dest="target", metavar="TARGET", help="say whether `export --to TARGET` could follow, too")
    _add_method_options(plan)

    export = _command(added, "export", commands.run_export, "write a quantized checkpoint in another tool's format")
    export.add_argument("directory", metavar="DIR")
    export.add_argument("destination", metavar="OUT", help="directory to write; for gguf, the file")
    export.add_argument("--to", required=True, metavar="TARGET", help="compressed-tensors, gptq, gguf or dense")
    export.add_argument("--dtype", metavar="D", help="of scales and dense weights; the checkpoint's own unless given")

    inspect = _command(added, "inspect", commands.run_inspect, "check a quantized checkpoint and count its bytes")
    inspect.add_argument("directory", metavar="DIR")
    inspect.add_argument(
        "--outliers",
        action="store_true",
        help="show where outliers sit instead, in any model: largest value of each input channel and column",
    )
    inspect.add_argument("--text", metavar="FILE", help="UTF-8 text to run through the model for that (the embedded one)")
    inspect.add_argument(
        "--transform",
        action="append",
        type=_transform,
        dest="transforms",
        metavar="T[:KEY=VALUE]",
        help="show what the transform leaves of them, too",
    )
    inspect.add_argument("--activation-bits", type=_number, metavar="N", help="for transforms that are fitted to rounding")
    inspect.add_argument("--plot", metavar="FILE", help="draw every channel of every layer (.png, .svg, .pdf or .html)")

    evaluate = _command(added, "eval", commands.run_eval, "perplexity or task scores of a model, beside a reference's")
    evaluate.add_argument("directory", metavar="DIR", help="directory or Hub id of the model, quantized or not")
    evaluate.add_argument("--text", metavar="FILE", help="UTF-8 text to measure on")
    evaluate.add_argument("--reference", metavar="SRC", help="the original, for divergence or document by document")
    evaluate.add_argument("--window", type=int, help="tokens per window of the text (512)")
    evaluate.add_argument("--characters", type=_count, metavar="N", help="only the first N characters of the text")
    evaluate.add_argument("--tasks", type=_names, metavar="A,B", help="lm-eval tasks to score instead (hf-lowbit[eval])")
    evaluate.add_argument("--tasks-dir", metavar="DIR", help="where YAML files of further tasks are")
    evaluate.add_argument("--limit", type=_count, metavar="N", help="only the first N documents of each task")
    evaluate.add_argument("--batch", type=_count, metavar="N", help="requests of tasks that run together (1)")
    evaluate.add_argument("--dtype", default="float32", choices=["auto", "float32", "bfloat16", "float16"])
    evaluate.add_argument("--device", default="cpu")

    bench = _command(added, "bench", commands.run_bench, "time decoding and prompt reading, and say which kernels ran")
    bench.add_argument("directory", metavar="DIR", help="directory or Hub id of the model, quantized or not")
    bench.add_argument("--reference", metavar="SRC", help="the original, timed in the same run for ratios")
    bench.add_argument("--batch", type=_count, action="append", metavar="N", help="sequences decoded together (1 and 8)")
    bench.add_argument(
        "--prompt", type=_count, default=128, metavar="TOKENS", help="length of the prompt that is read (128)"
    )
    bench.add_argument("--tokens", type=_count, default=32, metavar="N", help="decoding steps that are timed (32)")
    bench.add_argument("--threads", type=_count, metavar="N", help="torch threads; all cores unless given")
    bench.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], help="float32; on a GPU bfloat16")
    bench.add_argument("--device", default="cpu", metavar="NAME", help="where to measure: cpu, cuda or cuda:N (cpu)")
    bench.add_argument(
        "--tune",
        action="store_true",
        help="first measure block sizes of the GPU kernels for DIR, and keep them for this card",
    )

    report = _command(added, "report", commands.run_report, "write one HTML page about a quantized checkpoint")
    report.add_argument("directory", metavar="DIR", help="directory of the quantized checkpoint")
    report.add_argument("--html", required=True, metavar="OUT", help="the page to write; it loads nothing from elsewhere")
    report.add_argument("--reference", metavar="SRC", help="the original, for quality, error and text side by side")
    report.add_argument("--text", metavar="FILE", help="UTF-8 text to measure on (with --reference: embedded book text)")
    report.add_argument("--characters", type=_count, metavar="N", help="only the first N characters of the text")
    report.add_argument("--window", type=int, default=512, help="tokens per window (512)")
    report.add_argument(
        "--results", action="append", metavar="JSON", help="other models: what eval or demo --json printed, or eval/results"
    )
    report.add_argument("--prompt", metavar="TEXT", help="what the models continue")
    report.add_argument("--tokens", type=int, default=120, metavar="N", help="tokens to generate (120; 0 for none)")
    report.add_argument(
        "--detector", metavar="DIR", help="model that judges the texts; `none` for no verdict (the embedded model)"
    )

    detect = _command(added, "detect", commands.run_detect, "say who wrote texts, a person or a language model, or abstain")
    detect.add_argument("input", metavar="FILE|DIR|-", nargs="?", help="UTF-8 text, a directory of texts, or standard input")
    _add_detector_options(detect)

    calibrate = _command(added, "calibrate", commands.run_calibrate, "set a detector's thresholds from texts people wrote")
    calibrate.add_argument("human", metavar="FILE|DIR", help="JSON lines with a text each, or a directory of text files")
    calibrate.add_argument("output", metavar="JSON", help="the calibration to write; must not exist yet")
    calibrate.add_argument(
        "--machine", metavar="FILE|DIR", help="texts of the machines to be told apart, for verdicts of human"
    )
    calibrate.add_argument(
        "--fpr", type=float, default=0.01, help="share of people's texts that may be called a machine's (0.01)"
    )
    calibrate.add_argument("--language", default="en", help="what the texts are written in (en)")
    calibrate.add_argument("--source", default="", metavar="WORDS", help="what the texts are")
    _add_backbone_options(calibrate)

    push = _command(added, "push", commands.run_push, "publish a quantized checkpoint on the Hub, with its model card")
    push.add_argument("directory", metavar="DIR")
    push.add_argument("repository", metavar="REPO", help="user/name; made if it does not exist")
    push.add_argument("--private", action="store_true", default=None, help="make the repository private")
    push.add_argument("--revision", metavar="BRANCH", help="branch to push to; made if it does not exist")
    push.add_argument("--results", action="append", metavar="FILE", help="`eval --json` output to show (DIR/eval*.json)")
    push.add_argument("--base-model", metavar="ID", help="the original's Hub id, where it was quantized from a directory")
    push.add_argument("--dry-run", action="store_true", help="check everything and print the card; ask nobody, send nothing")

    _command(added, "doctor", commands.run_doctor, "say what this machine has and what works here")
    return parser


def _command(added: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser = added.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.set_defaults(run=run, parser=parser)
    return parser


def _add_method_options(parser: argparse.ArgumentParser) -> None:
    """Options that become ``LowBitConfig`` settings; what is not given keeps the config's default."""
    add = parser.add_argument
    add("--method", help="solver (`hf-lowbit doctor` lists them)")
    add("--bits", type=_number, help="code width, 1 to 8")
    add("--group-size", type=int, help="weights per scale; -1 for one scale per row")
    add("--levels", help="level family, where the method takes several")
    add("--scale-bits", type=int, help="16, or 8 or 6 under one fp16 super-scale per 256 weights")
    add("--outliers", type=float, metavar="F", help="fraction of weights kept beside the codes in fp16")
    add("--residual-terms", type=int, metavar="N", help="additive terms per matrix")
    add("--skip", action="append", dest="modules_to_not_convert", metavar="PATTERN", help="leave these modules alone")
    add("--override", action="append", type=_override, metavar="PATTERN:KEY=VALUE", help="other settings there")
    add("--no-quantize-embeddings", action="store_false", dest="quantize_embeddings", default=None)
    add("--calibration", metavar="FILE", help="text or JSON-lines file, or name of a data set, for calibrated methods")
    add("--sequences", type=_count, metavar="N", help="calibration windows (128)")
    add("--length", type=_count, metavar="TOKENS", help="tokens of a calibration window (512)")
    add("--option", action="append", type=_setting, metavar="KEY=VALUE", help="a setting of the method's own (see doctor)")
    add(
        "--transform",
        action="append",
        type=_transform,
        dest="transforms",
        metavar="T[:KEY=VALUE]",
        help="rewrite the model first (see doctor)",
    )
    add("--activation-bits", type=_number, metavar="N", help="round the inputs of matrices to N bits, 2 to 8")
    add(
        "--activation",
        action="append",
        type=_setting,
        metavar="KEY=VALUE",
        help="how: per=token|tensor|group, static=true, symmetric=true, group_size=N",
    )
    add("--target-size", metavar="SIZE", help="total size to reach, such as 2GB")
    add("--seed", type=int)
    add("--strict", action="store_true", default=None, help="fail where a large matrix would stay in high precision")


def _add_detector_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_backbone_options(parser)
    add("--calibration", metavar="JSON", help="thresholds of this detector; the checkpoint's own unless given")
    add("--score", metavar="NAME", help="the score verdicts rest on: spot, log_rank, fast_detectgpt, ... (fast_detectgpt)")
    add("--html", metavar="OUT", help="write a page with heat maps that works without any network")
    add("--serve", action="store_true", help="open a local web page instead (pip install 'hf-lowbit[serve]')")
    add("--port", type=_count, default=7860, help="of the web page (7860)")


def _add_backbone_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--detector", metavar="DIR", help="directory or Hub id of a causal LM, quantized or not (the embedded model)")
    add("--observer", metavar="DIR", help="a second model of the same tokenizer, for the score binoculars")
    add("--dtype", default="float32", choices=["auto", "float32", "bfloat16", "float16"])
    add("--device", default="cpu")


def _number(text: str) -> float | int:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    return int(value) if value.is_integer() else value


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r} names no task")
    return names


def _override(text: str) -> tuple[str, dict[str, Any]]:
    pattern, _, setting = text.rpartition(":")
    if not (pattern and re.fullmatch("[^=]+=.+", setting)):
        raise argparse.ArgumentTypeError(f"{text!r} is not PATTERN:KEY=VALUE, such as down_proj:bits=6")
    return pattern, _setting(setting)


def _transform(text: str) -> Any:
    name, *settings = text.split(":")
    return {"name": name, **{key: value for one in settings for key, value in _setting(one).items()}} if settings else name


def _setting(text: str) -> dict[str, Any]:
    key, _, value = text.partition("=")
    if not (key and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE, such as damping=0.02")
    try:
        return {key: json.loads(value)}
    except json.JSONDecodeError:
        return {key: value}


if __name__ == "__main__":
    sys.exit(main())
