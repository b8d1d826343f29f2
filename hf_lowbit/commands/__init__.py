"""What each command does, once its line is parsed. Every function takes the parsed line and prints."""

from hf_lowbit.commands.judging import run_calibrate, run_detect
from hf_lowbit.commands.looking import run_bench, run_doctor, run_eval, run_inspect, run_push, run_report
from hf_lowbit.commands.making import run_demo, run_export, run_merge, run_plan, run_quantize

__all__ = [
    "run_bench",
    "run_calibrate",
    "run_demo",
    "run_detect",
    "run_doctor",
    "run_eval",
    "run_export",
    "run_inspect",
    "run_merge",
    "run_plan",
    "run_push",
    "run_quantize",
    "run_report",
]
