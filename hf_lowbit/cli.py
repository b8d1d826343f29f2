"""The command line: parse, call, print. Exit code 0, 1 (the work failed) or 2 (the request cannot be served)."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

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
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = _command(commands, "demo", run_demo, "quantize the embedded model every way and compare")
    demo.add_argument("--keep", metavar="DIR", help="keep the quantized checkpoints there")

    quantize = _command(commands, "quantize", run_quantize, "quantize a checkpoint into a new directory")
    quantize.add_argument("source", metavar="SRC", help="directory or Hub id of the model")
    quantize.add_argument("destination", metavar="DST", help="directory to write; must not hold anything yet")
    _add_method_options(quantize)
    quantize.add_argument("--restart", action="store_true", help="throw away what a killed run finished")

    plan = _command(commands, "plan", run_plan, "say what quantizing would need: peak memory, time, final size")
    plan.add_argument("source", metavar="SRC", help="directory or Hub id of the model; only its config is read")
    _add_method_options(plan)

    inspect = _command(commands, "inspect", run_inspect, "check a quantized checkpoint and count its bytes")
    inspect.add_argument("directory", metavar="DIR")

    evaluate = _command(commands, "eval", run_eval, "perplexity of a model, and its divergence from a reference")
    evaluate.add_argument("directory", metavar="DIR", help="directory or Hub id of the model, quantized or not")
    evaluate.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text to measure on")
    evaluate.add_argument("--reference", metavar="SRC", help="the original, for KL and top-1 agreement")
    evaluate.add_argument("--window", type=int, default=512, help="tokens per window (512)")
    evaluate.add_argument("--characters", type=_count, metavar="N", help="only the first N characters of the text")
    evaluate.add_argument("--dtype", default="float32", choices=["auto", "float32", "bfloat16", "float16"])
    evaluate.add_argument("--device", default="cpu")

    _command(commands, "doctor", run_doctor, "say what this machine has and what works here")
    return parser


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
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
    add("--transform", action="append", dest="transforms", metavar="T", help="rewrite the model first")
    add("--activation-bits", type=int, metavar="N")
    add("--target-size", metavar="SIZE", help="total size to reach, such as 2GB")
    add("--seed", type=int)
    add("--strict", action="store_true", default=None, help="fail where a large matrix would stay in high precision")


SETTINGS = (
    *("method", "bits", "group_size", "levels", "scale_bits", "outliers", "residual_terms", "modules_to_not_convert"),
    *("quantize_embeddings", "calibration", "transforms", "activation_bits", "target_size", "seed", "strict"),
)


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


def _override(text: str) -> tuple[str, dict[str, Any]]:
    pattern, _, setting = text.rpartition(":")
    if not (pattern and re.fullmatch("[^=]+=.+", setting)):
        raise argparse.ArgumentTypeError(f"{text!r} is not PATTERN:KEY=VALUE, such as down_proj:bits=6")
    return pattern, _setting(setting)


def _setting(text: str) -> dict[str, Any]:
    key, _, value = text.partition("=")
    if not (key and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE, such as damping=0.02")
    try:
        return {key: json.loads(value)}
    except json.JSONDecodeError:
        return {key: value}


def run_demo(args: argparse.Namespace) -> None:
    """The comparison table of the embedded model."""
    from hf_lowbit import demo
    from hf_lowbit.plugin import checkpoint

    checkpoint.show_progress(False)
    progress = (lambda text: None) if args.json else (lambda text: print(text, file=sys.stderr))
    rows = demo.run_demo(progress, args.keep)
    if args.json:
        return _print_json({"text": str(demo.held_out_text()), "rows": rows})
    columns = ("model", "bits/weight", "file bytes", "perplexity", "KL (nats)", "top-1")
    cells = [
        (r["model"], f"{r['bits_per_weight_linears']:.3f}", f"{r['bytes']:,}", f"{r['perplexity']:.3f}",
         f"{r['kl']:.5f}", f"{100 * r['top1_agreement']:.1f} %") for r in rows
    ]  # fmt: skip
    _print_table("embedded model, held-out text, reloaded in a fresh process", columns, cells)
    print(f"\nContinuations of {demo.PROMPT!r} (greedy):")
    for row in rows:
        if row["model"] == "original" or row["model"].endswith("codebook"):
            print(f"  {row['model']:18} {' '.join(row['text'].split())}")


def config_from(args: argparse.Namespace) -> Any:
    """The ``LowBitConfig`` a command line asks for."""
    from hf_lowbit.plugin import LowBitConfig

    given = vars(args)
    settings = {name: given[name] for name in SETTINGS if given[name] is not None}
    overrides: dict[str, dict[str, Any]] = {}
    for pattern, change in args.override or []:
        overrides.setdefault(pattern, {}).update(change)
    sizes = {name: given[name] for name in ("sequences", "length") if given[name] is not None}
    if sizes and args.calibration is None:
        raise BadRequest(
            "--sequences and --length say how much of the calibration text to use; give --calibration FILE too."
        )
    if sizes:
        settings["calibration"] = {"source": args.calibration} | sizes
    options = {key: value for option in args.option or [] for key, value in option.items()}
    return LowBitConfig(overrides=overrides, options=options, **settings)


def run_quantize(args: argparse.Namespace) -> None:
    """Quantize SRC into DST."""
    from hf_lowbit.plugin import checkpoint

    config = config_from(args)
    drawn = sys.stderr.isatty() and not args.json
    checkpoint.show_progress(drawn)
    try:
        with _progress_bar("blocks", drawn) as progress:
            report, rows = checkpoint.quantize_checkpoint(args.source, args.destination, config, args.restart, progress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; finished blocks are kept: the same command goes on from there.") from None
    if os.environ.get("RANK", "0") != "0":
        return  # torchrun starts several; the first one speaks
    if args.json:
        return _print_json(_contents_json(args.destination) | {"destination": args.destination, "report": rows})
    print(report)
    if any("error" in row for row in rows):
        _print_report(rows)
    print(f"written to {args.destination}")


def _print_report(rows: Sequence[dict[str, Any]]) -> None:
    cells = []
    for row in rows:
        error = f"{row['error']:.2e}" if "error" in row else ""
        if "loss_before" in row:
            error = f"{row['loss_before']:.3e} -> {row['loss_after']:.3e}"
        note = row.get("fallback", "")
        damping = f"{row['damping']:g}" if "damping" in row else ""
        bits = f"{row['bits_per_weight']:.3f}" if "bits_per_weight" in row else ""
        cells.append((row["name"], bits, error, damping, str(row.get("tokens", "")), f"{row.get('seconds', 0):.1f}", note))
    _print_table("how it was solved", ("matrix", "bits/weight", "error", "damping", "tokens", "seconds", "note"), cells)


def run_plan(args: argparse.Namespace) -> None:
    """Print what quantizing SRC would need."""
    from hf_lowbit.plugin.plan import plan

    found = plan(args.source, config_from(args))
    if args.json:
        return _print_json(found.to_json())
    print(f"result     {found.bytes:,} bytes, {found.bits_per_weight:.3f} bits per weight inside blocks")
    print(f"memory     {found.peak_bytes / 1e6:,.0f} MB at the peak, beside the program itself (0.5 GB)")
    spent = ", ".join(f"{name} {seconds:,.0f} s" for name, seconds in found.parts.items() if seconds >= 0.5)
    print(f"time       about {found.seconds:,.0f} s on this machine{f': {spent}' if spent else ''}")


def run_inspect(args: argparse.Namespace) -> None:
    """Verify checksums and print the ledger of a directory."""
    if args.json:
        return _print_json(_contents_json(args.directory))
    from hf_lowbit.format import ledger
    from hf_lowbit.plugin import checkpoint

    contents = checkpoint.read_contents(args.directory)
    cells = []
    for name, layout in contents.record.layouts.items():
        counted, first = ledger(layout), layout.stages[0]
        shape = "x".join(map(str, layout.shape))
        cells.append((name, shape, first.levels.family, str(first.bits), str(first.group_size),
                      f"{counted.bits_per_weight:.3f}", f"{counted.bytes:,}"))  # fmt: skip
    columns = ("matrix", "shape", "levels", "bits", "group", "bits/weight", "bytes")
    _print_table(f"{args.directory}: all checksums hold", columns, cells)
    for name, size in contents.dense.items():
        print(f"{name}: high precision, {size:,} bytes. {contents.record.kept.get(name, '')}")
    blocks = ledger(contents.record.block_layouts)
    kinds = ", ".join(f"{kind} {size:,}" for kind, size in ledger(contents.record.layouts.values()).bytes_by_kind.items())
    print(f"bytes: {kinds}, high precision {sum(contents.dense.values()):,}, headers {contents.header_bytes:,}")
    print(f"files {contents.file_bytes:,} bytes, {contents.bits_per_weight_model:.3f} bits per weight over the whole model,")
    print(f"{blocks.bits_per_weight:.3f} in the quantized matrices inside blocks, all metadata counted")


def run_eval(args: argparse.Namespace) -> None:
    """Perplexity, divergence and size of a model."""
    from hf_lowbit import measure
    from hf_lowbit.plugin import checkpoint

    checkpoint.show_progress(sys.stderr.isatty() and not args.json)
    text = _read_text(args.text, args.characters)
    sizes = _sizes(args.directory)
    ids = checkpoint.tokenize(checkpoint.load_tokenizer(args.directory), text)
    window = measure.windows(ids, args.window).shape[1]  # refuses a text too short before a model is loaded
    model = checkpoint.load_model(args.directory, args.dtype, args.device)
    checkpoint.check_fits(model, ids, window)
    out: dict[str, Any] = {"method": sizes.pop("method")}
    with _progress_bar("windows", sys.stderr.isatty() and not args.json) as progress:
        if args.reference:
            reference = checkpoint.load_model(args.reference, args.dtype, args.device)
            checkpoint.check_fits(reference, ids, window)
            found = measure.divergence(model, reference, ids, args.window, progress)
            out |= {"perplexity": found.perplexity, "reference_perplexity": found.reference_perplexity}
            out |= {"kl": found.kl, "top1_agreement": found.top1_agreement, "tokens": found.tokens}
        else:
            plain = measure.perplexity(model, ids, args.window, progress)
            out |= {"perplexity": plain.perplexity, "kl": None, "top1_agreement": None, "tokens": plain.tokens}
    broken = [key for key, value in out.items() if isinstance(value, float) and not math.isfinite(value)]
    if broken:
        raise LowBitError(f"{broken[0]} is {out[broken[0]]}: on this text the logits are not finite. Check the weights.")
    out |= sizes
    if args.json:
        return _print_json(out)
    for key, value in out.items():
        if value is not None:
            print(f"{key:24} {value:,.5f}" if isinstance(value, float) else f"{key:24} {value:,}" if isinstance(value, int)
                  else f"{key:24} {value}")  # fmt: skip


def run_doctor(args: argparse.Namespace) -> None:
    """Versions, devices, registration, backends and methods."""
    from hf_lowbit.plugin import doctor

    report = doctor.examine()
    if args.json:
        return _print_json(report)
    for part, lines in report.items():
        print(part)
        for name, value in lines.items():
            print(f"  {name:22} {value}")


def _read_text(file: str, characters: int | None) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")[:characters]
    except OSError as error:
        raise BadRequest(f"cannot read {file!r}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise BadRequest(f"{file!r} is not UTF-8 text ({error.reason} at byte {error.start}).") from error


def _sizes(directory: str) -> dict[str, Any]:
    """Method, file bytes and bits per weight of a checkpoint on disk; None for what a Hub id or dense model lacks."""
    from hf_lowbit.plugin import checkpoint

    if not checkpoint.is_low_bit(directory):
        size = sum(file.stat().st_size for file in Path(directory).glob("*.safetensors")) or None
        return {"method": None, "bytes": size, "bits_per_weight_linears": None, "bits_per_weight_model": None}
    found = _contents_json(directory)
    return {key: found[key] for key in ("method", "bytes", "bits_per_weight_linears", "bits_per_weight_model")}


def _contents_json(directory: str) -> dict[str, Any]:
    from hf_lowbit.format import ledger
    from hf_lowbit.plugin import checkpoint

    contents = checkpoint.read_contents(directory)
    return {
        "method": contents.config.method,
        "bytes": contents.file_bytes,
        "header_bytes": contents.header_bytes,
        "bits_per_weight_linears": ledger(contents.record.block_layouts).bits_per_weight,
        "bits_per_weight_model": contents.bits_per_weight_model,
        "bytes_by_kind": ledger(contents.record.layouts.values()).bytes_by_kind,
        "tensors": {
            name: layout.to_json() | {"bits_per_weight": ledger(layout).bits_per_weight}
            for name, layout in contents.record.layouts.items()
        },
        "high_precision": {
            name: {"bytes": size, "reason": contents.record.kept.get(name)} for name, size in contents.dense.items()
        },
        "config": contents.config.to_dict(),
    }


def _progress_bar(label: str, on: bool) -> Any:
    """A context that gives ``progress(done, total)``, drawn on stderr if ``on``."""
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import Progress, TimeElapsedColumn

    @contextmanager
    def bar() -> Any:
        columns = (*Progress.get_default_columns(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), disable=not on, transient=True) as drawn:
            task = drawn.add_task(label, total=None)
            yield lambda done, total, name="": drawn.update(task, completed=done, total=total, description=f"{label} {name}")

    return bar()


def _print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 160
    Console(width=width).print(table)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


if __name__ == "__main__":
    sys.exit(main())
