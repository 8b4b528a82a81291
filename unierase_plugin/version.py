"""The version, which everything may name without importing the package's table of contents."""

__version__ = "0.1.0"
