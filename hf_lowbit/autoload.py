"""Being found without an import: registers the plugin as soon as Transformers' quantizers are imported, and our layers
as soon as PEFT is.

``import torch`` calls :func:`autoload` through the ``torch.backends`` entry point in every process (unless
``TORCH_DEVICE_BACKEND_AUTOLOAD=0``), and ``import hf_lowbit`` calls it too. It imports neither torch nor transformers: it
leaves a finder that waits for what ``PLUGINS`` names and imports our side right after it. An error on the way becomes a
warning, since an exception here would break ``import torch`` for everybody.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Module of a host -> module of ours whose import registers with it.
PLUGINS = {"transformers.quantizers": "hf_lowbit.plugin", "peft": "hf_lowbit.plugin.adapters.register"}


class _After(importlib.abc.MetaPathFinder):
    """Runs :func:`_register` after a module that ``PLUGINS`` names was executed; finds nothing itself."""

    def __init__(self) -> None:
        self.busy = False

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if self.busy or name not in PLUGINS:
            return None
        self.busy = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.busy = False
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _register(name)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


class _Unfinished(ModuleSpec):
    """Class of the spec of a module that is being imported: runs :func:`_register` when the import ends.

    Where ``import transformers.quantizers`` is what first imports torch, its finder was asked before ours was there, and
    the only sign that it is complete is the mark the import machinery takes off its spec.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_initializing" and not value:
            self.__class__ = ModuleSpec  # type: ignore[assignment]
            _register(self.name)


def autoload() -> None:
    """Register with each host that is there already now, with the others as soon as they are."""
    if not any(isinstance(finder, _After) for finder in sys.meta_path):
        sys.meta_path.insert(0, _After())
    for target in PLUGINS:
        spec = getattr(sys.modules.get(target), "__spec__", None)
        if not getattr(spec, "_initializing", False):
            _register(target)
        elif type(spec) is ModuleSpec:
            spec.__class__ = _Unfinished


def _register(target: str) -> None:
    plugin = PLUGINS[target]
    if plugin in sys.modules or target not in sys.modules:
        return
    try:
        importlib.import_module(plugin)
    except Exception as error:
        host = target.partition(".")[0]
        warnings.warn(f"hf-lowbit could not register itself with {host}: {error}", stacklevel=2)
