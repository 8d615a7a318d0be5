"""What a command says when it refuses its input."""

import pytest


def refusal(capsys, call, *args, status=2):
    """Call a command that must end with this status, and return its one line on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        call(*args)
    said = capsys.readouterr().err
    assert end.value.code == status, said
    assert said.startswith("error: ") and said.endswith("\n") and said.count("\n") == 1, said
    return said.rstrip("\n")
