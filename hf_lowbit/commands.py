"""What each command of the command line does: call the package, print a table or one JSON object."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_lowbit.errors import BadRequest, LowBitError

SETTINGS = (
    *("method", "bits", "group_size", "levels", "scale_bits", "outliers", "residual_terms", "modules_to_not_convert"),
    *("quantize_embeddings", "calibration", "transforms", "activation_bits", "target_size", "seed", "strict"),
)

# Options that are put together to a setting, and options of another name than their setting.
IN_PARTS = ("override", "option", "activation", "sequences", "length")
OPTIONS = {
    "modules_to_not_convert": "--skip",
    "transforms": "--transform",
    "quantize_embeddings": "--no-quantize-embeddings",
}

# Text that --outliers runs: ranges of channels hardly move after a few thousand tokens.
OUTLIER_CHARACTERS = 40_000


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
    if args.activation:
        if args.activation_bits is None:
            raise BadRequest("--activation says how activations are rounded; give --activation-bits N too.")
        shape = {key: value for setting in args.activation for key, value in setting.items()}
        settings["activation_bits"] = {"bits": args.activation_bits} | shape
    options = {key: value for option in args.option or [] for key, value in option.items()}
    return LowBitConfig(overrides=overrides, options=options, **settings)


def run_quantize(args: argparse.Namespace) -> None:
    """Quantize SRC into DST."""
    from hf_lowbit.plugin import checkpoint

    if args.from_quantized:
        return _import_quantized(args)
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


def _import_quantized(args: argparse.Namespace) -> None:
    """Take over a checkpoint of another tool."""
    from hf_lowbit.plugin import foreign

    given = next((name for name in (*SETTINGS, *IN_PARTS) if vars(args)[name] is not None), None)
    if given is not None:
        option = OPTIONS.get(given, f"--{given}".replace("_", "-"))
        raise BadRequest(
            f"{option} chooses how to quantize; --from-quantized takes a checkpoint over as it is. Leave one of the two out."
        )
    try:
        with _progress_bar("layers", sys.stderr.isatty() and not args.json) as progress:
            rows = foreign.import_checkpoint(args.source, args.destination, args.restart, progress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; finished layers are kept: the same command goes on from there.") from None
    found = _contents_json(args.destination)
    if args.json:
        return _print_json(found | {"destination": args.destination, "report": rows})
    print(f"{len(rows)} matrices of {found['config']['options']['source']} taken over, bit for bit:")
    print(f"{found['bits_per_weight_linears']:.3f} bits per weight, files {found['bytes']:,} bytes")
    print(f"written to {args.destination}")


def run_merge(args: argparse.Namespace) -> None:
    """Merge ADAPTER into DIR as OUT."""
    from hf_lowbit.plugin import checkpoint
    from hf_lowbit.plugin.adapters import merge_checkpoint

    checkpoint.show_progress(sys.stderr.isatty() and not args.json)
    report = merge_checkpoint(args.source, args.adapter, args.destination, args.how, args.method)
    sizes = _sizes(args.destination)
    if args.json:
        return _print_json(report.to_json() | sizes | {"destination": args.destination})
    cells = [(row.name, f"{row.error:.2e}", f"{row.update:.2e}") for row in report.rows]
    cells.append(("all", f"{report.error:.2e}", f"{report.update:.2e}"))
    _print_table(f"{args.how}: relative Frobenius norms", ("matrix", "error added", "size of the update"), cells)
    bits = sizes["bits_per_weight_linears"]
    print(f"written to {args.destination}, {sizes['bytes']:,} bytes" + (f", {bits:.3f} bits per weight" if bits else ""))


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

    config = config_from(args)
    found, answer = plan(args.source, config), None
    if args.target is not None:
        from hf_lowbit.plugin.exportable import exportable

        answer = exportable(args.source, config, args.target)
    if args.json:
        return _print_json(found.to_json() | ({} if answer is None else {"export": answer.to_json()}))
    print(f"result     {found.bytes:,} bytes, {found.bits_per_weight:.3f} bits per weight inside blocks")
    print(f"memory     {found.peak_bytes / 1e6:,.0f} MB at the peak, beside the program itself (0.5 GB)")
    spent = ", ".join(f"{name} {seconds:,.0f} s" for name, seconds in found.parts.items() if seconds >= 0.5)
    print(f"time       about {found.seconds:,.0f} s on this machine{f': {spent}' if spent else ''}")
    if answer is not None and answer.exportable:
        print(f"export     can be written as {answer.target}: {_forms(answer.forms)}")
    elif answer is not None:
        print(f"export     cannot be written as {answer.target}: {answer.reason}")
        print(f"           Settings that can: {answer.advice}")


def run_export(args: argparse.Namespace) -> None:
    """Write DIR in another format."""
    from hf_lowbit.plugin.export import export_checkpoint

    with _progress_bar("matrices", sys.stderr.isatty() and not args.json) as progress:
        found = export_checkpoint(args.directory, args.destination, args.to, args.dtype, progress)
    if args.json:
        return _print_json({"destination": args.destination, "to": args.to, **vars(found)})
    print(f"{_forms(found.forms)}; {found.bytes:,} bytes")
    for note in found.notes:
        print(f"note: {note}")
    print(f"written to {args.destination}")


def _forms(forms: dict[str, int]) -> str:
    return ", ".join(f"{count} matrices {name}" for name, count in forms.items())


def run_inspect(args: argparse.Namespace) -> None:
    """Verify checksums and print the ledger of a directory, or where the outliers of a model sit."""
    if args.outliers:
        return _run_outliers(args)
    given = next(
        (name for name in ("text", "transforms", "activation_bits", "plot") if getattr(args, name) is not None), None
    )
    if given is not None:
        raise BadRequest(f"--{given.replace('_', '-').removesuffix('s')} goes with --outliers.")
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


def _run_outliers(args: argparse.Namespace) -> None:
    from hf_lowbit.demo import held_out_text
    from hf_lowbit.plugin import LowBitConfig, checkpoint, outliers

    checkpoint.show_progress(sys.stderr.isatty() and not args.json)
    if args.plot:
        outliers.check_plot(Path(args.plot))
    config = LowBitConfig(method="rtn", transforms=args.transforms or [], activation_bits=args.activation_bits)
    text = _read_text(args.text or str(held_out_text()), OUTLIER_CHARACTERS)
    ids = checkpoint.tokenize(checkpoint.load_tokenizer(args.directory), text)
    windows = ids[: len(ids) // 256 * 256].view(-1, 256) if len(ids) >= 256 else ids[None]
    model = checkpoint.load_model(args.directory, "float32")
    checkpoint.check_fits(model, ids, windows.shape[1])
    before = outliers.examine(model, windows)
    later = outliers.after(model, config, windows) if config.transforms else None
    title = f"{Path(args.directory).name}" + (f" and {', '.join(map(str, config.transforms))}" if config.transforms else "")
    if args.plot:
        outliers.plot(args.plot, before, later, title)
    pairs = [(one, next((x for x in later or () if x.name == one.name), None)) for one in before]
    if args.json:
        rows = [{"before": one.summary(), "after": other and other.summary()} for one, other in pairs]
        return _print_json({"directory": args.directory, "tokens": windows.numel(), "matrices": rows})
    _print_table(f"{title}: {windows.numel():,} tokens", outliers.COLUMNS, [outliers.cells(*pair) for pair in pairs])
    if args.plot:
        print(f"drawn to {args.plot}")


def run_eval(args: argparse.Namespace) -> None:
    """Perplexity, divergence and size of a model, or its scores on tasks."""
    given = [name for name in ("text", "tasks") if getattr(args, name)]
    if len(given) != 1:
        raise BadRequest(
            "give --text FILE to measure perplexity on, or --tasks A,B to score, one of them a run. "
            "Run `hf-lowbit eval --help` for what it takes."
        )
    others = ("tasks_dir", "limit", "batch") if args.text else ("window", "characters")
    misplaced = next((name for name in others if getattr(args, name) is not None), None)
    if misplaced is not None:
        option = misplaced.replace("_", "-")
        raise BadRequest(f"--{option} goes with {'--tasks' if args.text else '--text'}, and --{given[0]} was given.")
    return _run_tasks(args) if args.tasks else _run_text(args)


def _run_tasks(args: argparse.Namespace) -> None:
    from hf_lowbit.plugin import checkpoint, evaluate

    drawn = sys.stderr.isatty() and not args.json
    checkpoint.show_progress(drawn)
    sizes, how = _sizes(args.directory), evaluate.Setting(args.limit, args.batch or 1, args.dtype, args.device, drawn)
    out = sizes | evaluate.evaluate_tasks(args.directory, args.tasks, args.tasks_dir, args.reference, how)
    if args.json:
        return _print_json(out)
    columns, cells = evaluate.table(out["tasks"])
    _print_table(f"{args.directory}: {', '.join(args.tasks)}", columns, cells)


def _run_text(args: argparse.Namespace) -> None:
    from hf_lowbit import measure
    from hf_lowbit.plugin import checkpoint, evaluate

    checkpoint.show_progress(sys.stderr.isatty() and not args.json)
    text, size = _read_text(args.text, args.characters), args.window or 512
    sizes = _sizes(args.directory)
    tokenizer = checkpoint.load_tokenizer(args.directory)
    ids = checkpoint.tokenize(tokenizer, text)
    window = measure.windows(ids, size).shape[1]  # refuses a text too short before a model is loaded
    model = checkpoint.load_model(args.directory, args.dtype, args.device)
    checkpoint.check_fits(model, ids, window)
    out: dict[str, Any] = {"method": sizes.pop("method")}
    with _progress_bar("windows", sys.stderr.isatty() and not args.json) as progress:
        if args.reference:
            reference = checkpoint.load_model(args.reference, args.dtype, args.device)
            checkpoint.check_fits(reference, ids, window)
            found = measure.divergence(model, reference, ids, size, progress)
            out |= {"perplexity": found.perplexity, "reference_perplexity": found.reference_perplexity}
            out |= {"kl": found.kl, "top1_agreement": found.top1_agreement, "tokens": found.tokens}
        else:
            plain = measure.perplexity(model, ids, size, progress)
            out |= {"perplexity": plain.perplexity, "kl": None, "top1_agreement": None, "tokens": plain.tokens}
    broken = [key for key, value in out.items() if isinstance(value, float) and not math.isfinite(value)]
    if broken:
        raise LowBitError(f"{broken[0]} is {out[broken[0]]}: on this text the logits are not finite. Check the weights.")
    out |= sizes
    if args.json:
        manifest = evaluate.text_manifest(args.directory, args.text, text, window, model, tokenizer)
        return _print_json(out | {"manifest": manifest})
    for key, value in out.items():
        if value is not None:
            print(f"{key:24} {value:,.5f}" if isinstance(value, float) else f"{key:24} {value:,}" if isinstance(value, int)
                  else f"{key:24} {value}")  # fmt: skip


def run_bench(args: argparse.Namespace) -> None:
    """Speed of a model, and of its original in the same run."""
    import torch

    from hf_lowbit.plugin import bench, checkpoint

    checkpoint.show_progress(sys.stderr.isatty() and not args.json)
    if args.threads:
        torch.set_num_threads(args.threads)
    tell = (lambda text: None) if args.json else (lambda text: print(text, file=sys.stderr))

    def measured(source: str) -> dict[str, Any]:
        tell(f"loading {source}")
        model = checkpoint.load_model(source, args.dtype)
        return bench.bench(model, args.batch or (1, 8), args.prompt, args.tokens, tell)

    out = measured(args.directory)
    if args.reference:
        out["reference"] = measured(args.reference)
    if args.json:
        return _print_json(out)
    original = out.get("reference")
    cells = []
    for number, row in enumerate(out["decode"]):
        rate, share = row["tokens_per_s"], f"{row['bandwidth_share']:.0%}"
        ratio = f"{rate / original['decode'][number]['tokens_per_s']:.2f}x" if original else ""
        cells.append(("decode", str(row["batch"]), f"{rate:.1f}", share, ratio))
    rate = out["prefill_tokens_per_s"]
    cells.append(("prefill", "1", f"{rate:.1f}", "", f"{rate / original['prefill_tokens_per_s']:.2f}x" if original else ""))
    columns = ("", "batch", "tokens/s", "of read bandwidth", "of the reference")
    _print_table(f"{args.directory}: {out['threads']} threads, prompt of {args.prompt} tokens", columns, cells)
    print(
        f"weights read per step {out['bytes_per_token'] / 1e6:,.1f} MB; reading {out['read_bandwidth_gb_s']:.1f} GB/s here"
    )
    if out["peak_bytes"]:
        anonymous, peak = out["anonymous_bytes"] / 1e6, out["peak_bytes"] / 1e6
        print(f"memory {anonymous:,.0f} MB anonymous, {peak:,.0f} MB resident at the peak")
    for row in out["kernels"]:
        refused = "".join(f"; {name} refused: {reason}" for name, reason in row["refused"].items())
        print(f"{row['backend']}: {row['matrices']} matrices, {row['weights']:,} weights ({row['reason']}{refused})")
    if out["fused_layers"]:
        print(f"{out['fused_layers']} decoder layers run as one op each for up to 8 tokens (HF_LOWBIT_FUSED=0 turns it off)")


def run_report(args: argparse.Namespace) -> None:
    """One HTML page about a quantized checkpoint."""
    from hf_lowbit import demo
    from hf_lowbit.plugin import checkpoint
    from hf_lowbit.report import document, gather, points

    _check_page(args.html)
    if args.tokens < 0:
        raise BadRequest(f"--tokens must be 0 or more, got {args.tokens}.")
    others = [point for file in args.results or () for point in points.read_points(file)]
    file = args.text or (str(demo.held_out_text()) if args.reference else None)
    text = (Path(file).name, _read_text(file, args.characters)) if file else None
    checkpoint.show_progress(False)
    drawn = sys.stderr.isatty() and not args.json
    facts = gather.gather(
        args.directory,
        args.reference,
        text,
        others,
        args.prompt if args.prompt is not None else demo.PROMPT,
        args.tokens,
        args.window,
        None if args.detector == "none" else args.detector or str(demo.embedded_model()),
        lambda message: print(message, file=sys.stderr) if drawn else None,
    )
    _write_text(args.html, document.document(facts))
    if args.json:
        return _print_json({"page": args.html} | dataclasses.asdict(facts))
    print(f"written to {args.html}")
    for name, why in facts.left_out.items():
        print(f"left out: {name}: {why}")


def run_detect(args: argparse.Namespace) -> None:
    """Verdicts on texts, or the web page."""
    from hf_lowbit import demo
    from hf_lowbit.detect import inputs, report
    from hf_lowbit.detect.scores import DEFAULT, get_score
    from hf_lowbit.plugin import checkpoint
    from hf_lowbit.plugin.detector import SpotDetector

    if bool(args.input) == args.serve:
        raise BadRequest("give what to judge, a FILE, a directory or -, or --serve for the web page.")
    if args.html:
        _check_page(args.html)
    score = get_score(args.score or DEFAULT).name
    files = [] if args.serve else inputs.find_inputs(args.input)  # refused before a model is loaded
    checkpoint.show_progress(False)
    detector = SpotDetector.from_pretrained(
        args.detector or demo.embedded_model(),
        observer=args.observer,
        calibration=args.calibration,
        score=score,
        dtype=args.dtype,
        device=args.device,
    )
    if args.serve:
        from hf_lowbit.detect import serve

        return serve.run(detector, args.port, demo.example_texts())
    with _progress_bar("texts", sys.stderr.isatty() and not args.json) as progress:
        results = list(inputs.judge(detector, files, progress))
    if args.html:
        _write_text(args.html, report.page(results))
    if args.json:
        return _print_json([result.to_json() for result in results])
    print("\n".join(line for result in results for line in report.lines(result)))


def run_calibrate(args: argparse.Namespace) -> None:
    """Thresholds for ``detect`` from people's texts."""
    from hf_lowbit import demo
    from hf_lowbit.detect import inputs
    from hf_lowbit.plugin import checkpoint
    from hf_lowbit.plugin.detector import SpotDetector

    if Path(args.output).exists():
        raise BadRequest(f"{args.output!r} exists already. Name a new file, or remove it.")
    human, machine = inputs.read_texts(args.human), inputs.read_texts(args.machine) if args.machine else []
    checkpoint.show_progress(False)
    place = args.detector or demo.embedded_model()
    detector = SpotDetector.from_pretrained(place, observer=args.observer, dtype=args.dtype, device=args.device)
    detector.calibrate(
        human, args.fpr, machine_texts=machine, language=args.language, source=args.source or Path(args.human).name
    )
    calibration = detector.calibration
    assert calibration is not None
    calibration.save(args.output)
    bins = [{"from": one.low, "to": one.high, "texts": len(one.human[detector.score])} for one in calibration.bins]
    if args.json:
        return _print_json({"written": args.output, "fpr": calibration.fpr, "human": len(human), "bins": bins})
    rate = f"at most {100 * calibration.fpr:g} % of people's texts called a machine's"
    print(f"{args.output}: {rate}, from {len(human):,} of them")
    for one in bins:
        to = "on" if one["to"] is None else f"to {one['to']}"
        print(f"  {one['from']} tokens {to}: {one['texts']:,} texts")


def run_push(args: argparse.Namespace) -> None:
    """Publish a checkpoint in one commit."""
    from hf_lowbit.plugin import checkpoint, hub

    checkpoint.show_progress(sys.stderr.isatty() and not args.json)
    results = [Path(file) for file in args.results] if args.results else None
    package = hub.pack(args.directory, args.repository, results, base_model=args.base_model)
    out: dict[str, Any] = {"repository": args.repository, "revision": args.revision, "commit": None, "card": None}
    if args.dry_run:
        out |= {"card": str(package.card)}
    else:
        try:
            done = hub.push(package, args.repository, private=args.private, revision=args.revision)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("interrupted; nothing was published. The same command goes on from there.") from None
        out |= {"commit": done.commit_url}
    out |= package.to_json()  # after the push, which may have learnt the licence
    if args.json:
        return _print_json(out)
    rows = [(file["name"], f"{file['bytes']:,}") for file in out["files"]]
    title = f"{args.directory} -> {args.repository}" + (": not sent, a dry run" if args.dry_run else "")
    _print_table(title, ("file", "bytes"), rows)
    for name in out["left_out"]:
        print(f"left out: {name}")
    print(f"licence: {out['license'] or 'none stated, the original does not say'}")
    print(f"measurements on the card: {out['measurements'] or 'none, it says so'}")
    print(out["card"] if args.dry_run else f"published: {out['commit']}")


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


def _check_page(file: str) -> None:
    if Path(file).exists() and not Path(file).is_file():
        raise BadRequest(f"cannot write {file!r}: it is not a file.")
    if not Path(file).absolute().parent.is_dir():
        raise BadRequest(f"cannot write {file!r}: there is no directory {str(Path(file).parent)!r}.")


def _write_text(file: str, text: str) -> None:
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadRequest(f"cannot write {file!r}: {error.strerror or error}.") from error


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
