"""Photos on their way through the graph lie in files beside the dataset; where they lie travels."""

import secrets
import typing

from hashvision import storage

FOLDER = "spool"
_OPEN = 64  # files that a reader keeps open


class Location(typing.NamedTuple):
    """Where the bytes of a photo lie."""

    file: str  # below the folder
    offset: int
    size: int


class SpoolWriter:
    """Appends photos to a file of its own, made with the first of them."""

    def __init__(self, folder: str) -> None:
        """Takes the folder of all spool files."""
        self._folder, self._file, self._offset = folder, None, 0

    def write(self, photo: bytes) -> Location:
        """Appends the bytes; they may be read once the writer is closed."""
        if self._file is None:
            self._name = secrets.token_hex(8)
            self._path = f"{self._folder}/{self._name}"
            storage.make_folder(self._folder)
            self._file = storage.open(self._path, "wb")
            self._offset = 0
        location = Location(self._name, self._offset, len(photo))
        with storage.naming(self._path):
            self._file.write(photo)
        self._offset += len(photo)
        return location

    def close(self) -> None:
        """Ends the file; what is written next goes into another."""
        if self._file is not None:
            with storage.naming(self._path):
                self._file.close()
            self._file = None


class SpoolReader:
    """Reads photos from the files of many writers."""

    def __init__(self, folder: str) -> None:
        """Takes the folder of all spool files."""
        self._folder, self._files = folder, {}

    def read(self, location: Location) -> bytes:
        """The bytes of a photo."""
        file = self._files.pop(location.file, None) or storage.open(
            f"{self._folder}/{location.file}"
        )
        self._files[location.file] = file  # the last is the one used last
        if len(self._files) > _OPEN:
            self._files.pop(next(iter(self._files))).close()
        file.seek(location.offset)
        return file.read(location.size)

    def close(self) -> None:
        """Closes all files."""
        for file in self._files.values():
            file.close()
        self._files = {}
