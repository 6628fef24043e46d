"""The report of a protocol on a dataset, as a table to print and as JSON."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from hashvision.evaluation.bootstrap import Estimate


@dataclasses.dataclass(frozen=True)
class Report:
    """The results of a protocol on a dataset; all metrics are fractions in [0, 1].

    Attributes:
      protocol: its name.
      dataset: the dataset's name in the workdir's reports.
      path: of the dataset.
      step: the network's training step.
      untrained: whether the network was freshly initialised instead.
      metrics: by name, each with its 95% interval.
      baselines: the same metrics for answers that ignore the photos.
      photos: number of photos of each kind.
      classes: number of classes.
      skipped: photos that could not be read: their "count", and some names as "examples".
      removed: number of photos left out because a removal list names them.
      details: settings and choices of the protocol.
    """

    protocol: str
    dataset: str
    path: str
    step: int
    untrained: bool
    metrics: dict[str, Estimate]
    baselines: dict[str, float]
    photos: dict[str, int]
    classes: int
    skipped: dict[str, Any]
    removed: int
    details: dict[str, Any]

    def as_json(self) -> str:
        """The content of the report's file; the details are members beside the others."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        details = values.pop("details")
        values["metrics"] = {name: each._asdict() for name, each in self.metrics.items()}
        return json.dumps({**values, **details}, indent=1, ensure_ascii=False) + "\n"

    def table(self) -> str:
        """The table to print: values in percent, then the photos and choices behind them."""
        network = "untrained network" if self.untrained else f"step {self.step:,}"
        lines = [f"{self.protocol} on {self.dataset}, {network}", ""]
        lines.append(f"{'':<30}{'value':>8}{'95% interval':>20}")
        for name, metric in self.metrics.items():
            interval = f"{_percent(metric.low)} to {_percent(metric.high)}"
            lines.append(f"{name:<30}{_percent(metric.value):>8}{interval:>20}")
        for name, value in self.baselines.items():
            lines.append(f"{name:<30}{_percent(value):>8}{'baseline':>20}")
        photos = ", ".join(f"{n:,} {part.replace('_', ' ')}" for part, n in self.photos.items())
        lines += ["", f"photos: {photos}; {self.classes:,} classes", *self._details()]
        if self.removed:
            lines.append(f"left out because the removal list names them: {self.removed:,}")
        if self.skipped["count"]:
            names = _some(self.skipped["examples"])
            lines.append(
                f"skipped because they are unreadable: {self.skipped['count']:,} ({names})"
            )
        return "\n".join(lines)

    def _details(self) -> list[str]:
        lines, details = [], self.details
        if "split" in details:
            lines.append(f"split: {details['split']}")
        if "l2" in details:
            lines.append(f"L2 chosen on a held-out quarter of train: {details['l2']:.3g}")
        if "matched" in details:
            names = len(details["matched"]) + len(details["unmatched"])
            line = f"names matched to the vocabulary: {len(details['matched']):,} of {names:,}"
            if details["unmatched"]:
                line += f"; not matched: {_some(details['unmatched'])}"
            lines.append(line)
        return lines


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _some(names: Sequence[str], number: int = 10) -> str:
    return ", ".join(names[:number]) + (", ..." if len(names) > number else "")
