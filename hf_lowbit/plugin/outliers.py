"""Where the outliers of a model sit: the largest value of every input channel and weight column of each matrix."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_lowbit.errors import BadRequest
from hf_lowbit.page import escape, page
from hf_lowbit.plugin.compress import prepare_targets
from hf_lowbit.plugin.config import LowBitConfig
from hf_lowbit.plugin.modules import LowBitLinear
from hf_lowbit.plugin.rewrite import rewrite, unrounded
from hf_lowbit.plugin.targets import ends_of
from hf_lowbit.transforms.graph import block_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS_PER_PASS = 2048
# A channel is an outlier if its largest value is this many times the median channel's.
OUTLIER = 6.0
# An axis that spans less than this is labelled between its powers of ten as well.
FEW_DECADES = 50
PLOTS = (".png", ".svg", ".pdf", ".html")


@dataclass(frozen=True)
class Channels:
    """One matrix: largest absolute value of each input channel, and of each of its columns, float32 ``[in]``."""

    name: str
    inputs: Tensor
    weights: Tensor

    @property
    def place(self) -> tuple[int, str]:
        """Number of the layer, 0 outside of all, and the name within it."""
        block = block_of(self.name)
        return int(block.rpartition(".")[2] or 0), self.name.removeprefix(block).removeprefix(".")

    def summary(self) -> dict[str, Any]:
        """Largest value, its ratio to the median channel's, and how many channels are outliers, of inputs and weights."""
        out: dict[str, Any] = {"name": self.name}
        for kind, values in (("inputs", self.inputs), ("weights", self.weights)):
            median = float(values.median().clamp_min(1e-12))
            out |= {f"{kind}_largest": float(values.max()), f"{kind}_ratio": float(values.max()) / median}
            out[f"{kind}_outliers"] = int((values > OUTLIER * median).sum())
        return out


@torch.no_grad()
def examine(model: PreTrainedModel, windows: Tensor) -> list[Channels]:
    """Run token windows int64 ``[n, T]`` through a model, dense or low-bit, and look at every linear layer but the head.

    What a low-bit layer does to its inputs before rounding them is done first.

    Raises:
        BadRequest: the model has no linear layer.
    """
    found: dict[str, Tensor] = {}
    layers = dict(_layers(model))
    if not layers:
        raise BadRequest(f"{type(model).__name__} has no linear layer to look at.")
    handles = [module.register_forward_pre_hook(_note(found, name)) for name, module in layers.items()]
    try:
        for ids in windows.split(max(1, TOKENS_PER_PASS // windows.shape[1])):
            model(input_ids=ids.to(model.device))
    finally:
        for handle in handles:
            handle.remove()
    return [Channels(name, values, _columns(layers[name])) for name, values in found.items()]


def after(model: PreTrainedModel, config: LowBitConfig, windows: Tensor) -> list[Channels]:
    """The same of a dense model once the transforms of a config have rewritten it, which they do in place."""
    done = rewrite(model, config, prepare_targets(model, config), windows)
    with unrounded(model, done.intakes):
        return examine(model, windows)


def _layers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    head = ends_of(model)[1]
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D, LowBitLinear)) and module is not head:
            yield name, module


def _note(found: dict[str, Tensor], name: str) -> Any:
    def hook(module: nn.Module, args: tuple) -> None:
        x = args[0].detach().flatten(0, -2).float()
        if isinstance(module, LowBitLinear) and module.activation is not None:
            x = module.activation.activations.rewritten(x)
        largest = x.abs().amax(0).cpu()
        found[name] = torch.maximum(found[name], largest) if name in found else largest

    return hook


def _columns(module: Any) -> Tensor:
    weight = module.lowbit().dequantize() if isinstance(module, LowBitLinear) else module.weight.detach().float()
    return weight.abs().amax(1 if isinstance(module, Conv1D) else 0).cpu()


def plot(path: str | Path, before: Sequence[Channels], later: Sequence[Channels] | None, title: str) -> None:
    """Draw every channel of every layer, a row for each kind of matrix; PNG, SVG, PDF, or an HTML page with the table.

    Raises:
        BadRequest: matplotlib is not installed, or the name ends otherwise.
    """
    path = Path(path)
    check_plot(path)
    figure = _figure(before, later, title)
    if path.suffix != ".html":
        figure.savefig(path, dpi=110)
        return
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    encoded = base64.b64encode(image.getvalue()).decode()
    rows = "".join(_row(one, other) for one, other in _pairs(before, later))
    head = "".join(f"<th>{text}</th>" for text in COLUMNS)
    body = (
        f"<h1>{escape(title)}</h1><p>{ABOUT}</p>"
        f'<img alt="Every channel of every layer" src="data:image/png;base64,{encoded}">'
        f'<div class="wide"><table><tr>{head}</tr>{rows}</table></div>'
    )
    path.write_text(page(title, body, STYLE, images=True), encoding="utf-8")


ABOUT = (
    "For each matrix the largest absolute value of every input channel on the text, and of every column of its weights: the "
    f"largest of all, how many times the median it is, and how many are outliers, beyond {OUTLIER:g} times the median."
)
STYLE = (
    ":root { --width: 80em; } .wide { overflow-x: auto; } td, th { text-align: right; padding: 0 .6em; } "
    "td, th { white-space: nowrap; } tr > :first-child { text-align: left; padding-left: 0; } img { margin-bottom: 1em; }"
)
COLUMNS = ("matrix", "inputs: largest", "/ median channel", "outliers", "weights: largest", "/ median column", "outliers")


def check_plot(path: Path) -> None:
    """Refuse a plot that cannot be drawn, before any work.

    Raises:
        BadRequest: matplotlib is not installed, or the name ends otherwise.
    """
    if path.suffix not in PLOTS:
        raise BadRequest(f"a plot is written as {', '.join(PLOTS)}, got {path.name!r}.")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise BadRequest('plots need matplotlib: pip install "hf-lowbit[plots]".') from error


def cells(one: Channels, other: Channels | None) -> list[str]:
    """A line of the table: values before, and after an arrow those after."""
    first, second = one.summary(), None if other is None else other.summary()
    out = [one.name]
    for key, style in (("largest", "{:.3g}"), ("ratio", "{:.1f}"), ("outliers", "{}")):
        for kind in ("inputs", "weights"):
            text = style.format(first[f"{kind}_{key}"])
            out.append(text if second is None else f"{text} → {style.format(second[f'{kind}_{key}'])}")
    return [out[0], out[1], out[3], out[5], out[2], out[4], out[6]]


def _row(one: Channels, other: Channels | None) -> str:
    return "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells(one, other)) + "</tr>"


def _pairs(before: Sequence[Channels], later: Sequence[Channels] | None) -> list[tuple[Channels, Channels | None]]:
    known = {one.name: one for one in later or ()}
    return [(one, known.get(one.name)) for one in before]


def _figure(before: Sequence[Channels], later: Sequence[Channels] | None, title: str) -> Any:
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(one.place[1] for one in before))
    layers = 1 + max(one.place[0] for one in before)
    times = [("", before)] if later is None else [("before", before), ("after", later)]
    columns = [(what, when, found) for what in ("inputs", "weights") for when, found in times]
    width = min(8.0, max(3.2, 0.2 * layers))
    figure = Figure(figsize=(width * len(columns), 1.0 + 1.7 * len(kinds)), layout="constrained")
    axes = figure.subplots(len(kinds), len(columns), squeeze=False)
    for row, kind in enumerate(kinds):
        for what in ("inputs", "weights"):
            shown = [axes[row][n] for n, column in enumerate(columns) if column[0] == what]
            _draw(shown, kind, what, times)
        axes[row][0].set_ylabel(kind, fontsize="small")
        for axis in axes[row]:
            axis.set_xlim(-0.5, layers - 0.5)
    for number, (what, when, _) in enumerate(columns):
        axes[0][number].set_title(f"max |{what}| {when}".strip())
        axes[-1][number].set_xlabel("layer")
    figure.legend(*axes[0][0].get_legend_handles_labels(), fontsize="small", loc="outside lower center", ncols=2)
    figure.suptitle(f"{title}; every point a channel, red beyond {OUTLIER:g} times the median")
    return figure


def _draw(shown: Sequence[Any], kind: str, what: str, times: Sequence[tuple[str, Sequence[Channels]]]) -> None:
    """One kind of matrix, before and after on one scale: all channels as points, median and maximum as lines."""
    from matplotlib.ticker import LogLocator, NullFormatter

    ends: list[float] = []
    for axis, (_, found) in zip(shown, times, strict=True):
        layers = [(one.place[0], getattr(one, what).clamp_min(1e-6)) for one in found if one.place[1] == kind]
        for number, values in layers:
            spread = number + torch.linspace(-0.3, 0.3, len(values))
            axis.plot(spread, values, ".", markersize=1.5, color="tab:blue", alpha=0.5)
            far = values > OUTLIER * values.median()
            axis.plot(spread[far], values[far], ".", markersize=5, color="tab:red")
            ends += [float(values.quantile(0.001)), float(values.max())]
        numbers = [number for number, _ in layers]
        axis.plot(numbers, [float(values.max()) for _, values in layers], color="tab:red", linewidth=1, label="largest")
        axis.plot(numbers, [float(values.median()) for _, values in layers], color="black", linewidth=1, label="median")
        axis.set_yscale("log")
        axis.xaxis.get_major_locator().set_params(integer=True)
    low, high = min(ends) / 1.5, max(ends) * 1.5
    for axis in shown:
        axis.set_ylim(low, high)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.yaxis.set_minor_formatter("{x:g}" if high / low < FEW_DECADES else NullFormatter())
