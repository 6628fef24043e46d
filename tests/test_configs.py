import json
import pathlib
import shlex
import subprocess
import sys

import jax
import pytest

from hashvision import configs
from hashvision.__main__ import main
from hashvision.errors import UserError
from hashvision.training import loop, presets, program

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"
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


def file(recipe):
    name, _, variant = recipe.partition(":")
    return f"{CONFIGS / name}.py" + (f":{variant}" if variant else "")


def load(recipe, *overrides):
    return configs.load(file(recipe), overrides)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_the_whole_schema_and_builds(recipe):
    config = load(recipe)
    assert set(config.keys()) == set(load("base").keys())
    presets.fill(config, 1e6)
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
        for setting in configs.explain(file("demo"), [f"--config.{override}"]).settings
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
        ("--config.lr=1", "`python -m hashvision config` lists them all"),
        ("--config.batch_size=many", "batch_size wants an integer (photos a step"),
        ("--config.batch_size=None", "batch_size wants an integer ("),
        ("--config.batch_size=true", "batch_size wants an integer ("),
        ("--config.steps=1.5", "steps wants an integer or None ("),
        ("--config.optimizer.learning_rate=true", "optimizer.learning_rate wants a number ("),
        ("--config.model.zero_scale=1", "model.zero_scale wants true or false ("),
        ("--config.swav.head=512", "swav.head wants a tuple (widths of"),
        ("--config.swav.head=(a,b)", "swav.head wants a tuple ("),
        ("--config.swav.head={[]: 1}", "swav.head wants a tuple ("),
        ("--config.profile=(1,", "profile wants a tuple ((first step, how many)"),
        ("--config.batch_size", "no option --config.batch_size"),
        ("--batch_size=3", "no option --batch_size"),
    ],
)
def test_a_wrong_override_is_one_sentence(override, words, capsys):
    assert main(["config", f"--config={file('demo')}", override]) == 2
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
def test_a_recipe_or_variant_that_is_not_there_is_one_sentence(recipe, words):
    with pytest.raises(UserError, match=words):
        load(recipe)


BASE = """import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.width = 3  # pixels
    return config
"""
MINE = """import base


def get_config():
    config = base.get_config()
    {line}
    return config
"""


def written(folder, line):
    """A schema and a recipe of somebody's own."""
    (folder / "base.py").write_text(BASE)
    (folder / "mine.py").write_text(MINE.format(line=line))
    return str(folder / "mine.py")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "config.widht = 4",
            "mine.py sets widht, .*base.py does not have; the nearest is width",
        ),
        ("config.width = 'wide'", r"fails at line 6 of .*mine.py \(TypeError: "),
        ("config.width == (", r"mine.py fails \(SyntaxError: "),
    ],
)
def test_a_recipe_that_fails_is_one_sentence(tmp_path, line, words):
    with pytest.raises(UserError, match=words) as caught:
        configs.load(written(tmp_path, line), [])
    assert "\n" not in str(caught.value)


def test_a_recipe_goes_by_the_base_of_its_own_folder(tmp_path):
    before = list(sys.path)
    assert "batch_size" in load("demo")
    found = configs.explain(written(tmp_path, "config.width = 4"), [])
    assert found.settings == [configs.Setting("width", 4, "recipe", "pixels")]
    assert found.schema.endswith("/base.py") and (tmp_path / "base.py").samefile(found.schema)
    assert "batch_size" in load("demo") and sys.path == before


def test_every_key_has_a_meaning():
    for setting in configs.explain(file("base"), []).settings:
        assert setting.meaning, f"no comment in configs/base.py says what {setting.key} means"


def test_the_comment_behind_a_key_or_else_above_it_is_its_meaning(tmp_path):
    (tmp_path / "schema.py").write_text(
        """def get_config():
    config = group()
    config.a = 1  # behind

    # Of both,
    # in two lines.
    config.b = b = group()
    b.c = "# no comment"
    # not this one
    b.d = (
        2,
    )  # after the last line

    # A heading.

    config.e.f = 3
"""
    )
    assert configs.meanings(str(tmp_path / "schema.py")) == {
        "a": "behind",
        "b": "Of both, in two lines.",
        "b.c": "",
        "b.d": "after the last line",
        "e.f": "",
    }


def printed(capsys, recipe, *overrides):
    """The values and sources that `config` prints, by key, values as a shell would hand them on."""
    assert main(["config", f"--config={file(recipe)}", *overrides]) == 0
    words = capsys.readouterr().out.split("\n\n", 1)[1]
    keys = {setting.key for setting in configs.explain(file("base"), []).settings}
    found = {}
    # A long value is followed by a line of its source.
    for line in words.replace("\n" + " " * 20, " ").splitlines():
        key, _, rest = line.partition(" ")
        if key in keys:
            reader = shlex.shlex(rest, posix=True)
            reader.whitespace_split, reader.commenters = True, ""
            found[key] = (reader.get_token(), reader.get_token())
    assert found.keys() == keys
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_printed_values_make_the_same_config_out_of_another_recipe(recipe, capsys):
    values = {key: value for key, (value, _) in printed(capsys, recipe).items()}
    overrides = [f"--config.{key}={value}" for key, value in values.items()]
    # In this one alone the learning rate may be None.
    assert load("swav_resnet50", *overrides).to_dict() == load(recipe).to_dict()


def test_each_value_says_where_it_comes_from(capsys):
    found = printed(capsys, "demo:drawn", "--config.epochs=2", "--config.seed=0")
    assert found["epochs"] == ("2.0", "override") and found["seed"] == ("0", "override")
    assert found["batch_size"] == ("32", "recipe") and found["accumulate"] == ("1", "base")
    assert {source for _, source in printed(capsys, "base").values()} == {"base"}


def test_config_writes_the_same_for_machines(tmp_path, capsys):
    path = tmp_path / "config.json"
    assert main(["config", f"--config={file('demo')}", "--config.steps=3", f"--json={path}"]) == 0
    found = json.loads(path.read_text())
    assert found["recipe"].endswith("configs/demo.py:softmax")
    assert found["overrides"] == ["--config.steps=3"]
    steps = found["settings"]["steps"]
    assert steps["value"] == 3 and steps["source"] == "override" and steps["meaning"]
    assert found["settings"]["data.crops"]["value"] == [[1, 96, 0.2, 1.0]]


def test_config_may_be_read_in_part():
    command = [sys.executable, "-m", "hashvision", "config", f"--config={file('demo')}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0
    process.stderr.close()


def test_config_answers_without_jax_or_tensorflow():
    arguments = ["config", f"--config={file('seer_regnety:10b')}"]
    code = f"""
import sys
sys.modules['jax'] = sys.modules['tensorflow'] = None  # any import of them now fails
from hashvision.__main__ import main
sys.exit(main({arguments!r}))
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--config.model.name=resnet51", "model.name='resnet51'"),
        ("--config.model.dtype=float16", "model.dtype='float16'"),
        ("--config.model.group_conv=fast", "model.group_conv='fast'"),
        ("--config.objective.name=swap", "objective.name='swap'"),
        ("--config.batch_size=60", "batch_size=60 does not divide over 8 devices"),
        ("--config.batch_size=-8", "batch_size=-8 does not divide over 8 devices"),
        ("--config.model.norm_photos=5", "set --config.model.norm_photos=4"),
        ("--config.model.norm_photos=64", "set --config.model.norm_photos=32"),
        ("--config.model.norm_photos=-1", "model.norm_photos=-1 does not divide"),
        ("--config.accumulate=4", "set --config.model.norm_photos=8, or a divisor of that, or"),
        ("--config.model.remat=(True,)", "four stages"),
        ("--config.model.remat=(1,1,0,0)", "four stages"),
        ("--config.mesh.fsdp=3", "mesh.fsdp=3"),
        ("--config.mesh.fsdp=0", "mesh.fsdp=0"),
        ("--config.accumulate=3", "accumulate=3"),
        ("--config.accumulate=0", "accumulate=0"),
        ("--config.data.crops=((2, 96, 0.2, 1.0),)", "more than the one crop"),
        ("--config.data.crops=(1, 96)", "is no tuple of"),
        ("--config.data.crops=((1, 96, 0.2, 1.5),)", "is no tuple of"),
        ("--config.augment.distortion=-0.1", "is no strength of at least 0"),
        ("--config.augment.grey=1.5", "two probabilities"),
    ],
)
def test_a_value_that_cannot_be_built_is_one_sentence(override, words):
    assert len(jax.devices()) == 8
    with pytest.raises(UserError, match=words):
        program.build(load("demo", override), 10, 100.0)


def test_a_head_without_widths_is_one_sentence():
    config = load("demo_swav", "--config.swav.head=('wide',128)", "--config.swav.queue=0")
    presets.fill(config, 1000.0)
    with pytest.raises(UserError, match="swav.head=.*is no tuple of widths"):
        program.build(config, 10, 1000.0)


@pytest.mark.parametrize("key", loop._COUNTS)
def test_counts_begin_at_one(key, tmp_path):
    with pytest.raises(UserError, match=f"{key} must be at least 1"):
        loop.train(load("demo", f"--config.{key}=0"), str(tmp_path))


def test_steps_follow_from_epochs():
    config = load("demo", "--config.epochs=3", "--config.batch_size=64")
    assert program.total_steps(config, 1000.0) == 47
    assert program.total_steps(load("demo", "--config.steps=5"), 1000.0) == 5


def test_each_part_of_an_accumulated_batch_holds_whole_groups_of_batchnorm():
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
def test_batchnorm_has_the_papers_groups(recipe, photos):
    config = load(recipe)
    assert config.model.norm_photos == photos
    presets.fill(config, 1e6)
    model = program.build_model(config, "tpu")
    assert model.norm_groups == ((photos, config.batch_size // photos) if photos else None)


def test_a_learning_rate_left_open_is_named():
    crops = "--config.data.crops=((1, 96, 0.2, 1.0),)"
    config = load("swav_resnet50", "--config.objective.name=hashtag", crops)
    with pytest.raises(UserError, match="optimizer.learning_rate is not set"):
        program.build(config, 10, 100.0)
