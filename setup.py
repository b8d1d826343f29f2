"""Compiles the CPU kernels into the package; all else about the build stands in pyproject.toml.

The result is one shared library with a plain C ABI, so a wheel serves every Python and torch of its platform. Each
instruction set is a file of its own with its own flags, chosen at run time. Without a working C++17 compiler the install
succeeds and the package runs on its reference path; ``hf-lowbit doctor`` says so. ``HF_LOWBIT_NO_COMPILE=1`` skips it.
"""

from __future__ import annotations

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

FOLDER = Path("hf_lowbit/kernels/cpu")
LIBRARY = "hf_lowbit.kernels._lowbit_cpu"
# No contraction: rows decoded for an embedding are bit for bit the reference's.
FLAGS = ["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-fPIC", "-pthread"]
X86 = {
    "body_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "body_avx512.cpp": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni"],
}
ARM = {"body_neon.cpp": ["-march=armv8.2-a+dotprod"]}


def flags_of(file: str, machine: str = platform.machine()) -> list[str]:
    """Instruction set flags of a source file on a machine, by default this one."""
    machine = machine.lower()
    return (X86 if machine in ("x86_64", "amd64") else ARM if machine in ("aarch64", "arm64") else {}).get(file, [])


class Kernels(build_ext):
    """Builds the library, or says in a line why not and goes on."""

    def get_ext_filename(self, fullname: str) -> str:
        """Without the tag of one Python: nothing in it depends on Python."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Compile each file with its flags, several at a time, and link."""
        target = Path(self.get_ext_fullpath(ext.name))
        target.unlink(missing_ok=True)  # a stale one must not outlive a failed build
        if os.environ.get("HF_LOWBIT_NO_COMPILE", "0") not in ("", "0"):
            print("hf-lowbit: HF_LOWBIT_NO_COMPILE is set, the CPU kernels are left out.", file=sys.stderr)
            return
        try:
            with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
                objects = [name for names in pool.map(self._compile, ext.sources) for name in names]
            target.parent.mkdir(parents=True, exist_ok=True)
            self.compiler.link_shared_object(objects, str(target), target_lang="c++", extra_postargs=["-pthread"])
        except Exception as error:  # whatever a missing or broken compiler raises, the package works without it
            target.unlink(missing_ok=True)
            print(f"hf-lowbit: no CPU kernels ({error}); the reference path will be used.", file=sys.stderr)

    def _compile(self, source: str) -> list[str]:
        folder, special = self.build_temp, flags_of(Path(source).name)
        try:
            return self.compiler.compile([source], output_dir=folder, extra_postargs=FLAGS + special)
        except CompileError:
            if not special:
                raise
            # A compiler that does not know this instruction set: the file then compiles to nothing.
            return self.compiler.compile([source], output_dir=folder, extra_postargs=FLAGS)

    def get_outputs(self) -> list[str]:
        """Only what was built."""
        return [name for name in super().get_outputs() if Path(name).exists()]

    def copy_extensions_to_source(self) -> None:
        """For an editable install; nothing to copy where nothing was built."""
        for ext in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(ext.name)
            beside = Path(self.get_ext_filename(ext.name))
            beside.unlink(missing_ok=True)
            if built.exists():
                self.copy_file(str(built), str(beside))


class PlatformWheel(bdist_wheel):
    """A wheel of this platform for any Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        """``py3-none-PLATFORM``."""
        return "py3", "none", super().get_tag()[2]


if sys.argv[1:2] == ["--flags"]:  # FILE [MACHINE], for `make sanitize` and `make neon`
    print(*flags_of(*sys.argv[2:]))
    sys.exit()
sources = sorted(str(path) for path in FOLDER.glob("*.cpp"))
headers = sorted(str(path) for path in FOLDER.glob("*.h"))
setup(
    ext_modules=[Extension(LIBRARY, sources, depends=headers)],
    cmdclass={"build_ext": Kernels, "bdist_wheel": PlatformWheel},
)
