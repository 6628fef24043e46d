"""Spool files, in which photos wait beside the dataset while Beam passes on only their locations.

location = SpoolWriter(folder).write(photo)
photo = SpoolReader(folder).read(location)
"""

import secrets
import typing

from hashvision import storage

FOLDER = "spool"
_OPEN_FILES = 64  # per reader


class Location(typing.NamedTuple):
    """Where the bytes of a photo are."""

    file: str  # name, relative to the spool folder
    offset: int
    size: int


class SpoolWriter:
    """Appends photos to a file of its own, which it creates at the first photo."""

    def __init__(self, folder: str) -> None:
        """Takes the folder of all spool files."""
        self._folder, self._file, self._offset = folder, None, 0

    def write(self, photo: bytes) -> Location:
        """Appends the bytes; they can be read once the writer is closed."""
        if self._file is None:
            self._name = secrets.token_hex(8)
            self._path = f"{self._folder}/{self._name}"
            storage.make_folder(self._folder)
            self._file = storage.open(self._path, "wb")
            self._offset = 0
        location = Location(file=self._name, offset=self._offset, size=len(photo))
        with storage.add_path_to_errors(self._path):
            self._file.write(photo)
        self._offset += len(photo)
        return location

    def close(self) -> None:
        """Closes the file; the next write starts another one."""
        if self._file is not None:
            with storage.add_path_to_errors(self._path):
                self._file.close()
            self._file = None


class SpoolReader:
    """Reads photos from the files of many writers."""

    def __init__(self, folder: str) -> None:
        """Takes the folder of all spool files."""
        self._folder, self._files = folder, {}

    def read(self, location: Location) -> bytes:
        """Returns the bytes of a photo; fewer than its size at the end of the file."""
        path = f"{self._folder}/{location.file}"
        file = self._files.pop(location.file, None) or storage.open(path)
        self._files[location.file] = file  # the last entry is the most recently used
        if len(self._files) > _OPEN_FILES:
            self._files.pop(next(iter(self._files))).close()
        file.seek(location.offset)
        return file.read(location.size)

    def close(self) -> None:
        """Closes all files."""
        for file in self._files.values():
            file.close()
        self._files = {}
