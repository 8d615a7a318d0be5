"""The error of everything that reads or writes checkpoints."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or does not fit the model; the message says which keys and what to do."""


def listing(keys: list[str], most: int = 6) -> str:
    """Return the first keys in words, and how many more there are."""
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")
