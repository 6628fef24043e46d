"""`python -m hashvision`, which also records for chaos.py what each step was shown.

Lines of SEEN/HOST-of-HOSTS-SESSION.jsonl: {"step", "host", "hosts", "keys"}.
"""

import json
import os
import pathlib
import sys
import uuid

from hashvision.commands.main import main
from hashvision.data import reader

SEEN = "CHAOS_SEEN"


def note(batches):
    """Wraps BatchReader.batches to record each batch before the training loop gets it."""

    def noted(self, start=0):
        host = int(os.environ.get("JAX_PROCESS_ID", 0))
        hosts = int(os.environ.get("JAX_NUM_PROCESSES", 1))
        name = f"{host}-of-{hosts}-{uuid.uuid4().hex[:8]}.jsonl"
        with open(pathlib.Path(os.environ[SEEN]) / name, "w") as file:
            for step, (items, batch) in enumerate(batches(self, start)):
                keys = [int(a) << 32 | int(b) for a, b in batch["key"]]
                line = {"step": start + step, "host": host, "hosts": hosts, "keys": keys}
                line["ids"] = self._stream.names(items).tolist()
                file.write(json.dumps(line) + "\n")
                file.flush()
                yield items, batch

    return noted


if __name__ == "__main__":
    reader.BatchReader.batches = note(reader.BatchReader.batches)
    sys.exit(main())
