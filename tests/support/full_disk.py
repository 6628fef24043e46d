"""What a full disk is like: files of this process, and of those it starts, stop at a size."""

import contextlib
import os
import resource
import sys
from collections.abc import Iterator
from unittest import mock

# Before 3.14 Python keeps a compiled module that was cut short, and fails at it ever after
# (gh-126606): where files are limited none is kept.
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
