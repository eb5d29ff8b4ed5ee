"""The same runs from a script or a notebook, in its own process.

    from beit3_dist import Model, pretrain, read_config

    config = read_config("demo", out="runs/mine", steps=100, data={"pairs": "pairs/*.tar"})
    folder = pretrain(config, on_step=lambda record: print(record["step"], record["loss"]))

What a launcher would end its process for is raised here: ValueError for a mistake, RunStopped where the run ends
itself, KeyboardInterrupt; `checkpoint={"resume": "auto"}` goes on. A script whose run has loader processes
(data.workers) begins under `if __name__ == "__main__":`, which Python wants of every program that starts some; a
notebook need not.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from beit3_dist.command_line import configured, importing
from beit3_dist.config import RunConfig, require
from beit3_dist.launched import take_place
from beit3_dist.leaving import SIGNALS
from beit3_dist.objectives import SECTIONS
from beit3_dist.opening import one_line
from beit3_dist.plugins import load_plugins


def read_config(recipe: str | Path, **fields: Any) -> RunConfig:
    """The config of a recipe, a file or the name of one that comes with the program, with these fields changed:
    sections are dictionaries. Raises ValueError with one line that names what is wrong."""
    options = [f"--{name}={_written(name, value)}" for name, value in _dotted(fields)]
    try:
        return configured(RunConfig, "read_config", "", ["--config", str(recipe), *options], SECTIONS)
    except ValueError as error:
        raise ValueError(one_line(error)) from error


def _dotted(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, Mapping) and value:
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _written(name: str, value: Any) -> str:
    """A field's value as a command line gives it. Raises ValueError for what no recipe can hold."""
    try:
        return str(value) if isinstance(value, str | Path) else json.dumps(value, default=_plain)
    except (AttributeError, TypeError, ValueError):
        kinds = "a number, a text, or lists and dictionaries of these"
        raise ValueError(f"{name}={value!r}: a recipe holds no {type(value).__name__}; give {kinds}") from None


def _plain(value: Any) -> Any:
    """A path, or a number of NumPy or torch, as JSON has it."""
    return str(value) if isinstance(value, Path) else value.item()


def pretrain(
    config: RunConfig,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    on_validation: Callable[[dict[str, Any]], None] | None = None,
    on_save: Callable[[Path], None] | None = None,
) -> Path:
    """Pretrains as launchers/pretrain.py does, in this process, and gives the run's folder. The functions are called
    after those of `config.callbacks`, which says with what. Raises as the module describes."""
    load_plugins([config.plugins] if isinstance(config.plugins, str) else config.plugins)
    world = take_place().world
    require(world == 1, f"WORLD_SIZE={world}: several processes train by `torchrun ... -m beit3_dist pretrain`")
    with importing():
        from beit3_dist.parallel.mesh import read_mesh
        from beit3_dist.plan.auto import with_layout
        from beit3_dist.run.preflight import prepare_run
        from beit3_dist.train import pretraining

    given = {"on_step": on_step, "on_validation": on_validation, "on_save": on_save}
    called = {name: function for name, function in given.items() if function is not None}
    with _process_kept():
        config = with_layout(config, world)
        ready = prepare_run(config, read_mesh(config.parallel.tensor, config.parallel.pipeline))
        pretraining.pretrain(ready, called)
    return Path(config.out)


@contextmanager
def _process_kept() -> Iterator[None]:
    """Inside, a run may do as if the process were its own. Afterwards nothing of it watches, listens or writes there;
    what stays is torch's process group of one, which the next run takes, since DeepSpeed holds on to the first."""
    from beit3_dist.run.failure import ends_by_itself

    signals = {number: signal.getsignal(number) for number in SIGNALS}
    logs = list(logging.getLogger().handlers)
    try:
        yield
    finally:
        ends_by_itself.set()  # for the watchdog of a run that has failed
        faulthandler.cancel_dump_traceback_later()
        for thread in threading.enumerate():
            if thread.name == "watchdog":
                thread.join()
        ends_by_itself.clear()
        for handler in [handler for handler in logging.getLogger().handlers if handler not in logs]:
            logging.getLogger().removeHandler(handler)
            handler.close()
        for number, before in signals.items():
            signal.signal(number, before)
