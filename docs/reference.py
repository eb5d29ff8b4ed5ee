"""Pages of the site that the code writes: every command with its help, and what is for Python.

A hook of mkdocs: the pages are made when the site is built and lie nowhere else, so that they cannot grow old.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from beit3_dist import __main__ as command

PUBLIC = {
    "A run from Python": ("beit3_dist", ["read_config", "pretrain", "RunConfig"]),
    "A model in use": ("beit3_dist.inference", ["Model"]),
    "An objective of one's own": ("beit3_dist.objectives.base", ["Objective"]),
    "A downstream task of one's own": ("beit3_dist.tasks.base", ["Task"]),
}
"""Heading -> module, and what it has for others."""


OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)\)")
"""A link of a page to a file of the repository beside docs/, as it also serves readers of the folder."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages to those of the folder, and the files of the repository that these link to."""
    for name, text in {"commands": commands(), "python": python()}.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    pages = Path(config.docs_dir)
    for name in {name for page in pages.glob("*.md") for name in OUTSIDE.findall(page.read_text())}:
        files.append(File.generated(config, name, abs_src_path=str(pages.parent / name)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The files beside docs/ lie in the site itself."""
    return OUTSIDE.sub(r"](\1)", markdown)


def commands() -> str:
    """Every command of `beit3`, in its groups, with what its --help prints."""
    os.environ["COLUMNS"] = "100"  # argparse's width
    page = ["# Commands\n", "`beit3 COMMAND --help` prints the same.\n"]
    for group, programs in command.PROGRAMS.items():
        page.append(f"## {group}\n")
        for name, (_, summary) in programs.items():
            words = help_of(name)
            page.append(f"### beit3 {name}\n\n{summary[0].upper()}{summary[1:]}.\n\n```text\n{words}```\n")
            usage, *_ = words.split("\n\n")
            for part in PART.findall(words) if usage.endswith("...") else ():
                page.append(f"#### beit3 {name} {part}\n\n```text\n{help_of(name, part)}```\n")
    return "\n".join(page)


PART = re.compile(r"^    ([a-z]\w*)(?=  +\w|$)", re.MULTILINE)
"""A command of a command, as argparse lists those of a program whose usage ends in "..."."""


def help_of(*names: str) -> str:
    """What `beit3 NAMES --help` prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        command.main([*names, "--help"])
    return printed.getvalue()


def python() -> str:
    """Signatures and docstrings of what PUBLIC names."""
    page = ["# Python\n"]
    for heading, (module, names) in PUBLIC.items():
        page.append(f"## {heading}\n")
        for name in names:
            page += described(f"{module}.{name}", getattr(import_module(module), name), "###")
    return "\n".join(page)


def described(name: str, thing: Any, level: str) -> Iterator[str]:
    """A function, or a class and its public methods with a docstring. The fields of a config are in the commands' help,
    and not said again."""
    yield f"{level} {name}\n"
    if not hasattr(thing, "__dataclass_fields__"):
        signature = str(inspect.signature(thing)).replace("'", "")
        yield f"```python\n{name.rpartition('.')[2]}{signature}\n```\n"
    yield f"{inspect.getdoc(thing)}\n"
    if inspect.isclass(thing):
        for method, function in vars(thing).items():
            if not method.startswith("_") and callable(getattr(thing, method)) and inspect.getdoc(function):
                yield from described(f"{name.rpartition('.')[2]}.{method}", getattr(thing, method), level + "#")
