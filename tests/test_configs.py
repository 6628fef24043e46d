import pathlib

import jax
import pytest

from hashvision.__main__ import _config
from hashvision.errors import UserError
from hashvision.training import presets, program

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


def load(recipe, *overrides):
    name, _, variant = recipe.partition(":")
    return _config(f"{CONFIGS / name}.py" + (f":{variant}" if variant else ""), list(overrides))


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


def test_values_take_the_type_of_the_key():
    config = load(
        "demo",
        "--config.steps=7",
        "--config.optimizer.learning_rate=1",
        "--config.data.sampling=natural",
        "--config.model.remat=(True,True,False,False)",
        "--config.data.sampling_threshold=0.25",
    )
    assert config.steps == 7 and config.data.sampling == "natural"
    assert config.optimizer.learning_rate == 1.0
    assert config.model.remat == (True, True, False, False)
    assert config.data.sampling_threshold == 0.25


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--config.optimizer.learning_rte=1", "the nearest is optimizer.learning_rate"),
        ("--config.learning_rate=1", "the nearest is optimizer.learning_rate"),
        ("--config.batch_size=many", "batch_size the type int"),
        ("--config.steps=1.5", "steps the type int"),
        ("--config.batch_size", "no option --config.batch_size"),
        ("--batch_size=3", "no option --batch_size"),
    ],
)
def test_a_wrong_override_is_one_sentence(override, words):
    with pytest.raises(UserError, match=words):
        load("demo", override)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--config.model.name=resnet51", "model.name='resnet51'"),
        ("--config.model.dtype=float16", "model.dtype='float16'"),
        ("--config.model.group_conv=fast", "model.group_conv='fast'"),
        ("--config.objective.name=swap", "objective.name='swap'"),
        ("--config.batch_size=60", "batch_size=60 does not divide over 8 devices"),
        ("--config.model.norm_groups=5", "model.norm_groups=5"),
        ("--config.mesh.fsdp=3", "mesh.fsdp=3"),
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


def test_steps_follow_from_epochs():
    config = load("demo", "--config.epochs=3", "--config.batch_size=64")
    assert program.total_steps(config, 1000.0) == 47
    assert program.total_steps(load("demo", "--config.steps=5"), 1000.0) == 5


def test_each_part_of_an_accumulated_batch_divides_into_norm_groups():
    config = load("demo", "--config.accumulate=4", "--config.model.norm_groups=16")
    with pytest.raises(
        UserError, match="accumulate=4 parts does not divide into model.norm_groups"
    ):
        program.build(config, 10, 100.0)


def test_a_learning_rate_left_open_is_named():
    crops = "--config.data.crops=((1, 96, 0.2, 1.0),)"
    config = load("swav_resnet50", "--config.objective.name=hashtag", crops)
    with pytest.raises(UserError, match="optimizer.learning_rate is not set"):
        program.build(config, 10, 100.0)
