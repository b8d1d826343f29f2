"""What ``import hf_lowbit`` adds to ``import transformers``: medians over fresh processes, the two in turn.

python eval/import_time.py [--runs 9]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

from results_file import write

# With torch's entry points off, so that the plain import is plain; the model class forces the host's real imports.
HOST = "import transformers; transformers.AutoModelForCausalLM; transformers.LlamaForCausalLM"
IMPORTS = {
    "import transformers": "import transformers",
    "import transformers, hf_lowbit": "import transformers, hf_lowbit",
    "transformers with a model class": HOST,
    "the same and hf_lowbit registered": f"{HOST}; import hf_lowbit; hf_lowbit.LowBitConfig",
}


def main() -> None:
    """Measure, print and write ``eval/results/import_time.json``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=9)
    runs = parser.parse_args().runs
    seconds: dict[str, list[float]] = {label: [] for label in IMPORTS}
    for _ in range(runs):
        for label, code in IMPORTS.items():
            begun = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, env={"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})
            seconds[label].append(time.perf_counter() - begun)
    rows = {label: {"median_s": round(statistics.median(s), 3), "min_s": round(min(s), 3)} for label, s in seconds.items()}
    for label, row in rows.items():
        print(f"{label:38} median {row['median_s']:.3f} s, least {row['min_s']:.3f} s")
    print("written to", write("import_time", rows))


if __name__ == "__main__":
    main()
