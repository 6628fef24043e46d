"""Tests that any private line of a post wins, and else the latest line counts."""

import random

from hashvision.prepare import states
from hashvision.sources.posts import Post


def line(post_id: str, offset: int, created_at: str = "", visibility: str = "public") -> bytes:
    post = Post(post_id, None, "", "", visibility, created_at)
    return states.state_of(post, offset, offset // 100).pack()


def found(lines: list[bytes]) -> dict[int, str]:
    """The reason why a line does not count, by offset."""
    random.shuffle(lines)
    told = list(states.superseded(lines))
    assert all(chunk == offset // 100 for chunk, (offset, _) in told)
    assert len(told) == len({offset for _, (offset, _) in told})
    return dict(where for _, where in told)


def test_the_latest_state_counts():
    assert found([line("a", 0), line("b", 100), line("c", 200, visibility="private")]) == {}
    assert found([line("a", 0), line("a", 10), line("a", 150)]) == dict.fromkeys(
        (0, 10), "duplicate_id"
    )
    # By date, not by place; time zones and seconds count, and of equal dates the last line.
    new, old = "2020-01-01T00:00:00-05:00", "2020-01-01T03:00:00Z"
    assert found([line("a", 0, new), line("a", 10, old)]) == {10: "duplicate_id"}
    assert found([line("a", 0, "1577854800"), line("a", 10, new)]) == {0: "duplicate_id"}


def test_private_anywhere_wins():
    lines = [line("a", 0, "2019", "private"), line("a", 10, "2020"), line("a", 20, "2018")]
    assert found([*lines, line("b", 30)]) == dict.fromkeys((10, 20), "private")
    for visibility in ("", "friends", "Public"):
        assert found([line("a", 5), line("a", 7, "", visibility)]) == {5: "private"}
