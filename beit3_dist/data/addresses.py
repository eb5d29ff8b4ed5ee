"""Images at an address, file:// or https://, for a model in use; shards at one are data/streaming.py's."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    UnknownHandler,
    url2pathname,
)

from beit3_dist.data.faults import check_size

TIMEOUT_S = 30.0
"""For each answer of a server."""


def is_address(text: str) -> bool:
    """Whether a text is an address and no path."""
    return re.match(r"[a-z][a-z0-9+.-]*://", text, re.IGNORECASE) is not None


def local_file(address: str) -> Path | None:
    """The file of a file:// address; None for any other. Raises ValueError where it lies on another machine."""
    parts = urlsplit(address)
    if parts.scheme != "file":
        return None
    if parts.netloc not in ("", "localhost"):
        raise ValueError(f"{address}: a file:// address names no other machine than this one")
    return Path(url2pathname(parts.path))


def fetched(address: str, most: int) -> bytes:
    """What an https:// address holds, no more than `most` bytes of it.

    The server's certificate is checked, and it may lead on to https:// addresses alone. Raises OSError where it does
    not answer, ValueError for other addresses, BadSample for more bytes.
    """
    if urlsplit(address).scheme != "https":
        raise ValueError(f"{address}: images are read from files, file:// and https:// alone")
    try:
        with _opener().open(address, timeout=TIMEOUT_S) as answer:
            data = answer.read(most + 1)
    except URLError as error:
        raise OSError(f"{address} cannot be read: {error}") from None
    check_size("an image", len(data), most)
    return data


@cache
def _opener() -> OpenerDirector:
    opener = OpenerDirector()
    for handler in (ProxyHandler, UnknownHandler, HTTPSHandler, HTTPRedirectHandler, HTTPDefaultErrorHandler,
                    HTTPErrorProcessor):  # fmt: skip
        opener.add_handler(handler())
    return opener
