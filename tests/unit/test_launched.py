"""What an earlier job has left in the shell, and how processes say that they do not find one another."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from beit3_dist import launched
from beit3_dist.launched import ProcessPlace, read_place, take_place
from tests.parallel.workers import free_port

MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, ProcessPlace(0, 1, 0, 1)),
        ({name: "" for name in launched.VARIABLES}, ProcessPlace(0, 1, 0, 1)),
        ({"RANK": "0"}, ProcessPlace(0, 1, 0, 1)),
        ({"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}, ProcessPlace(0, 1, 0, 1)),
        (
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **MEETING},
            ProcessPlace(3, 4, 1, 2),
        ),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", **MEETING}, ProcessPlace(3, 4, 1, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", **MEETING}, ProcessPlace(1, 2, 1, 2)),
    ],
)
def test_the_place_of_a_process(environment: dict[str, str], place: ProcessPlace) -> None:
    assert read_place(environment) == place


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "1"}, "RANK=1 .* not below WORLD_SIZE=1"),
        ({"RANK": "-1"}, "RANK=-1 .* not below WORLD_SIZE=1"),
        ({"RANK": "two"}, "RANK=two .* no whole number"),
        ({"WORLD_SIZE": "1.0"}, "WORLD_SIZE=1.0 .* no whole number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 .* at least one"),
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE=8 .* RANK is not set"),
        ({"WORLD_SIZE": "8", "RANK": "", **MEETING}, "WORLD_SIZE=8 .* RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "WORLD_SIZE=2 .* MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "2", "RANK": "1", **MEETING, "MASTER_PORT": ""}, "WORLD_SIZE=2 .* MASTER_PORT is not set"),
        ({"WORLD_SIZE": "2", "RANK": "1", **MEETING, "MASTER_PORT": "http"}, "MASTER_PORT=http .* no whole number"),
        ({"WORLD_SIZE": "2", "RANK": "1", **MEETING, "MASTER_PORT": "70000"}, "MASTER_PORT=70000 .* no port"),
        ({"WORLD_SIZE": "2", "RANK": "2", **MEETING}, "RANK=2 .* not below WORLD_SIZE=2"),
        ({"LOCAL_RANK": "3"}, r"LOCAL_RANK=3 .* this host has 1 process"),
    ],
)
def test_what_no_launcher_sets_is_named_with_the_remedy(environment: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=f"{words}.*unset RANK WORLD_SIZE LOCAL_RANK") as mistake:
        read_place(environment)
    assert "\n" not in str(mistake.value)


def test_what_is_set_to_nothing_is_dropped_before_torch_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launched, "_place", None)
    environment = {"RANK": "", "WORLD_SIZE": "", "MASTER_ADDR": "", "HOME": "/root"}
    assert take_place(environment) == ProcessPlace(0, 1, 0, 1) and environment == {"HOME": "/root"}


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in launched.VARIABLES}
    return subprocess.run(
        [sys.executable, *command], cwd=REPOSITORY, env=clean | variables, text=True, capture_output=True, timeout=300
    )


@pytest.mark.parametrize("launcher", ["pretrain.py", "finetune.py", "train_image_tokenizer.py"])
def test_every_launcher_says_what_is_left_over(launcher: str) -> None:
    """Also to whoever would not be the first process."""
    result = run(f"launchers/{launcher}", "--help", RANK="1")
    assert result.returncode == 2 and result.stderr.startswith(f"{launcher}: error: RANK=1 in the environment")
    assert result.stderr.count("\n") == 1 and result.stdout == ""
    assert run(f"launchers/{launcher}", "--help", RANK="", WORLD_SIZE="").returncode == 0


def test_tools_speak_whatever_is_left_over(tmp_path: Path) -> None:
    """No launcher starts them, so that nobody else would say it."""
    left = {"RANK": "1", "WORLD_SIZE": "2", **MEETING}
    for tool, *arguments in (("compare_tasks.py", str(tmp_path)), ("plan.py", "--steps", "0")):
        result = run(f"tools/{tool}", *arguments, **left)
        assert result.returncode == 2 and result.stderr.startswith(f"{tool}: error: "), result


MEET = """\
import sys
from beit3_dist.parallel import meeting
from beit3_dist.run.endings import ending_of
meeting.SILENCE_S, meeting.PATIENCE = 0.5, meeting.timedelta(seconds=4)
try:
    meeting.meet("gloo", int(sys.argv[1]), 2, None)
except meeting.NotMet as trouble:
    print(trouble)
    sys.exit(ending_of(trouble)[0].exit_code)
"""


@pytest.mark.parametrize(("rank", "what"), [(0, "the other 1 to come to"), (1, "rank 0 to answer at")])
def test_a_process_that_nobody_meets_says_so_and_ends(rank: int, what: str) -> None:
    port = str(free_port())
    result = run("-c", MEET, str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    waits = f"rank {rank} of 2 on {socket.gethostname()} waits for {what} 127.0.0.1:{port}"
    assert waits in result.stderr and "unset RANK" in result.stderr
    assert result.returncode == 1 and f"has waited in vain for {what}" in result.stdout
    assert result.stdout.count("\n") == 1


def test_a_port_in_use_is_a_mistake_with_its_remedy() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        result = run("-c", MEET, "0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(taken.getsockname()[1]))
    assert result.returncode == 2 and "is in use on" in result.stdout and "--master_port" in result.stdout
    assert result.stdout.count("\n") == 1


def test_a_process_alone_meets_nobody() -> None:
    program = "from beit3_dist.parallel import meeting; meeting.SILENCE_S = 0; meeting.meet('gloo', 0, 1, None)"
    result = run("-c", program, MASTER_ADDR="192.0.2.1", MASTER_PORT="1")
    assert result.returncode == 0 and "waits for" not in result.stderr, result.stderr
