"""JSON and YAML files that others may have written, damaged or cut off: read with bounds, errors of one line."""

import json
import stat
from pathlib import Path
from typing import Any

import yaml

#: Largest YAML file that is read, in bytes, and the most values that its aliases may stand for.
YAML_BYTES, YAML_NODES = 2**20, 100_000
#: Largest JSON file that is read, in bytes: an index of a million shards has 60 MB.
JSON_BYTES = 2**28


class FileContentError(ValueError):
    """A file does not hold what it should; the message names it and says what to do."""


def read_text(path: str | Path, limit: int) -> str:
    """Return the text of a regular file of at most ``limit`` bytes.

    Args:
        path: The file.
        limit: In bytes.

    Returns:
        The text.

    Raises:
        FileContentError: If it is a pipe or a device, larger, or no UTF-8.
        OSError: If it cannot be read.
    """
    if not stat.S_ISREG(Path(path).stat().st_mode):  # reading a pipe would wait for ever
        raise FileContentError(f"{path} is no regular file.")
    with Path(path).open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise FileContentError(f"{path} has more than {limit:,} bytes, which is no file of this kind.")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise FileContentError(f"{path} is no text in UTF-8: {error}.") from error


def read_json(path: str | Path, types: dict[str, Any], remedy: str) -> dict[str, Any]:
    """Return a JSON file's mapping, which has the keys that it must have.

    Args:
        path: The file.
        types: Key -> type, or tuple of types, of its value.
        remedy: What the user can do if the file is damaged: a sentence.

    Returns:
        The mapping.

    Raises:
        FileContentError: If the file is damaged.
        OSError: If it cannot be read.
    """
    try:
        content = json.loads(read_text(path, JSON_BYTES))
        if not isinstance(content, dict):
            raise FileContentError(f"it holds no mapping but a {type(content).__name__}")
        for key, kind in types.items():
            if key not in content:
                raise FileContentError(f"it has no {key!r}")
            if not isinstance(content[key], kind) or (isinstance(content[key], bool) and kind is not bool):
                raise FileContentError(f"its {key!r} is a {type(content[key]).__name__}")
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).removeprefix(f"{path} ").rstrip(".").split())
        raise FileContentError(f"{path} is damaged: {reason}. {remedy}") from error
    return content


def read_yaml_text(path: str | Path) -> str:
    """Return the text of a YAML file that is small however its aliases are followed, and gives no key twice.

    Args:
        path: The file.

    Returns:
        The text, for a YAML loader.

    Raises:
        FileContentError: If it is no YAML, is too large, or a mapping has the same key twice, of which YAML would take
            the last in silence.
        OSError: If it cannot be read.
    """
    text = read_text(path, YAML_BYTES)
    try:
        root = yaml.compose(text, yaml.SafeLoader)
        if root is not None and _size(root, {}, str(path)) > YAML_NODES:
            raise FileContentError(f"{path}: its aliases stand for more than {YAML_NODES:,} values. Write them out.")
    except yaml.YAMLError as error:
        raise FileContentError(f"{path} is no YAML file: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise FileContentError(f"{path} is nested too deeply.") from error
    return text


def _size(node: yaml.Node, known: dict[int, int], path: str) -> int:
    """Return how many values a node stands for with its aliases followed; each node is looked at once."""
    if id(node) in known:
        if not known[id(node)]:
            raise FileContentError(f"{path}, line {node.start_mark.line + 1}: an alias stands for what it is part of.")
        return known[id(node)]
    known[id(node)] = 0  # not finished
    size = 1
    if isinstance(node, yaml.SequenceNode):
        size += sum(_size(item, known, path) for item in node.value)
    elif isinstance(node, yaml.MappingNode):
        keys: set[tuple[str, str]] = set()
        for key, value in node.value:
            name = key.tag, str(key.value)
            if isinstance(key, yaml.ScalarNode) and name in keys and key.value != "<<":
                raise FileContentError(
                    f"{path}, line {key.start_mark.line + 1}: the key `{key.value}` is there twice. Remove one of them."
                )
            keys.add(name)
            size += _size(key, known, path) + _size(value, known, path)
    known[id(node)] = size
    return size
