"""Downloading a large file: resumable, verified, and never half there under its own name."""

from __future__ import annotations

import http.client
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tqdm import tqdm

from dataset.files import make_folder, storage_error
from dataset.format import DataError
from dataset.hashing import md5_of

_ATTEMPTS = 4
_BLOCK = 1 << 18


@dataclass(frozen=True)
class RemoteArchive:
    """An archive on the web.

    Attributes:
      url: Its address.
      md5: Its published checksum, 32 hexadecimal digits.
    """

    url: str
    md5: str


# Source: https://www.cs.toronto.edu/~kriz/cifar.html, the table under "Download".
OFFICIAL_BINARY = RemoteArchive(
    "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"
)
# Of that archive, CIFAR-100's other one, and CIFAR-10's two.
OFFICIAL_MD5S = (
    OFFICIAL_BINARY.md5,
    "eb9058c3a382ffc7106e4002c42a8d85",
    "c32a1d4ab5d03f1284b67883e8d87530",
    "c58f30108f718f92721af3b95e74349a",
)


class UnreachableError(DataError):
    """There is no connection to the server, or it does not give the file out: nothing has come."""


class _BusyError(UnreachableError):
    """The server gives nothing out at the moment."""


class _InterruptedError(Exception):
    """The transfer broke off in a way that trying again may cure."""


def fetch(
    url: str,
    target: Path,
    md5: str,
    *,
    progress: bool = True,
    timeout: float = 30.0,
    backoff: float = 1.0,
) -> Path:
    """Downloads a file, or returns at once if it is there already.

    What has come so far is kept in `target.part`; an interrupted transfer goes on from there, in
    this call (three more attempts) or in a later one. A failure to connect at the beginning is not
    retried: offline, the answer should come quickly.

    Args:
      url: The file's address.
      target: Where to put it.
      md5: Its checksum, 32 hexadecimal digits.
      progress: Whether to draw a progress bar on a terminal (never drawn into a log).
      timeout: Seconds to wait for the connection, and for each block.
      backoff: Seconds before the first retry; doubled for each further one.

    Returns:
      `target`.

    Raises:
      UnreachableError: If the server cannot be reached or refuses, and nothing came in this call.
      StorageError: If the file cannot be written.
      DataError: If the transfer keeps breaking off (what has come is kept), or the content is not
        the expected one (it is removed then).
    """
    if target.is_file() and md5_of(target) == md5:
        return target
    make_folder(target.parent)
    part = target.with_name(target.name + ".part")
    began = False
    failure: Exception
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(backoff * 2 ** (attempt - 1))
        try:
            _transfer(url, part, progress=progress, timeout=timeout)
            break
        except _InterruptedError as error:
            began, failure = True, error
        except UnreachableError as error:
            # A server that was there a moment ago may be back soon.
            if not began and (attempt == _ATTEMPTS - 1 or not isinstance(error, _BusyError)):
                raise
            failure = error
    else:
        size = part.stat().st_size if part.exists() else 0
        raise DataError(
            f"downloading {url} broke off {_ATTEMPTS} times ({failure}); {size:,} bytes are kept "
            f"in {part}: run again to go on from there"
        )
    actual = md5_of(part)
    if actual != md5:
        size = part.stat().st_size
        part.unlink()
        raise DataError(
            f"wrong checksum: {url} gave {size:,} bytes with md5 {actual}, expected {md5}; the "
            "file was removed: run again, or if that repeats, look whether a proxy answers "
            "instead of the server, or get the file another way"
        )
    os.replace(part, target)
    return target


def _transfer(url: str, part: Path, *, progress: bool, timeout: float) -> None:
    """Adds to `part` what is missing of it."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing lies beyond what we have: it is whole, or another file's
            whole = error.headers.get("Content-Range", "").rpartition("/")[2]
            if whole == str(have):
                return
            part.unlink()
            raise _InterruptedError("the part kept did not fit the file") from None
        if error.code == 429 or error.code >= 500:
            raise _BusyError(f"cannot download {url}: HTTP {error.code} {error.reason}") from None
        raise UnreachableError(f"cannot download {url}: HTTP {error.code} {error.reason}") from None
    except (urllib.error.URLError, OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise UnreachableError(
            f"cannot download {url}: {reason}: check the network and the proxy settings "
            "(https_proxy)"
        ) from None
    with response:
        resumed = response.status == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink()
            raise _InterruptedError("the server went on from another place than asked")
        have = have if resumed else 0  # a server that ignores Range starts from the beginning
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        try:
            file = open(part, "ab" if resumed else "wb")
        except OSError as error:
            raise storage_error(error, part) from None
        bar = tqdm(
            desc=part.name.removesuffix(".part"),
            initial=have,
            total=total,
            unit="B",
            unit_scale=True,
            unit_divisor=1000,
            disable=None if progress else True,  # None: only on a terminal
        )
        with bar, file:
            have += _copy(response, file, part, bar)
    if total is not None and have < total:
        raise _InterruptedError(f"the connection closed after {have:,} of {total:,} bytes")


def _copy(response: http.client.HTTPResponse, file: IO[bytes], part: Path, bar: tqdm) -> int:
    """Copies the response's body to the file and returns the number of bytes."""
    count = 0
    while True:
        try:
            block = response.read(_BLOCK)
        except (OSError, http.client.HTTPException) as error:
            raise _InterruptedError(str(error) or type(error).__name__) from None
        if not block:
            return count
        try:
            file.write(block)
            file.flush()
        except OSError as error:
            raise storage_error(error, part) from None
        count += len(block)
        bar.update(len(block))
