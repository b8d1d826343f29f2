"""Commands on finished checkpoints: inspect, eval, bench, report, push; and doctor, on the machine."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

from hf_lowbit.commands.output import (
    check_page,
    contents_json,
    print_json,
    print_table,
    progress_bar,
    read_text,
    sizes_of,
    write_text,
)
from hf_lowbit.errors import BadRequest, LowBitError

# Text that --outliers runs: ranges of channels hardly move after a few thousand tokens.
OUTLIER_CHARACTERS = 40_000


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
        return print_json(contents_json(args.directory))
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
    print_table(f"{args.directory}: all checksums hold", columns, cells)
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
    text = read_text(args.text or str(held_out_text()), OUTLIER_CHARACTERS)
    ids = checkpoint.tokenize(checkpoint.load_tokenizer(args.directory), text)
    windows = ids[: len(ids) // 256 * 256].view(-1, 256) if len(ids) >= 256 else ids[None]
    model = checkpoint.load_model(args.directory, "float32")
    checkpoint.check_fits(model, ids, windows.shape[1])
    before = outliers.examine(model, windows)
    later = outliers.after(model, config, windows) if config.transforms else None
    title = f"Outliers of {Path(args.directory).name}"
    if config.transforms:
        title += f" before and after {', '.join(entry.name for entry, _ in config.parsed_transforms())}"
    if args.plot:
        outliers.plot(args.plot, before, later, title)
    pairs = [(one, next((x for x in later or () if x.name == one.name), None)) for one in before]
    if args.json:
        rows = [{"before": one.summary(), "after": other and other.summary()} for one, other in pairs]
        return print_json({"directory": args.directory, "tokens": windows.numel(), "matrices": rows})
    print_table(f"{title}: {windows.numel():,} tokens", outliers.COLUMNS, [outliers.cells(*pair) for pair in pairs])
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
    sizes, how = sizes_of(args.directory), evaluate.Setting(args.limit, args.batch or 1, args.dtype, args.device, drawn)
    out = sizes | evaluate.evaluate_tasks(args.directory, args.tasks, args.tasks_dir, args.reference, how)
    if args.json:
        return print_json(out)
    columns, cells = evaluate.table(out["tasks"])
    print_table(f"{args.directory}: {', '.join(args.tasks)}", columns, cells)


def _run_text(args: argparse.Namespace) -> None:
    from hf_lowbit import measure
    from hf_lowbit.plugin import checkpoint, evaluate

    checkpoint.show_progress(sys.stderr.isatty() and not args.json)
    text, size = read_text(args.text, args.characters), 512 if args.window is None else args.window
    sizes = sizes_of(args.directory)
    tokenizer = checkpoint.load_tokenizer(args.directory)
    ids = checkpoint.tokenize(tokenizer, text)
    window = measure.windows(ids, size).shape[1]  # refuses a text too short before a model is loaded
    model = checkpoint.load_model(args.directory, args.dtype, args.device)
    checkpoint.check_fits(model, ids, window)
    out: dict[str, Any] = {"method": sizes.pop("method")}
    with progress_bar("windows", sys.stderr.isatty() and not args.json) as progress:
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
        return print_json(out | {"manifest": manifest})
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

    dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")

    def measured(source: str, tune: bool) -> dict[str, Any]:
        tell(f"loading {source}")
        model = checkpoint.load_model(source, dtype, args.device)
        if tune:
            bench.tune(model, tell)
        return bench.bench(model, args.batch or (1, 8), args.prompt, args.tokens, tell)

    out = measured(args.directory, args.tune)
    if args.reference:
        out["reference"] = measured(args.reference, tune=False)
    if args.json:
        return print_json(out)
    original = out.get("reference")
    cells = []
    for number, row in enumerate(out["decode"]):
        rate, share = row["tokens_per_s"], f"{row['bandwidth_share']:.0%}"
        ratio = f"{rate / original['decode'][number]['tokens_per_s']:.2f}x" if original else ""
        cells.append(("decode", str(row["batch"]), f"{rate:.1f}", share, ratio))
    rate = out["prefill_tokens_per_s"]
    cells.append(("prefill", "1", f"{rate:.1f}", "", f"{rate / original['prefill_tokens_per_s']:.2f}x" if original else ""))
    columns = ("", "batch", "tokens/s", "of read bandwidth", "of the reference")
    where = out["device"] if out["device"] != "cpu" else f"{out['threads']} threads"
    print_table(f"{args.directory}: {where}, prompt of {args.prompt} tokens", columns, cells)
    print(
        f"weights read per step {out['bytes_per_token'] / 1e6:,.1f} MB; reading {out['read_bandwidth_gb_s']:.1f} GB/s here"
    )
    if out["anonymous_bytes"]:
        anonymous, peak = out["anonymous_bytes"] / 1e6, out["peak_bytes"] / 1e6
        print(f"memory {anonymous:,.0f} MB anonymous, {peak:,.0f} MB resident at the peak")
    elif out["peak_bytes"]:
        print(f"memory {out['peak_bytes'] / 1e6:,.0f} MB allocated on {out['device']} at the peak")
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

    check_page(args.html)
    if args.tokens < 0:
        raise BadRequest(f"--tokens must be 0 or more, got {args.tokens}.")
    others = [point for file in args.results or () for point in points.read_points(file)]
    file = args.text or (str(demo.held_out_text()) if args.reference else None)
    text = (Path(file).name, read_text(file, args.characters)) if file else None
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
    write_text(args.html, document.document(facts))
    if args.json:
        return print_json({"page": args.html} | dataclasses.asdict(facts))
    print(f"written to {args.html}")
    for name, why in facts.left_out.items():
        print(f"left out: {name}: {why}")


def run_doctor(args: argparse.Namespace) -> None:
    """Versions, devices, registration, backends and methods."""
    from hf_lowbit.plugin import doctor

    report = doctor.examine()
    if args.json:
        return print_json(report)
    for part, lines in report.items():
        print(part)
        for name, value in lines.items():
            print(f"  {name:22} {value}")


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
        return print_json(out)
    rows = [(file["name"], f"{file['bytes']:,}") for file in out["files"]]
    title = f"{args.directory} -> {args.repository}" + (": not sent, a dry run" if args.dry_run else "")
    print_table(title, ("file", "bytes"), rows)
    for name in out["left_out"]:
        print(f"left out: {name}")
    print(f"licence: {out['license'] or 'none stated, the original does not say'}")
    print(f"measurements on the card: {out['measurements'] or 'none, it says so'}")
    print(out["card"] if args.dry_run else f"published: {out['commit']}")
