"""Says which versions of a model TF Serving serves, and which of them are `stable` and `canary`.

    python -m serving.versions serving/config/models.config            # what is there
    python -m serving.versions models.config load 1795611313           # serve this one, too
    python -m serving.versions models.config label stable=1795524913 canary=latest
    python -m serving.versions models.config promote                   # the canary becomes stable
    python -m serving.versions models.config rollback                  # stable goes back a version

It edits TF Serving's models file, which the server polls (--model_config_file_poll_wait_seconds).
A label moves only to a version that is loaded already, as TF Serving demands (it would refuse the
whole file): hence `load` comes first; versions stay loaded until another `load` leaves them out.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tensorflow_serving.config import model_server_config_pb2

from serving import config_files
from serving.server.config import ConfigError, read_text_proto

STABLE, CANARY = "stable", "canary"
_COMMENT = (
    """Written by `python -m serving.versions`; serving/config/models.config says what is in it."""
)


class VersionError(ValueError):
    """What was asked for cannot be; the message says why and what to do."""


def on_disk(base_path: Path) -> list[int]:
    """Lists the versions that have been pushed, in increasing order.

    Args:
      base_path: A TF Serving model base path. Folders that are being written, whose names are no
        numbers, do not count.

    Raises:
      VersionError: There is no such folder.
    """
    if not base_path.is_dir():
        raise VersionError(
            f"{base_path} is no folder: name the one that models are pushed to with --base_path."
        )
    folders = (path.parent for path in base_path.glob("*/saved_model.pb"))
    return sorted(int(folder.name) for folder in folders if folder.name.isdecimal())


def served(model: Any, available: Sequence[int]) -> list[int]:
    """Lists the versions that a server loads, in increasing order.

    Args:
      model: A ModelConfig.
      available: The versions on disk, in increasing order.
    """
    policy = model.model_version_policy
    kind = policy.WhichOneof("policy_choice")
    if kind == "specific":
        return sorted(set(policy.specific.versions) & set(available))
    if kind == "all":
        return list(available)
    return list(available)[-max(policy.latest.num_versions, 1) :]


def load(model: Any, available: Sequence[int], versions: Sequence[int]) -> None:
    """Has the labelled versions and these served, and no others.

    Raises:
      VersionError: One of them is not on disk.
    """
    wanted = sorted({*model.version_labels.values(), *versions})
    if not wanted:
        raise VersionError("name the versions to load: nothing is labelled, and none was given.")
    for version in wanted:
        if version not in available:
            raise VersionError(
                f"version {version} is not on disk; there are: {_join(available)}. "
                "Name one of these, or move the label that points to it."
            )
    model.model_version_policy.Clear()
    model.model_version_policy.specific.versions.extend(wanted)


def label(model: Any, available: Sequence[int], labels: dict[str, int | None]) -> None:
    """Points labels to versions; what is served stays as it is, and is spelt out.

    Args:
      model: The ModelConfig to change.
      available: The versions on disk, in increasing order.
      labels: The version of each label, or None to remove it.

    Raises:
      VersionError: A version is not among those that are loaded.
    """
    loaded = served(model, available)
    for name, version in labels.items():
        if version is None:
            model.version_labels.pop(name, None)
        elif version not in loaded:
            raise VersionError(
                f"{name} cannot point to version {version}, which is not loaded; loaded are: "
                f"{_join(loaded)}. First `load {version}`, and wait for the server to load it."
            )
        else:
            model.version_labels[name] = version
    load(model, available, loaded)


def promote(model: Any, available: Sequence[int]) -> None:
    """Makes the canary the stable version; the old one stays loaded, to roll back to.

    Raises:
      VersionError: There is no canary.
    """
    if CANARY not in model.version_labels:
        raise VersionError("there is no canary: `label canary=VERSION` first.")
    label(model, available, {STABLE: model.version_labels[CANARY]})


def rollback(model: Any, available: Sequence[int]) -> None:
    """Moves `stable` to the version before it, and takes the canary label away.

    Raises:
      VersionError: There is no stable version, or none before it is loaded.
    """
    if STABLE not in model.version_labels:
        raise VersionError("no version is stable: `label stable=VERSION` first.")
    current = model.version_labels[STABLE]
    earlier = [version for version in served(model, available) if version < current]
    if not earlier:
        older = [version for version in available if version < current]
        remedy = (
            f"`load {older[-1]}`, wait for the server to load it, and repeat this."
            if older
            else "There is none on disk either."
        )
        raise VersionError(f"no version before {current} is loaded. {remedy}")
    label(model, available, {STABLE: earlier[-1], CANARY: None})


def find_model(config: Any, name: str | None) -> Any:
    """Finds a model in a ModelServerConfig: the only one, or the one of this name.

    Raises:
      VersionError: There is none, or there are several and no name was given.
    """
    models = config.model_config_list.config
    chosen = [model for model in models if name in (None, model.name)]
    if len(chosen) != 1:
        names = ", ".join(model.name for model in models) or "none"
        raise VersionError(f"name one model with --model; the file has: {names}.")
    return chosen[0]


def describe(model: Any, available: Sequence[int]) -> str:
    """A line for each version: its number, whether it is served, its labels."""
    loaded = served(model, available)
    lines = []
    for version in sorted({*available, *model.version_labels.values()}):
        labels = [name for name, number in model.version_labels.items() if number == version]
        state = "served" if version in loaded else "not served"
        state = state if version in available else "missing on disk"
        lines.append(f"{version}  {state:<15}  {' '.join(sorted(labels))}".rstrip())
    return "\n".join(lines) or "no version has been pushed"


def _join(versions: Sequence[int]) -> str:
    return ", ".join(map(str, versions)) or "none"


def _parse_labels(texts: Sequence[str], available: Sequence[int]) -> dict[str, int | None]:
    labels: dict[str, int | None] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        # TF Serving's REST paths take no other characters in a label.
        if not equals or not re.fullmatch("[A-Za-z0-9_]+", name):
            raise VersionError(f"{text!r} is not understood: use LABEL=VERSION, or LABEL= .")
        if value == "latest" and available:
            labels[name] = available[-1]
        elif value == "" or value.isdecimal():
            labels[name] = int(value) if value else None
        else:
            raise VersionError(f"{text!r}: a version is a number; on disk are: {_join(available)}.")
    return labels


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; exits with code 2 and a message where something cannot be done."""
    parser = argparse.ArgumentParser(
        prog="python -m serving.versions",
        description="Which versions of a model TF Serving serves, and which are stable and canary.",
    )
    parser.add_argument("config", type=Path, help="TF Serving's models file, which is rewritten")
    parser.add_argument("--model", help="the model's name, if the file has several")
    parser.add_argument(
        "--base_path", type=Path, help="where the versions are, if not at the file's base_path"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("show", help="list the versions (this is the default)")
    loader = commands.add_parser("load", help="serve the labelled versions and these, no others")
    loader.add_argument("versions", type=int, nargs="*", metavar="VERSION")
    labeller = commands.add_parser("label", help="point labels to versions")
    labeller.add_argument(
        "labels", nargs="+", metavar="LABEL=VERSION", help="VERSION may be `latest`, or nothing"
    )
    commands.add_parser("promote", help="make the canary stable")
    commands.add_parser("rollback", help="move stable to the version before it")
    args = parser.parse_args(arguments)
    try:
        config = read_text_proto(args.config, model_server_config_pb2.ModelServerConfig())
        model = find_model(config, args.model)
        available = on_disk(args.base_path or Path(model.base_path))
        changes: dict[str, Callable[[], None]] = {
            "load": lambda: load(model, available, args.versions),
            "label": lambda: label(model, available, _parse_labels(args.labels, available)),
            "promote": lambda: promote(model, available),
            "rollback": lambda: rollback(model, available),
        }
        if args.command in changes:
            changes[args.command]()
            config_files.write(config, args.config, comment=_COMMENT)
    except (VersionError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(describe(model, available))


if __name__ == "__main__":
    main()
