"""Reads cycles and collectives from the text (HLO) of a compiled program."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_START = re.compile(r"(ENTRY )?%([\w.\-]+) .*\{$")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(")
_SHAPE = re.compile(r"([a-z]+\d+)\w*\[([\d,]*)\]")
_GROUP = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]*)\})")
_MESH = re.compile(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}")


class Collective(NamedTuple):
    """A collective of a program, as one device executes it.

    Attributes:
      kind: one of COLLECTIVES.
      elements: number of elements of the result; several results are added up.
      size: bytes of the result.
      devices: number of devices that take part; 0 if the text does not say.
      times: how often it runs in one run of the program.
    """

    kind: str
    elements: int
    size: int
    devices: int
    times: int

    @property
    def sent(self) -> float:
        """Bytes that one device sends in all its runs, with the optimal algorithm, a ring."""
        others = (self.devices - 1) / self.devices if self.devices else 1.0
        # The result of a reduce-scatter is one device's share of the sum.
        whole = self.size * (self.devices or 1) if self.kind == "reduce-scatter" else self.size
        passes = 2 if self.kind == "all-reduce" else 1
        return self.times * whole * (1.0 if self.kind == "collective-permute" else passes * others)


def instructions(text: str) -> Iterator[tuple[str, int]]:
    """Yields each instruction that runs and how often it runs, from the entry down.

    The trip count of a loop is the one that the compiler notes, as it does for CPU. Otherwise it is
    the constant of a condition `counter < constant`, with a counter from 0, as JAX makes of a scan.
    Any other loop counts once.

    Args:
      text: `compiled.as_text()`.
    """
    computations: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        start = _START.match(line)
        if start:
            current = computations.setdefault(start[2], [])
            entry = start[2] if start[1] else entry
        elif current is not None:
            current.append(line)

    def walk(name: str, times: int) -> Iterator[tuple[str, int]]:
        for line in computations.get(name, ()):
            yield line, times
            body = re.search(r"body=%([\w.\-]+)", line)
            if body:
                yield from walk(body[1], times * _trips(line, computations))
            for called in re.findall(r"calls=%([\w.\-]+)", line):
                yield from walk(called, times)
            for called in re.findall(r" call\(.*to_apply=%([\w.\-]+)", line):
                yield from walk(called, times)
            branches = re.search(r"branch_computations=\{(.*?)\}", line)
            if branches:  # one branch runs; take the first
                yield from walk(branches[1].split(",")[0].strip().removeprefix("%"), times)

    yield from walk(entry, 1)


def _trips(loop: str, computations: dict[str, list[str]]) -> int:
    """The trip count of a loop instruction; 1 if unknown."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%([\w.\-]+)", loop)
    lines = computations.get(condition[1], []) if condition else []
    constants = dict(re.findall(r"%([\w.\-]+) = s32\[\]\S* constant\((\d+)\)", "\n".join(lines)))
    limit = re.search(r"compare\(%[\w.\-]+, %([\w.\-]+)\), direction=LT", "\n".join(lines))
    return int(constants.get(limit[1], 1)) if limit else 1


def cycles(text: str) -> int:
    """The sum of the compiler's estimates of cycles; 0 if the compiler makes none."""
    total = 0
    for line, times in instructions(text):
        found = re.search(r'"estimated_cycles":"(\d+)"', line)
        total += times * int(found[1]) if found else 0
    return total


def collectives(text: str) -> list[Collective]:
    """The collectives of a program, sorted by kind and size."""
    found = []
    for line, times in instructions(text):
        match = _COLLECTIVE.search(line)
        if not match:
            continue
        shapes = _SHAPE.findall(match[1])
        if match[0].endswith("-start(") and len(shapes) > 1 and match[2] != "all-reduce":
            shapes = shapes[len(shapes) // 2 :]  # (operands, results)
        counts = [math.prod(int(n) for n in dims.split(",") if n) for _, dims in shapes]
        bits = [int(re.sub(r"\D", "", kind)) for kind, _ in shapes]
        size = sum(n * b for n, b in zip(counts, bits, strict=True)) // 8
        found.append(
            Collective(
                kind=match[2],
                elements=sum(counts),
                size=size,
                devices=_devices(line),
                times=times,
            )
        )
    return sorted(found)


def _devices(line: str) -> int:
    """The number of devices in a group of a collective; 0 if the text does not say.

    The text has one of three forms: [groups,N]<=..., {{0,1,...},...} or mesh[...] {axes}.
    """
    group, mesh = _GROUP.search(line), _MESH.search(line)
    if group:
        return int(group[1]) if group[1] else len(group[2].split(","))
    if not mesh:
        return 0
    sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
    # A part of an axis is written 'axis':(before)size.
    axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
    return math.prod(int(part) if part else sizes[axis] for axis, part in axes)
