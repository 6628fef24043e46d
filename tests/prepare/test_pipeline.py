"""Tests of `prepare`, from a dump that the tests make to a dataset folder."""

import base64
import contextlib
import csv
import io
import json
import os
import pathlib
import random
import re
import shutil
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from hashvision.data import dataset, keys, reader, records, removals, sampling, stream
from hashvision.errors import UserError
from hashvision.prepare import folder, graph, pipeline, reading

WORDNET = """<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE LexicalResource SYSTEM "http://globalwordnet.github.io/schemas/WN-LMF-1.1.dtd">
<LexicalResource xmlns:dc="https://globalwordnet.github.io/schemas/dc/">
<Lexicon id="small" label="Small" language="en" email="a@b.c" license="none" version="1">
{}</Lexicon></LexicalResource>
"""
# Each topic with its tags, and the other words of its captions.
TOPICS = {
    "brown bear": (["brownbear", "BrownBears", "ursusarctos"], "river fish fur claws"),
    "dog": (["dog", "Dogs", "dog"], "leash stick bark tail"),
    "car": (["car", "motorcar", "cars"], "road wheel driver engine"),
    "apple": (["apple", "Ápple", "apples"], "orchard peel pie core"),
    "boat": (["boat", "boats", "boat"], "lake sail anchor rower"),
    "mountain": (["mountain", "mountains", "mount"], "peak ridge climb summit"),
}
SYNSETS = [
    ("animal", ["brown bear", "Ursus arctos", "bruin"]),
    ("animal", ["dog"]),
    ("artifact", ["car", "motorcar"]),
    ("food", ["apple"]),
    ("artifact", ["boat"]),
    ("object", ["mountain", "mount"]),
    ("feeling", ["love"]),
    ("person", ["friend"]),
]
SPAM = ["love", "tbt", "friend", "photooftheday"]
FILLER = "the a with on in and two young near old big sunny some this my".split()

pytestmark = pytest.mark.slow


def jpeg(seed: int, size: tuple[int, int] = (24, 16)) -> bytes:
    small = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize(size).save(buffer, "JPEG")
    return buffer.getvalue()


def write_wordnet(path: pathlib.Path) -> str:
    entries, synsets = "", ""
    for number, (kind, lemmas) in enumerate(SYNSETS):
        synsets += f'<Synset id="s{number}" ili="" partOfSpeech="n" lexfile="noun.{kind}"/>\n'
        for lemma in lemmas:
            name = lemma.replace(" ", "_")
            entries += (
                f'<LexicalEntry id="{name}"><Lemma writtenForm="{lemma}" partOfSpeech="n"/>'
                f'<Sense id="{name}-1" synset="s{number}"/></LexicalEntry>\n'
            )
    path.write_text(WORDNET.format(entries + synsets))
    return str(path)


def write_dump(folder: pathlib.Path) -> str:
    """Writes 900 good posts on six topics, with spam, and one or two posts to drop per reason."""
    generator = random.Random(0)
    (folder / "images").mkdir(parents=True)
    lines = []

    def add(post_id: str, text: str, image: object = None, visibility: str = "public", **more):
        if image is None:
            image = f"images/{post_id}.jpg"
            (folder / image).write_bytes(jpeg(len(lines)))
        fields = {"id": post_id, "image": image, "text": text, "owner": f"u{len(lines) % 9}"}
        lines.append(json.dumps({**fields, "visibility": visibility, "created_at": "2020", **more}))

    for number in range(900):
        tags, said = TOPICS[generator.choice(list(TOPICS))]
        words = generator.sample(said.split(), 2) + generator.sample(FILLER, 5)
        spam = [tag for tag in SPAM if generator.random() < 0.3]
        text = " ".join(words) + " #" + "#".join([generator.choice(tags), *spam])
        add(f"p{number:04d}", text)
    lines.append('{"id": "broken", "image": ')
    lines.append("")
    lines.append('{"no": "id"}')
    os.mkfifo(folder / "images" / "pipe")  # to open it would not return
    add("private", "#dog", "images/pipe", "private")
    add("nobody", "#dog", "images/pipe", "Public")
    add("missing", "#dog", "images/absent.jpg")
    add("outside", "#dog", "../posts.jsonl")
    add("pathless", "#dog", 7)
    (folder / "images" / "truncated.jpg").write_bytes(jpeg(0)[:-60])
    add("undecodable", "#dog", "images/truncated.jpg")
    add("untagged", "nothing at all")
    add("spam", "a river #love #tbt")
    add("rare", "#unheardof")
    add("bytes", "#dog", image_bytes=base64.b64encode(jpeg(5007, (90, 60))).decode())
    add("twice", "#Dog and #dog")
    add("twice", "#car")
    (folder / "posts.jsonl").write_text("\n".join(lines) + "\n\n", "utf-8")
    return str(folder / "posts.jsonl")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[pathlib.Path, dict, str]:
    """A dataset made with WordNet: its folder, its manifest, the dump."""
    folder = tmp_path_factory.mktemp("prepare")
    dump = write_dump(folder / "dump")
    output = folder / "dataset"
    manifest = pipeline.prepare(
        dump,
        str(output),
        wordnet=write_wordnet(folder / "wordnet.xml"),
        short_side=16,
        shard_bytes=300_000,
    )
    return output, manifest, dump


def read_records(folder: pathlib.Path) -> list[Any]:
    import tensorflow as tf

    shards = sorted(str(path) for path in folder.glob("*.tfrecord-*"))
    parsed = tf.data.TFRecordDataset(shards).map(records.parse)
    return list(parsed.as_numpy_iterator())


def vocabulary_of(folder: pathlib.Path) -> dict:
    return json.loads((folder / "vocabulary.json").read_text())


def test_every_post_is_accounted_for(made):
    output, manifest, _ = made
    assert json.loads((output / "manifest.json").read_text()) == manifest
    posts = manifest["posts"]
    assert (posts["read"], posts["kept"]) == (915 - 1, 902)
    dropped = posts["dropped"]
    assert {reason: entry["count"] for reason, entry in dropped.items() if entry["count"]} == {
        "broken_line": 2,
        "private": 2,
        "path_outside": 1,
        "missing_file": 2,
        "undecodable": 1,
        "duplicate_id": 1,
        "no_tag": 3,
    }
    assert manifest["images"] == 902


def test_examples_of_dropped_posts_are_offsets_without_names(made):
    output, manifest, dump = made
    text = pathlib.Path(dump).read_bytes()

    def found(reason):
        examples = manifest["posts"]["dropped"][reason]["examples"]
        lines = [text[int(each.removeprefix("byte ")) :].split(b"\n")[0] for each in examples]
        return [json.loads(line)["id"] if b'"id": ' in line[:7] else line for line in lines]

    assert found("duplicate_id") == ["twice"]
    assert found("path_outside") == ["outside"]
    assert found("missing_file") == ["missing", "pathless"]
    assert found("undecodable") == ["undecodable"]
    assert found("no_tag") == ["untagged", "spam", "rare"]
    assert manifest["posts"]["dropped"]["broken_line"]["count"] == 2
    # Private posts have no examples at all.
    assert manifest["posts"]["dropped"]["private"] == {"count": 2, "examples": []}
    told = (output / "manifest.json").read_text()
    assert not [name for name in ("nobody", "twice", "pathless") if name in told]
    examples = [each for drop in manifest["posts"]["dropped"].values() for each in drop["examples"]]
    assert examples and all(re.fullmatch(r"byte \d+", each) for each in examples)


def test_synonyms_merge_and_spam_is_left_out(made):
    output, manifest, _ = made
    vocabulary = vocabulary_of(output)
    assert (vocabulary["posts"], vocabulary["wordnet"]) == (902, "small:1")
    classes = {entry["name"]: entry for entry in vocabulary["classes"]}
    merged = [set(entry["tags"]) for entry in classes.values()]
    assert {"brownbear", "brownbears", "ursusarctos"} in merged
    assert {"mountain", "mountains", "mount"} in merged
    assert len(classes) == len(TOPICS) == manifest["classes"]
    left_out = {entry["tag"]: entry["why"] for entry in vocabulary["left_out"]}
    assert set(SPAM) <= left_out.keys()
    assert "evenly" in left_out["friend"]
    assert "names nothing visible" in left_out["love"]
    order = [(-entry["count"], entry["name"]) for entry in vocabulary["classes"]]
    assert order == sorted(order)


def test_records_and_index_agree(made):
    output, manifest, _ = made
    vocabulary = vocabulary_of(output)
    found = read_records(output)
    assert len(manifest["shards"]) > 1
    assert [shard["records"] for shard in manifest["shards"]] == [
        len(np.load(path)) for path in sorted(output.glob("index-*.npy"))
    ]
    index = np.concatenate([np.load(path) for path in sorted(output.glob("index-*.npy"))])
    assert index.dtype == records.INDEX_DTYPE
    counts = np.zeros(len(vocabulary["classes"]), int)
    key = dataset.load(str(output)).key()
    for row, record in zip(index, found, strict=True):
        assert row["id"] == key.hash("id", record["id"].decode())
        assert row["owner"] == key.hash("owner", record["owner"].decode())
        np.add.at(counts, record["labels"], 1)
    assert counts.tolist() == [entry["count"] for entry in vocabulary["classes"]]
    rarest = [counts[record["labels"]].min() for record in found]
    np.testing.assert_array_equal(index["rarest"], rarest)
    summary = sampling.epoch_summary(
        *np.unique(index["rarest"], return_counts=True), 902, manifest["sampling_threshold"]
    )
    assert manifest["epoch"] == summary
    # In the order of hashes, so that every range of records is a random sample of the posts.
    order = [records.id_hash(record["id"].decode()) for record in found]
    assert order == sorted(order)
    number = {tag: n for n, entry in enumerate(vocabulary["classes"]) for tag in entry["tags"]}
    labels = sorted((record["id"], *record["labels"]) for record in found)
    assert (b"bytes", number["dog"]) in labels
    assert (b"twice", number["car"]) in labels  # its latest state


def test_photos_are_reduced_and_otherwise_untouched(made):
    output, _, dump = made
    photos = {record["id"].decode(): record["image"] for record in read_records(output)}
    assert Image.open(io.BytesIO(photos["bytes"])).size == (24, 16)
    stored = (pathlib.Path(dump).parent / "images" / "p0005.jpg").read_bytes()
    assert photos["p0005"] == stored


def test_tfds_opens_the_folder(made):
    import tensorflow_datasets as tfds

    output, manifest, _ = made
    builder = cast(Any, tfds.builder_from_directory(str(output)))
    assert builder.info.splits["train"].num_examples == 902
    names = builder.info.features["labels"].feature.names
    assert names == [entry["name"] for entry in vocabulary_of(output)["classes"]]
    read = list(builder.as_dataset(split="train").take(3).as_numpy_iterator())
    assert all(example["image"].shape == (16, 24, 3) for example in read)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_without_wordnet_it_says_so_and_replaces_the_former_dataset(
    made, tmp_path: pathlib.Path, capsys
):
    output, _, dump = made
    again = tmp_path / "again"
    images = os.path.dirname(dump)
    shutil.copytree(output, again)
    (again / "index-00007-of-00009.npy").write_text("stale")
    manifest = pipeline.prepare(dump, str(again), images=images, shard_bytes=300_000)
    assert "spelling only" in capsys.readouterr().out
    assert (manifest["wordnet"], manifest["merged_by"]) == (None, "spelling only")
    assert not (again / "index-00007-of-00009.npy").exists()
    assert sorted(os.listdir(tmp_path)) == ["again", "again.key"]
    tags = {tag for entry in vocabulary_of(again)["classes"] for tag in entry["tags"]}
    assert not set(SPAM) & tags
    assert {"brownbear", "brownbears", "ursusarctos", "dog", "dogs", "mountain"} <= tags
    merged = [set(entry["tags"]) for entry in vocabulary_of(again)["classes"]]
    assert {"dog", "dogs"} in merged and {"ursusarctos"} in merged


IN_PROCESSES = ("--direct_num_workers=2", "--direct_running_mode=multi_processing")


@pytest.mark.parametrize("flags", [(), IN_PROCESSES])
def test_the_same_dump_gives_the_same_bytes(made, tmp_path: pathlib.Path, flags):
    output, manifest, dump = made
    again = tmp_path / "again"
    pipeline.prepare(
        dump,
        str(again),
        wordnet=str(output.parent / "wordnet.xml"),
        short_side=16,
        shard_bytes=300_000,
        key=f"{output}.key",
        beam_options=flags,
    )
    assert contents(again) == contents(output)


def test_a_refused_run_leaves_no_files(made, tmp_path: pathlib.Path):
    _, _, dump = made
    output = tmp_path / "output"
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    cases = [
        ((str(tmp_path / "absent.jsonl"), str(output)), {}, "absent.jsonl cannot be read"),
        ((str(tmp_path), str(output)), {}, "cannot be read"),
        ((dump, str(output)), {"images": str(tmp_path / "absent")}, "does not exist"),
        ((dump, str(output)), {"wordnet": str(tmp_path / "absent")}, "cannot be opened"),
        ((dump, str(output)), {"minimum_count": 0}, "at least 1"),
        ((dump, str(output)), {"beam_options": ["--minimum_cuont=3"]}, "minimum_cuont"),
        (
            (dump, str(output)),
            {"beam_options": ["--direct_running_mode=multi_threading"]},
            "use --direct_running_mode=multi_processing",
        ),
        ((dump, str(other)), {}, "is not a hashvision dataset: it holds thesis.txt"),
        ((dump, str(other / "thesis.txt")), {}, "is a file"),
        ((str(empty), str(output)), {}, "No post of empty.jsonl was kept"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(UserError, match=message):
            pipeline.prepare(*arguments, **options)
    # The key remains, so that the same command makes the same bytes when it is repeated.
    assert sorted(os.listdir(tmp_path)) == ["empty.jsonl", "other", "output.key"]
    assert os.listdir(other) == ["thesis.txt"]


def test_the_manifest_holds_all_digests_and_the_key_is_beside_the_dataset(made):
    output, manifest, _ = made
    assert manifest["format"] == {"name": dataset.FORMAT, "version": dataset.VERSION}
    key = output.with_name("dataset.key")
    assert key.stat().st_mode & 0o777 == 0o600
    secret = key.read_text().strip()
    assert manifest["key"] == keys.Key(bytes.fromhex(secret)).id
    for path in output.iterdir():
        held = path.read_bytes()
        assert secret.encode() not in held and bytes.fromhex(secret) not in held
    source = dataset.load(str(output))
    source.verify()
    shards = len(manifest["shards"])
    assert {path.name for path in output.glob("*.npy")} == {
        name(shard, shards)
        for shard in range(shards)
        for name in (records.index_name, records.copies_name)
    }


def test_a_key_in_the_dataset_is_refused(made, tmp_path):
    output = tmp_path / "set"
    with pytest.raises(UserError, match="--key=.* is in the dataset"):
        pipeline.prepare(made[2], str(output), key=str(output / "key"))
    assert not output.exists()


def test_a_key_replaced_during_the_run_is_an_error(made, tmp_path, monkeypatch):
    whole = folder.finish

    def finish(*arguments, **options):
        (tmp_path / "set.key").write_text("00" * 32)
        return whole(*arguments, **options)

    monkeypatch.setattr(folder, "finish", finish)
    with pytest.raises(UserError, match="set.key was replaced during the run"):
        pipeline.prepare(made[2], str(tmp_path / "set"), short_side=16)
    assert os.listdir(tmp_path) == ["set.key"]


def test_cells_that_look_like_formulas_are_escaped(tmp_path):
    rows = [(f"{sign}1+cmd|' /C calc'!A0", "duplicate_photo", "p1", "0.9") for sign in "=+-@\t\r"]
    rows.append(("p=2", "duplicate_photo", "-3", "1.0"))
    folder.write_duplicates(str(tmp_path), shard=0, shards=1, rows=rows)
    (path,) = tmp_path.iterdir()
    with path.open(newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert not [cell for cell in cells if cell[0] in "=+-@\t\r"]
    assert "p=2" in cells and "'-3" in cells and "'=1+cmd|' /C calc'!A0" in cells


def test_shards_cut_the_hashes_evenly():
    largest = 2**64 - 1
    assert [graph.shard_of((h, 0), 4) for h in (0, largest // 2, largest)] == [0, 1, 3]
    assert graph.count_shards((10_000, 1_000_000), 100_000) == 10
    assert graph.count_shards((100, 1_000_000), 100_000) == 1
    assert graph.count_shards((0, 0), 100_000) == 1


@pytest.mark.realdata
def test_real_posts(tmp_path: pathlib.Path, shared_data: pathlib.Path):
    manifest = pipeline.prepare(
        str(shared_data / "posts" / "posts.jsonl"),
        str(tmp_path / "dataset"),
        wordnet=str(shared_data / "wordnet" / "oewn-2025.xml.xz"),
        removals=str(shared_data / "posts" / "removals.csv"),
        evaluation_sets=[str(shared_data / "transfer" / "flickr8k_multilabel")],
    )
    posts = manifest["posts"]
    assert posts["read"] == 6279
    assert posts["read"] == posts["kept"] + sum(d["count"] for d in posts["dropped"].values())
    assert posts["dropped"]["broken_line"]["count"] == 2
    assert posts["dropped"]["private"]["count"] == 335
    assert posts["dropped"]["removed"]["count"] == 57
    assert posts["dropped"]["evaluation_photo"]["count"] == 35
    assert posts["dropped"]["removed_copy"]["count"] == 9
    assert posts["dropped"]["duplicate_photo"]["count"] == 174
    assert posts["kept"] > 4900 and manifest["classes"] > 150
    made = dataset.load(str(tmp_path / "dataset"))
    rows = made.rows(0, len(made))
    listed = removals.RemovalList(removals.read(str(shared_data / "posts" / "removals.csv")))
    assert not len(made.find_removed(0, len(made), made.names(listed)))
    private = set()
    for line in (shared_data / "posts" / "posts.jsonl").read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            post = json.loads(line)
            if post["visibility"] != "public":
                private.add(made.key().hash("id", post["id"]))
    assert len(private) == 335 and not private & set(rows["id"].tolist())
    classes = {entry["name"]: entry for entry in vocabulary_of(tmp_path / "dataset")["classes"]}
    assert set(classes["dog"]["tags"]) >= {"dog", "dogs", "canisfamiliaris", "domesticdog"}


def test_a_post_lost_by_the_runner_is_an_error(made, tmp_path: pathlib.Path, monkeypatch):
    whole = reading.ReadPosts._read

    def forgetful(self, offset, *rest):
        return whole(self, offset, *rest) if offset else iter(())

    monkeypatch.setattr(reading.ReadPosts, "_read", forgetful)
    with pytest.raises(UserError, match="returned 913 of the 914 posts"):
        pipeline.prepare(made[2], str(tmp_path / "lost"), short_side=16)
    assert list(tmp_path.iterdir()) == [tmp_path / "lost.key"]


def test_keep_untagged_keeps_photos_without_text(tmp_path):
    """Photos without any text: there is nothing to count and nothing to name."""
    lines = []
    for number in range(80):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
        lines.append(json.dumps({"id": f"p{number}", "image": f"{number}.jpg"}))
        lines[-1] = lines[-1][:-1] + ', "visibility": "public"}'
    (tmp_path / "posts.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match="--keep_untagged"):
        pipeline.prepare(str(tmp_path / "posts.jsonl"), str(tmp_path / "none"))
    made = pipeline.prepare(
        str(tmp_path / "posts.jsonl"), str(tmp_path / "set"), keep_untagged=True
    )
    assert made["posts"]["kept"] == 80 and made["classes"] == 0
    assert made["posts"]["dropped"]["no_tag"]["count"] == 0
    opened = dataset.load(str(tmp_path / "set"))
    assert not opened.rows(0, 80)["rarest"].any()
    natural = stream.Stream(opened, batch_size=8, lanes=4, seed=0, method="natural")
    assert natural.epoch_length == 80
    _, batch = next(reader.BatchReader(natural, 8, 4, threads=1).batches())
    assert batch["photos"].shape == (8, 8, 8, 3) and (batch["labels"] == -1).all()
    with pytest.raises(UserError, match="too few photos with a tag"):
        stream.Stream(opened, batch_size=8, lanes=4, seed=0, method="square_root", tagged_only=True)
