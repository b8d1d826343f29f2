"""Our checkpoints and other libraries' side by side: same model, same text, same rule for bytes.

    python eval/peers.py [--environment DIR] [--model DIR] [--text FILE] [--characters 130000] [--calibration FILE]
                         [--peers NAME ...] [--only WORDS] [--missing] [--name NAME]

Makes a virtual environment (a temporary one unless a directory is given, which is kept and reused), installs torch and
Transformers at the versions of ``constraints.txt`` and then each peer from PyPI, and measures every peer there in a process
of its own. A peer that does not install, load or run is a row that says why.

Bytes are those of the weight files that a library's ``save_pretrained`` or GGUF writer makes of the 16-bit checkpoint; where
it saves no such file, of all tensors it holds in memory, each counted once. Bits per weight are these bytes over all weights
of the model, embedding and norms included. Quality is measured with float32 arithmetic; where a finished model cannot be
cast to it, on the same model quantized in float32. KL is KL(original || quantized) in nats per predicted token, the original
in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import venv
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from peer_models import PEERS, ROW
from results_file import RESULTS, write
from tables import markdown

from hf_lowbit.demo import calibration_text, embedded_model, held_out_text

ROOT = Path(__file__).parents[1]
BASE = ("transformers", "accelerate", "safetensors", "filelock", "rich")
# What else a peer needs from PyPI beside the package it is named after.
WITH = {"llama-cpp-python": ("gguf",), "gptqmodel": ("--no-build-isolation",)}


def environment(folder: Path) -> Path:
    """The interpreter of a virtual environment with torch and Transformers at our versions, made if it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    done = install(python, ["torch"]) or install(python, list(BASE))
    if done:
        raise SystemExit(f"torch and Transformers do not install into {folder}: {done}")
    return python


def pinned(package: str) -> str:
    """A package at the version of ``constraints.txt``."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith(f"{package}=="))


def install(python: Path, packages: list[str], minutes: int = 15) -> str | None:
    """Install from PyPI what is not there, without moving torch or Transformers; None, or why it failed."""
    if all(version_of(python, package) for package in packages if not package.startswith("-")):
        return None
    constraints = [pinned(package) for package in ("torch", "transformers")]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(constraints) + "\n")
        file.flush()
        command = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", file.name, *packages]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60 * minutes, check=False)
        except subprocess.TimeoutExpired:
            return f"not done in {minutes} minutes"
    if not done.returncode:
        return None
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    return (errors[-1] if errors else done.stderr.strip()[-160:] or f"pip ended with {done.returncode}")[:200]


def measure(python: Path, labels: list[str], args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of one peer from a process of their own; where it ends early, the rest from another one."""
    while labels:
        command = [str(python), str(ROOT / "eval" / "peer_models.py"), *labels]
        for name in ("model", "text", "calibration", "characters"):
            command += [f"--{name}", str(getattr(args, name))]
        alone = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_LOWBIT_CPU_ARITHMETIC": "exact"}
        with (
            tempfile.TemporaryFile("w+") as errors,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env=alone, cwd=tempfile.gettempdir()
            ) as run,
        ):
            assert run.stdout is not None
            for line in run.stdout:
                if line.startswith(ROW):
                    yield labels[0], json.loads(line.removeprefix(ROW))
                    labels = labels[1:]
            code = run.wait()
            errors.seek(0)
            last = (errors.read().strip().splitlines() or ["nothing said"])[-1]
        if labels:
            yield labels[0], {"fails": f"ended with {code}: {last[:160]}"}
            labels = labels[1:]


def version_of(python: Path, package: str) -> str | None:
    """Installed version of a package in the environment."""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Measured rows as Markdown, then a line for each that failed."""
    measured = {label: row for label, row in rows.items() if "fails" not in row}
    failed = [f"* {label}: {row['fails']}" for label, row in rows.items() if "fails" in row]
    return "\n".join([markdown(measured), "", *failed])


def stored(name: str) -> dict[str, dict[str, Any]]:
    """Rows measured before."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["result"] if path.exists() else {}


def main() -> None:
    """Install, measure, print the table, write ``eval/results``; what was measured before is kept unless asked for again."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--environment", type=Path, help="directory of the virtual environment")
    parser.add_argument("--model", default=str(embedded_model()))
    parser.add_argument("--text", default=str(held_out_text()))
    parser.add_argument("--characters", type=int, default=130_000)
    parser.add_argument("--calibration", default=str(calibration_text()))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--only", default="", metavar="WORDS", help="rows that begin so")
    parser.add_argument("--missing", action="store_true", help="only rows that the result does not hold yet")
    parser.add_argument("--name", default="peers")
    args = parser.parse_args()
    args.model, args.text, args.calibration = (str(Path(p).resolve()) for p in (args.model, args.text, args.calibration))
    sources = {name: Path(getattr(args, name)).name for name in ("model", "text", "calibration")}
    sources["characters"] = str(args.characters)
    order = [label for of_peer in PEERS.values() for label in of_peer]
    with nullcontext(args.environment) if args.environment else tempfile.TemporaryDirectory() as folder:
        python = environment(Path(folder).resolve())
        for peer in args.peers:
            if args.missing and not PEERS[peer].keys() - stored(args.name).keys():
                continue
            failed = None if peer == "hf-lowbit" else install(python, [*WITH.get(peer, ()), peer])
            asked = [label for label in PEERS[peer] if label.startswith(args.only)]
            asked = [label for label in asked if not (args.missing and label in stored(args.name))]
            found = ((label, {"fails": f"does not install: {failed}"}) for label in asked)
            for label, row in found if failed else measure(python, asked, args):
                if peer != "hf-lowbit":
                    row["version"] = version_of(python, peer)
                print(f"{label:44} {row}", flush=True)
                rows = stored(args.name) | {label: row}  # other peers may be measured beside this one
                rows = dict(sorted(rows.items(), key=lambda row: order.index(row[0]) if row[0] in order else -1))
                write(args.name, rows, sources)
    print(f"\n{table(stored(args.name))}\n\nwritten to {RESULTS / args.name}.json")


if __name__ == "__main__":
    main()
