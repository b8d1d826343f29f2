"""The one place the version stands."""

__version__ = "0.4.0"
