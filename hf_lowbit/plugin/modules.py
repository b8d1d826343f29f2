"""The modules that stand in for dense ones: ``LowBitLinear``, ``LowBitTiedHead``, ``LowBitEmbedding``.

Stored tensors are buffers named ``{parameter}_{field}``: buffers keep their integer dtypes under ``.to(dtype)`` and get
no gradient. While a model is quantized on the fly a module briefly owns a meta ``weight`` under the checkpoint's name,
which is where the loader looks; :meth:`LowBitModule.install` replaces it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_lowbit.errors import FormatError
from hf_lowbit.format.activations import ActivationLayout, Activations
from hf_lowbit.format.layout import Layout
from hf_lowbit.format.serialize import field_name
from hf_lowbit.format.tensor import LowBitTensor
from hf_lowbit.kernels import Choice, cpu, integer, reference, select


class LowBitModule(nn.Module):
    """A module that owns one or more low-bit parameters.

    ``layouts`` maps parameter name to layout once known; :meth:`lowbit` gives the record itself.
    """

    layouts: dict[str, Layout]

    def install(self, parameter: str, layout: Layout, device: torch.device | str = "meta") -> None:
        """Replace the dense ``parameter``, if there, by uninitialised buffers for ``layout``."""
        if parameter in self._parameters:
            del self._parameters[parameter]
        before = getattr(self, "layouts", {}).get(parameter)
        for stored in () if before is None else before.fields:
            self._buffers.pop(field_name(parameter, stored), None)
        for stored, tensor in LowBitTensor.empty(layout, device).tensors.items():
            self.register_buffer(field_name(parameter, stored), tensor)
        self.layouts = {**getattr(self, "layouts", {}), parameter: layout}

    def put(self, parameter: str, tensor: LowBitTensor) -> None:
        """Install ``tensor`` as low-bit ``parameter``."""
        self.install(parameter, tensor.layout)
        for stored, value in tensor.tensors.items():
            self._buffers[field_name(parameter, stored)] = value

    def lowbit(self, parameter: str = "weight") -> LowBitTensor:
        """The record of a low-bit parameter, sharing this module's buffers."""
        layout = self.layouts[parameter]
        return LowBitTensor(layout, {s: self.get_buffer(field_name(parameter, s)) for s in layout.fields})

    def choice(self, parameter: str = "weight", strict: bool = False) -> Choice:
        """The backend for a parameter on its present device, and why."""
        first = self.get_buffer(field_name(parameter, "codes"))
        return select(self.layouts[parameter], first.device, strict=strict)

    def prepared(self, parameter: str = "weight") -> tuple[Any, Any]:
        """The backend and its prepared form of a parameter, made again whenever the record was replaced or written to."""
        first, layout = self._buffers[field_name(parameter, "codes")], self.layouts[parameter]
        cache = self.__dict__.setdefault("_prepared", {})
        known = cache.get(parameter)
        writes = written(first)
        if known is None or known[0] is not first or known[1] is not layout or writes not in (None, known[2]):
            backend = self.choice(parameter).backend
            known = cache[parameter] = (first, layout, writes, backend, self._prepare(backend, parameter))
        return known[3], known[4]

    def _prepare(self, backend: Any, parameter: str) -> Any:
        return backend.prepare(self.lowbit(parameter))

    def __getstate__(self) -> dict:
        state = dict(self.__dict__)
        state.pop("_prepared", None)  # holds the old buffers; a copy prepares its own
        return state


class ActivationQuantizer(nn.Module):
    """What is done to the inputs of a low-bit matrix before it multiplies them; ``hf_lowbit.format.activations`` says how.

    Args:
        layout: what is done.
        tensors: its numbers; None leaves them uninitialised on the meta device, for loading.
    """

    def __init__(self, layout: ActivationLayout, tensors: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.layout = layout
        for name, wanted in layout.fields.items():
            empty = torch.empty(wanted.shape, dtype=wanted.dtype, device="meta")
            self.register_buffer(name, empty if tensors is None else tensors[name])

    @property
    def activations(self) -> Activations:
        """Layout and tensors."""
        return Activations(self.layout, {name: self.get_buffer(name) for name in self.layout.fields})

    def forward(self, x: Tensor) -> Tensor:
        """What reaches the matrix for inputs ``[..., in_features]``."""
        return self.activations(x)

    def extra_repr(self) -> str:
        """What is done, for ``print(model)``."""
        return describe(self.layout)


def describe(layout: ActivationLayout) -> str:
    """An activation layout in words."""
    spec, words = layout.spec, []
    if spec is not None:
        words = [f"{spec.bits} bits per {spec.per}", "static" if spec.static else "dynamic"]
        words += ["symmetric"] * spec.symmetric + [f"{layout.high} channels at {layout.high_bits} bits"] * bool(layout.high)
    given = {
        "split and merged": layout.members,
        "shifted": layout.shifted,
        "divided": layout.scaled,
        "rotated": layout.rotated,
    }
    return ", ".join([*words, *(word for word, there in given.items() if there)])


class LowBitLinear(LowBitModule):
    """``y = x W^T + b`` with a low-bit ``W`` ``[out_features, in_features]`` and a bias in high precision.

    With an :class:`ActivationQuantizer` in ``activation``, inputs are rewritten and rounded first. The product is then of
    whole numbers where both sides allow it (``hf_lowbit.kernels.integer``), else an exact float one, which gives the same.

    Args:
        in_features, out_features: as of ``nn.Linear``.
        bias: whether there is a bias parameter.
        transposed: the dense module stores ``[in, out]`` (GPT-2's ``Conv1D``); only loading and ``dense()`` care.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, transposed: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features, self.transposed = in_features, out_features, transposed
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)
        self.activation: ActivationQuantizer | None = None

    @classmethod
    def from_tensor(cls, tensor: LowBitTensor, bias: Tensor | None = None) -> LowBitLinear:
        """A linear layer around a 2-D record."""
        out_features, in_features = tensor.shape
        module = cls(in_features, out_features, bias=False)
        if bias is not None:
            module.bias = nn.Parameter(bias, requires_grad=bias.requires_grad)
        module.put("weight", tensor)
        return module

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``, in the dtype of ``x``."""
        backend, prepared = self.prepared()
        if isinstance(prepared, integer.IntegerMatrix):
            if not (torch.is_grad_enabled() and x.requires_grad):
                return prepared.linear(x, cast("Tensor | None", self.bias))
            backend, prepared = reference.REFERENCE, reference.stored(prepared.record)
        x = x if self.activation is None else self.activation(x)
        return backend.linear(x, prepared) if self.bias is None else backend.linear(x, prepared, self.bias)

    @property
    def simulated(self) -> str | None:
        """Why rounded inputs are not multiplied in whole numbers, or None where they are."""
        if self.activation is None:
            return "its inputs are not rounded"
        return integer.unfit(self.lowbit(), self.activation.layout)

    def _prepare(self, backend: Any, parameter: str) -> Any:
        if self.activation is not None and self.simulated is None:
            return integer.integer_matrix(self.lowbit(), self.activation.activations)
        prepared = super()._prepare(backend, parameter)
        if self.activation is not None and isinstance(prepared, cpu.Prepared):
            return prepared._replace(auto=cpu.EXACT)  # the kernel must not round again what was rounded here
        return prepared

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The matrix ``[out_features, in_features]`` that multiplies this layer's inputs as they come, but for rounding."""
        weight = self.lowbit().dequantize(dtype)
        if self.activation is not None:
            units = torch.eye(self.in_features, dtype=torch.float64, device=weight.device)
            weight = (weight.double() @ self.activation.activations.exact(units).T).to(dtype)
        return weight

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight as the module this one replaced would hold it; what is done to its inputs is multiplied in."""
        return self.matrix(dtype).T.contiguous() if self.transposed else self.matrix(dtype)

    # The names by which PEFT finds a quantized layer's device and sizes, whatever the kind of adapter.
    @property
    def qweight(self) -> Tensor:
        """The packed codes."""
        return self.get_buffer(field_name("weight", "codes"))

    @property
    def infeatures(self) -> int:
        """Inputs."""
        return self.in_features

    @property
    def outfeatures(self) -> int:
        """Outputs."""
        return self.out_features

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def put_activations(model: nn.Module, found: Mapping[str, ActivationQuantizer]) -> None:
    """Give low-bit linear layers, by module name, what is to be done to their inputs.

    Raises:
        FormatError: a name that is no low-bit linear layer.
    """
    for name, quantizer in found.items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            module = None
        if not isinstance(module, LowBitLinear):
            raise FormatError(f"the header lists activations of {name!r}, which is no low-bit linear layer of the model.")
        module.activation = quantizer
        module.__dict__.pop("_prepared", None)


class LowBitEmbedding(LowBitModule):
    """Rows of a low-bit table ``[num_embeddings, embedding_dim]``, times an optional constant (Gemma's scaled ones).

    The rows come in the dtype of ``dtype_like``, an empty buffer that follows ``.to(dtype)`` as a weight would.

    Args:
        host: the dense embedding this one stands in for.
        dtype: of the rows.
    """

    def __init__(self, host: nn.Embedding, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.padding_idx = host.num_embeddings, host.embedding_dim, host.padding_idx
        self.register_buffer("dtype_like", torch.empty(0, dtype=dtype), persistent=False)
        self.embed_scale = _number(host, "embed_scale", "scalar_embed_scale")
        self._host = [host]  # without its weight; comes back in dense(), whatever subclass it is

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids of any shape to ``[..., embedding_dim]``."""
        backend, prepared = self.prepared()
        rows = backend.embedding(ids, prepared, self.dtype_like.dtype)
        # The host rounds its constant to the dtype of the table before multiplying; so must we.
        return rows if self.embed_scale is None else rows * torch.tensor(self.embed_scale, dtype=rows.dtype).item()

    def dense(self, dtype: torch.dtype) -> nn.Embedding:
        """The module this one replaced, with the decoded table."""
        (host,) = self._host
        host.weight = nn.Parameter(self.lowbit().dequantize(dtype), requires_grad=False)
        if isinstance(getattr(host, "embed_scale", None), Tensor):
            host.embed_scale = torch.tensor(self.embed_scale, device=host.weight.device)
        return host

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"{self.num_embeddings}, {self.embedding_dim}"


class LowBitTiedHead(nn.Module):
    """An output head that multiplies by the table of an embedding; it owns nothing but its bias."""

    def __init__(self, embedding: LowBitEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self._embedding = [embedding]  # in a list, so that the table is registered and saved once, by the embedding
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.register_parameter("bias", bias)

    @property
    def embedding(self) -> LowBitEmbedding:
        """The embedding whose table this head reads."""
        return self._embedding[0]

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``, in the dtype of ``x``."""
        backend, prepared = self.embedding.prepared()
        return backend.linear(x, prepared) if self.bias is None else backend.linear(x, prepared, self.bias)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, tied"


def written(tensor: Tensor | None) -> int | None:
    """How often a tensor was written to in place; what was made in inference mode or is being traced does not say."""
    if torch.compiler.is_compiling() or tensor is None or tensor.is_inference():
        return None
    return tensor._version


def _number(module: nn.Module, *names: str) -> float | None:
    """The first of the named attributes that holds a number (a tensor on the meta device holds none)."""
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, (int, float)) or (isinstance(value, Tensor) and not value.is_meta):
            return float(value)
    return None
