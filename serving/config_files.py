"""Writes TF Serving's configuration files; `serving.server.config` reads them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from google.protobuf import text_format
from google.protobuf.message import Message

from serving.server.config import ConfigError


def write(
    message: Message, path: str | os.PathLike[str], *, comment: str = "", mode: int | None = None
) -> None:
    """Writes a text proto; a server that polls the file sees the old or the new one, whole.

    Args:
      message: What to write.
      path: The file, which is replaced.
      comment: Lines to put on top of it.
      mode: The file's permissions; default: those it has, 0644 for a new one.

    Raises:
      ConfigError: The file cannot be written.
    """
    target = Path(path)
    text = "".join(f"# {line}".rstrip() + "\n" for line in comment.splitlines())
    text += text_format.MessageToString(message)
    try:
        if mode is None:
            mode = target.stat().st_mode & 0o777 if target.exists() else 0o644
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(name, mode)
            os.replace(name, target)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}.") from error
