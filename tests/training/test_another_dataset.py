"""Tests of runs that resume on another dataset, prepared again with another removal list."""

import collections
import json
import os
import signal

import jax
import numpy as np
import pytest

import datasets
from hashvision.config import recipes
from hashvision.data import dataset, keys, reader, removals, stream
from hashvision.errors import UserError
from hashvision.prepare import pipeline
from hashvision.takedowns import audit
from hashvision.training import loop, optim, program
from runs import curve, make

pytestmark = pytest.mark.slow

POSTS, BATCH, EPOCHS, STOP = 64, 16, 4, 9
FEW = ("--config.steps=None", f"--config.epochs={EPOCHS}", "--config.checkpoint.every=1000")
OPEN_SWAV = """
import tiny_swav
from ml_collections import config_dict


def get_config():
    config = tiny_swav.get_config()
    config.optimizer.learning_rate = config_dict.placeholder(float)
    for key in ("prototypes", "queue", "frozen_steps", "queue_start"):
        config.swav[key] = config_dict.placeholder(int)
    return config
"""


def tag(number):
    """The tag of a post: all of u3's are dogs, which are rarest without u3; only u4 has boats."""
    return {3: "dog", 4: "boat"}.get(number % 5, ("dog", "tree", "tree")[number % 3])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A dump prepared three times: whole, without u3, and without u4, the only one with boats.

    The datasets share a key, so that the audit recognises a post in each of them.
    """
    place = make(tmp_path_factory.mktemp("runs"))
    (place / "open_swav.py").write_text(OPEN_SWAV)
    lines = []
    for number in range(POSTS):
        (place / f"{number}.jpg").write_bytes(datasets.jpeg(number))
        post = {"id": f"p{number}", "owner": f"u{number % 5}", "text": f"#{tag(number)}"}
        lines.append(json.dumps({**post, "image": f"{number}.jpg", "visibility": "public"}))
    (place / "posts.jsonl").write_text("\n".join(lines))
    for name, gone in (("whole", "nobody"), ("without-3", "u3"), ("without-4", "u4")):
        listed = place / f"{name}.csv"
        listed.write_text(f"kind,value,reason,received_at\nowner,{gone},left,2018-06-01\n")
        pipeline.prepare(
            str(place / "posts.jsonl"),
            str(place / name),
            minimum_count=1,
            keep_duplicates=True,
            removals=str(listed),
            key=str(place / "key"),
        )
    return place


def classes(place, name):
    vocabulary = json.loads((place / name / "vocabulary.json").read_text())
    return [entry["name"] for entry in vocabulary["classes"]]


class Run:
    """A run in this process that records the posts and labels of each step."""

    def __init__(self, place, name, recipe, monkeypatch):
        self.place, self.name, self.recipe = place, name, recipe
        self.shown, self.labels, noted = {}, {}, reader.BatchReader.batches

        def batches(own, start=0):
            for step, (items, batch) in enumerate(noted(own, start), start):
                self._ahead[step] = own._stream.names(items).tolist()
                self.labels[step] = batch["labels"][:, 0].tolist()
                yield items, batch

        monkeypatch.setattr(reader.BatchReader, "batches", batches)
        build = program.build

        def guarded(*arguments):
            built = build(*arguments)

            def step(*arguments):
                with jax.transfer_guard("disallow"):  # implicit transfers would slow every step
                    return built.step(*arguments)

            return built._replace(step=step)

        monkeypatch.setattr(program, "build", guarded)

    @property
    def workdir(self):
        return str(self.place / self.name)

    def train(self, data, *overrides, stop=False):
        """Starts or resumes on a dataset; with `stop`, SIGTERM arrives before step 9."""
        self._ahead = {}
        given = [
            f"--config.dataset={self.place / data}",
            "--config.evaluate_every=8",
            *FEW,
            *overrides,
        ]
        config = recipes.load(str(self.place / f"{self.recipe}.py"), given)

        def check(predict, resolution, step):
            if stop and step == STOP - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return {}

        done = loop.train(config, self.workdir, check)
        trained = max(curve(self.place, self.name))
        self.shown.update({s: names for s, names in self._ahead.items() if s < trained})
        return done

    def frozen(self):
        with open(f"{self.workdir}/config.json") as file:
            return json.load(file)

    def counts(self, end):
        """How often each post was shown in the steps before `end`."""
        numbers = hashes(self.place)
        return collections.Counter(
            numbers[name] for step in range(end) for name in self.shown[step]
        )


def hashes(place):
    """{name in the index: number} of the posts."""
    key = keys.read(str(place / "key"))
    return {key.hash("id", f"p{number}"): number for number in range(POSTS)}


def audited(run, end):
    """How often each post was shown according to the audit, up to the checkpoint of step `end`."""
    listed = [removals.Removal("id", f"p{number}", "", "") for number in range(POSTS)]
    seen = audit.audit_run(run.workdir, removals.RemovalList(listed, str(run.place / "key")))
    column = seen.checkpoints.index(end)
    return {min(photo.lines): int(photo.shown.times[column]) for photo in seen.records}


def test_hashtags_resume_on_a_dataset_with_fewer_posts(place, monkeypatch):
    assert classes(place, "whole") != classes(place, "without-3")  # the commonest come first
    run = Run(place, "hashtags", "tiny", monkeypatch)
    assert not run.train("whole", stop=True)
    assert run.train("without-3")

    # The length and the learning rates are those of an uninterrupted run on the first dataset.
    source = dataset.load(str(place / "whole"))
    options = {"batch_size": BATCH, "lanes": 8, "seed": 0, "method": "square_root"}
    length = stream.Stream(source, **options, tagged_only=True).epoch_length
    total = int(np.ceil(EPOCHS * length / BATCH))
    rates = [rate for _, rate in curve(place, "hashtags").values()]
    wanted = optim.schedule(
        "cosine", 0.2 * BATCH / 256, total_steps=total, warmup_steps=round(length / BATCH)
    )
    assert len(rates) == total
    np.testing.assert_allclose(rates, [wanted(step) for step in range(total)], rtol=1e-5)

    # Classes keep their numbers.
    numbers = {name: number for number, name in enumerate(classes(place, "whole"))}
    posts = {name: tag(number) for name, number in hashes(place).items()}
    for step, names in run.shown.items():
        assert run.labels[step] == [numbers[posts[name]] for name in names]

    checkpoints = [STOP, total]
    for end in checkpoints:
        found, shown = audited(run, end), run.counts(end)
        assert {post: times for post, times in found.items() if times} == shown
    after = run.counts(total) - run.counts(STOP)
    assert after and all(post % 5 != 3 for post in after)


def test_swav_resumes_on_a_dataset_of_other_classes(place, monkeypatch):
    run = Run(place, "swav", "open_swav", monkeypatch)
    assert not run.train("whole", stop=True)
    first = run.frozen()
    assert first["swav"]["frozen_steps"] == 4
    with pytest.raises(UserError, match=r"trained with swav\.frozen_steps=4, not 2"):
        run.train("without-4", "--config.swav.frozen_steps=2")
    assert run.train("without-4")
    second = run.frozen()
    for key in ("swav", "optimizer", "epoch_length"):
        assert second[key] == first[key]
    assert max(curve(place, "swav")) == EPOCHS * POSTS // BATCH
    for end in (STOP, EPOCHS * POSTS // BATCH):
        found = {post: times for post, times in audited(run, end).items() if times}
        assert found == run.counts(end)
