#!/usr/bin/env python3
"""Lists the recipes that come with the program, which --config finds by name; of one, its text.

    python tools/list_recipes.py [NAME]

A recipe of one's own need only say what it changes: `based_on: base` and a line for each field.
"""

from __future__ import annotations

import re
import sys
import textwrap
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from itertools import takewhile

from beit3_dist.command_line import refusing
from beit3_dist.recipe import recipe_texts, shipped_recipes

PROGRAM = "list_recipes.py"
WIDTH = 119


def about(text: str) -> str:
    """The first sentence of the comment that a recipe begins with."""
    comment = " ".join(line.strip("# ") for line in takewhile(lambda line: line.startswith("#"), text.split("\n")))
    return re.split(r"(?<=\.) (?=[A-Z])", comment)[0]


def main(arguments: Sequence[str]) -> None:
    parser = ArgumentParser(prog=PROGRAM, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", metavar="NAME", help="the recipe to print, with those that it is based on")
    options = parser.parse_args(list(arguments))
    with refusing(PROGRAM):
        if options.name:
            print("\n".join(f"# {path.name}\n{text}" for path, text in recipe_texts(options.name)), end="")
            return
        texts = {name: recipe_texts(name)[-1][1] for name in shipped_recipes()}
    width = max(map(len, texts))
    for name, text in texts.items():
        print(f"{name:{width}}  {textwrap.shorten(about(text), WIDTH - width, placeholder=' ...')}")


if __name__ == "__main__":
    main(sys.argv[1:])
