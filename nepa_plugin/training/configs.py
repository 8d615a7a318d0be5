"""YAML configs that build on others: a key ``base`` names the file that is read first."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from nepa_plugin.runtime.reading import FileContentError, read_yaml_text
from nepa_plugin.runtime.shipped import ShippedConfigError, find, named


class ConfigFileError(ValueError):
    """A config file cannot be used; the message names it and says what to do."""


def read_config(path: str | Path, folder: str = "lightly_configs") -> dict[str, Any]:
    """Return a config with everything that it builds on.

    The file named by ``base`` (relative to the file that names it, or a shipped config by its name) is read first;
    mappings are merged, anything else is replaced.

    Args:
        path: YAML file, or the name of a shipped config.
        folder: Where shipped configs of the name are looked for.

    Returns:
        The merged mapping, without ``base``.

    Raises:
        ConfigFileError: If a file is missing, is no YAML mapping, gives a key twice, or names itself as its base.
    """
    try:
        return _read(find(path, folder), (), folder)
    except ShippedConfigError as error:
        raise ConfigFileError(str(error)) from error


def _read(path: Path, above: tuple[Path, ...], folder: str) -> dict[str, Any]:
    if path.resolve() in above:
        raise ConfigFileError(f"{path} builds on itself: change the key `base` in {above[-1]}.")
    try:
        config = get_loader("yaml")(read_yaml_text(path)) or {}  # reads 1e-3 as a number, as --config does
    except FileContentError as error:
        raise ConfigFileError(str(error)) from error
    except (yaml.YAMLError, ValueError) as error:  # such as the date 2026-99-99
        raise ConfigFileError(f"{path} is no YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ConfigFileError(f"{path} must hold a mapping of options, not a {type(config).__name__}.")
    base = config.pop("base", None)
    if base is None:
        return config
    if not isinstance(base, str):
        raise ConfigFileError(f"{path}: `base` must be the path of one file, got {base!r}.")
    return merge(_read(_base_of(path, base, folder), (*above, path.resolve()), folder), config)


def _base_of(path: Path, base: str, folder: str) -> Path:
    beside = path.parent / base
    if beside.is_file():
        return beside
    try:
        return named(base, folder)
    except ShippedConfigError as error:
        raise ConfigFileError(f"No config file at {beside}, which {path} names as its `base`.") from error


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return ``base`` with the values of ``over``; mappings are merged key by key."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


@contextmanager
def merged_configs(args: list[str], shipped: str = "lightly_configs") -> Iterator[list[str]]:
    """Put each ``--config FILE`` first, as a file of the same name that holds what FILE builds on, too.

    Configs come before the other options wherever they stand, so that an option that is typed is the one in force.

    Args:
        args: A command line.
        shipped: Where shipped configs of a name are looked for.
    """
    with tempfile.TemporaryDirectory(prefix="nepa-config-") as folder:
        configs: list[str] = []
        others: list[str] = []
        left = iter(args)
        for arg in left:
            option, equals, value = arg.partition("=")
            if option not in ("--config", "-c"):
                others.append(arg)
                continue
            given = value if equals else next(left, None)
            if given is None:
                others.append(arg)  # the parser says what is missing
                continue
            content = yaml.safe_dump(read_config(given, shipped), sort_keys=False)
            merged = Path(folder) / str(len(configs)) / Path(given).name
            merged.parent.mkdir()
            merged.write_text(content)
            configs.append(f"{option}={merged}")
        yield configs + others
