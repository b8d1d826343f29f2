"""The storage format: one record, ``LowBitTensor``, and everything that describes, packs, counts and stores it."""

from hf_lowbit.format.layout import Field, Layout, Stage, parse_layout
from hf_lowbit.format.ledger import Ledger, ledger
from hf_lowbit.format.levels import Levels
from hf_lowbit.format.serialize import FORMAT_VERSION, Record, load_tensors, read_record, save_tensors
from hf_lowbit.format.spec import Spec
from hf_lowbit.format.tensor import LowBitTensor

__all__ = [
    "FORMAT_VERSION",
    "Field",
    "Layout",
    "Ledger",
    "Levels",
    "LowBitTensor",
    "Record",
    "Spec",
    "Stage",
    "ledger",
    "load_tensors",
    "parse_layout",
    "read_record",
    "save_tensors",
]
