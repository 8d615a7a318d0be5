"""The error of images that cannot be used."""


class DataError(ValueError):
    """The images cannot be used; the message names the file or folder and says what to do."""
