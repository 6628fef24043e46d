"""Tests of reading removal lists and matching them to an index."""

import hashlib
import unicodedata

import numpy as np
import pytest

from hashvision.data import keys, records, removals
from hashvision.errors import UserError

KEY = keys.Key(bytes(range(32)))
DIGEST = hashlib.sha256(b"photo").hexdigest()
HEADER = "kind,value,reason,received_at\n"
LIST = f"""{HEADER}owner,u0153,account deleted,2018-06-01
id,"p,178",post deleted,2018-06-02
sha256,{DIGEST.upper()},takedown,2018-06-03
"""


def write(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "removals.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return str(path)


def no_copies():
    return np.zeros(0, records.COPIES_DTYPE)


@pytest.mark.parametrize("key", [keys.NO_KEY, KEY])
def test_each_kind_matches_its_column_of_the_index(tmp_path, key):
    names = removals.names(removals.read(write(tmp_path, LIST, "utf-8-sig")), key)
    rows = np.zeros(5, records.INDEX_DTYPE)
    rows["owner"] = [key.hash("owner", owner) for owner in ("u0153", "u1", "u2", "u3", "p,178")]
    rows["id"] = [key.hash("id", post) for post in ("a", "p,178", "b", "u0153", "c")]
    rows["photo"][2] = key.hash("sha256", bytes.fromhex(DIGEST))
    hits = names.hits(100, rows, no_copies())
    assert removals.marks(hits, 100, 5).tolist() == [True, True, True, False, False]
    assert names.matched(hits).all() and not hits["copy"].any()
    assert not len(removals.NOTHING.hits(0, rows, no_copies()))
    assert names.holds("id", "p,178") and not names.holds("owner", "p,178")
    assert names.holds("sha256", bytes.fromhex(DIGEST)) and not names.holds("sha256", bytes(32))


def test_lines_that_match_nothing_are_reported():
    lines = [removals.Removal("id", f"p{n}", "", "") for n in range(6)]
    listed = removals.RemovalList([*lines, removals.Removal("owner", "p0", "", "")])
    names = listed.names(KEY)
    rows = np.zeros(1, records.INDEX_DTYPE)
    rows["id"] = KEY.hash("id", "p0")
    unmatched = listed.unmatched(names, names.matched(names.hits(0, rows, no_copies())))
    assert unmatched == [*lines[1:], listed.lines[-1]]
    told = removals.describe_unmatched(unmatched, 7, "DIR")
    assert told == "6 of the 7 removals match nothing in DIR: id p1, id p2, id p3, ..."
    assert removals.describe_unmatched(unmatched[:1], 7, "DIR").endswith("in DIR: id p1.")
    assert removals.describe_unmatched([], 7, "DIR") == "0 of the 7 removals match nothing in DIR."


def test_names_are_compared_in_canonical_form(tmp_path):
    lines = f"owner, 12345.0 ,,\nid,{unicodedata.normalize('NFD', 'café')},,\nid,007,,\n"
    names = removals.names(removals.read(write(tmp_path, HEADER + lines)), KEY)
    assert names.holds("owner", "12345") and names.holds("id", "café") and names.holds("id", "007")


def test_valid_csv_is_read(tmp_path):
    text = (
        "\ufeffvalue,note, kind ,reason\r\n"
        '"a ""b"", c",,id,"two, of them"\r\n'
        "\r\n"
        'ü,"",owner,it\'s\ta tab\r\n'
        "p9,,id,last"
    )
    assert removals.read(write(tmp_path, text)) == [
        removals.Removal("id", 'a "b", c', "two, of them", ""),
        removals.Removal("owner", "ü", "it's\ta tab", ""),
        removals.Removal("id", "p9", "last", ""),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("value,reason\np1,gone\n", "no column kind"),
        ("kind;value\nid;p1\n", "no column kind"),
        ("", "no column kind"),
        ("kind,value,value\nid,a,b\n", "Line 1.*two columns named 'value'"),
        ("kind,value,note,note\nid,a,b,c\n", "Line 1.*two columns named 'note'"),
        (LIST + "post,p2,,\n", "Line 5.*'post'"),
        (LIST + "id,,,\n", "Line 5.*no value"),
        (LIST + "id,  ,,\n", "Line 5.*no value"),
        (LIST + "\n\nsha256,12ab,,\n", "Line 7.*SHA-256"),
        (LIST + f"sha256,{DIGEST[:-1]}g,,\n", "Line 5.*SHA-256"),
        (LIST + f"sha256,{DIGEST[:32]} {DIGEST[33:]},,\n", "Line 5.*SHA-256"),
        (LIST + "owner,Smith, John,r,t\n", "Line 5.*5 values, but .* 4 names.*double quotes"),
        (LIST + "id,p2\n", "Line 5.*2 values, but .* 4 names"),
        (LIST + 'owner, "Smith, John",r,t\n', "Line 5.*double quote in the wrong place"),
        (LIST + 'owner,"Smith" John,r,t\n', "Line 5.*wrong place, at character 14"),
        (LIST + 'owner,Smith "John",r,t\n', "Line 5.*wrong place"),
        (LIST + 'owner,"Smith,r,t\n', "Line 5.*wrong place"),
        (LIST + 'id,p1,"left,2018\nid,p2,gone",2018\n', "Line 5.*wrong place"),
        (LIST + "id,p\x002,,\n", "Line 5.*control characters"),
        (LIST + "id,p1,,\rid,p2,,\n", "Line 5.*control characters"),
        (LIST + f"id,{'x' * 1001},,\n", "Line 5.*too long"),
        (LIST + f"id,{'x' * 200_000},,\n", "Line 5.*more than 100,000 bytes"),
        (LIST.encode() + "id,é,,\n".encode("latin-1"), "Line 5.*UTF-8"),
        (LIST.encode("utf-16"), "Line 1.*UTF-8"),
    ],
)
def test_an_invalid_line_is_named(tmp_path, text, words):
    with pytest.raises(UserError, match=words) as told:
        removals.read(write(tmp_path, text))
    assert "\n" not in str(told.value)


def test_a_missing_list_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        removals.read(str(tmp_path / "none.csv"))
