"""Commands on who wrote a text: detect, calibrate."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hf_lowbit.commands.output import check_page, print_json, progress_bar, write_text
from hf_lowbit.errors import BadRequest


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
        check_page(args.html)
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
    with progress_bar("texts", sys.stderr.isatty() and not args.json) as progress:
        results = list(inputs.judge(detector, files, progress))
    if args.html:
        write_text(args.html, report.page(results))
    if args.json:
        return print_json([result.to_json() for result in results])
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
        return print_json({"written": args.output, "fpr": calibration.fpr, "human": len(human), "bins": bins})
    rate = f"at most {100 * calibration.fpr:g} % of people's texts called a machine's"
    print(f"{args.output}: {rate}, from {len(human):,} of them")
    for one in bins:
        to = "on" if one["to"] is None else f"to {one['to']}"
        print(f"  {one['from']} tokens {to}: {one['texts']:,} texts")
