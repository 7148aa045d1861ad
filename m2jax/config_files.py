# SPDX-License-Identifier: Apache-2.0
"""From a config file and ``key=value`` overrides to an experiment."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from m2jax.config import Experiment, UserError, as_config_dict, build, from_json


def load_config(spec: str, overrides: Sequence[str] = ()) -> Experiment:
    """Reads a config file and applies overrides.

    Args:
        spec: ``FILE.py`` or ``FILE.py:ARG``; the file defines ``get_config(arg="")`` and returns a
            ``ConfigDict`` that began as ``as_config_dict()``. A ``.json`` file is a saved run's.
        overrides: ``key.sub=value`` strings, values in Python's literal form or plain text.

    Raises:
        UserError: no such file, a misspelt key, or a value of the wrong type.
    """
    path, _, arg = spec.partition(":")
    file = find_config(path)
    if file.suffix == ".json":
        config = as_config_dict(from_json(file.read_text(), str(file)))
    else:
        config = _run_file(file, arg)
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise UserError(f"--config.{item}: no value: write --config.{item}=VALUE")
        _override(config, key, text)
    return build(config)


def find_config(name: str) -> Path:
    """The file a config is named by: a path, or the bare name of one that ships with m2jax."""
    shipped = Path(__file__).parent.parent / "configs"
    if not shipped.is_dir():
        shipped = Path(__file__).parent / "_configs"
    for candidate in (Path(name), shipped / f"{name}.py", shipped / Path(name).name):
        if candidate.is_file() and candidate.suffix in (".py", ".json"):
            return candidate
    names = ", ".join(sorted(p.stem for p in shipped.glob("*.py")))
    raise UserError(f"--config {name}: no such config file: give a path or one of {names}")


def _run_file(file: Path, arg: str) -> ConfigDict:
    """Executes a config file. It is code of the user's own, so it runs with the user's rights."""
    module_spec = importlib.util.spec_from_file_location(file.stem, file)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        takes = inspect.signature(module.get_config).parameters
        if arg and not takes:
            raise UserError(f"--config {file}:{arg}: this config takes no argument: drop :{arg}")
        config = module.get_config(arg) if arg else module.get_config()
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's code raises is theirs to mend
        reason = " ".join(str(a) for a in error.args[:1]).replace("\n", " ")
        raise UserError(
            f"{file}: {type(error).__name__}: {reason}: mend the config file, or what follows the "
            "colon after its name"
        ) from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"{file}: get_config returned no ConfigDict: start from as_config_dict()")
    return config


def _override(config: ConfigDict, key: str, text: str) -> None:
    """Sets one dotted key from the command line, by the type its default has."""
    *parents, last = key.split(".")
    where = f"--config.{key}={text}"
    node: Any = config
    try:
        for parent in parents:
            node = node[parent]
        current = node[last]
    except (KeyError, TypeError, AttributeError) as error:
        hint = str(error.args[0]).replace("\n", " ").strip('"') if error.args else ""
        raise UserError(f"{where}: no such key: {hint}") from None
    node[last] = _parse(current, text, where)


def _parse(current: Any, text: str, where: str) -> Any:
    """A command-line value in the type of the value it replaces."""
    wanted = type(current).__name__
    try:
        if isinstance(current, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(current, int):
            return int(text)
        if isinstance(current, float):
            return float(text)
        if isinstance(current, str):
            return text
        if isinstance(current, (tuple, list)):
            parts = (part.strip(" '\"") for part in text.strip(" ()[]").split(","))
            return tuple(part for part in parts if part)
    except (ValueError, KeyError):
        raise UserError(f"{where}: not of type {wanted}: give a value like {current!r}") from None
    raise UserError(f"{where}: this is a group of keys: name one key inside it")
