"""Sites of a model: a tensor that matrices read, what produces it, and every reader of it, proven by a traced pass.

A site may be rewritten (its channels scaled, shifted or rotated) only if all uses of it are readers that can take the
inverse. What is not proven is left alone, with the reason in ``trouble``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowbit.transforms.norms import Norm
from hf_lowbit.transforms.provenance import Read, Source, Trace, channel_of, source_of, tracing

# What a scale per channel may pass on its way from producer to reader.
TRANSPARENT = ("attention", "relu", "scaled", "product")


@dataclass(frozen=True)
class Reader:
    """A matrix whose inputs are channels of a site.

    Attributes:
        weight, bias: parameter names.
        axis: of ``weight``, the one over its inputs (-1, or -2 where weights are stored ``[.., in, out]``).
        columns: channel of the site that each input reads, int64 ``[in]``.
    """

    weight: str
    bias: str | None
    axis: int
    columns: Tensor


@dataclass(frozen=True)
class Producer:
    """What can take the inverse of a rewriting at the other end of a site.

    Attributes:
        kind: ``norm`` or ``rows`` (of a matrix).
        weight, bias: parameter names.
        axis: of ``weight``, the one over its outputs.
        channels: for each channel of the site, the producer's, int64; several share one where heads share keys and values.
        size: channels the producer has.
        norm: what kind of norm.
        through: maps passed on the way.
    """

    kind: str
    weight: str
    bias: str | None
    axis: int
    channels: Tensor
    size: int
    norm: Norm | None = None
    through: tuple[str, ...] = ()


@dataclass(frozen=True)
class Site:
    """One tensor that matrices read.

    Attributes:
        name: the readers' module names, joined.
        kind: of its source: ``norm``, ``attention``, ``product``, ``relu`` or ``opaque``.
        size: its channels.
        readers: all matrices that read it.
        producer: what can be rewritten in turn; None where nothing can.
        trouble: why it cannot be folded; None where it can.
        width: channels of a head, where the site is the output of attention.
        source: its number in the trace.
        norm: the norm that makes it, whether it can be folded or not.
    """

    name: str
    kind: str
    size: int
    readers: tuple[Reader, ...]
    producer: Producer | None
    trouble: str | None
    width: int = 0
    source: int = -1
    norm: Norm | None = None


@dataclass(frozen=True)
class Residual:
    """The residual stream, or why it cannot be rotated.

    Attributes:
        tables: names of embedding tables ``[n, D]`` that write into it.
        writers: matrices that write into it, as ``(weight, bias, axis over outputs)``.
        sites: numbers of the norm sites that read it.
        centred: whether a layer norm reads it, so that only rotations that keep the all-ones direction commute.
        size: D.
        trouble: why it cannot be rotated.
    """

    tables: tuple[str, ...] = ()
    writers: tuple[tuple[str, str | None, int], ...] = ()
    sites: tuple[int, ...] = ()
    centred: bool = False
    size: int = 0
    trouble: str | None = None


@dataclass
class Graph:
    """All sites of a model in running order, and its residual stream."""

    sites: list[Site] = field(default_factory=list)
    residual: Residual = field(default_factory=Residual)

    def report(self) -> list[tuple[str, str]]:
        """(site, reason) of all that was not understood."""
        return [(site.name, site.trouble) for site in self.sites if site.trouble is not None]


def find_graph(
    model: nn.Module,
    run: Callable[[], Any],
    is_stack: Callable[[nn.Module], bool] = lambda module: False,
) -> Graph:
    """The graph of a model.

    Args:
        model: in eval mode.
        run: one forward pass on a few tokens, returning everything the model returns.
        is_stack: tells a module that holds its experts' matrices as stacks.
    """
    with tracing(model, is_stack) as trace:
        out = run()
        for tensor in _values(out):
            labels = trace.labels(tensor)
            if labels is not None:
                trace.use(labels, "output", -1)
    graph, idle = Graph(), _idle(model, trace)
    for number, source in enumerate(trace.sources):
        if any(use.op == "read" for use in source.uses):
            graph.sites.append(_site(trace, number, source, idle))
    graph.residual = _residual(trace, graph, idle)
    return graph


def _idle(model: nn.Module, trace: Trace) -> dict[str, str]:
    """Block -> a matrix in it that the traced pass never touched, such as an expert that no token chose.

    What it reads when it does run is not known, so of its block nothing is.
    """
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    found: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and name not in trace.taken and name not in tables:
            found.setdefault(block_of(name), name)
    return found


def block_of(name: str) -> str:
    """``model.layers.3`` for what lies in that block, and nothing for what lies in none."""
    parts = name.split(".")
    number = next((n for n, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[: number + 1])


def _site(trace: Trace, number: int, source: Source, idle: Mapping[str, str]) -> Site:
    reads = [r for r in trace.reads if r.columns is not None and bool((source_of(r.columns) == number).any())]
    trouble = _unread(trace, source, reads, number)
    stranger = next((idle[block] for r in reads if (block := block_of(r.weight)) in idle), None)
    if trouble is None and stranger is not None:
        trouble = f"{stranger} did not run on the tokens tried and may read it, too"
    readers = tuple(Reader(r.weight, r.bias, r.axis, channel_of(r.columns)) for r in reads if r.columns is not None)
    name = _joined([r.weight.removesuffix(".weight") for r in readers])
    producer = None
    if trouble is None:
        labels = (number << 32) + torch.arange(source.size)
        found = _producer(trace, labels, (), None)
        producer, trouble = (found, None) if isinstance(found, Producer) else (None, found)
    if any(producer is not None and producer.weight == reader.weight for reader in readers):
        producer, trouble = None, "the same matrix makes and reads it"
    return Site(name, source.kind, source.size, readers, producer, trouble, source.width, number, source.norm)


def _unread(trace: Trace, source: Source, reads: Sequence[Read], number: int) -> str | None:
    """Why not every use of a source is a reader that can be rewritten; None where each is."""
    others = sorted({use.op for use in source.uses if use.op != "read"})
    if others:
        return f"also used by {', '.join(others)}, which cannot be rewritten"
    if len(reads) < len(source.uses):
        return "a matrix reads other channels for other tokens"
    for read in reads:
        assert read.columns is not None
        if not bool((source_of(read.columns) == number).all()):
            return f"{read.weight} reads other sources besides"
        if sum(other.weight == read.weight for other in trace.reads) > 1:
            return f"{read.weight} is used more than once"
        if any(s.kind == "embedding" and s.weight == read.weight for s in trace.sources):
            return f"{read.weight} is tied to an embedding table"
    return None


def _producer(trace: Trace, labels: Tensor, through: tuple[str, ...], user: int | None) -> Producer | str:
    """The producer of some channels, by label, if a scale of each can be moved into it."""
    numbers = source_of(labels).unique().tolist()
    if len(numbers) != 1 or numbers[0] < 0:
        return "its channels come from several sources"
    source, channels = trace.sources[numbers[0]], channel_of(labels)
    if user is not None:
        mine = channels.unique()
        for use in source.uses:
            if use.into != user and bool(torch.isin(use.channels, mine).any()):
                return f"what it is made from is also used by {use.op}"
    if source.kind == "norm":
        assert source.norm is not None and source.weight is not None
        return Producer("norm", source.weight, source.bias, 0, channels, source.size, source.norm, through)
    if source.kind == "linear":
        assert source.weight is not None
        if sum(other.weight == source.weight for other in trace.reads) > 1:
            return f"{source.weight} is used more than once"
        return Producer("rows", source.weight, source.bias, source.axis, channels, source.size, None, through)
    if source.kind not in TRANSPARENT:
        return f"it is made by {source.made_by or source.kind}, which a scale does not pass"
    reason = ""
    for parent in source.parents:
        found = _producer(trace, parent[channels], (*through, source.kind), numbers[0])
        if isinstance(found, Producer):
            return found
        reason = found
    return reason


def _residual(trace: Trace, graph: Graph, idle: Mapping[str, str]) -> Residual:
    """The stream that starts at the embeddings, followed through every sum."""
    tables = {n for n, source in enumerate(trace.sources) if source.kind == "embedding"}
    if not tables:
        return Residual(trouble="no embedding was seen")
    members, open_ones = set(tables), set(tables)
    while open_ones:
        found: set[int] = set()
        for number in open_ones:
            found |= {use.into for use in trace.sources[number].uses if use.op == "sum"}
            if trace.sources[number].kind == "sum":
                found |= {int(n) for parent in trace.sources[number].parents for n in source_of(parent).unique()}
            if trace.sources[number].kind == "scaled":
                found |= {int(n) for n in source_of(trace.sources[number].parents[0]).unique()}
            found |= {use.into for use in trace.sources[number].uses if use.op == "scaled" and number in tables}
        open_ones = found - members
        members |= found
    stream = _checked(trace, graph, members)
    roots = {block_of(weight).rpartition(".")[0] for weight, _, _ in stream.writers}
    stranger = next((name for block, name in idle.items() if block.rpartition(".")[0] in roots), None)
    if stranger is not None:
        return Residual(trouble=f"{stranger} did not run on the tokens tried and may read or write it, too")
    return stream


def _checked(trace: Trace, graph: Graph, members: set[int]) -> Residual:
    sites = {site.source: site for site in graph.sites}
    tables: list[str] = []
    writers: list[tuple[str, str | None, int]] = []
    norms: list[int] = []
    centred = False
    size = max(trace.sources[n].size for n in members if trace.sources[n].kind == "embedding")
    for number in sorted(members):
        source = trace.sources[number]
        if source.size != size:
            return Residual(trouble=f"{source.weight or source.kind} of {source.size} channels is added to {size}")
        for parent in source.parents if source.kind in ("sum", "scaled") else ():
            if not bool((channel_of(parent) == torch.arange(size)).all()):
                return Residual(trouble="channels change places on the residual stream")
        if source.kind == "embedding" and source.weight is not None:
            tables.append(source.weight)
        elif source.kind == "linear" and source.weight is not None:
            writers.append((source.weight, source.bias, source.axis))
        elif source.kind not in ("sum", "scaled"):
            return Residual(trouble=f"a {source.kind} writes into the residual stream ({source.weight or 'no weight'})")
        for use in source.uses:
            if use.op == "norm":
                reader = trace.sources[use.into]
                if not reader.parents or not bool((channel_of(reader.parents[0]) == torch.arange(size)).all()):
                    return Residual(trouble=f"{reader.weight} does not read the whole residual stream")
                norms.append(use.into)
                centred |= bool(reader.norm and reader.norm.centred)
            elif use.into not in members:
                return Residual(trouble=f"the residual stream is also used by {use.op}")
    for number in norms:
        site = sites.get(number)
        if site is None or site.producer is None:
            reason = (site.trouble if site is not None else None) or "no matrix reads it"
            if site is None or "tied" not in reason:
                return Residual(trouble=f"the norm {trace.sources[number].weight}: {reason}")
    return Residual(tuple(dict.fromkeys(tables)), tuple(writers), tuple(norms), centred, size)


def _joined(names: Sequence[str]) -> str:
    """``layers.0.self_attn.{q,k,v}_proj`` for three names that share their beginning."""
    first = names[0] if names else "?"
    prefix = first.rpartition(".")[0]
    if len(names) > 1 and all(name.rpartition(".")[0] == prefix for name in names):
        return f"{prefix}.{'+'.join(name.rpartition('.')[2] for name in names)}"
    return " + ".join(names)


def _values(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, dict):
        for item in out.values():
            yield from _values(item)
    elif isinstance(out, (tuple, list)):
        for item in out:
            yield from _values(item)
