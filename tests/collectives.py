"""What a compiled program communicates, read from its HLO."""

import math
import re

_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


def of(text: str) -> list[tuple[str, int]]:
    """(kind, elements of the result) of each collective, sorted; several results are added up."""
    found = []
    for line in text.splitlines():
        match = re.search(rf"= (.*?) ({_KINDS})(?:-start)?\(", line)
        if match:
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            sizes = [math.prod(int(s) for s in shape.split(",") if s) for shape in shapes]
            found.append((match[2], sum(sizes)))
    return sorted(found)
