"""The package's version, where the build reads it without importing torch."""

__all__ = ["__version__"]

__version__ = "0.1.0"
