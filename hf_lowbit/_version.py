"""The one place the version stands."""

__version__ = "0.5.0"
