"""From a recipe and dotted overrides on the command line to a typed config; mistakes to one line and exit code 2."""

from __future__ import annotations

import argparse
import gc
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, replace
from io import StringIO
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import (
    SUPPRESS,
    ActionConfigFile,
    ArgumentError,
    ArgumentParser,
    DefaultHelpFormatter,
    Namespace,
    set_parsing_settings,
)

from beit3_dist.launched import rank, take_place
from beit3_dist.leaving import ExitCode, interrupted, leave_when_asked
from beit3_dist.opening import one_line
from beit3_dist.plugins import load_plugins
from beit3_dist.recipe import current_name, fields_in, recipe_texts

Config = TypeVar("Config")


def is_first_process() -> bool:
    """Whether this process speaks for the run; one that no launcher has started always does."""
    return rank() == 0


def refuse(program: str, error: BaseException | str) -> NoReturn:
    """Ends the process for a mistake of the user's; the first process prints the error as one line."""
    if is_first_process():
        print(f"{program}: error: {one_line(error)}", file=sys.stderr, flush=True)
    sys.exit(ExitCode.MISTAKE)


@contextmanager
def refusing(program: str) -> Iterator[None]:
    """Inside, a ValueError or an OSError is a mistake of the user's: `refuse`. Ctrl-C is one line, too."""
    try:
        yield
    except (ValueError, OSError) as error:
        refuse(program, error)
    except KeyboardInterrupt:
        sys.exit(interrupted(program))


def begin(program: str) -> None:
    """What every program of launchers/ does first: from here on a signal to go ends the process in order, and `rank`
    is its rank in the run. Variables that no launcher sets like this end the process with one line."""
    leave_when_asked(program)
    try:
        take_place()
    except ValueError as error:
        refuse(program, error)


@contextmanager
def importing() -> Iterator[None]:
    """For the imports that take seconds: torch, DeepSpeed. A program names its mistakes before them. Without garbage
    collection, which would search again and again what they leave, and that stays: a quarter of their time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def log_to_console() -> None:
    """Shows the package's messages (progress of an index, warnings) on standard error, in the first process only."""
    log = logging.getLogger("beit3_dist")
    log.setLevel(logging.INFO)
    log.addHandler(logging.StreamHandler() if is_first_process() else logging.NullHandler())


@dataclass(frozen=True)
class Sections:
    """Sections `FIELD.NAME` of a config that plugins can add to. A recipe or a command line that names one wants it."""

    field: str
    classes: Callable[[], Mapping[str, type]]
    """Name -> dataclass of the section, once the plugins are imported."""
    default: str
    """The section of a config that names none."""

    def named(self, recipes: Iterable[Mapping[str, Any]], arguments: Sequence[str]) -> list[str]:
        """The sections that are wanted."""
        in_recipes = [name for recipe in recipes for name in recipe.get(self.field) or ()]
        return in_recipes + [a.split(".")[1].split("=")[0] for a in arguments if a.startswith(f"--{self.field}.")]

    def check(self, named: Iterable[str]) -> None:
        """Raises ValueError for a section that there is not."""
        for name in named:
            if name not in self.classes():
                raise ValueError(
                    f"{self.field}.{name}: there is no {name}, only {', '.join(self.classes())}; the file that defines "
                    "another one is named by plugins"
                )


class _Help(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Descriptions keep their lines, of which some are commands."""


class _Recipe(ActionConfigFile):
    """--config FILE: the fields of a file that was checked as a whole; it is named with what is wrong in them."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        for path, text in parser.recipe_texts[values]:
            try:
                super().__call__(parser, cfg, text, option_string)
                parser.validate(cfg, skip_required=True)  # what the command line has given so far is known to be right
            except (ArgumentError, TypeError, ValueError, KeyError) as error:
                raise ValueError(f"the recipe {path}: {error}") from None


def configured(
    config_class: Callable[..., Config],
    program: str,
    description: str,
    arguments: Sequence[str],
    sections: Sections | None = None,
    trusted: bool = True,
) -> Config:
    """The config that `--config RECIPE.yaml` and `--a.b VALUE` describe.

    `config_class` is a (nested) dataclass whose docstrings become the help. Raises ValueError for unknown keys, wrong
    types and what its `__post_init__` refuses. `--print_config` prints the resolved config and exits. `trusted`: the
    plugins that the recipe names are imported, and not only those of the command line.
    """
    # Reading what fields' docstrings say takes as long as all else here.
    set_parsing_settings(docstring_parse_attribute_docstrings=any(a in ("-h", "--help") for a in arguments))
    arguments = [f"--{current_name(a[2:])}" if a.startswith("--") else a for a in arguments]
    # Under a launcher every process parses; the first one's --help and --print_config are enough.
    terminal = nullcontext() if is_first_process() else redirect_stdout(StringIO())
    try:
        early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        for option in ("--config", "--plugins"):
            early.add_argument(option, action="append", default=[])
        files, _ = early.parse_known_args(arguments)
        texts = {path: recipe_texts(path) for path in files.config}
        recipes = {path: fields_in(some) for path, some in texts.items()}
        of_recipes = [recipe.get("plugins", []) for recipe in recipes.values() if trusted]
        for plugins in (*of_recipes, *map(yaml.safe_load, files.plugins)):
            load_plugins([plugins] if isinstance(plugins, str) else plugins)
        parser = ArgumentParser(
            prog=program,
            description=description,
            formatter_class=_Help,
            exit_on_error=False,
            usage=f"{program} --config RECIPE.yaml [--field VALUE ...] [--print_config] [--help]",
        )
        about = "a YAML file with any of the fields below, or the name of a recipe that comes with the program"
        parser.add_argument("--config", action=_Recipe, help=about)
        parser.add_argument("--local_rank", "--local-rank", type=int, default=SUPPRESS, help=SUPPRESS)  # of launchers
        parser.add_class_arguments(config_class, skip={sections.field} if sections else set())
        for path, recipe in recipes.items():
            for name, value in recipe.items():
                if name in (parser.groups or {}) and not isinstance(value, dict):
                    raise ValueError(f"the recipe {path}: {name} is a section of fields, not {value!r}")
        setattr(parser, "recipe_texts", texts)  # noqa: B010 (for _Recipe)
        named = sections.named(recipes.values(), arguments) if sections else []
        # Sections are classes beside code that needs torch: whoever names none is told of a typo seconds earlier.
        if sections and (named or any(a in ("-h", "--help") or a.startswith("--print_config") for a in arguments)):
            sections.check(named)
            for name, section in sections.classes().items():
                parser.add_class_arguments(section, f"{sections.field}.{name}")
        with terminal:
            values = parser.instantiate(parser.parse_args(arguments))
        fields = {name: value for name, value in vars(values).items() if name not in ("config", "local_rank")}
        if sections is None:
            return config_class(**fields)
        given = vars(fields.pop(sections.field, Namespace()))
        config: Any = config_class(**fields)
        chosen = {name: given[name] for name in given if name in named}
        chosen = chosen or {sections.default: sections.classes()[sections.default]()}
        return replace(config, **{sections.field: chosen})
    except (ArgumentError, TypeError) as error:
        raise ValueError(str(error)) from error


def parse(
    config_class: Callable[..., Config],
    program: str,
    description: str,
    arguments: Sequence[str],
    sections: Sections | None = None,
    trusted: bool = True,
) -> Config:
    """As `configured`, for a program: a mistake ends the process through `refuse`."""
    try:
        return configured(config_class, program, description, arguments, sections, trusted)
    except ValueError as error:
        refuse(program, error)


def to_yaml(config: Any) -> str:
    """The resolved config as a recipe."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)
