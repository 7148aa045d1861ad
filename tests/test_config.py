# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest

from m2jax import config, config_values
from m2jax.config import (
    ARCHITECTURES,
    Experiment,
    Model,
    UserError,
    as_config_dict,
    build,
    from_json,
    resolve,
    to_json,
)
from m2jax.config_files import load_config


def test_json_round_trip():
    experiment = load_config("emoji", ["train.steps=7", "data.languages=zh", "optim.eps=1e-6"])
    assert experiment.train.steps == 7
    assert experiment.data.languages == ("zh",)
    assert from_json(to_json(experiment)) == experiment
    assert hash(experiment) == hash(from_json(to_json(experiment)))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stps=5", "steps"),
        ("train.steps=five", "int"),
        ("train.steps=1.5", "int"),
        ("train=5", "group"),
        ("nothing=1", "no such key"),
        ("loss.contrastive.impl=fast", "dense"),
        ("optim.name=sgd", "adamw"),
        ("model.name=m3", "m2-encoder-10b"),
        ("model.heads=5", "model.heads"),
        ("model.width=-192", "model.width=-192: must lie between 1 and 16,777,216"),
        ("model.max_text_len=1023", "has room for 1022"),
        ("train.steps", "no value"),
    ],
)
def test_bad_overrides_are_one_line_with_a_mend(override, words):
    with pytest.raises(UserError) as caught:
        load_config("emoji", [override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_argument_that_a_config_does_not_take_is_named():
    with pytest.raises(UserError, match=r"emoji\.py:foo: this config takes no argument: drop :foo"):
        load_config("emoji:foo")


@pytest.mark.parametrize("body", ["    return as_config_dikt()", "    assert 0", "    1 / 0"])
def test_whatever_a_config_file_raises_names_the_file(tmp_path, body):
    file = tmp_path / "mine.py"
    file.write_text(f"def get_config():\n{body}\n")
    with pytest.raises(UserError, match=r"mine\.py: .*Error: .*mend the config file") as caught:
        load_config(str(file))
    assert "\n" not in str(caught.value)


def test_a_misspelt_key_in_a_file_names_the_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from m2jax.config import as_config_dict\n"
        "def get_config():\n    c = as_config_dict()\n    c.train.stepz = 3\n    return c\n"
    )
    with pytest.raises(UserError, match=r"mine\.py.*steps"):
        load_config(str(file))


def test_a_missing_file_lists_what_ships():
    with pytest.raises(UserError, match="emoji"):
        load_config("no-such-config")


@pytest.mark.parametrize("text", ["{", "[1]", '{"train": {"stepz": 1}}', '{"train": 3}'])
def test_damaged_json_is_refused(text):
    with pytest.raises(UserError, match=r"config\.json"):
        from_json(text)


def test_every_architecture_resolves_and_keeps_overrides():
    for name, sizes in ARCHITECTURES.items():
        assert resolve(Model(name=name)).width == sizes["width"]
    assert resolve(Model(width=96)).width == 96


def test_the_default_builds():
    built = build(as_config_dict())
    assert built.model.width == ARCHITECTURES[Experiment().model.name]["width"]


@pytest.mark.parametrize("text", ["en,zh", "('en', 'zh')", "['en','zh']", '("en", "zh")'])
def test_a_tuple_may_be_written_as_python_does(text):
    assert load_config("emoji", [f"data.languages={text}"]).data.languages == ("en", "zh")


@pytest.mark.parametrize(
    "setting",
    [
        "train.log_every=0", "train.steps=-5", "data.batch_size=0", "data.views=0",
        "model.unroll=0",
        "optim.b1=2", "optim.ema=1", "model.drop_path=2", "model.patch_drop=1",
        "loss.contrastive.tile=0", "loss.contrastive.group=-1", "loss.contrastive.scale_init=0",
        "optim.learning_rate=nan",
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_refused_by_name(setting):
    with pytest.raises(UserError, match=setting.split("=")[0].replace(".", r"\.")):
        load_config("emoji", [setting])


def test_every_limit_is_of_a_setting_there_is():
    for name, key in {**config_values._CHOICES, **config_values._RANGES}:
        assert key in {field.name for field in dataclasses.fields(getattr(config, name))}
