"""How a command names itself: ``nepa evaluate`` when it was called so, or else the file that it was started as."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import NoReturn


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with status 2."""
        say_usage_error(message)


def say_usage_error(message: str) -> NoReturn:
    """Print what is wrong with the options, in one line, and exit with status 2."""
    sys.stderr.write(f"error: {' '.join(message.split())} (--help lists the options)\n")
    sys.exit(2)


def program(command: str, args: Sequence[str] | None) -> str | None:
    """Return the ``prog`` of a parser.

    Args:
        command: Name of the sub-command.
        args: What its ``main`` was given: ``None`` if it reads ``sys.argv`` itself.
    """
    return None if args is None else f"nepa {command}"


def command_parser(command: str, doc: str | None, args: Sequence[str] | None) -> OneLineParser:
    """Return a parser whose help starts with the command's docstring; other arguments as for :func:`program`."""
    form = argparse.RawDescriptionHelpFormatter
    return OneLineParser(prog=program(command, args), description=doc, formatter_class=form)


def command_line(command: str, args: Sequence[str] | None) -> str:
    """Return the whole command as it can be typed again; arguments as for :func:`program`."""
    return shlex.join(["python", *sys.argv] if args is None else ["nepa", command, *args])
