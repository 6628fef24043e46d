"""Fuzzes every kind of user input; tests/commands/test_doors.py runs a few cases of each.

bash launch/chaos.sh fuzz [--cases=100000] [--seed=0] [--doors="removal lists,labels"]

A door is a generator of cases for one kind of input; a case is a name and a call. A call has one of
three OUTCOMES. It works, or it is refused in one sentence (UserError, exit code 2). All else is a
fault: a traceback, several sentences or none, a timeout, or a photo with another photo's labels.
"""

import argparse
import ast
import collections
import contextlib
import csv
import io
import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import typing
import warnings
from collections.abc import Callable, Iterator

import numpy as np

import datasets
import hostile_photos
import process_doors
from hashvision.commands.main import explain as explain_error
from hashvision.commands.main import main as run_command
from hashvision.config import explain, recipes
from hashvision.errors import UserError
from places import REPO

DEMO = str(REPO / "configs" / "demo.py")
OUTCOMES = ("works", "refused", "fault")
SECONDS = 10.0  # CPU time that a case may take
LONGEST_SENTENCE = 900  # characters, including names of files and values

Case = tuple[str, Callable[[], typing.Any]]


class World:
    """The files that cases work on: a dataset, and a workdir that looks like a run on it."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.dataset = datasets.write(folder / "dataset", size=32, shards=2)
        self.truth = dict(_shown(self.dataset))
        self.workdir = folder / "run"
        self._claim()
        self.scratch = folder / "scratch"

    def _claim(self) -> None:
        """Makes a workdir as `train` does, but without the arrays of its checkpoints."""
        from hashvision.data import dataset
        from hashvision.training import run

        config = recipes.load(DEMO, [f"--config.dataset={self.dataset}"])
        source = dataset.load(str(self.dataset))
        run.claim(str(self.workdir), config, source.vocabulary, source.manifest)
        (self.workdir / "checkpoints" / "8").mkdir(parents=True)

    def copy(self, what: pathlib.Path) -> pathlib.Path:
        """Makes a copy to damage; replaces the previous one."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        target = self.scratch / what.name
        shutil.copytree(what, target)
        return target

    def write(self, name: str, content: bytes) -> pathlib.Path:
        """Writes a file into an otherwise empty folder."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()
        path = self.scratch / name
        path.write_bytes(content)
        return path


class Faulty(Exception):
    """An outcome that no input may have."""


def run(*argv: str) -> None:
    """Runs a command in this process; raises UserError if it is refused, and Faulty for a fault."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run_command(list(argv))
    except SystemExit as stopped:  # argparse's
        code = stopped.code
    said = err.getvalue()
    if "Traceback" in said or code not in (0, 1, 2, None) or (code == 1 and argv[0] != "audit"):
        raise Faulty(f"exit code {code}: {said[-600:]}")
    if code == 2:
        # After the line that a renamed command prints first.
        said = said.removeprefix("hashvision: `drawn` is called `draw` now.\n")
        usage, _, sentence = said.strip().rpartition("error: ")
        raise UserError(sentence if usage else said.strip().removeprefix("hashvision: "))


def outcome(call: Callable[[], typing.Any]) -> tuple[str, str]:
    """The outcome of a case, one of OUTCOMES, and its message."""

    def late(*_: object) -> None:
        raise Faulty(f"more than {SECONDS:.0f} s")

    signal.signal(signal.SIGPROF, late)  # CPU time only; a case that waits hangs the whole test
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
        found, said = "works", ""
    except UserError as error:
        said = str(error)
        found = "refused" if _is_sentence(said) else "fault"
    except OSError as error:  # the command line makes a sentence of it
        code, said = explain_error(error)
        found = "refused" if code == 2 and _is_sentence(said) else "fault"
    except Exception as error:
        found, said = "fault", f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return found, said


def _is_sentence(said: str) -> bool:
    one = "\n" not in said.strip() and 10 <= len(said) <= LONGEST_SENTENCE
    return one and "Traceback" not in said


# Values to put in place of a number, a name or a list.
VALUES: tuple[typing.Any, ...] = (
    None, True, False, 0, -1, -5, 1, 3, 2**31, 2**63, 2**64, 10**18, 10**40, 0.5, -0.5, 1e308,
    5e-324, float("nan"), float("inf"), float("-inf"), "", " ", "0", "x", "../x", "/etc/passwd",
    "\0", "\ud800", "é", "e\u0301", "\u202e", "=1+1", "a" * 5000, [], [[]],
    [None], ["x"], {}, {"x": 1}, {"": {}},
)  # fmt: skip


def mangled_json(generator: random.Random, text: str) -> bytes:
    """A JSON text with one fault in its content or its bytes."""
    match generator.randrange(8):
        case 0:
            return hostile_photos.mutated(generator, text.encode())
        case 1:
            deep = generator.choice([100, 100_000])
            return (generator.choice("[{") * deep).encode() + text.encode()
        case 2:
            return b'{"a":' * 100_000 + b"1" + b"}" * 100_000
        case 3:
            return json.dumps(generator.choice(VALUES)).encode()
        case 4:
            return generator.choice([b"", b"\xff\xfe", b"\xef\xbb\xbf" + text.encode(), b"\0" * 99])
        case _:
            whole = json.loads(text)
            nodes = list(_nodes(whole))
            holder, key = generator.choice(nodes)
            if generator.random() < 0.2:
                del holder[key]
            elif generator.random() < 0.3 and isinstance(holder[key], list):
                generator.choice((holder[key].reverse, holder[key].clear, holder[key].pop))()
            else:
                holder[key] = generator.choice(VALUES)
            return json.dumps(whole).encode()


def _nodes(tree: typing.Any) -> Iterator[tuple[typing.Any, typing.Any]]:
    """(container, key) of each value in a JSON tree."""
    keys = [*tree] if isinstance(tree, dict) else []
    if isinstance(tree, list):
        keys = [*range(len(tree))]
    for key in keys:
        yield tree, key
        yield from _nodes(tree[key])


# The doors: endless generators of cases.


def removal_lists(world: World, generator: random.Random) -> Iterator[Case]:
    """Removal lists, read by `audit`."""
    while True:
        rows = [["kind", "value", "reason", "received_at"]]
        for _ in range(generator.randrange(6)):
            kind = generator.choice(["owner", "id", "sha256", "Owner", "", "url"])
            value = generator.choice(
                ["u1", "p3", "12345.0", "=x", "e\u0301", "", "ab" * 32, "\0", "a,b"]
            )
            rows.append([kind, value, generator.choice(["r", "a, b", '"']), "2020"])
        if generator.random() < 0.2:
            rows[0] = generator.choice([["kind", "kind", "value"], ["value"], [], ["kind", ""]])
        text = io.StringIO()
        quoting: typing.Any = generator.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
        csv.writer(text, quoting=quoting).writerows(rows)
        content = text.getvalue().encode("utf-8", "surrogatepass")
        if generator.random() < 0.6:
            content = hostile_photos.mutated(generator, content)
        if generator.random() < 0.05:
            bad = [b"", b"\n", b"\xff\xfe\0", content * 2000, b'kind,value\nid,"']
            content = generator.choice(bad)
        path = world.write("removals.csv", content)
        yield (
            "list",
            lambda path=path: run("audit", f"--removals={path}", f"--dataset={world.dataset}"),
        )


def labels(world: World, generator: random.Random) -> Iterator[Case]:
    """labels.jsonl of a labelled set, read as `evaluate` reads it."""
    from hashvision.evaluation import labelled

    photo = hostile_photos.encode(hostile_photos.quarters(), "JPEG")
    lines = "\n".join(json.dumps({"image": f"{n}.jpg", "labels": [f"c{n % 2}"]}) for n in range(8))

    def read(path: pathlib.Path) -> None:
        found = labelled.read(path)
        for image in found.test.images():
            assert image in (b"", photo), "bytes of another file"
        labelled.single_label(found)

    while True:
        content = lines.encode()
        if generator.random() < 0.2:
            pass  # valid
        elif generator.random() < 0.5:
            content = hostile_photos.mutated(generator, content)
        else:
            every = lines.split("\n")
            number = generator.randrange(len(every))
            every[number] = mangled_json(generator, every[number]).decode("latin-1")
            content = "\n".join(every).encode("latin-1", "replace")
        path = world.write("labels.jsonl", content)
        for number in range(8):
            path.with_name(f"{number}.jpg").write_bytes(photo)
        yield "labels", lambda path=path: read(path)


def evaluation_photos(world: World, generator: random.Random) -> Iterator[Case]:
    """Photos of labelled sets, decoded as `evaluate` decodes them."""
    from hashvision.evaluation import features

    whole = {**hostile_photos.valid(generator), **hostile_photos.odd(generator)}
    foreign = [*hostile_photos.FOREIGN.items(), *hostile_photos.bombs().items()]

    def see(encoded: bytes) -> None:
        crop = next(iter(features.decoded([encoded], 32)))
        if crop is None:
            raise UserError("This photo cannot be read.")
        if crop.shape != (32, 32, 3) or crop.dtype != np.uint8:
            raise Faulty(f"a crop of {crop.shape}")

    for name, encoded in (*whole.items(), *foreign):
        yield name, lambda encoded=encoded: see(encoded)
    while True:
        name, encoded = generator.choice(list(whole.items()))
        if len(encoded) < 200_000:
            harmed = hostile_photos.mutated(generator, encoded)
            yield f"{name.split()[0]} with a fault", lambda harmed=harmed: see(harmed)


def wordnets(world: World, generator: random.Random) -> Iterator[Case]:
    """WordNet files."""
    import gzip
    import lzma

    from hashvision.tags import wordnet

    whole = TINY_WORDNET.encode()
    while True:
        content = hostile_photos.mutated(generator, whole) if generator.random() < 0.7 else whole
        if generator.random() < 0.1:
            content = LAUGHS.encode()
        pack = generator.choice([lambda x: x, lzma.compress, gzip.compress])
        content = pack(content)
        if generator.random() < 0.3:
            content = hostile_photos.mutated(generator, content)
        path = world.write("wordnet.xml", content)
        yield "file", lambda path=path: wordnet.load_wordnet(str(path))


TINY_WORDNET = """<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE LexicalResource SYSTEM "http://globalwordnet.github.io/schemas/WN-LMF-1.1.dtd">
<LexicalResource xmlns:dc="https://globalwordnet.github.io/schemas/dc/">
  <Lexicon id="tiny" label="t" language="en" email="a@b.c" license="CC0" version="1">
    <LexicalEntry id="e1"><Lemma writtenForm="dog" partOfSpeech="n"/>
      <Sense id="s1" synset="y1"/></LexicalEntry>
    <LexicalEntry id="e2"><Lemma writtenForm="hound" partOfSpeech="n"/>
      <Sense id="s2" synset="y1"/></LexicalEntry>
    <Synset id="y1" ili="" partOfSpeech="n" lexfile="noun.animal">
      <Definition>a dog</Definition></Synset>
  </Lexicon>
</LexicalResource>
"""
LAUGHS = (
    '<?xml version="1.0"?><!DOCTYPE l [<!ENTITY a "ha">'
    + "".join(
        f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefghij", "bcdefghijk", strict=True)
    )
    + "]><LexicalResource>&k;</LexicalResource>"
)


def dataset_folders(world: World, generator: random.Random) -> Iterator[Case]:
    """Damaged dataset folders: refused, or each photo comes with its own labels."""

    def read(folder: pathlib.Path) -> None:
        for photo, label in _shown(folder):
            if world.truth.get(photo) != label:
                raise Faulty(f"a photo of {world.truth.get(photo)} came as {label}")

    while True:
        folder = world.copy(world.dataset)
        names = sorted(path.name for path in folder.iterdir())
        name = generator.choice(names)
        path = folder / name
        if name.endswith(".json") and generator.random() < 0.9:
            path.write_bytes(mangled_json(generator, path.read_text()))
        elif name.endswith(".npy") and generator.random() < 0.7:
            array = np.load(path)
            how = generator.randrange(5)
            if how == 0:
                array = np.roll(array, 1)
            elif how == 1:
                array = array[::-1]
            elif how == 2:
                array = array[:-1]
            elif how == 3:
                array = array["offset"].astype("<u4")
            else:
                column = generator.choice(array.dtype.names or ["offset"])
                array[column] = np.roll(array[column], 1)
            np.save(path, array)
        elif generator.random() < 0.3:
            path.unlink()
            if generator.random() < 0.5:
                path.mkdir()
        else:
            path.write_bytes(hostile_photos.mutated(generator, path.read_bytes()))
        yield re.sub(r"-?\d{5}.*", "", name), lambda folder=folder: read(folder)


def _shown(folder: pathlib.Path) -> Iterator[tuple[bytes, tuple[int, ...]]]:
    """(pixels, labels) of the photos in four batches, as training reads a dataset."""
    from hashvision.data import dataset, reader, stream

    source = dataset.load(str(folder))
    photos = stream.Stream(
        source, batch_size=8, lanes=2, seed=0, method="natural", threshold=None, tagged_only=False,
        host=0, hosts=1,
    )  # fmt: skip
    faults = reader.Faults(share=1.0)
    with contextlib.redirect_stdout(io.StringIO()):
        batches = reader.BatchReader(photos, 64, 4, faults, threads=1).batches(0)
        for _ in range(4):
            _, batch = next(batches)
            for pixels, found in zip(batch["photos"], batch["labels"], strict=True):
                yield pixels.tobytes(), tuple(int(label) for label in found if label >= 0)


def workdirs(world: World, generator: random.Random) -> Iterator[Case]:
    """Damaged workdirs, read by `audit` and by a run that resumes there."""
    from hashvision.data import dataset
    from hashvision.training.run import claim

    listed = world.folder / "list.csv"
    listed.write_text("kind,value,reason,received_at\nid,p3,r,2020\nowner,u1,r,2020\n")
    source = dataset.load(str(world.dataset))

    def resume(folder: pathlib.Path) -> None:
        config = recipes.load(DEMO, [f"--config.dataset={world.dataset}"])
        claim(str(folder), config, source.vocabulary, source.manifest)

    while True:
        folder = world.copy(world.workdir)
        names = sorted(path.name for path in folder.iterdir() if path.is_file())
        path = folder / generator.choice(names)
        if generator.random() < 0.85:
            path.write_bytes(mangled_json(generator, path.read_text()))
        else:
            path.unlink()
            if generator.random() < 0.5:
                path.mkdir()
        if generator.random() < 0.5:
            yield (
                f"audit, {path.name}",
                lambda folder=folder: run("audit", f"--removals={listed}", f"--workdir={folder}"),
            )
        else:
            yield f"resume, {path.name}", lambda folder=folder: resume(folder)


def overrides(world: World, generator: random.Random) -> Iterator[Case]:
    """--config.KEY=VALUE for each recipe, read by `config`."""
    recipes = sorted(
        str(path) for path in (REPO / "configs").glob("*.py") if path.name != "base.py"
    )
    keys = [setting.key for setting in explain.explain(recipes[0], []).settings]
    texts = [*map(str, VALUES), "1,2", "(1,)", "((1,2,3),)", "True,False", "1e999", "None", "0x10"]
    while True:
        given = [
            f"--config.{generator.choice(keys)}={generator.choice(texts)}"
            for _ in range(generator.choice([1, 1, 1, 2]))
        ]
        if generator.random() < 0.1:
            harmed = hostile_photos.mutated(generator, given[0].encode("utf-8", "replace"))
            given = [harmed.decode("latin-1")]
        recipe = generator.choice(recipes)
        argv = ("config", f"--config={recipe}", *given)
        yield "override", lambda argv=argv: run(*argv)


def command_lines(world: World, generator: random.Random) -> Iterator[Case]:
    """A stray word anywhere in a command line; it must be refused."""
    sources = (REPO / "hashvision" / "commands").glob("*.py")
    flags = sorted({
        node.value
        for source in sources
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        and node.value.startswith("--")
    })  # fmt: skip
    commands = ["draw", "drawn", "prepare", "config", "train", "plan", "evaluate", "audit", "x", ""]
    missing = str(world.folder / "missing")
    needed = {
        "draw": [f"--output={missing}/a/b", "--posts=0"],
        "drawn": [f"--output={missing}/a/b", "--posts=0"],
        "prepare": [f"--posts={missing}", f"--output={missing}"],
        "config": [f"--config={REPO / 'configs' / 'demo.py'}"],
        "train": [f"--config={missing}.py", f"--workdir={missing}"],
        "plan": [f"--config={missing}.py", "--topology=cpu:1"],
        "evaluate": [f"--workdir={missing}", f"--dataset={missing}", "--protocol=knn"],
        "audit": [f"--removals={missing}"],
    }
    while True:
        command = generator.choice(commands)
        words = list(needed.get(command, []))
        stray = generator.choice(
            ["removals=list.csv", "-", "--", "x", "-x", "--removal=list.csv", "--unknown=1", "=",
             "--config.seed=1 ", generator.choice(flags) + generator.choice(["", "=", "=x", "=-1"])]
        )  # fmt: skip
        words.insert(generator.randrange(len(words) + 1), stray)

        def call(argv: list[str] = [command, *words], stray: str = stray) -> None:  # noqa: B006
            run(*argv)
            if not stray.startswith("--") and stray != "-":
                raise Faulty(f"{stray!r} was ignored")

        yield command or "nothing", call


def outputs(world: World, generator: random.Random) -> Iterator[Case]:
    """Values of --output that `prepare` must refuse without changing what is there."""
    from hashvision.prepare import pipeline

    posts = world.folder / "posts" / "posts.jsonl"
    if not posts.exists():
        photo = hostile_photos.encode(hostile_photos.quarters(), "JPEG")
        posts.parent.mkdir()
        (posts.parent / "a.jpg").write_bytes(photo)
        post = {"id": "a", "image": "a.jpg", "text": "#dog", "owner": "u", "visibility": "public"}
        posts.write_text(json.dumps(post) + "\n")

    def harmed(make: Callable[[pathlib.Path], str]) -> None:
        shutil.rmtree(world.scratch, ignore_errors=True)
        world.scratch.mkdir()
        output = make(world.scratch)
        before = _everything(world.scratch)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.chdir(world.scratch):
                pipeline.prepare(str(posts), output)
        finally:
            after = _everything(world.scratch)
            strays = [path.name for path in world.scratch.iterdir() if ":" in path.name]
            if strays:
                raise Faulty(f"{strays} appeared in the working folder")
            lost = {path for path, content in before.items() if after.get(path) != content}
            if lost:
                raise Faulty(f"{sorted(lost)} was changed or deleted")

    def foreign(folder: pathlib.Path) -> str:
        (folder / "mine" / ".git").mkdir(parents=True)
        (folder / "mine" / ".git" / "config").write_text("mine")
        content = generator.choice(["{}", "null", '{"shards": []}', '{"name": "my app"}'])
        (folder / "mine" / "manifest.json").write_text(content)
        return str(folder / "mine")

    def dataset_and_more(folder: pathlib.Path) -> str:
        shutil.copytree(world.dataset, folder / "mine")
        (folder / "mine" / "thesis.txt").write_text("mine")
        return str(folder / "mine")

    def a_file(folder: pathlib.Path) -> str:
        (folder / "mine").write_text("mine")
        return str(folder / "mine")

    def below_a_file(folder: pathlib.Path) -> str:
        return a_file(folder) + "/dataset"

    def a_dangling_link(folder: pathlib.Path) -> str:
        (folder / "link").symlink_to(folder / "missing" / "deep" / ("x" * 300))
        return str(folder / "link")

    def a_loop(folder: pathlib.Path) -> str:
        (folder / "link").symlink_to(folder / "link")
        return str(folder / "link")

    def too_long(folder: pathlib.Path) -> str:
        return str(folder / ("x" * 300))

    def above_the_posts(folder: pathlib.Path) -> str:
        return str(posts.parent)

    def a_scheme(folder: pathlib.Path) -> str:
        return generator.choice(["file:///tmp/x", "ftp://x/y", "s3://b/x", "://", "gs://"])

    def odd(folder: pathlib.Path) -> str:
        return generator.choice(["", ".", "/", "/dev/null", "/proc/self"])

    makes = (foreign, dataset_and_more, a_file, below_a_file, a_dangling_link, a_loop, too_long,
             above_the_posts, a_scheme, odd)  # fmt: skip
    while True:
        for make in makes:
            yield make.__name__.replace("_", " "), lambda make=make: harmed(make)


def _everything(folder: pathlib.Path) -> dict[str, bytes | str]:
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
        elif path.is_file():
            found[str(path)] = path.read_bytes()
    return found


DOORS = {
    "removal lists": removal_lists,
    "labels": labels,
    "evaluation photos": evaluation_photos,
    "WordNet files": wordnets,
    "dataset folders": dataset_folders,
    "workdirs": workdirs,
    "overrides": overrides,
    "command lines": command_lines,
    "outputs": outputs,
    "environments": process_doors.environments,
    "two at once": process_doors.two_at_once,
}

PROCESSES = {"environments", "two at once"}  # doors whose cases take seconds; a hundredth as many


class Tried(typing.NamedTuple):
    """The outcomes of a door's cases."""

    door: str
    counts: collections.Counter[str]
    faults: list[tuple[str, str]]  # (case, message)


def attack(folder: pathlib.Path, cases: dict[str, int], seed: int) -> list[Tried]:
    """Tries the given number of cases of each door; reproducible from the seed."""
    world, found = World(folder), []
    for door, number in cases.items():
        generator = random.Random(f"{seed} {door}")
        counts, faults = collections.Counter(), []
        for (name, call), _ in zip(DOORS[door](world, generator), range(number), strict=False):
            what, said = outcome(call)
            counts[what] += 1
            if what == "fault":
                faults.append((name, said))
        found.append(Tried(door, counts, faults))
    return found


def table(found: list[Tried]) -> str:
    """A Markdown table with a row per door."""
    lines = ["| door | inputs | work | refused in a sentence | faults |", "|---|---|---|---|---|"]
    for door, counts, _ in found:
        row = (door, f"{counts.total():,}", *(f"{counts[what]:,}" for what in OUTCOMES))
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--doors", default=",".join(DOORS))
    arguments = parser.parse_args()
    chosen = arguments.doors.split(",")
    if unknown := set(chosen) - DOORS.keys():
        parser.error(f"there is no door {', '.join(sorted(unknown))}; there are {', '.join(DOORS)}")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        each = {door: arguments.cases // len(chosen) for door in chosen}
        for door in PROCESSES & each.keys():
            each[door] = each[door] // 100 or 1
        found = attack(pathlib.Path(folder), each, arguments.seed)
    print(table(found))
    for door, _, faults in found:
        kinds = collections.Counter(
            (name, re.sub(r"\d+|'.*?'", "*", said)[:200]) for name, said in faults
        )
        for (name, said), number in kinds.most_common(40):
            print(f"{door}: {number} x {name}: {said}")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{grown:,} MB at most")
    return int(any(faults for _, _, faults in found))


if __name__ == "__main__":
    sys.exit(main())
