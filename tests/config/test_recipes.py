"""Tests of recipes: reading them, overriding keys, printing them, and configs of old versions."""

import json
import shlex
import subprocess
import sys

import jax
import pytest

from hashvision import objectives
from hashvision.commands.main import main
from hashvision.config import derive, explain, recipes, schema, upgrade
from hashvision.data import removals
from hashvision.errors import UserError
from hashvision.models import convnet
from hashvision.takedowns import audit
from hashvision.training import program, run
from places import CONFIGS, load, recipe_file

RECIPES = [
    "base",
    "demo",
    "demo:drawn",
    "demo:sigmoid",
    *(f"wsl_resnext101:{variant}" for variant in ("32x8d", "32x16d", "32x32d", "32x48d")),
    "demo_swav",
    "swav_resnet50",
    "swav_resnet50:256",
    *(f"seer_regnety:{variant}" for variant in ("32gf", "64gf", "128gf", "256gf", "10b")),
    *(f"swag_regnety:{variant}" for variant in ("16gf", "32gf", "128gf")),
]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_the_whole_schema_and_builds(recipe):
    config = load(recipe)
    assert set(config.keys()) == set(load("base").keys())
    objectives.fill(config, 1e6)
    built = program.build(config, 50, 1e6)
    assert built.total_steps >= 1
    head, classes = ("head", 50)
    if config.objective.name == "swav":
        head, classes = "prototypes", config.swav.prototypes
    assert built.abstract.params[head]["kernel"].shape[1] == classes


def test_every_config_file_is_tested():
    assert {path.stem for path in CONFIGS.glob("*.py")} == {name.split(":")[0] for name in RECIPES}


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("steps=7", 7),
        ("steps=None", None),
        ("epochs=3", 3.0),
        ("optimizer.learning_rate=1e-3", 1e-3),
        ("data.sampling_threshold=1", 1.0),
        ("data.sampling=natural", "natural"),
        ("dataset=", ""),
        ("dataset=2018", "2018"),
        ("model.zero_scale=false", False),
        ("model.zero_scale=True", True),
        ("model.remat=(True,True,False,False)", (True, True, False, False)),
        ("swav.head=[512, 64]", (512, 64)),
        ("profile=100,5", (100, 5)),
        (
            "data.crops=((2, 96, 0.2, 1.0), (4, 48, 0.08, 0.3))",
            ((2, 96, 0.2, 1.0), (4, 48, 0.08, 0.3)),
        ),
    ],
)
def test_values_take_the_type_of_the_key(override, value):
    key = override.partition("=")[0]
    (found,) = (
        setting
        for setting in explain.explain(recipe_file("demo"), [f"--config.{override}"]).settings
        if setting.key == key
    )
    assert found.value == value and type(found.value) is type(value)
    assert found.source == "override"


def test_the_last_override_of_a_key_counts():
    assert load("demo", "--config.steps=1", "--config.seed=2", "--config.steps=None").steps is None


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--config.optimizer.learning_rte=1", "the nearest is optimizer.learning_rate"),
        ("--config.learning_rate=1", "the nearest is optimizer.learning_rate"),
        ("--config.model=resnet50", "the nearest is model.name"),
        ("--config.lr=1", "`hashvision config` lists all keys"),
        ("--config.batch_size=many", "batch_size takes an integer from 1 to 1,048,576 (photos per"),
        ("--config.batch_size=None", "batch_size takes an integer from"),
        ("--config.batch_size=true", "batch_size takes an integer from"),
        ("--config.steps=1.5", "steps takes an integer from 1 to 2,147,483,647, or None ("),
        ("--config.optimizer.learning_rate=true", "optimizer.learning_rate takes a number from"),
        ("--config.model.zero_scale=1", "model.zero_scale takes true or false ("),
        ("--config.swav.head=512", "swav.head takes a tuple of widths (widths of the pro"),
        ("--config.swav.head=(a,b)", "swav.head takes a tuple of widths ("),
        ("--config.swav.head={[]: 1}", "swav.head takes a tuple of widths ("),
        ("--config.profile=(1,", "profile takes (first step, number of steps), or () ("),
        ("--config.batch_size", "no option --config.batch_size"),
        ("--batch_size=3", "no option --batch_size=3; did you mean --config.batch_size"),
    ],
)
def test_a_wrong_override_is_one_sentence(override, words, capsys):
    assert main(["config", f"--config={recipe_file('demo')}", override]) == 2
    said = capsys.readouterr()
    assert not said.out and words in said.err
    assert said.err.startswith("hashvision: ") and said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("demo:swish", "no variant swish; it has softmax, sigmoid, drawn"),
        ("swav_resnet50:512", "no variant 512; it has 4096, 256"),
        ("demo_swav:drawn", "has no variants; leave :drawn out"),
        ("nothing", "nothing.py does not exist"),
    ],
)
def test_a_missing_recipe_or_variant_is_named(recipe, words):
    with pytest.raises(UserError, match=words):
        load(recipe)


MINE = """import base


def get_config():
    config = base.get_config()
    {line}
    return config
"""
# configs/base.py of a version before config/schema.py existed; users have copies beside recipes.
OLD_BASE = """import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.batch_size = 64  # photos a step
    config.model = model = ml_collections.ConfigDict()
    model.name = "resnet50"
    model.remat = (False, False, False, False)
    return config
"""


def write_recipe(folder, line, base=None):
    """Writes a user's own recipe, with a copy of base.py beside it; returns its path."""
    (folder / "base.py").write_text(base or (CONFIGS / "base.py").read_text())
    (folder / "mine.py").write_text(MINE.format(line=line))
    return str(folder / "mine.py")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "config.epohcs = 4",
            "mine.py sets epohcs, which this version of hashvision does not have; the nearest is",
        ),
        ("config.epochs = 'long'", r"fails at line 6 of .*mine.py \(TypeError: "),
        ("config.epochs == (", r"mine.py fails \(SyntaxError: "),
        ("config.epochs = -1.0", "mine.py sets epochs=-1.0, but epochs takes a number above 0"),
        ("config = None", r"mine.py fails \(AttributeError: "),
    ],
)
def test_a_recipe_that_fails_is_one_sentence(tmp_path, line, words):
    with pytest.raises(UserError, match=words) as caught:
        recipes.load(write_recipe(tmp_path, line), [])
    assert "\n" not in str(caught.value)


def test_a_recipe_can_import_files_beside_it_and_they_are_unloaded_afterwards(tmp_path):
    before = list(sys.path)
    assert load("demo").batch_size == 32
    config = recipes.load(write_recipe(tmp_path, "config.log_every = 4"), [])
    assert config.log_every == 4 and config.batch_size == 256
    assert load("demo").batch_size == 32 and sys.path == before and "base" not in sys.modules


def test_a_recipe_with_an_old_copy_of_base_gets_all_present_keys(tmp_path):
    file = write_recipe(tmp_path, "config.model.remat = (True, True, True, True)", OLD_BASE)
    config = recipes.load(file, ["--config.epochs=2"])
    assert config.batch_size == 64 and config.model.remat == (True,) * 4 and config.epochs == 2
    assert config.optimizer.learning_rate == 0.1 and set(config) == set(load("base"))


@pytest.fixture
def renamed(monkeypatch):
    """Makes accumulate and log_every keys that had other names in an earlier version."""
    monkeypatch.setattr(
        upgrade,
        "RENAMED",
        (
            upgrade.Renamed("part", "accumulate", lambda old: old["batch_size"] // old["part"]),
            upgrade.Renamed("rate", "log_every", lambda old: 100 // old["rate"]),
        ),
    )


def old_workdir(**changes):
    """config.json of an earlier version: it lacks keys, and has some under old names."""
    values = json.loads(json.dumps(load("demo").to_dict()))
    del values["accumulate"], values["log_every"], values["hosts"], values["swav"]["queue"]
    return {**values, "part": 8, "rate": 5, **changes}


def test_upgrade_adds_defaults_and_renames_keys(renamed):
    found = upgrade.upgrade(old_workdir(batch_size=64))
    assert found["accumulate"] == 8 and found["log_every"] == 20 and "part" not in found
    assert found["hosts"] == {"join": 300.0, "lost": 30.0} and found["swav"]["queue"] is None
    assert found["data"]["crops"] == [[1, 96, 0.2, 1.0]]  # lists stay lists
    assert set(schema.flat(found)) == set(schema.KEYS)
    again = json.loads(json.dumps(load("demo").to_dict()))
    assert schema.flat(upgrade.upgrade(again)) == schema.flat(again)  # a present config is kept


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (None, "run/config.json lacks seed; copy it again from where `train` wrote it"),
        ([], "run/config.json lacks seed"),
        ({"seed": 0}, "run/config.json lacks batch_size"),
        (old_workdir(resolution=224), "sets resolution, which this version of hashvision does not"),
        (old_workdir(rate=0), "sets rate=0, which cannot be converted to log_every, the key's new"),
        (old_workdir(rate="x"), "sets rate='x', which cannot be converted to log_every"),
        (old_workdir(part=-1), "sets accumulate=-32, but accumulate takes an integer"),
        (old_workdir(seed=None), "sets seed=None, but seed takes an integer"),
        (old_workdir(augment="none"), "sets augment, which this version"),
    ],
)
def test_a_config_that_cannot_be_upgraded_is_refused_in_one_sentence(renamed, values, words):
    with pytest.raises(UserError, match=words) as caught:
        upgrade.upgrade(values, "run/config.json")
    assert "run/config.json" in str(caught.value) and "\n" not in str(caught.value)


def test_an_old_key_is_refused_in_an_override_and_upgraded_in_a_recipe(renamed, tmp_path):
    with pytest.raises(UserError, match="no key part of a config; it is called accumulate now"):
        load("demo", "--config.part=3")
    file = write_recipe(tmp_path, "config.part = 16")  # recipes of earlier versions still work
    assert recipes.load(file, []).accumulate == 16


@pytest.mark.parametrize(
    ("groups", "accumulate", "photos"), [(1, 1, 0), (8, 1, 4), (1, 4, 8), (2, 4, 4)]
)
def test_norm_groups_of_old_configs_become_norm_photos(groups, accumulate, photos):
    values = load("demo").to_dict()
    del values["model"]["norm_photos"]
    values["model"]["norm_groups"], values["accumulate"] = groups, accumulate
    assert upgrade.upgrade(values)["model"]["norm_photos"] == photos


@pytest.mark.parametrize("reader", ["read", "claim", "audit"])
def test_every_reader_of_a_workdir_reads_old_configs(reader, renamed, tmp_path):
    config = load("demo", f"--config.dataset={tmp_path}", "--config.accumulate=4")
    vocabulary = {"classes": []}
    run.claim(str(tmp_path / "run"), config, vocabulary, {})
    path = tmp_path / "run" / "config.json"
    values = json.loads(path.read_text())
    del values["accumulate"], values["optimizer"]["average"]
    path.write_text(json.dumps({**values, "part": 8}))
    if reader == "claim":
        run.claim(str(tmp_path / "run"), config, vocabulary, {})
        with pytest.raises(UserError, match="was trained with seed=0, not 8"):
            config.seed = 8
            run.claim(str(tmp_path / "run"), config, vocabulary, {})
    elif reader == "read":
        found, _ = run.read(str(tmp_path / "run"))
        assert found.accumulate == 4 and found.optimizer.average == 0.0
        assert found.data.crops == ((1, 96, 0.2, 1.0),)
    else:
        assert audit.audit_run(str(tmp_path / "run"), removals.RemovalList()).checkpoints == []


def printed(capsys, recipe, *overrides):
    """The values and sources that `config` prints, by key; values as a shell unquotes them."""
    assert main(["config", f"--config={recipe_file(recipe)}", *overrides]) == 0
    words = capsys.readouterr().out.split("\n\n", 1)[1]
    keys = {setting.key for setting in explain.explain(recipe_file("base"), []).settings}
    found = {}
    # The source of a long value is on the next line.
    for line in words.replace("\n" + " " * 20, " ").splitlines():
        key, _, rest = line.partition(" ")
        if key in keys:
            reader = shlex.shlex(rest, posix=True)
            reader.whitespace_split, reader.commenters = True, ""
            found[key] = (reader.get_token(), reader.get_token())
    assert found.keys() == keys
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_printed_values_given_as_overrides_reproduce_the_config(recipe, capsys):
    values = {key: value for key, (value, _) in printed(capsys, recipe).items()}
    overrides = [f"--config.{key}={value}" for key, value in values.items()]
    # Only swav_resnet50 lets the learning rate be None.
    assert load("swav_resnet50", *overrides).to_dict() == load(recipe).to_dict()


def test_config_prints_the_source_of_each_value(capsys):
    found = printed(capsys, "demo:drawn", "--config.epochs=2", "--config.seed=0")
    assert found["epochs"] == ("2.0", "override") and found["seed"] == ("0", "override")
    assert found["batch_size"] == ("32", "recipe") and found["accumulate"] == ("1", "base")
    assert {source for _, source in printed(capsys, "base").values()} == {"base"}


def test_config_writes_json(tmp_path, capsys):
    path = tmp_path / "config.json"
    assert (
        main(["config", f"--config={recipe_file('demo')}", "--config.steps=3", f"--json={path}"])
        == 0
    )
    found = json.loads(path.read_text())
    assert found["recipe"].endswith("configs/demo.py:softmax")
    assert found["overrides"] == ["--config.steps=3"]
    steps = found["settings"]["steps"]
    assert steps["value"] == 3 and steps["source"] == "override" and steps["meaning"]
    assert found["settings"]["data.crops"]["value"] == [[1, 96, 0.2, 1.0]]


def test_config_survives_a_closed_pipe():
    command = [sys.executable, "-m", "hashvision", "config", f"--config={recipe_file('demo')}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0
    process.stderr.close()


def test_config_imports_neither_jax_nor_tensorflow():
    arguments = ["config", f"--config={recipe_file('seer_regnety:10b')}"]
    code = f"""
import sys
sys.modules['jax'] = sys.modules['tensorflow'] = None  # importing them fails now
from hashvision.commands.main import main
sys.exit(main({arguments!r}))
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--config.model.name=resnet51", "no network 'resnet51'"),
        ("--config.batch_size=60", "batch_size=60 does not divide over 8 devices"),
        ("--config.model.norm_photos=5", "set --config.model.norm_photos=4"),
        ("--config.model.norm_photos=64", "set --config.model.norm_photos=32"),
        ("--config.accumulate=4", "set --config.model.norm_photos=8, or a divisor of that, or"),
        ("--config.mesh.fsdp=3", "mesh.fsdp=3"),
        ("--config.accumulate=3", "accumulate=3"),
        ("--config.data.crops=((2, 96, 0.2, 1.0),)", "more than one crop"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused_in_one_sentence(override, words):
    assert len(jax.devices()) == 8
    with pytest.raises(UserError, match=words):
        program.build(load("demo", override), 10, 100.0)


def peak(config, photos=1e9):
    """The learning rate after the warm-up, and the number of steps of the warm-up."""
    objectives.fill(config, photos)
    rate = config.optimizer.learning_rate * config.batch_size / 256
    return rate, config.optimizer.warmup_epochs * photos / config.batch_size


@pytest.mark.parametrize(
    ("recipe", "batch", "rate", "warmup", "start", "schedule"),
    [
        ("swav_resnet50:4096", 4096, 4.8, None, 0.3, "cosine"),
        ("seer_regnety:32gf", 4096, 4.8, 8000, 0.15, "cosine"),
        ("seer_regnety:64gf", 8192, 9.6, 8000, 0.15, "cosine"),
        ("seer_regnety:128gf", 4096, 4.8, 8000, 0.15, "constant"),
        ("seer_regnety:256gf", 8192, 9.6, 8000, 0.15, "cosine"),
        ("seer_regnety:10b", 7936, 9.3, None, 0.15, "cosine"),
    ],
)
def test_recipes_match_the_released_configs(recipe, batch, rate, warmup, start, schedule):
    config = load(recipe)
    assert config.batch_size == batch and config.optimizer.schedule == schedule
    found, steps = peak(config)
    assert found == pytest.approx(rate, rel=1e-3) and config.optimizer.warmup_start == start
    if warmup:
        assert steps == pytest.approx(warmup)


def test_other_recipes_warm_up_from_zero():
    for recipe in RECIPES:
        if not recipe.startswith(("swav_", "seer_")):
            assert load(recipe).optimizer.warmup_start == 0.0


def test_steps_follow_from_epochs():
    config = load("demo", "--config.epochs=3", "--config.batch_size=64")
    assert derive.total_steps(config, 1000.0) == 47
    assert derive.total_steps(load("demo", "--config.steps=5"), 1000.0) == 5


def test_batchnorm_groups_must_divide_each_part_of_an_accumulated_batch():
    config = load("demo", "--config.accumulate=4", "--config.model.norm_photos=16")
    with pytest.raises(UserError, match="norm_photos=16 does not divide the 8 photos .*photos=8"):
        program.build(config, 10, 100.0)


@pytest.mark.parametrize(
    ("recipe", "photos"),
    [
        ("swav_resnet50", 512),  # 8 GPUs of 64
        ("swav_resnet50:256", 0),
        ("seer_regnety:128gf", 2048),  # 64 of 32
        ("seer_regnety:256gf", 1024),  # 64 of 16
        ("seer_regnety:10b", 128),  # 8 of 16
    ],
)
def test_batchnorm_groups_match_the_papers(recipe, photos):
    config = load(recipe)
    assert config.model.norm_photos == photos
    objectives.fill(config, 1e6)
    groups = convnet.norm_groups(config)
    assert groups == ((photos, config.batch_size // photos) if photos else None)


def test_a_missing_learning_rate_is_refused():
    crops = "--config.data.crops=((1, 96, 0.2, 1.0),)"
    config = load("swav_resnet50", "--config.objective.name=hashtag", crops)
    with pytest.raises(UserError, match="optimizer.learning_rate is not set"):
        program.build(config, 10, 100.0)
