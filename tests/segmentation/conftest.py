import contextlib

import pytest


@pytest.fixture(autouse=True)
def lines_of_configs_as_they_are(request, monkeypatch):
    """A config's lines are broken where they read best, for a third of a second and several times in every run."""
    with contextlib.suppress(ImportError):
        import mmengine.config.config as config

        if request.path.stem != "test_mmseg_configs":
            monkeypatch.setattr(config, "FormatCode", lambda text, **_: (text, True))
