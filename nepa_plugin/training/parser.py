"""The command line's parser: errors of one line, with the nearest valid key."""

import difflib
import re
import sys
from collections.abc import Callable
from typing import NoReturn

from pytorch_lightning.cli import LightningArgumentParser

from nepa_plugin import methods
from nepa_plugin.methods import Method


class RunParser(LightningArgumentParser):
    """A parser whose errors are one line, with the nearest valid key where a key is unknown."""

    #: The group of the model's options.
    group = "model"

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
        """Print the message, with a suggestion, and exit with status 2."""
        sys.stderr.write(f"error: {explain(message, self._known_keys, self.group)}\n")
        sys.exit(2)

    def _known_keys(self) -> list[str]:
        return sorted({a.dest for a in self._actions if a.dest not in ("help", "==SUPPRESS==")})


class PretrainParser(RunParser):
    """The same where the model is one of several methods."""

    group = "model.init_args"

    def _known_keys(self) -> list[str]:
        keys = set(super()._known_keys())
        for cls in [Method, *_subclasses(Method)]:
            sub = LightningArgumentParser(add_help=False)
            sub.add_class_arguments(cls, "model.init_args", fail_untyped=False)
            keys |= {a.dest for a in sub._actions}
        return sorted(keys)


def _subclasses(cls: type) -> list[type]:
    below: list[type] = cls.__subclasses__()
    return below + [deeper for sub in below for deeper in _subclasses(sub)]


def _is_ours(cls: type) -> bool:
    return hasattr(methods, cls.__name__) and not cls.__name__.endswith("Method")


def explain(message: str, known_keys: Callable[[], list[str]], group: str = "model.init_args") -> str:
    """Shorten jsonargparse's message to what the user can act on.

    Args:
        message: The parser's message.
        known_keys: Returns every valid dotted key; asked if one is unknown, as it takes a second.
        group: The group of the model's options.

    Returns:
        One line; for an unknown key it names the nearest valid one.
    """
    text = " ".join(message.split())
    unknown = (
        re.search(r"[Uu]nrecognized arguments: --([\w.]+)", text)
        or re.search(r"[Kk]ey ['\"]([\w.]+)['\"] (?:is not expected|does not exist|not accepted)", text)
        or re.search(r"Option ['\"]([\w.]+)['\"] is not accepted", text)
        or re.search(r"(?:does not accept|not accept) (?:option|nested key) ['\"]([\w.]+)['\"]", text)
        or re.search(r"No action for key ['\"]([\w.]+)['\"]", text)
    )
    if not unknown:
        return plain(text)
    key = unknown.group(1)
    named = re.search(r"[Gg]roup ['\"]([\w.]+)['\"]", text)
    if named:
        key = f"{named.group(1)}.{key}"
    elif "." not in key:  # jsonargparse names options of the method without their group
        key = f"{group}.{key}"
    elif key.startswith("model.") and not key.startswith(f"{group}."):
        key = f"{group}.{key.removeprefix('model.')}"
    known = known_keys()
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not close:  # the right option under the wrong group
        close = [k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]][:1]
    hint = f"; did you mean `{close[0]}`?" if close else "; see --help for all options."
    return f"config key `{key}`: no such option{hint}"


def plain(message: str) -> str:
    """Return what jsonargparse's message says, without its account of every type that it has tried.

    Args:
        message: One line.

    Returns:
        ``option: what is wrong with it``, or the message if it has another form.
    """
    wrapped = re.match(r"(?:Parser key \"([\w.]+)\": )?(.*)", message)
    assert wrapped is not None
    if "numpy accepts" in message:  # Lightning's word for a seed
        return f"seed_everything: {message}."
    key, text = wrapped.groups()
    tried = re.search(r"Subtypes: \[(.*?)\] Errors: - (.*) Given value type: .*? Given value: (.*)$", text)
    if tried:
        types, reasons, value = tried.groups()
        own = [part for part in reasons.split(" - ") if not re.match(r"Expected a (<class|typing\.Literal|list)", part)]
        if own:
            inner = re.sub(r"^Problem with given class_path '[^']*': ", "", own[-1])
            if key == "model" and re.search("dot import path|has no attribute|Import path does not|No module", inner):
                known = sorted({cls.__name__ for cls in _subclasses(Method) if _is_ours(cls)})
                return f"model: there is no method {value.strip()}; the methods are {', '.join(known)}."
            return f"{key}: {inner}" if key and not inner.startswith("Parser key") else plain(inner)
        text = f"Expected a {types}. Got value: {value}"
    expected = re.fullmatch(r"Expected an? (.*?)\. Got value: (.*)", text)
    if expected:
        kinds = re.findall(r"(?:<class '|Annotated\[)(?:\w+\.)*(\w+)|Literal\[(.*?)\]", expected.group(1))
        names = [{"NoneType": "null", "str": "text"}.get(name, name) or choice for name, choice in kinds]
        text = f"expected {' or '.join(names) or expected.group(1)}, got {expected.group(2)}."
    return f"{key}: {text}" if key else text
