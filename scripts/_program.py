"""Shared by the example scripts: arguments from the command line or a file, and mistakes in them as one line."""

import dataclasses
import logging
import os
import re
import sys
import typing
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from hf_sparse import load_plugin
from hf_sparse.cli.mistakes import MISTAKES, format_mistake, is_internal, print_mistake
from hf_sparse.import_hooks import hidden_package
from hf_sparse.registry import nearest


logger = logging.getLogger("scripts.program")

# YAML 1.1 reads 5e-5 as text (it requires 5.0e-5), and a learning rate that is text fails only during training.
_FLOAT_WITHOUT_POINT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
_FILES = (".json", ".yaml", ".yml")


@dataclass
class PluginArguments:
    """Plug-ins with methods of your own. They are loaded before the options of pruning are checked."""

    plugin: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Files (my_methods.py) or modules (my_package.methods) that register methods of your own.",
            "action": "extend",
        },
    )

    def __post_init__(self):
        for plugin in [self.plugin] if isinstance(self.plugin, str) else self.plugin:
            load_plugin(plugin)


def run_program(main: Callable[[list[str]], object], classes: tuple, argv: list[str] | None = None) -> None:
    """Runs a script with its command line. A mistake of the user is one line on stderr, with exit code 2, also where
    several processes make it.

    Args:
        main: of the script; it takes the arguments.
        classes: the dataclasses whose fields are the options of the script, for the names in messages.
        argv: arguments without the name of the program; `sys.argv[1:]` if None.
    """
    argv = sys.argv[1:] if argv is None else argv
    program = Path(sys.modules[main.__module__].__file__ or main.__module__).name
    try:
        # accelerate imports DeepSpeed wherever it is installed, which takes seconds and logs what it finds.
        with nullcontext() if _asks_for_deepspeed(argv) else hidden_package("deepspeed"):
            main(argv)
    except KeyboardInterrupt:
        sys.exit(130)
    except MISTAKES as error:
        if is_internal(error):
            raise
        logger.debug("the traceback of the error:", exc_info=True)
        fields = [each.name for cls in classes for each in dataclasses.fields(cls)]
        spelled = {} if _is_file(argv) else {name: f"--{name}" for name in fields}
        print_mistake(f"{program}: {format_mistake(error, spelled)}")
        sys.exit(2)


def _is_file(argv: list[str]) -> bool:
    return len(argv) == 1 and argv[0].endswith(_FILES)


def _asks_for_deepspeed(argv: list[str]) -> bool:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        return True
    is_file = _is_file(argv) and Path(argv[0]).is_file()
    return "deepspeed" in (Path(argv[0]).read_text(encoding="utf-8", errors="replace") if is_file else " ".join(argv))


class _Parser(HfArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        """Raises an error in place of printing hundreds of options."""
        # argparse names each option in both spellings, with underscores and with dashes.
        message = re.sub(r"^argument (--\w+)(/--[\w-]+)*", r"\1", message)
        raise ValueError(f"{message} (--help lists all options)")


def parse_args(dataclass_types: tuple, argv: list[str] | None = None) -> tuple:
    """Parses a command line, or the one .json or .yaml file that it names, into the given dataclasses.

    Adds the option `--plugin`, and `--no_X` for each boolean option X.

    Args:
        dataclass_types: the dataclasses, in the order in which their instances are returned.
        argv: arguments without the name of the program; `sys.argv[1:]` if None.

    Raises:
        ValueError, OSError: an option is unknown, lacks its value, or has one that is not allowed.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    classes = (PluginArguments, *dataclass_types)
    parser = _Parser(classes)
    names = [each.name for cls in classes for each in dataclasses.fields(cls) if each.init]
    if not _is_file(argv):
        _, *parsed, unknown = parser.parse_args_into_dataclasses(
            args=_expand_negations(argv, dataclass_types), return_remaining_strings=True
        )
        _refuse_unknown(unknown, [f"--{name}" for name in names])
        return tuple(parsed)
    values = _read_arguments(Path(argv[0]))
    _refuse_unknown(values.keys() - {*names}, names)
    hints = {name: kind for cls in classes for name, kind in typing.get_type_hints(cls).items()}
    _, *parsed = parser.parse_dict({name: _checked(name, value, hints[name]) for name, value in values.items()})
    return tuple(parsed)


def _read_arguments(path: Path) -> dict:
    """Returns the mapping in a file of arguments."""
    if not path.is_file():
        raise FileNotFoundError(f'argument file "{path}" does not exist.')
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is a subset of YAML
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f'argument file "{path}" cannot be read: {error}') from error
    if not isinstance(values, dict):
        raise ValueError(f'argument file "{path}" must hold one mapping of argument names to values.')
    return {str(name): value for name, value in values.items()}


def _refuse_unknown(given: Iterable[str], known: list[str]) -> None:
    given = list(given)
    options = [word.partition("=")[0] for word in given if word.startswith("--") or word in known] or given
    if options:
        option = options[0]
        spelled = f"--{option[2:].replace('-', '_')}" if option.startswith("--") else option
        raise ValueError(f"unknown option {option}.{nearest(spelled, known) or ' --help lists all options.'}")


def _expand_negations(argv: list[str], dataclass_types: tuple) -> list[str]:
    """Replaces `--no_X` and `--no-X` of boolean options by `--X false`.

    HfArgumentParser adds `--no_X` only where the default is True, and that of an option of pruning is None.
    """
    hints = [typing.get_type_hints(dataclass_type) for dataclass_type in dataclass_types]
    flags = {name for types in hints for name, kind in types.items() if kind in (bool, bool | None)}
    expanded = []
    for argument in argv:
        match = re.fullmatch(r"--no[-_]([\w-]+)", argument)
        name = match[1].replace("-", "_") if match else None
        expanded += [f"--{name}", "false"] if name in flags else [argument]
    return expanded


def _checked(name: str, value: typing.Any, hint: typing.Any) -> typing.Any:
    """Returns a value from a file, where a number, a flag or a text is expected as such."""
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)] or [hint]
    if isinstance(value, str) and str not in kinds and _FLOAT_WITHOUT_POINT.fullmatch(value):
        value = float(value)
    words = {int: "a whole number", float: "a number", bool: "true or false"}
    if value is None or len(kinds) != 1 or kinds[0] not in words:
        return value
    kind = kinds[0]
    is_valid = isinstance(value, bool) == (kind is bool) and isinstance(value, (int, float) if kind is float else kind)
    if not is_valid:
        raise ValueError(f"`{name}` is {value!r}: it must be {words[kind]}.")
    return value
