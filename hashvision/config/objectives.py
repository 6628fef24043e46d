"""The objectives by name; a new objective adds a line here."""

from typing import NamedTuple


class Entry(NamedTuple):
    """The facts about an objective that code without JAX needs.

    Attributes:
      module: the module that implements it; see hashvision/objectives.
      needs_tags: whether it learns from tags. If so, photos without a tag are left out, and the
        dataset's classes must match the run's.
    """

    module: str
    needs_tags: bool


OBJECTIVES = {
    "hashtag": Entry("hashvision.objectives.hashtag", needs_tags=True),
    "swav": Entry("hashvision.objectives.swav", needs_tags=False),
}
