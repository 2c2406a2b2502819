"""The command line of a configuration: a flag for each of its fields."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import sys
import textwrap
import typing
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

from pipeline.config import ConfigError, PipelineConfig
from trainer.presets import PRESETS

_GROUPS = {
    "data": "what to train on",
    "model": "what to train, and how",
    "gate": "when to push the model",
    "places": "where things go",
    "running": "how to run",
    "cluster": "where it runs (Kubernetes)",
}


class _Parser(argparse.ArgumentParser):
    """Suggests the nearest flag for an unknown one."""

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            close = difflib.get_close_matches(unknown[1], flags, n=1)
            message = f"there is no flag {unknown[1]}"
            message += f"; did you mean {close[0]}?" if close else "; see --help."
        self.exit(2, f"error: {message}\n")


def _type_of(hint: Any) -> type:
    """The type behind an annotation, `float` for `float | None`."""
    if isinstance(hint, type):
        return hint
    return next(option for option in typing.get_args(hint) if option is not type(None))


def _presets() -> str:
    wrap = textwrap.TextWrapper(width=96, initial_indent="  ", subsequent_indent=" " * 16)
    return "\n".join(
        wrap.fill(f"{name:<12}  {preset.description}") for name, preset in PRESETS.items()
    )


def parse_args(arguments: Sequence[str]) -> PipelineConfig:
    """Reads the local runner's command line; see `parse`."""
    return parse(
        PipelineConfig,
        arguments,
        prog="python -m pipeline.local_runner",
        description="Trains a Vision Transformer on a folder of images and pushes it for TF "
        "Serving if it is good enough. Without flags: a public data set if it can be had, a "
        "training length that fits this machine.",
        epilog=f"presets:\n{_presets()}\n\n"
        "examples:\n"
        "  --preset tiny --limit 1000      a smoke test, a minute or two\n"
        "  --train_minutes 60              the default on a CPU, but six times as long\n"
        "  --preset notebook --epochs 20   the reference notebook\n"
        "  --data photos --work_dir /tmp/run\n",
    )


Config = TypeVar("Config", bound=PipelineConfig)


def parse(
    config_class: type[Config],
    arguments: Sequence[str],
    *,
    without: Sequence[str] = (),
    **about: str,
) -> Config:
    """Reads a command line.

    Args:
      config_class: Has a flag for each of its fields.
      arguments: The flags, without the program's name.
      without: Fields without a flag.
      **about: The program's `prog`, `description` and `epilog`.

    Returns:
      The configuration, checked.

    Raises:
      SystemExit: With code 2 and a message, for an unknown flag or an unusable value; with code 0
        for --help.
    """
    parser = _Parser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **about,  # type: ignore[arg-type]
    )
    groups = {key: parser.add_argument_group(text) for key, text in _GROUPS.items()}
    types = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if field.name in without:
            continue
        options = dict(field.metadata)
        group = groups[options.pop("group")]
        flag = f"--{field.name}"
        text = options.pop("help")
        kind = _type_of(types[field.name])
        if kind is bool and field.default:
            group.add_argument(
                f"--no_{field.name}", dest=field.name, action="store_false", help=f"do not {text}"
            )
            continue
        if kind is bool:
            group.add_argument(flag, action="store_true", help=text)
            continue
        if field.default not in (None, ()):
            text += f" (default: {options.pop('shown', field.default)})"
        group.add_argument(
            flag,
            default=None if field.default == () else field.default,
            help=text.replace("%", "%%"),
            **{"type": kind, **options},
        )
    try:
        values = vars(parser.parse_args(arguments))
        return config_class(**{**values, "set": tuple(values["set"] or ())})
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
