"""Where shards may come from: local files by absolute path, web addresses, and commands only if that is allowed."""

import os
import re
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

from nepa_plugin.data.errors import DataError

#: Addresses that webdataset opens itself, by curl and gsutil.
SCHEMES = ("http", "https", "gs")
#: The most shards that a pattern may stand for.
MAX_SHARDS = 1_000_000
#: A tar file in a command.
_TAR = r"[^/\s]+\.tar\b"


def import_webdataset() -> Any:
    """Return webdataset, which is an extra.

    Raises:
        DataError: If it is not installed.
    """
    try:
        import webdataset
    except ModuleNotFoundError as error:
        raise DataError("Shards need the webdataset package: pip install 'nepa-plugin[shards]'.") from error
    return webdataset


def is_local(url: str) -> bool:
    """Whether one of :func:`shard_urls` is a local file: those have absolute paths, which no scheme begins with."""
    return os.path.isabs(url)


def shard_name(url: str) -> str:
    """Return the file name of a shard in a path, a URL or a command."""
    if is_local(url):
        return os.path.basename(url)
    if not url.startswith("pipe:"):
        return os.path.basename(urlsplit(url).path) or url
    match = re.search(_TAR, url)
    return match.group() if match else url


def beside(url: str, name: str) -> str:
    """Return where the file ``name`` beside a shard is."""
    if is_local(url):
        return os.path.join(os.path.dirname(url), name)
    if url.startswith("pipe:"):
        return re.sub(_TAR, name, url)
    at = url.rfind(shard_name(url))
    return url[:at] + name + url[at + len(shard_name(url)) :]


def shard_urls(source: str, allow_pipe: bool = False) -> list[str]:
    """Return the shards that a folder, pattern, URL or ``pipe:`` command stands for.

    webdataset would run whatever begins with ``pipe:`` in a shell, a relative folder of that name included. So what is
    there as a file or folder is taken for one, by its absolute path, and all else must be of a known scheme.

    Args:
        source: A folder of ``.tar`` files, or a pattern in which ``{000..146}`` stands for numbers; several of them
            with ``::`` between.
        allow_pipe: Whether ``pipe:`` commands may be run.

    Returns:
        Absolute paths, URLs or commands; no two of the same file name.

    Raises:
        DataError: If there is none, too many or one twice, a local one is missing, or a scheme is not allowed.
    """
    import_webdataset()
    if not source or "\0" in source:
        raise DataError("data.train_shards: give a folder of .tar files, or a pattern of paths or URLs.")
    if os.path.isdir(source):
        folder = os.path.abspath(source)
        found = [path for path in sorted(os.listdir(folder)) if path.endswith(".tar")]
        urls = [os.path.join(folder, name) for name in found]
    else:
        urls = [_checked(url, allow_pipe) for part in source.split("::") for url in _expand(part)]
    if not urls:
        raise DataError(f"data.train_shards: {source} holds no .tar file. tools/make_shards.py packs an image folder.")
    missing = [url for url in urls if is_local(url) and not os.path.isfile(url)]  # a pipe or a dead link, too
    if missing:
        raise DataError(f"data.train_shards: {len(missing)} of {len(urls)} shard(s) are missing, first {missing[0]}.")
    names: set[str] = set()
    for url in urls:
        if shard_name(url) in names:
            raise DataError(
                f"data.train_shards: two shards are called {shard_name(url)}, which their index cannot tell apart."
            )
        names.add(shard_name(url))
    return urls


def _expand(pattern: str) -> list[str]:
    if os.path.exists(pattern):
        return [pattern]
    from braceexpand import braceexpand  # webdataset's

    if _count(pattern) > MAX_SHARDS:
        raise DataError(f"data.train_shards: {pattern} stands for more than {MAX_SHARDS:,} shards.")
    try:
        return list(islice(braceexpand(pattern), MAX_SHARDS))
    except ValueError as error:
        raise DataError(f"data.train_shards: the braces of {pattern} are no pattern: {error}.") from error


def _count(pattern: str) -> int:
    """Return an upper bound of what a pattern stands for, without expanding it: the product over all its braces."""
    count, group = 1, re.compile(r"\{([^{}]*)\}")
    while match := group.search(pattern):
        span = re.fullmatch(r"(-?\d{1,30})\.\.(-?\d{1,30})(?:\.\.-?\d+)?", match[1])
        if span:
            count *= abs(int(span[2]) - int(span[1])) + 1
        elif ".." in match[1]:  # of letters, or of numbers with more digits than that
            count *= 128 if len(match[1]) < 16 else MAX_SHARDS + 1
        else:
            count *= match[1].count(",") + 1
        pattern = pattern[: match.start()] + pattern[match.end() :]
    return count


def _checked(url: str, allow_pipe: bool) -> str:
    if os.path.exists(url):
        return os.path.abspath(url)
    if url.startswith("pipe:"):
        if not allow_pipe:
            raise DataError(
                f"data.train_shards: {url} is a shell command. --data.allow_pipe true runs it; a local file of that "
                "name needs its whole path."
            )
        return url
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", url)
    if scheme is None:
        return os.path.abspath(url)
    if scheme[1].lower() not in SCHEMES or not urlsplit(url).netloc:
        raise DataError(
            f"data.train_shards: {url} is no file, and of the addresses only {', '.join(SCHEMES)}://HOST/... are read. "
            "For others, --data.allow_pipe true allows commands, such as 'pipe:aws s3 cp s3://BUCKET/x.tar -'."
        )
    return url
