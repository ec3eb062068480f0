"""The options of `serve` on both command lines: every field of ServerOptions is one, of the same name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ByteSize

from furiosa_build.ir.engine_options import description, plain_type
from furiosa_build.server.options import ServerOptions, from_command_line

_NAMES: dict[Any, str] = {ByteSize: "size", list[str]: "str,..."}
"""What types of values are called in the help, if not by their own names."""
_FILE = typer.Option(metavar="FILE", help="YAML file with the names of these options as keys.")


def with_server_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for every field of its argument `options: ServerOptions`, and for a file of them."""

    def with_options(server_config: Path | None, **given: Any) -> None:
        texts = {name: value for name in ServerOptions.model_fields if (value := given.pop(name)) is not None}
        command(**given, options=from_command_line(texts, server_config))

    signature = inspect.signature(command, eval_str=True)
    own = [parameter for parameter in signature.parameters.values() if parameter.name != "options"]
    parameters = [
        *own,
        _parameter("server_config", Annotated[Path | None, _FILE]),
        *map(_option, ServerOptions.model_fields),
    ]
    with_options.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    with_options.__name__, with_options.__doc__ = command.__name__, command.__doc__
    return with_options


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _option(name: str) -> inspect.Parameter:
    """An option that takes a text, as pydantic reads it; None: not given."""
    field = ServerOptions.model_fields[name]
    text = field.description or description(field.annotation)
    default = "" if field.default in (None, "", []) else f" (default: {field.default})"
    value = _NAMES.get(field.annotation) or plain_type(field.annotation).__name__
    return _parameter(name, Annotated[str | None, typer.Option(metavar=f"<{value}>", help=text + default)])
