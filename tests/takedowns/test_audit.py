"""Tests of `audit`: records on the list, and what checkpoints saw, equal a replay step by step."""

import collections
import itertools
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

import datasets
from hashvision.commands import main as program
from hashvision.config import recipes
from hashvision.data import dataset, keys, reader, records, removals, stream
from hashvision.errors import UserError
from hashvision.takedowns import audit
from hashvision.training import run as run_files
from runs import REPO, finish, make, start

SIZE, BATCH, LANES = 64, 16, 4


def text(number):
    """Bytes in place of a photo, for tests that decode none."""
    return b"photo %d" % number


def listed(*lines):
    return [removals.Removal(kind, value, "left", "2018-06-01") for kind, value in lines]


def digest(number, photo=text):
    return datasets.record(number, photo(number), ()).sha256.hex()


def as_list(lines, **options):
    return removals.RemovalList(lines, **options)


LISTED = listed(("owner", "u3"), ("id", "p5"), ("sha256", digest(20)), ("id", "gone"), ("id", "p3"))
NAMED = {5, 20, *range(3, SIZE, 5)}


def write_list(path, lines):
    rows = "".join(",".join(line) + "\n" for line in lines)
    path.write_text("kind,value,reason,received_at\n" + rows)
    return f"--removals={path}"


def some_untagged(folder):
    for path in sorted(folder.glob("index-*")):
        rows = np.load(path)
        rows["rarest"][::4] = 0
        np.save(path, rows)
    datasets.seal(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dataset that includes photos without a tag."""
    return some_untagged(datasets.write(tmp_path_factory.mktemp("data") / "set", SIZE, photo=text))


class Run:
    """A run without a network: its workdir, and what each of its steps was shown."""

    def __init__(self, path, folder, seed=0, method="square_root", objective="swav", lanes=LANES):
        self.path, self.folder, self.shown = path, folder, {}
        self.config = recipes.load(str(REPO / "configs" / "base.py"), [])
        self.config.update_from_flattened_dict(
            {"batch_size": BATCH, "seed": seed, "data.lanes": lanes, "data.sampling": method}
        )
        self.config.objective.name = objective

    def start(self, step, removed=(), hosts=1, folder=None, keep=False):
        """Does what `loop.train` does before its first step; returns a stream for each host."""
        self.folder = folder or self.folder
        source = dataset.load(str(self.folder))
        self.config.dataset = str(self.folder)
        run_files.claim(str(self.path), self.config, source.vocabulary, source.manifest)
        names = source.names(removals.RemovalList(list(removed), keep_copies=keep))
        run_files.note_start(str(self.path), step, names)
        self.shown = {done: seen for done, seen in self.shown.items() if done < step}
        return [
            stream.Stream(
                source,
                batch_size=BATCH,
                lanes=self.config.data.lanes,
                seed=self.config.seed,
                method=self.config.data.sampling,
                threshold=None,
                tagged_only=self.config.objective.name == "hashtag",
                host=host,
                hosts=hosts,
                removed=names,
            )
            for host in range(hosts)
        ]

    def go(self, step, end, removed=(), hosts=1, broken=(), folder=None, keep=False):
        """Runs steps `step` to `end`; `broken` are the (step, record) that are found meanwhile."""
        photos = self.start(step, removed, hosts, folder, keep)
        faults = [reader.Faults(str(self.path), host, 1.0) for host in range(hosts)]
        for host, part in enumerate(photos):
            excluded = np.zeros(part.last - part.first, bool)
            for fault in faults[host].unresolved:
                if part.first <= fault.record < part.last:
                    if (fault.record + step) % 2:  # some can be read again
                        faults[host].add(fault._replace(step=step, cause=""))
                    else:
                        if fault.step > step:
                            faults[host].add(fault._replace(step=step))
                        excluded[fault.record - part.first] = True
            part.exclude(excluded)
        for now in range(step, end):
            for host, part in enumerate(photos):
                found = np.zeros(part.last - part.first, bool)
                for when, record in broken:
                    if when == now and part.first <= record < part.last:
                        faults[host].add(reader.Fault(now, record, 1, "shard", 0, "broken"))
                        found[record - part.first] = True
                part.exclude(found)
            self.shown[now] = np.concatenate([part.items(now).record for part in photos])

    def save(self, *steps):
        for step in steps:
            (self.path / "checkpoints" / str(step)).mkdir(parents=True)


def replayed(run, checkpoint, named=NAMED):
    """By record: how often it was shown, and at which steps first and last."""
    times, steps = collections.Counter(), collections.defaultdict(list)
    for step in range(checkpoint):
        for record in run.shown[step].tolist():
            if record in named:
                times[record] += 1
                steps[record].append(step + 1)
    return {record: (times[record], min(steps[record]), max(steps[record])) for record in times}


def audited(seen, checkpoint):
    column = seen.checkpoints.index(checkpoint)
    return {
        photo.shown.position: int(photo.shown.times[column])
        for photo in seen.records
        if photo.shown.times[column]
    }


def agree(run, seen, named=NAMED):
    for checkpoint in seen.checkpoints:
        whole = replayed(run, checkpoint, named)
        assert audited(seen, checkpoint) == {record: count[0] for record, count in whole.items()}
    spans = {p.shown.position: (p.shown.first, p.shown.last) for p in seen.records if p.shown.first}
    assert spans == {record: found[1:] for record, found in whole.items()}
    assert {photo.shown.position for photo in seen.records} == named


@pytest.mark.parametrize("objective", ["swav", "hashtag"])
@pytest.mark.parametrize("method", ["natural", "square_root", "uniform"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_counts_are_those_of_every_step_replayed(
    tmp_path, folder, seed, method, objective, monkeypatch
):
    rng = np.random.default_rng([seed, len(method), len(objective)])

    def faults(first, last):
        # Few records, so that the same ones are broken, restored and broken again.
        steps = rng.integers(first, last, 10).tolist()
        return list(zip(steps, rng.choice([1, 3, 8, 13, 18, 30, 40], 10).tolist(), strict=True))

    run = Run(tmp_path / "run", folder, seed, method, objective)
    run.go(0, 23, broken=faults(0, 23))
    # A power cut: back to step 15, with a first list; then another list with other photos.
    run.go(15, 40, removed=LISTED[1:3], broken=faults(15, 40))
    run.go(31, 52, removed=listed(("owner", "u3"), ("owner", "u1")), broken=faults(31, 52))
    run.go(52, 60, removed=listed(("owner", "u1")), hosts=1)
    run.save(5, 15, 20, 47, 60)
    agree(run, audit.audit_run(str(run.path), as_list(LISTED)))
    monkeypatch.setattr("hashvision.takedowns.replay._ITEMS", 7)  # the same counts in parts
    agree(run, audit.audit_run(str(run.path), as_list(LISTED)))


@pytest.mark.parametrize("lanes", [1, 2, 16])
def test_counts_are_the_same_whatever_hosts_and_lanes(tmp_path, folder, lanes):
    run = Run(tmp_path / "run", folder, lanes=lanes)
    hosts = min(lanes, 2)
    run.go(0, 10, hosts=hosts, broken=[(4, 8), (6, 33)])
    run.go(10, 30, LISTED[:1], hosts, [(12, 20)])
    run.save(10, 30)
    agree(run, audit.audit_run(str(run.path), as_list(LISTED)))


def test_a_replacement_of_a_removed_photo_counts_as_shown(tmp_path, folder):
    run = Run(tmp_path / "run", folder, method="natural", lanes=1)
    run.go(0, 4, removed=listed(*(("id", f"p{n}") for n in range(1, SIZE))))  # p0 alone is left
    run.save(4)
    (photo,) = audit.audit_run(str(run.path), as_list(listed(("id", "p0")))).records
    assert photo.shown.times.tolist() == [4 * BATCH]


class Reads(Run):
    """A run that reads its photos; the list names all of its records."""

    def __init__(self, place):
        super().__init__(place / "run", datasets.write(place / "set", size=SIZE), method="natural")
        self.shard = self.folder / records.shard_name(1, 2)  # from record 32 on
        self.whole = self.shard.read_bytes()

    def read(self, step, end, removed=(), when=None, happens=None):
        """Runs steps `step` to `end`; calls `happens` after step `when`."""
        (photos,) = self.start(step, removed)
        faults = reader.Faults(str(self.path), 0, 1.0)
        batches = reader.BatchReader(photos, 48, 2, faults, threads=2).batches(step)
        for now, (items, _) in enumerate(itertools.islice(batches, end - step), step):
            self.shown[now] = items.record
            if now == when:
                happens()

    def flip(self, *numbers):
        """Flips a bit of records, or flips it back."""
        source = dataset.load(str(self.folder))
        for number in numbers:
            shard = source.shards[int(source.shard_of(np.array([number]))[0])]
            with open(shard, "r+b") as file:
                file.seek(int(source.rows(number, number + 1)["offset"][0]) + 100)
                byte = file.read(1)[0]
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte ^ 16]))

    def cut(self, number):
        """Ends the second shard within a record."""
        rows = dataset.load(str(self.folder)).rows(number, number + 1)
        os.truncate(self.shard, int(rows["offset"][0]) + 10)

    def agrees(self):
        every = listed(*(("id", f"p{n}") for n in range(SIZE)))
        agree(self, audit.audit_run(str(self.path), as_list(every)), set(range(SIZE)))


@pytest.mark.slow
def test_counts_are_those_of_the_batches_that_were_read(tmp_path):
    run = Reads(tmp_path)
    run.flip(9)
    run.read(0, 12)
    run.flip(9, 12, 33, 42)  # record 9 can be read again, and the others cannot
    run.read(5, 14, listed(("id", "p3")))
    run.cut(53)
    run.read(9, 18)
    run.shard.write_bytes(run.whole)
    run.flip(54)
    run.read(16, 24)
    run.flip(54)
    run.read(18, 30)
    run.save(4, 9, 12, 18, 20, 30)
    run.agrees()


@pytest.mark.slow
def test_broken_records_are_not_shown_in_repeated_steps(tmp_path):
    run = Reads(tmp_path)
    run.read(0, 8)
    run.flip(*range(1, SIZE, 5))
    run.read(6, 14)
    run.read(3, 16)  # before it was found
    run.save(16)
    run.agrees()


def test_records_of_a_restored_shard_are_shown_again_except_a_broken_first(tmp_path):
    run = Reads(tmp_path)
    run.cut(50)
    run.read(0, 8)
    run.shard.write_bytes(run.whole)
    run.flip(50)
    run.read(8, 20)
    run.save(20)
    run.agrees()


@pytest.mark.slow
def test_a_shard_cut_short_while_it_is_read_loses_its_last_records_too(tmp_path):
    run = Reads(tmp_path)
    run.flip(55)
    run.read(0, 24, when=8, happens=lambda: run.cut(50))
    run.save(24)
    run.agrees()


def test_a_run_that_resumed_on_another_dataset(tmp_path, folder):
    smaller = datasets.write(tmp_path / "smaller", size=48, photo=text)
    run = Run(tmp_path / "run", folder)
    run.go(0, 10)
    first = replayed(run, 10)
    run.go(10, 20, folder=smaller)
    run.save(10, 20)
    seen = audit.audit_run(str(run.path), as_list(LISTED))
    both = collections.Counter({record: count[0] for record, count in first.items()})
    later = replayed(run, 20)
    assert audited(seen, 10) == both
    assert audited(seen, 20) == {record: count[0] for record, count in later.items()}
    assert sum(later[record][0] for record in later) > sum(both.values())
    gone = tmp_path / "moved"
    smaller.rename(gone)
    smaller.with_name("smaller.key").rename(tmp_path / "moved.key")
    with pytest.raises(UserError, match=f"from step 11 on.*{smaller} does not exist.*--dataset"):
        audit.audit_run(str(run.path), as_list(LISTED))
    assert audited(audit.audit_run(str(run.path), as_list(LISTED), str(gone)), 20) == audited(
        seen, 20
    )


def call(*arguments):
    return program.main(["audit", *map(str, arguments)])


def test_a_dataset_audit_reports_records_on_the_list(tmp_path, folder, capsys):
    removed = write_list(tmp_path / "list.csv", LISTED)
    assert call(removed, f"--dataset={folder}", f"--json={tmp_path / 'all.json'}") == 1
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert ["owner", "u3", "left", "2018-06-01", "13", "0", "0:3,", "0:8,", "0:13", "..."] in rows
    assert ["id", "3", "2", "2", "0"] in rows  # p3 is one of u3's too
    assert "1 of the 5 removals match nothing in it: id gone." in out
    assert "15 of the 64 records" in out and "`prepare --removals`" in out
    assert "dropped as a copy" not in out
    found = json.loads((tmp_path / "all.json").read_text())
    held = [len(line["records"]) for line in found["removals"]]
    assert (held, found["still_inside"]) == ([13, 1, 1, 0, 1], 15)
    where = {"shard": 0, "file": "posts-train.tfrecord-00000-of-00002", "position": 20}
    assert found["removals"][2]["records"] == [{**where, "shows": "a removed post"}]


def test_a_dataset_without_removed_records(tmp_path, folder, capsys):
    removed = write_list(tmp_path / "list.csv", listed(("id", "gone")))
    assert call(removed, f"--dataset={folder}") == 0
    assert "0 of the 64 records" in capsys.readouterr().out


def test_a_long_list_is_cut_and_moves_no_cursor(tmp_path, folder, capsys):
    lines = [
        removals.Removal("id", f"p{n}", f"\u202e{'because ' * 9}", "2018") for n in range(SIZE)
    ]
    assert call(write_list(tmp_path / "list.csv", lines), f"--dataset={folder}") == 1
    out = capsys.readouterr().out
    assert "and 24 more; --json lists all." in out and "\u202e" not in out
    assert max(map(len, out.split("\n\n")[0].splitlines())) < 100


@pytest.fixture
def run(tmp_path, folder):
    """Six steps that see photos of the list, then four that apply it."""
    run = Run(tmp_path / "run", folder)
    run.go(0, 6)
    run.go(6, 10, LISTED)
    run.save(6, 10)
    return run


def test_a_run_audit_reports_what_checkpoints_saw(tmp_path, run, capsys):
    (run.path / "checkpoints" / "12.orbax-checkpoint-tmp").mkdir()
    (run.path / "damaged" / "11.0").mkdir(parents=True)
    removed = write_list(tmp_path / "list.csv", LISTED)
    assert call(removed, f"--workdir={run.path}", f"--json={tmp_path / 'all.json'}") == 1
    out = capsys.readouterr().out
    whole = replayed(run, 6)
    total = sum(count[0] for count in whole.values())
    assert f"        10  {len(whole):>20}  {total:>12}" in out
    assert "Weights do not forget." in out and "from the start, in a new --workdir" in out
    found = json.loads((tmp_path / "all.json").read_text())
    assert found["checkpoints"] == [6, 10]
    assert {record["shown"]["10"] for record in found["records"]} >= {1, 2}
    by_place = {(r["shard"], r["position"]): r for r in found["records"]}
    three = by_place[0, 3]
    assert [line["value"] for line in three["removals"]] == ["u3", "p3"]
    assert (three["shown"]["6"], three["first_step"], three["last_step"]) == whole[3]


def test_the_checkpoint_to_resume_from_is_named(tmp_path, folder, capsys):
    run = Run(tmp_path / "run", folder)
    run.go(0, 3, LISTED)
    run.go(3, 8)
    run.save(2, 3, 8)
    first = min(found[1] for found in replayed(run, 8).values())
    assert call(write_list(tmp_path / "list.csv", LISTED), f"--workdir={run.path}") == 1
    out = capsys.readouterr().out
    assert first > 3 and "from the checkpoint of step 3," in out and f"before step {first}," in out


@pytest.mark.parametrize("saved", [(), (4,)])
def test_a_run_that_saw_no_removed_record(tmp_path, folder, saved, capsys):
    run = Run(tmp_path / "run", folder)
    run.config.init_from = "elsewhere"
    run.go(0, 4, LISTED)
    run.save(*saved)
    assert call(write_list(tmp_path / "list.csv", LISTED), f"--workdir={run.path}") == 0
    out = capsys.readouterr().out
    assert ("no checkpoint saw any" if saved else "holds no checkpoint") in out
    assert "trunk of elsewhere" in out  # which may have seen some


def test_a_run_of_an_earlier_version_applied_no_list(tmp_path, folder):
    run = Run(tmp_path / "run", folder)
    run.go(0, 6)
    run.save(6)
    (run.path / "removed.jsonl").unlink()
    agree(run, audit.audit_run(str(run.path), as_list(LISTED)))


def test_a_moved_dataset_is_given(tmp_path, folder, run, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    shutil.copy(f"{folder}.key", f"{moved}.key")
    noted = json.loads((run.path / "dataset.json").read_text())
    noted["dataset"] = str(tmp_path / "nowhere")
    (run.path / "dataset.json").write_text(json.dumps(noted))
    starts = [json.loads(line) for line in (run.path / "removed.jsonl").read_text().splitlines()]
    lines = (json.dumps({**start, "dataset": noted["dataset"]}) + "\n" for start in starts)
    (run.path / "removed.jsonl").write_text("".join(lines))
    removed = write_list(tmp_path / "list.csv", LISTED)
    assert call(removed, f"--workdir={run.path}") == 2
    assert "nowhere does not exist); give --dataset" in capsys.readouterr().err
    assert call(removed, f"--workdir={run.path}", f"--dataset={moved}") == 1
    other = datasets.write(tmp_path / "other", size=48, photo=text)
    assert call(removed, f"--workdir={run.path}", f"--dataset={other}") == 2
    assert "other is another dataset, " in capsys.readouterr().err


def test_a_dataset_of_another_run_is_refused(tmp_path, run, capsys):
    other = datasets.write(tmp_path / "other", size=48, photo=text)
    removed = write_list(tmp_path / "list.csv", LISTED)
    assert call(removed, f"--workdir={run.path}", f"--dataset={other}") == 2
    assert "is not the dataset that" in capsys.readouterr().err


ANYTHING = ["null", "[]", '"run"', "-5", "1e18", "NaN", "{", "", "[" * 100_000, '{"a":' * 100_000]
NO_REMOVALS = {"owner": [], "id": [], "sha256": []}


def damaged(name, contents, words):
    return [(name, content, words) for content in contents]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        *damaged("config.json", [None], "not the workdir of a run"),
        *damaged("config.json", ANYTHING, "config.json"),
        *damaged("config.json", ["{}"], "lacks seed; copy it again"),
        *damaged("dataset.json", [None], "not the workdir of a run"),
        *damaged("dataset.json", ANYTHING, "dataset.json"),
        *damaged(
            "dataset.json",
            ["{}", '{"dataset": 5, "manifest": {}}'],
            "not a file that `train` writes",
        ),
        *damaged(
            "dataset.json", ['{"dataset": "set", "manifest": {"rarest": {}}}'], "the invalid shards"
        ),
        *damaged("vocabulary.json", [*ANYTHING, '{"classes": [-5]}'], "vocabulary.json"),
        *damaged("removed.jsonl", ANYTHING[:-3] + ANYTHING[-2:], "Line 1 of .*removed.jsonl"),
        *damaged(
            "removed.jsonl",
            [
                '{"step": 0}',
                json.dumps({"removed": NO_REMOVALS}),
                *(
                    json.dumps({"step": step, "removed": NO_REMOVALS})
                    for step in (-1, 1e18, float("nan"), "0", None, 1.5, 10**30)
                ),
                '{"step": 0, "removed": {"who": []}}',
                '{"step": 0, "removed": []}',
                *(
                    json.dumps({"step": 0, "removed": {**NO_REMOVALS, "owner": [value]}})
                    for value in (-5, 1e18, float("nan"), 2**64, None, [])
                ),
                *(
                    json.dumps({"step": 0, "removed": NO_REMOVALS, key: value})
                    for key, value in (
                        ("keep_copies_of_removed", 1),
                        ("dataset", 5),
                        ("fingerprint", None),
                    )
                ),
            ],
            "Line 1 of .*not a note that `train` writes",
        ),
        *damaged("removed.jsonl", [b"\xff\xfe".decode("latin-1")], "Line 1 of .*not valid JSON"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_damaged_workdir_is_named(tmp_path, run, name, content, words, capsys):
    (run.path / name).unlink()
    if content is not None:
        (run.path / name).write_text(content + "\n", "latin-1")
    assert call(write_list(tmp_path / "list.csv", LISTED), f"--workdir={run.path}") == 2
    error = capsys.readouterr().err
    assert re.search(words, error) and error.count("\n") == 1 and len(error) < 500


def test_a_vocabulary_of_another_run_is_named(tmp_path, run, capsys):
    path = run.path / "vocabulary.json"
    vocabulary = json.loads(path.read_text())
    vocabulary["classes"].reverse()
    path.write_text(json.dumps(vocabulary))
    assert call(write_list(tmp_path / "list.csv", LISTED), f"--workdir={run.path}") == 2
    assert "vocabulary.json has changed since `train` wrote it" in capsys.readouterr().err


# Copies: c0 and c1 show the photo of record 9, c2, of an owner of records here too, that of 40.
COPIES = [
    (9, records.Copy("c0", "v0", b"0" * 32)),
    (9, records.Copy("c1", "v1", b"1" * 32)),
    (40, records.Copy("c2", "u3", b"2" * 32)),
]


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "copied"
    return some_untagged(datasets.write(folder, SIZE, photo=text, copies=COPIES))


def test_a_record_that_shows_a_copy_of_a_removed_post_is_found(tmp_path, copied, capsys):
    lines = listed(("id", "c0"), ("owner", "v1"), ("sha256", (b"2" * 32).hex()), ("id", "p9"))
    removed = write_list(tmp_path / "list.csv", lines)
    assert call(removed, f"--dataset={copied}", f"--json={tmp_path / 'all.json'}") == 1
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert ["id", "c0", "left", "2018-06-01", "0", "1", "0:9", "(copy)"] in rows
    assert ["id", "p9", "left", "2018-06-01", "1", "0", "0:9"] in rows
    assert ["owner", "1", "1", "0", "1"] in rows and ["id", "2", "2", "1", "0"] in rows
    assert (
        "2 of the 64 records" in out
        and "as a removed post, which `prepare` dropped as a copy" in out
    )
    found = json.loads((tmp_path / "all.json").read_text())
    assert found["still_inside"] == 2
    assert [[place["shows"] for place in line["records"]] for line in found["removals"]] == [
        ["a copy of a removed post"],
        ["a copy of a removed post"],
        ["a copy of a removed post"],
        ["a removed post"],
    ]
    kept = ["--keep_copies_of_removed", f"--dataset={copied}"]
    assert call(write_list(tmp_path / "list.csv", lines[1:2]), *kept) == 0
    assert call(write_list(tmp_path / "list.csv", lines[:1]), *kept) == 1


@pytest.mark.parametrize("keep", [False, True])
def test_a_run_bars_and_counts_records_that_show_a_copy(tmp_path, copied, keep):
    lines = listed(("owner", "u3"), ("id", "c1"))
    named = {9, *range(3, SIZE, 5), *([] if keep else [40])}
    run = Run(tmp_path / "run", copied)
    run.go(0, 6)
    run.go(6, 20, lines, hosts=2, keep=keep)
    run.save(6, 20)
    shown = {record for step in range(6, 20) for record in run.shown[step].tolist()}
    assert not shown & named and (40 in shown) == keep
    # The replay bars what was excluded during the run, whatever the options are now.
    agree(run, audit.audit_run(str(run.path), as_list(lines, keep_copies=keep)), named)
    agree(run, audit.audit_run(str(run.path), as_list(lines)), named | {40})
    agree(run, audit.audit_run(str(run.path), as_list(lines, keep_copies=True)), named - {40})


def test_a_run_audit_reports_copies(tmp_path, copied, capsys):
    run = Run(tmp_path / "run", copied, method="natural")
    run.go(0, 8)
    run.save(8)
    removed = write_list(tmp_path / "list.csv", listed(("id", "c0"), ("id", "gone")))
    assert call(removed, f"--workdir={run.path}", f"--json={tmp_path / 'all.json'}") == 1
    out = capsys.readouterr().out
    assert "0:9 (copy)" in out and "as a removed post, which `prepare` dropped as a copy" in out
    assert "1 of the 2 removals match nothing in the run's data: id gone." in out
    (record,) = json.loads((tmp_path / "all.json").read_text())["records"]
    assert (record["position"], record["shows"]) == (9, "a copy of a removed post")


def rekeyed(folder, key):
    """Gives a dataset another key."""
    for number in range(2):
        path = folder / records.index_name(number, 2)
        rows, first = np.load(path), number * SIZE // 2
        whole = [datasets.record(first + n, text(first + n), ()) for n in range(len(rows))]
        rows["id"] = [key.hash("id", record.id) for record in whole]
        rows["owner"] = [key.hash("owner", record.owner) for record in whole]
        rows["photo"] = [key.hash("sha256", record.sha256) for record in whole]
        np.save(path, rows)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "key": key.id}))
    folder.with_name(f"{folder.name}.key").write_text(key.secret.hex())
    return some_untagged(folder)


def test_a_run_on_two_datasets_with_different_keys(tmp_path, folder):
    key = keys.Key(b"another key of thirty-two bytes.")
    other = rekeyed(datasets.write(tmp_path / "other", SIZE, photo=text), key)
    run = Run(tmp_path / "run", folder)
    run.go(0, 10)
    first = replayed(run, 10)
    run.go(10, 20, LISTED[:1], folder=other)
    run.save(10, 20)
    later = {
        record: count[0] - (first[record][0] if record in first else 0)
        for record, count in replayed(run, 20).items()
    }
    for given in (None, f"{folder}.key", str(tmp_path / "other.key")):
        seen = audit.audit_run(str(run.path), as_list(LISTED, key=given))
        parts = [
            [p for p in seen.records if p.source.path == str(path)] for path in (folder, other)
        ]
        assert all({photo.shown.position for photo in part} == NAMED for part in parts)
        counts = [
            {p.shown.position: p.shown.times[-1] for p in part if p.shown.first} for part in parts
        ]
        assert counts[0] == {record: count[0] for record, count in first.items()}
        assert counts[1] == {record: count for record, count in later.items() if count}


def test_starts_are_noted_with_keyed_hashes(tmp_path, folder):
    run = Run(tmp_path / "run", folder)
    run.go(0, 2, LISTED, keep=True)
    (start,) = map(json.loads, (run.path / "removed.jsonl").read_text().splitlines())
    assert start["key"] == datasets.KEY.id and start["keep_copies_of_removed"] is True
    assert start["removed"]["owner"] == [datasets.KEY.hash("owner", "u3")]
    every = "".join(path.read_text() for path in run.path.iterdir() if path.is_file())
    assert str(records.id_hash("u3")) not in every and datasets.KEY.secret.hex() not in every


def test_a_key_elsewhere_is_given(tmp_path, run, folder, capsys):
    moved, key = tmp_path / "moved", tmp_path / "kept"
    shutil.copytree(folder, moved)
    key.write_text(datasets.KEY.secret.hex())
    removed = write_list(tmp_path / "list.csv", LISTED)
    assert call(removed, f"--dataset={moved}") == 2
    assert "moved.key cannot be read" in capsys.readouterr().err
    assert call(removed, f"--dataset={moved}", f"--key={key}") == 1
    assert call(removed, f"--dataset={moved}", f"--workdir={run.path}", f"--key={key}") == 1
    key.write_text("11" * 32)
    for place in ([f"--dataset={moved}"], [f"--dataset={moved}", f"--workdir={run.path}"]):
        capsys.readouterr()
        assert call(removed, *place, f"--key={key}") == 2
        error = capsys.readouterr().err
        assert "kept is the key" in error and "--key" in error and error.count("\n") == 1
    assert call(removed, f"--dataset={folder}", f"--key={key}") == 1  # its own lies beside it


def test_an_audit_of_a_version_1_dataset_states_its_limits(tmp_path, capsys):
    old = datasets.write(tmp_path / "old", SIZE, photo=text, version=1)
    removed = write_list(tmp_path / "list.csv", LISTED)
    assert call(removed, f"--dataset={old}") == 1
    out = capsys.readouterr().out
    assert "15 of the 64 records" in out and "old is of version 1, which lists no copies" in out
    run = Run(tmp_path / "run", some_untagged(old))
    run.go(0, 6)
    run.go(6, 10, LISTED[1:])
    run.save(6, 10)
    agree(run, audit.audit_run(str(run.path), as_list(LISTED)))
    assert call(removed, f"--workdir={run.path}") == 1
    assert "old is of version 1, which lists no copies" in capsys.readouterr().out


def test_a_dataset_is_verified_with_a_list_and_without(tmp_path, capsys):
    folder = datasets.write(tmp_path / "set", SIZE, photo=text)
    assert call("--verify", f"--dataset={folder}") == 0
    assert "set is intact: 2 shards of" in capsys.readouterr().out
    removed = write_list(tmp_path / "list.csv", LISTED)
    assert call("--verify", removed, f"--dataset={folder}") == 1
    out = capsys.readouterr().out
    assert "set is intact" in out and "15 of the 64 records" in out
    shard = folder / records.shard_name(1, 2)
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    assert call(removed, f"--dataset={folder}") == 1  # it needs no shard
    assert call("--verify", removed, f"--dataset={folder}") == 2
    error = capsys.readouterr().err
    assert f"{shard.name} is not the file that manifest.json lists" in error
    old = datasets.write(tmp_path / "old", SIZE, photo=text, version=1)
    assert call("--verify", f"--dataset={old}") == 0
    assert "digests of the shards only" in capsys.readouterr().out


def test_mistakes_are_one_sentence(tmp_path, folder, capsys):
    removed = write_list(tmp_path / "list.csv", LISTED)
    for arguments, words in [
        ([removed], "give --dataset"),
        ([f"--dataset={folder}"], "give a list with --removals, or --verify"),
        (["--verify", removed, "--workdir=run"], "give its folder with --dataset"),
        ([removed, f"--dataset={tmp_path}"], "not a dataset"),
        ([f"--removals={tmp_path / 'none.csv'}", f"--dataset={folder}"], "cannot be read"),
        ([removed, f"--dataset={folder}", f"--json={tmp_path}"], "the audit is printed above"),
        ([removed, f"--dataset={folder}", "--fast"], "--fast"),
    ]:
        assert call(*arguments) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


def test_an_audit_needs_no_jax(tmp_path, run):
    removed = write_list(tmp_path / "list.csv", LISTED)
    code = f"""
import sys
sys.modules['jax'] = sys.modules['tensorflow'] = None  # any import of them now fails
from hashvision.commands.main import main
sys.exit(main(["audit", "{removed}", "--workdir={run.path}"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 1 and not done.stderr and "do not forget" in done.stdout


@pytest.mark.slow
def test_a_real_run_before_and_after_a_list(tmp_path, capsys):
    (tmp_path / "place").mkdir()
    place = make(tmp_path / "place")
    removed = write_list(place / "list.csv", listed(("owner", "u3")))
    code, _, err = finish(start(place, "run", "--config.steps=6"))
    assert code == 0, err
    assert call(removed, f"--workdir={place / 'run'}", f"--json={tmp_path / 'a.json'}") == 1
    code, _, err = finish(start(place, "run", "--config.steps=12", removed))
    assert code == 0, err
    assert call(removed, f"--workdir={place / 'run'}", f"--json={tmp_path / 'b.json'}") == 1
    before, after = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert (before["checkpoints"][-1], after["checkpoints"][-1]) == (6, 12)
    shown = [
        sum(r["shown"][step] for r in found["records"])
        for found, step in ((before, "6"), (after, "6"), (after, "12"))
    ]
    assert shown[0] == shown[1] == shown[2] > 0
