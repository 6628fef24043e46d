"""Tests of the schema: each key keeps the values in its range and refuses all others."""

import inspect
import math
import typing

import ml_collections
import pytest

from hashvision import models
from hashvision.config import Config, derive, ranges, recipes, schema, upgrade
from hashvision.errors import UserError
from hashvision.models.layers import GROUP_CONV_FORMS
from places import CONFIGS

NOT_NUMBERS = (math.nan, math.inf, -math.inf, 1e308, -1.0, "x", "", True, (), [1])
NOT_INTEGERS = (*NOT_NUMBERS, 1.5, 10**20, -1)
MOST_STEPS, MOST = 2**31 - 1, 2**20

# For each key: values that it takes, and values that it refuses besides None and those above.
TABLE = {
    "seed": ([0, 2**32 - 1], [2**32]),
    "dataset": (["", "gs://b/d"], [1, "a\0b"]),
    "batch_size": ([1, MOST], [0, MOST + 1]),
    "accumulate": ([1, MOST], [0, MOST + 1]),
    "epochs": ([1e-9, 800.0, 1_000_000], [0, 0.0, 1_000_001]),
    "epoch_length": ([None, 0.5, 1e15], [0.0, 1e16]),
    "steps": ([None, 1, MOST_STEPS], [0, MOST_STEPS + 1]),
    "data.lanes": ([1, MOST], [0]),
    "data.sampling": (["natural", "square_root", "uniform"], ["", "Natural", 1]),
    "data.sampling_threshold": ([None, 1e-9, 1, 1.0], [0.0, 1.1, 1e300]),
    "data.max_labels": ([1, 1024], [0, 1025]),
    "data.photo_size": ([1, 65_535], [0, 65_536]),
    "data.crops": (
        [((1, 1, 0.2, 0.2),), ((2, 96, 0.2, 1), (4, 48, 0.08, 0.3)), [[1, 96, 0.2, 1.0]]],
        [
            *((), (1, 96), (1, 96, 0.2, 1.0), ((1, 96, 0.2),), ((1, 96, 0.2, 1.5),), ((),)),
            *(((0, 96, 0.2, 1.0),), ((1, 0, 0.2, 1.0),), ((1, 96, 0.0, 1.0),), ((1, 1, 1, 0.5),)),
            *(((1.0, 96, 0.2, 1.0),), ((1, 96, math.nan, 1.0),), ((1, 96, 0.2, 1.0),) * 17, "x"),
        ],
    ),
    "data.broken": ([0, 0.0, 1.0], [1.001]),
    "data.threads": ([None, 1, 4096], [0, 4097]),
    "augment.distortion": ([0.0, 10.0], [10.1]),
    "augment.grey": ([0.0, 1.0], [1.1]),
    "augment.blur": ([0.0, 1.0], [1.1]),
    "init_from": (["", "run"], [1, "\0"]),
    "model.name": (["resnet50"], ["", 50]),
    "model.dtype": (["float32", "bfloat16"], ["float16"]),
    "model.norm_photos": ([0, MOST], [MOST + 1]),
    "model.zero_scale": ([True, False], [0, 1, "true"]),
    "model.remat": ([(True, False, False, True)], [(True,) * 3, (1, 1, 0, 0), (), True]),
    "model.unroll": ([0, 1024], [1025]),
    "model.group_conv": (["auto", *GROUP_CONV_FORMS.values()], ["fast"]),
    "objective.name": (["hashtag", "swav"], ["swap"]),
    "objective.loss": (["softmax", "sigmoid"], ["hinge"]),
    "objective.label_smoothing": ([0.0, 0.999], [1.0, 2.0]),
    "swav.prototypes": ([None, 2, 2**24], [1, 2**24 + 1]),
    "swav.temperature": ([0.001, 1000.0], [0.0, 1e-9]),
    "swav.epsilon": ([0.001, 1000.0], [0.0, 1e-9]),
    "swav.iterations": ([1, 1000], [0, 1001]),
    "swav.assigned": ([1, 64], [0, 65]),
    "swav.head": ([(1,), (2048, 128), [8, 4]], [(), (0,), ("wide", 128), (2.0,), 512]),
    "swav.head_norm": ([True, False], [0, 1]),
    "swav.frozen_steps": ([None, 0, MOST_STEPS], [MOST_STEPS + 1]),
    "swav.queue": ([None, 0, MOST_STEPS], [MOST_STEPS + 1]),
    "swav.queue_start": ([None, 0, MOST_STEPS], [MOST_STEPS + 1]),
    "swav.patience": ([None, 1, MOST_STEPS], [0, MOST_STEPS + 1]),
    "optimizer.name": (["sgd", "larc", "adamw"], ["lars"]),
    "optimizer.learning_rate": ([None, 0.0, 1e30], [1e31]),
    "optimizer.schedule": (["cosine", "halving", "constant", "plateau"], ["step"]),
    "optimizer.plateau_steps": ([1, MOST_STEPS], [0]),
    "optimizer.warmup_epochs": ([0.0, 1_000_000], [1_000_001]),
    "optimizer.warmup_start": ([0.0, 1e30], [1e31]),
    "optimizer.final": ([0.0, 1.0], [1.1]),
    "optimizer.halvings": ([1, 1000], [0, 1001]),
    "optimizer.momentum": ([0.0, 0.999], [1.0, 2.0]),
    "optimizer.weight_decay": ([0.0, 1000.0], [1001.0]),
    "optimizer.clip": ([0.0, 1e30], [1e31]),
    "optimizer.average": ([0.0, 0.9999], [1.0, 2.0]),
    "mesh.fsdp": ([1, MOST], [0]),
    "hosts.join": ([0.5, 1_000_000], [0.0]),
    "hosts.lost": ([0.5, 1_000_000], [0.0]),
    "evaluate_on": (["", "flowers"], [1, "\0"]),
    "evaluate_protocols": (["knn", "knn,linear"], [1, "\0"]),
    "evaluate_every": ([1, MOST_STEPS], [0]),
    "log_every": ([1, MOST_STEPS], [0]),
    "profile": ([(), (100, 5), [100, 5]], [(1,), (0, 5), (5, 0), (1, 2, 3), (1.0, 2), 5]),
    "checkpoint.every": ([1, MOST_STEPS], [0]),
    "checkpoint.keep": ([1, MOST], [0]),
}


def refused_values(key):
    """Values that a key does not take."""
    default, takes, _ = schema.KEYS[key]
    any_kind = {int: NOT_INTEGERS, float: NOT_NUMBERS}.get(takes.kind, (math.nan, 10**20))
    return [*TABLE[key][1], *any_kind, *([] if takes.optional else [None])]


def test_the_table_has_every_key():
    assert TABLE.keys() == schema.KEYS.keys()


@pytest.mark.parametrize("key", TABLE)
def test_each_key_takes_exactly_the_values_in_its_range(key):
    default, takes, meaning = schema.KEYS[key]
    assert meaning and takes.fits(default)
    for value in TABLE[key][0]:
        schema.check({key: value}, "a recipe")
        group, _, name = key.rpartition(".")
        config = schema.get_config({key: value})
        assert (config[group] if group else config)[name] == takes.cast(value)
    for value in refused_values(key):
        with pytest.raises(UserError) as caught:
            schema.check({key: value}, "a recipe")
        said = str(caught.value)
        assert said.startswith(f"a recipe sets {key}=") and "\n" not in said and len(said) < 300
        assert f"{key} takes {takes.words} ({meaning})" in said


@pytest.mark.parametrize("key", TABLE)
def test_overrides_take_exactly_the_values_in_the_range(key):
    takes = schema.KEYS[key].takes
    for value in TABLE[key][0]:
        assert takes.read(str(value)) == takes.cast(value)
    for value in refused_values(key):
        if (takes.kind is str and takes.fits(str(value))) or value == "true":
            continue  # the key takes the string that represents it
        with pytest.raises(ValueError):
            takes.read(str(value))


def test_a_refused_override_is_quoted_as_typed():
    with pytest.raises(UserError, match="^--config.epochs=nan does not fit: epochs takes a number"):
        recipes.load(str(CONFIGS / "demo.py"), ["--config.epochs=nan"])


@pytest.mark.parametrize("key", TABLE)
def test_config_json_takes_exactly_the_values_in_the_range(key):
    values = {key: each.default for key, each in schema.KEYS.items()}
    for value in refused_values(key):
        with pytest.raises(UserError, match=f"^run/config.json sets {key}="):
            upgrade.upgrade(schema.nested({**values, key: value}), "run/config.json")


def test_an_integer_too_long_for_python_to_print_is_refused():
    with pytest.raises(UserError, match="sets seed=an integer of more than 4,300 digits, but seed"):
        schema.check({"seed": 10**5000}, "a recipe")


def test_a_refused_value_of_a_recipe_is_blamed_on_its_file(tmp_path):
    (tmp_path / "base.py").write_bytes((CONFIGS / "base.py").read_bytes())
    (tmp_path / "mine.py").write_text(
        "import base\n\n\ndef get_config():\n    config = base.get_config()\n"
        "    config.epochs = float('nan')\n    return config\n"
    )
    with pytest.raises(UserError, match="mine.py sets epochs=nan, but epochs takes a number above"):
        recipes.load(str(tmp_path / "mine.py"), [])
    with pytest.raises(UserError, match="mine.py sets epochs=nan"):  # the recipe itself is wrong
        recipes.load(str(tmp_path / "mine.py"), ["--config.epochs=1"])


@pytest.mark.parametrize(
    "text", ["(" * 100_000, "-" * 100_000 + "1", "[" * 1000 + "]" * 1000, "9" * 5000, "{[]: 1}"]
)
@pytest.mark.parametrize("key", ["data.crops", "seed", "epochs", "steps"])
def test_text_that_crashes_pythons_parser_is_refused(key, text):
    with pytest.raises(ValueError):
        schema.KEYS[key].takes.read(text)


def test_ranges_describe_themselves():
    assert ranges.number(0, 1, above=True).words == "a number above 0, up to 1"
    assert ranges.number(0, 1, below=True).words == "a number from 0 to below 1"
    assert ranges.optional(ranges.integer(1, 4096)).words == "an integer from 1 to 4,096, or None"
    assert ranges.one_of("a", "b", "c").words == "a, b or c"


def test_nested_inverts_flat():
    values = {key: each.default for key, each in schema.KEYS.items()}
    assert schema.flat(schema.nested(values)) == values == schema.flat(schema.get_config())


def test_model_name_takes_every_network():
    for name in models.names():
        schema.check({"model.name": name}, "a recipe")


def test_the_types_of_config_agree_with_the_schema():
    kinds = {"bool": bool, "int": int, "float": float, "str": str, "tuple": tuple}
    typed = {}
    for name, hint in inspect.get_annotations(Config).items():
        if isinstance(hint, type) and issubclass(hint, ml_collections.ConfigDict):
            for key, inner in inspect.get_annotations(hint).items():
                typed[f"{name}.{key}"] = inner
        else:
            typed[name] = hint
    assert typed.keys() == schema.KEYS.keys()
    for key, hint in typed.items():
        takes, options = schema.KEYS[key].takes, set(typing.get_args(hint)) - {type(None)}
        optional = type(None) in typing.get_args(hint)
        plain = next(iter(options)) if optional else hint
        kind = typing.get_origin(plain) or plain
        assert kind == kinds[takes.kind.__name__], key
        assert optional == takes.optional or (takes.optional and key in derive.OPEN), key


def test_get_config_returns_instances_of_the_typed_classes():
    config = schema.get_config()
    assert type(config) is Config and type(config.data).__name__ == "DataConfig"
    assert type(config.copy_and_resolve_references()) is Config
