"""What can be wrong with a segmentation run: its config, its dataset, its numbers."""


class ConfigError(ValueError):
    """A config asks for what cannot be; the message names the key and says what to do."""


class DatasetError(ValueError):
    """The dataset cannot be used as configured; the message names the folder, file or key and says what to do."""


class DivergenceError(RuntimeError):
    """Training has left the finite numbers; the message says when, and what to try."""
