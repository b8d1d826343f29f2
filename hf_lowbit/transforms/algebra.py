"""The equivalence algebra: scale, shift and rotation of a site, folded into its producer and all of its readers.

What no producer can take over stays at run time before one reader, which takes the inverse.

With row vectors and ``y = x W^T + b``, a site's tensor ``x`` becomes ``(x - z) / s`` or ``x Q``; the producer takes that
over and every reader its inverse, so the function stays. All arithmetic is float64; a parameter is rounded once to its own
dtype when it is written back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from hf_lowbit.errors import BadRequest, WeightError
from hf_lowbit.format.hadamard import rotate, unrotate
from hf_lowbit.transforms.graph import Graph, Producer, Reader, Site
from hf_lowbit.transforms.intake import Before


class Weights:
    """Parameters by name: read as float64 copies, written back in their own dtype.

    Args:
        parameters: name -> parameter; changed in place.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters

    @classmethod
    def of(cls, model: nn.Module) -> Weights:
        """All parameters of a model, tied ones under each of their names."""
        return cls(dict(model.named_parameters(remove_duplicate=False)))

    def __getitem__(self, name: str) -> Tensor:
        return self._parameters[name].detach().to(torch.float64)

    @torch.no_grad()
    def __setitem__(self, name: str, value: Tensor) -> None:
        parameter = self._parameters[name]
        rounded = value.to(parameter.dtype)
        if not bool(torch.isfinite(rounded).all()):
            raise WeightError(
                f"{name}: folding would need {float(value.abs().max()):.3g}, which {parameter.dtype} cannot hold. "
                "Load the model in bfloat16 or float32."
            )
        parameter.copy_(rounded)


class Step(Protocol):
    """One rewriting with its numbers; what the manifest lists."""

    def apply(self, weights: Weights) -> None:
        """Rewrite producer and readers."""

    def inverse(self) -> Step:
        """What takes it back."""

    def describe(self) -> dict[str, str]:
        """Kind, site and a digest of the numbers."""


@dataclass(frozen=True)
class Scale:
    """Divide the channels of a site by ``factor``, float64 ``[size]``, and multiply its readers' columns.

    The division goes into the producer, or stays at run time ``before`` one of the readers, which alone makes up for it.
    """

    site: Site
    factor: Tensor
    before: Before | None = None

    def apply(self, weights: Weights) -> None:
        """Rewrite producer and readers.

        Raises:
            BadRequest: the site cannot be folded, or factors that are not finite, not the same over heads that share a
                channel, zero, or negative behind a ReLU; before one reader, inputs that are rotated already.
        """
        factor = self.factor.to(torch.float64)
        if not bool(torch.isfinite(factor).all()) or bool((factor == 0).any()):
            raise BadRequest(f"{self.site.name}: a scale must be finite and not zero.")
        if self.before is None:
            self._fold(weights, factor)
        else:
            self.before.divide(factor[self.before.reader.columns])
        for reader in self.site.readers if self.before is None else (self.before.reader,):
            weights[reader.weight] = _times(weights[reader.weight], reader.axis, factor[reader.columns])

    def _fold(self, weights: Weights, factor: Tensor) -> None:
        producer = _foldable(self.site)
        if "relu" in producer.through and bool((factor < 0).any()):
            raise BadRequest(f"{self.site.name}: a negative scale does not pass a ReLU.")
        own = _per_producer(self.site, factor)
        if producer.norm is not None:
            weights[producer.weight] = (weights[producer.weight] + producer.norm.plus) / own - producer.norm.plus
        else:
            weights[producer.weight] = _times(weights[producer.weight], producer.axis, 1 / own)
        if producer.bias is not None:
            weights[producer.bias] = weights[producer.bias] / own

    def inverse(self) -> Scale:
        """Scale by the reciprocals."""
        return replace(self, factor=1 / self.factor.to(torch.float64))

    def describe(self) -> dict[str, str]:
        """Kind, site and a digest of the factors."""
        return {"kind": "scale", "site": _place(self.site, self.before), "digest": digest(self.factor)}


@dataclass(frozen=True)
class Shift:
    """Subtract ``offset``, float64 ``[size]``, from the channels of a site; its readers' biases make up for it.

    ``before`` one reader, the shift is subtracted at run time and given back after rounding, so that no bias is needed.
    """

    site: Site
    offset: Tensor
    before: Before | None = None

    def apply(self, weights: Weights) -> None:
        """Rewrite the producer's bias and the readers'.

        Raises:
            BadRequest: a map a shift does not pass, or a bias that is not there; before one reader, inputs that are rotated
                already.
        """
        if self.before is not None:
            return self.before.subtract(self.offset.to(torch.float64)[self.before.reader.columns])
        producer = _foldable(self.site)
        if set(producer.through) - {"attention"}:
            raise BadRequest(f"{self.site.name}: a shift does not pass {' and '.join(producer.through)}.")
        parts: list[Producer | Reader] = [producer, *self.site.readers]
        lacking = [part.weight for part in parts if part.bias is None]
        if lacking:
            raise BadRequest(f"{self.site.name}: a shift needs biases, {', '.join(lacking)} has none.")
        offset = self.offset.to(torch.float64)
        assert producer.bias is not None
        weights[producer.bias] = weights[producer.bias] - _per_producer(self.site, offset, 0.0)
        for reader in self.site.readers:
            assert reader.bias is not None
            restored = weights[reader.weight].transpose(reader.axis, -1) @ offset[reader.columns]
            weights[reader.bias] = weights[reader.bias] + restored
        return None

    def inverse(self) -> Shift:
        """Shift back."""
        return replace(self, offset=-self.offset)

    def describe(self) -> dict[str, str]:
        """Kind, site and a digest of the offsets."""
        return {"kind": "shift", "site": _place(self.site, self.before), "digest": digest(self.offset)}


@dataclass(frozen=True)
class RotateHeads:
    """Rotate the values of each key-value head: ``v R`` with ``matrix`` ``[heads, h, h]``, one for each producer head."""

    site: Site
    matrix: Tensor

    def apply(self, weights: Weights) -> None:
        """Rewrite the value rows and the readers.

        Raises:
            BadRequest: the site is not the output of attention alone, or the matrix is not orthogonal.
        """
        producer = _foldable(self.site)
        if self.site.kind != "attention" or producer.through != ("attention",):
            raise BadRequest(f"{self.site.name} is not the output of attention: its heads cannot be rotated.")
        matrix = self.matrix.to(torch.float64)
        check_orthogonal(matrix, self.site.name)
        value, bias = weights[producer.weight], None if producer.bias is None else weights[producer.bias]
        readers = {reader.weight: weights[reader.weight] for reader in self.site.readers}
        done: dict[int, int] = {}
        for channels in torch.arange(self.site.size).split(self.site.width):
            rows = producer.channels[channels]
            head = done.get(int(rows[0]))
            if head is None:
                head = done[int(rows[0])] = len(done)
                _rotate_part(value, producer.axis, rows, matrix[head])
                if bias is not None:
                    _rotate_part(bias, -1, rows, matrix[head])
            for reader in self.site.readers:
                _rotate_part(readers[reader.weight], reader.axis, _places(reader)[channels], matrix[head])
        weights[producer.weight] = value
        if producer.bias is not None and bias is not None:
            weights[producer.bias] = bias
        for name, rotated in readers.items():
            weights[name] = rotated

    def inverse(self) -> RotateHeads:
        """Rotate back."""
        return replace(self, matrix=self.matrix.transpose(-1, -2))

    def describe(self) -> dict[str, str]:
        """Kind, site and a digest of the matrix."""
        return {"kind": "rotate_heads", "site": self.site.name, "digest": digest(self.matrix)}


@dataclass(frozen=True)
class RotateResidual:
    """Rotate the residual stream: ``x Q`` with ``matrix`` float64 ``[D, D]``. The gains of all norms on it must be 1."""

    graph: Graph
    matrix: Tensor

    def apply(self, weights: Weights) -> None:
        """Rewrite embeddings, writers, norm biases and readers.

        Raises:
            BadRequest: a stream that cannot be rotated, a gain other than 1, or a matrix that is not orthogonal or, where
                layer norms read the stream, moves the all-ones direction.
        """
        stream, matrix = self.graph.residual, self.matrix.to(torch.float64)
        if stream.trouble is not None:
            raise BadRequest(f"the residual stream cannot be rotated: {stream.trouble}.")
        check_orthogonal(matrix, "the residual stream")
        ones = torch.ones(stream.size, dtype=torch.float64)
        if stream.centred and float((matrix @ ones - ones).abs().max()) > 1e-9:
            raise BadRequest("layer norms read the residual stream: only rotations that keep the all-ones vector commute.")
        sites = [site for site in self.graph.sites if site.source in stream.sites]
        for site in sites:
            producer = _foldable(site)
            assert producer.norm is not None
            if float((weights[producer.weight] + producer.norm.plus - 1).abs().max()) > 1e-6:
                raise BadRequest(f"{producer.weight} is not 1: fold it into its readers before the stream is rotated.")
        for table in stream.tables:
            weights[table] = weights[table] @ matrix
        for weight, bias, axis in stream.writers:
            weights[weight] = _rotated(weights[weight], axis, matrix)
            if bias is not None:
                weights[bias] = weights[bias] @ matrix
        for site in sites:
            if site.producer is not None and site.producer.bias is not None:
                weights[site.producer.bias] = weights[site.producer.bias] @ matrix
            for reader in site.readers:
                ordered = weights[reader.weight].transpose(reader.axis, -1)[..., _places(reader)]
                weights[reader.weight] = (ordered @ matrix)[..., reader.columns].transpose(reader.axis, -1)

    def inverse(self) -> RotateResidual:
        """Rotate back."""
        return replace(self, matrix=self.matrix.T)

    def describe(self) -> dict[str, str]:
        """Kind and a digest of the matrix."""
        return {"kind": "rotate_residual", "site": "residual stream", "digest": digest(self.matrix)}


@dataclass(frozen=True)
class Rotate:
    """Rotate the inputs of one matrix by a Hadamard matrix at run time."""

    before: Before
    back: bool = False

    def apply(self, weights: Weights) -> None:
        """Rewrite the matrix and note the rotation.

        Raises:
            BadRequest: its inputs are rotated already.
        """
        reader, intake = self.before.reader, self.before.intake
        if intake.rotated != self.back:
            raise BadRequest(f"{reader.weight}: its inputs are {'not ' * self.back}rotated already.")
        turn = unrotate if self.back else rotate
        weights[reader.weight] = turn(weights[reader.weight].transpose(reader.axis, -1)).transpose(reader.axis, -1)
        intake.rotated = not self.back

    def inverse(self) -> Rotate:
        """Rotate back."""
        return replace(self, back=not self.back)

    def describe(self) -> dict[str, str]:
        """Kind and matrix."""
        return {"kind": "rotate", "site": self.before.reader.weight, "digest": "hadamard"}


@dataclass(frozen=True)
class Widen:
    """Round some input channels of one matrix, int64 ``channels``, to more bits; none of them takes it back."""

    before: Before
    channels: Tensor
    bits: int = 8

    def apply(self, weights: Weights) -> None:
        """Note the channels."""
        intake = self.before.intake
        intake.high, intake.high_bits = (self.channels if len(self.channels) else None), self.bits

    def inverse(self) -> Widen:
        """All channels alike."""
        return replace(self, channels=self.channels[:0])

    def describe(self) -> dict[str, str]:
        """Kind, matrix and a digest of the channels."""
        return {"kind": "widen", "site": self.before.reader.weight, "digest": digest(self.channels)}


def gain_of(weights: Weights, site: Site) -> Tensor:
    """The gain of the norm that produces a site, float64 ``[size]``."""
    producer = _foldable(site)
    assert producer.norm is not None
    return weights[producer.weight] + producer.norm.plus


def check_orthogonal(matrix: Tensor, where: str) -> None:
    """Refuse a matrix ``[.., n, n]`` with ``|Q^T Q - I|`` above 1e-10.

    Raises:
        BadRequest: naming where it was to be used.
    """
    square = matrix.to(torch.float64).transpose(-1, -2) @ matrix.to(torch.float64)
    error = float((square - torch.eye(square.shape[-1], dtype=torch.float64)).abs().max())
    if error > 1e-10:
        raise BadRequest(f"{where}: the matrix is not orthogonal (off by {error:.2g}).")


def digest(values: Tensor) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of some numbers as float64."""
    return hashlib.sha256(values.detach().to(torch.float64).contiguous().numpy().tobytes()).hexdigest()[:16]


def _place(site: Site, before: Before | None) -> str:
    return site.name if before is None else before.reader.weight


def _foldable(site: Site) -> Producer:
    if site.producer is None:
        raise BadRequest(f"{site.name} cannot be folded: {site.trouble}.")
    return site.producer


def _per_producer(site: Site, values: Tensor, rest: float = 1.0) -> Tensor:
    """Values of a site's channels as the producer's channels see them; ``rest`` for those the site does not have."""
    producer = _foldable(site)
    own = torch.full((producer.size,), rest, dtype=torch.float64)
    own[producer.channels] = values
    if float((own[producer.channels] - values).abs().max()) > 0:
        raise BadRequest(f"{site.name}: channels that share keys and values must be given the same number.")
    return own


def _times(tensor: Tensor, axis: int, factor: Tensor) -> Tensor:
    return (tensor.transpose(axis, -1) * factor).transpose(axis, -1)


def _rotated(tensor: Tensor, axis: int, matrix: Tensor) -> Tensor:
    return (tensor.transpose(axis, -1) @ matrix).transpose(axis, -1)


def _rotate_part(tensor: Tensor, axis: int, places: Tensor, matrix: Tensor) -> None:
    view = tensor.transpose(axis, -1)
    view[..., places] = view[..., places] @ matrix


def _places(reader: Reader) -> Tensor:
    """For each channel of the site, the input of the reader that takes it."""
    if not torch.equal(reader.columns.sort().values, torch.arange(len(reader.columns))):
        raise BadRequest(f"{reader.weight} does not read every channel of its site once, so it cannot be rotated.")
    return reader.columns.argsort()
