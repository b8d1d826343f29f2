"""Several commands: ``torchrun shared.py COMMAND...``, each a JSON list of arguments. Prints their exit codes."""

from __future__ import annotations

import json
import os
import sys

import torch.distributed as dist

from hf_lowbit.cli import main

dist.init_process_group("gloo")  # once: joining again and again is more than the launcher serves
codes = [main(json.loads(command)) for command in sys.argv[1:]]
print(f"rank {os.environ['RANK']}: {codes}", file=sys.stderr, flush=True)
