"""Commands that write checkpoints: demo, quantize, plan, merge, export."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from hf_lowbit.commands.output import contents_json, print_json, print_table, progress_bar, sizes_of
from hf_lowbit.errors import BadRequest

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


def run_demo(args: argparse.Namespace) -> None:
    """The comparison table of the embedded model."""
    from hf_lowbit import demo
    from hf_lowbit.plugin import checkpoint

    checkpoint.show_progress(False)
    progress = (lambda text: None) if args.json else (lambda text: print(text, file=sys.stderr))
    rows = demo.run_demo(progress, args.keep)
    if args.json:
        return print_json({"text": str(demo.held_out_text()), "rows": rows})
    columns = ("model", "bits/weight", "file bytes", "perplexity", "KL (nats)", "top-1")
    cells = [
        (r["model"], f"{r['bits_per_weight_linears']:.3f}", f"{r['bytes']:,}", f"{r['perplexity']:.3f}",
         f"{r['kl']:.5f}", f"{100 * r['top1_agreement']:.1f} %") for r in rows
    ]  # fmt: skip
    print_table("embedded model, held-out text, reloaded in a fresh process", columns, cells)
    print(f"\nContinuations of {demo.PROMPT!r} (greedy):")
    for row in rows:
        if row["model"] == "original" or row["model"].endswith("codebook"):
            print(f"  {row['model']:18} {' '.join(row['text'].split())}")


def run_quantize(args: argparse.Namespace) -> None:
    """Quantize SRC into DST."""
    from hf_lowbit.plugin import checkpoint

    if args.from_quantized:
        return _import_quantized(args)
    config = config_from(args)
    drawn = sys.stderr.isatty() and not args.json
    checkpoint.show_progress(drawn)
    try:
        with progress_bar("blocks", drawn) as progress:
            report, rows = checkpoint.quantize_checkpoint(args.source, args.destination, config, args.restart, progress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; finished blocks are kept: the same command goes on from there.") from None
    if os.environ.get("RANK", "0") != "0":
        return  # torchrun starts several; the first one speaks
    if args.json:
        return print_json(contents_json(args.destination) | {"destination": args.destination, "report": rows})
    print(report)
    if any("error" in row for row in rows):
        _print_report([row for row in rows if "left_alone" not in row])
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
        with progress_bar("layers", sys.stderr.isatty() and not args.json) as progress:
            rows = foreign.import_checkpoint(args.source, args.destination, args.restart, progress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; finished layers are kept: the same command goes on from there.") from None
    found = contents_json(args.destination)
    if args.json:
        return print_json(found | {"destination": args.destination, "report": rows})
    print(f"{len(rows)} matrices of {found['config']['options']['source']} taken over, bit for bit:")
    print(f"{found['bits_per_weight_linears']:.3f} bits per weight, files {found['bytes']:,} bytes")
    print(f"written to {args.destination}")


def run_merge(args: argparse.Namespace) -> None:
    """Merge ADAPTER into DIR as OUT."""
    from hf_lowbit.plugin import checkpoint
    from hf_lowbit.plugin.adapters import merge_checkpoint

    checkpoint.show_progress(sys.stderr.isatty() and not args.json)
    report = merge_checkpoint(args.source, args.adapter, args.destination, args.how, args.method)
    sizes = sizes_of(args.destination)
    if args.json:
        return print_json(report.to_json() | sizes | {"destination": args.destination})
    cells = [(row.name, f"{row.error:.2e}", f"{row.update:.2e}") for row in report.rows]
    cells.append(("all", f"{report.error:.2e}", f"{report.update:.2e}"))
    print_table(f"{args.how}: relative Frobenius norms", ("matrix", "error added", "size of the update"), cells)
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
    print_table("how it was solved", ("matrix", "bits/weight", "error", "damping", "tokens", "seconds", "note"), cells)


def run_plan(args: argparse.Namespace) -> None:
    """Print what quantizing SRC would need."""
    from hf_lowbit.plugin.plan import plan

    config = config_from(args)
    found, answer = plan(args.source, config), None
    if args.target is not None:
        from hf_lowbit.plugin.exportable import exportable

        answer = exportable(args.source, config, args.target)
    if args.json:
        return print_json(found.to_json() | ({} if answer is None else {"export": answer.to_json()}))
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

    with progress_bar("matrices", sys.stderr.isatty() and not args.json) as progress:
        found = export_checkpoint(args.directory, args.destination, args.to, args.dtype, progress)
    if args.json:
        return print_json({"destination": args.destination, "to": args.to, **vars(found)})
    print(f"{_forms(found.forms)}; {found.bytes:,} bytes")
    for note in found.notes:
        print(f"note: {note}")
    print(f"written to {args.destination}")


def _forms(forms: dict[str, int]) -> str:
    return ", ".join(f"{count} matrices {name}" for name, count in forms.items())
