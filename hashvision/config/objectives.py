"""The objectives by name: the table that a new objective adds a line to."""

from typing import NamedTuple


class Entry(NamedTuple):
    """What is known of an objective without JAX.

    Attributes:
      module: the file that implements it; see hashvision/objectives.
      needs_tags: whether it learns from tags; photos without a tag are left out then, and the
        dataset's classes must match the run's.
    """

    module: str
    needs_tags: bool


OBJECTIVES = {
    "hashtag": Entry("hashvision.objectives.hashtag", needs_tags=True),
    "swav": Entry("hashvision.objectives.swav", needs_tags=False),
}
