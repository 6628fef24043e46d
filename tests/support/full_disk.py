"""Simulates a full disk: files of this process and its child processes cannot exceed a size."""

import contextlib
import os
import resource
import sys
from collections.abc import Iterator
from unittest import mock

# Before 3.14, Python keeps a compiled module that was cut short, and every later import fails
# (gh-126606). So no compiled modules are kept while files are limited.
NOTHING_COMPILED = {"PYTHONDONTWRITEBYTECODE": "1"}


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Limits files to `size` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with (
        mock.patch.dict(os.environ, NOTHING_COMPILED),
        mock.patch.object(sys, "dont_write_bytecode", True),
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
