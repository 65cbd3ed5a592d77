"""The CUDA extension as the tests of csrc/ build it."""

from tests.csrc.conftest import built_extension, library

__all__ = ["built_extension", "library"]
