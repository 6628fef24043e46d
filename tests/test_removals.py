import hashlib

import numpy as np
import pytest

from hashvision.data import records, removals
from hashvision.errors import UserError

DIGEST = hashlib.sha256(b"photo").hexdigest()
LIST = f"""kind,value,reason,received_at
owner,u0153,account deleted,2018-06-01
id,"p,178",post deleted,2018-06-02
sha256,{DIGEST.upper()},takedown,2018-06-03
"""


def write(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "removals.csv"
    path.write_bytes(text.encode(encoding))
    return str(path)


def test_each_kind_is_found_where_the_index_holds_it(tmp_path):
    names = removals.names(removals.read(write(tmp_path, LIST, "utf-8-sig")))
    rows = np.zeros(5, records.INDEX_DTYPE)
    rows["owner"] = [records.id_hash(owner) for owner in ("u0153", "u1", "u2", "u3", "p,178")]
    rows["id"] = [records.id_hash(post) for post in ("a", "p,178", "b", "u0153", "c")]
    rows["photo"][2] = records.photo_hash(bytes.fromhex(DIGEST))
    assert names.match(rows).tolist() == [True, True, True, False, False]
    assert not removals.NOTHING.match(rows).any()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("value,reason\np1,gone\n", "no column kind"),
        (LIST + "post,p2,,\n", "Line 5.*'post'"),
        (LIST + "id,,,\n", "Line 5.*no value"),
        (LIST + "sha256,12ab,,\n", "Line 5.*SHA-256"),
        ("", "no column kind"),
    ],
)
def test_a_line_that_makes_no_sense_is_named(tmp_path, text, words):
    with pytest.raises(UserError, match=words):
        removals.read(write(tmp_path, text))


def test_a_list_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        removals.read(str(tmp_path / "none.csv"))
    with pytest.raises(UserError, match="UTF-8"):
        removals.read(write(tmp_path, LIST + "id,é,,\n", "latin-1"))
