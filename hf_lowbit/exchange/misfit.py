"""What one format holds and the other cannot, said by name."""

from __future__ import annotations

from hf_lowbit.errors import BadRequest


class Misfit(BadRequest):
    """A field of a matrix, or of a checkpoint's settings, that has no counterpart on the other side.

    Args:
        field: its name.
        found: what it holds.
        allowed: what it would have to hold, in words that end a sentence.
        matrix: parameter name; empty where the field is the whole checkpoint's.
    """

    def __init__(self, field: str, found: object, allowed: str, matrix: str = "") -> None:
        self.field, self.found, self.allowed, self.matrix = field, found, allowed, matrix
        super().__init__(f"{matrix}: {field} is {found}; {allowed}" if matrix else f"{field} is {found}; {allowed}")

    def at(self, matrix: str) -> Misfit:
        """The same, of a named matrix."""
        return Misfit(self.field, self.found, self.allowed, self.matrix or matrix)
