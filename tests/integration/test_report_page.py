"""The page of runs in a real browser: its texts, on a phone, in the dark, by keyboard, live, and hostile captions."""

from __future__ import annotations

import http.client
import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beit3_dist.reports import live
from beit3_dist.reports.contents import RunContents
from beit3_dist.reports.page import Shown, contents, page, shown_example
from beit3_dist.train.guesses import Example, Piece
from tests.browser import Browser, browsing
from tools import report

torch = pytest.importorskip("torch")

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> \u2028 & ' \""
DRAWN = "document.documentElement?.dataset.drawn"
SETTLED = "new Promise((go) => setTimeout(go, 150))"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def step(number: int, **more: Any) -> dict[str, Any]:
    """A record as a run writes it."""
    fall = math.exp(-number / 300)
    return {
        "step": number, "loss": 8 + 9 * fall, "loss_image": 3 + 3 * fall, "loss_text": 5 + 6 * fall,
        "acc_image": 0.3 - 0.3 * fall,
        "lr": 1e-3, "grad_norm": 1 + fall, "images": 4, "texts": 4, "pairs": 0, "samples_per_s": 40.0,
        "step_s": 0.2, "data_wait_s": 0.01,
        "memory_gb": 1.5, "replaced_samples": 0, "entropy_image": 4.0, "skipped": 0, "computes": f"CPU {HOSTILE}",
    } | more  # fmt: skip


def write(path: Path, *records: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def run_folder(folder: Path, steps: int = 120, resumed: bool = False) -> Path:
    """A run folder without data or checkpoints."""
    folder.mkdir(parents=True)
    recipe = f"steps: 200\nout: {json.dumps(HOSTILE)}\nobjectives: {{}}\noptim:\n  lr: "
    (folder / "config.yaml").write_text(f"{recipe}{0.002 if resumed else 0.001}\n")
    (folder / "config_step_0000000.yaml").write_text(f"{recipe}0.001\n")
    if steps:
        write(folder / "metrics.jsonl", *(step(i) for i in range(1, steps + 1)))
        write(folder / "eval.jsonl", *({"step": i, "loss": 9.0, "loss_image": 3.5, "recall@1": 0.2} for i in (50, 100)))
    if resumed:
        (folder / "config_step_0000060.yaml").write_text(f"{recipe}0.002\n")
        write(folder / "skipped.jsonl", {"step": 33, "images": [1]})
        fault = {"step": 5, "stream": "images", "shard": f"a{HOSTILE}.tar", "key": "7", "reason": f"cut {HOSTILE}"}
        write(folder / "quarantine.jsonl", fault, fault)
    return folder


def pictured() -> dict[str, Any]:
    """What a model makes of a pair whose caption is hostile."""
    caption = [Piece(HOSTILE), Piece(" a", HOSTILE), Piece(" dog", " dog"), Piece(" cat", " dog")]
    image = torch.arange(3 * 4 * 4, dtype=torch.uint8).reshape(3, 4, 4)
    hidden, codes = torch.tensor([False, True, False, False]), torch.tensor([0, 1, 0, 0])
    looks = torch.full((2, 3, 2, 2), 200, dtype=torch.uint8)
    example = shown_example(Example(image, hidden, codes, codes, caption), looks)
    return {
        "checkpoint_step": 100, "pictures": "held-out", "collapsed": [], "codes_right": {"pair_image": 0.25}, "why": "",
        "losses": {"image": {"title": f"images {HOSTILE}", "unit": "patch", "nats": True}}, "entropies": {"image": 4.2},
        "baselines": {"image": 0.05}, "examples": {"pair_image": [example]},
        "pictures_version": "1",
    }  # fmt: skip


def told(folder: Path, name: str) -> dict[str, Any]:
    run = Shown(folder, name, 0, torch.device("cpu"), "report.py")
    run.read()
    return run.told()


def opened(browser: Browser, path: Path, shown: list[dict[str, Any]]) -> str:
    """Writes the page of these runs and opens it; all of its text."""
    path.write_text(page(contents([]) | {"runs": shown}), encoding="utf-8")
    browser.open(path.as_uri(), DRAWN)
    browser.value(SETTLED)
    return browser.value("document.body.innerText")


def is_sound(browser: Browser, width: int) -> None:
    """Nothing is complained of, nothing sticks out to the side, and no text of a run has become a part of the page."""
    assert browser.complaints == []
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value("document.title") != "owned"
    assert browser.value("document.querySelectorAll('script').length") == 2
    assert browser.value("document.querySelectorAll('img[src=x]').length") == 0


@pytest.mark.parametrize(("width", "dark"), [(1400, False), (390, True)])
def test_several_runs_with_hostile_texts(browser: Browser, tmp_path: Path, width: int, dark: bool) -> None:
    browser.look_like(width, dark=dark)
    first = told(run_folder(tmp_path / "a", resumed=True), HOSTILE) | pictured()
    second = told(run_folder(tmp_path / "b"), "a calm one") | {"why": "There are no pictures yet."}
    text = opened(browser, tmp_path / "page.html", [first, second])
    is_sound(browser, width)
    for words in (
        HOSTILE.split(" \u2028")[0], "a calm one", "120 of 200 steps", "What is learnt", "after step 60",
        "There are no pictures yet", "optim.lr: 0.001 → 0.002", "1 step changed nothing", "held-out 3.5", "below",
        "Recall@1", "25 % of the hidden codes guessed",
    ):  # fmt: skip
        assert words in text, words
    assert browser.value("document.querySelectorAll('.caption .right').length") == 1
    assert browser.value("[...document.querySelectorAll('.caption .wrong')].map((e) => e.textContent).join('|')") == (
        f"{HOSTILE.strip()} → a|dog → cat"
    )
    paths = "document.querySelectorAll('[data-field=loss_image] path.mean').length"
    assert browser.value(paths) == 2
    assert browser.value("document.querySelectorAll('[data-field=loss_image] circle.held').length") == 4
    browser.value("document.querySelectorAll('#runs input')[1].click()")
    assert browser.value(paths) == 1, "a run that is left out is drawn"
    paper = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper[4:-1].split(","))) < 300) == dark
    browser.screenshot(tmp_path / "page.png")


def test_it_is_used_by_keyboard_and_told_to_screen_readers(browser: Browser, tmp_path: Path) -> None:
    browser.look_like(1400)
    opened(browser, tmp_path / "page.html", [told(run_folder(tmp_path / "a"), "a")])
    browser.value("document.querySelector('[data-field=loss_image] .plot').focus()")
    browser.key("Home")
    browser.key("ArrowRight")
    browser.wait("document.getElementById('said').textContent.includes('Image, step')")
    assert "held-out 3.5" in browser.value("document.getElementById('said').textContent")
    said = browser.value("document.activeElement.getAttribute('aria-label')")
    assert said.startswith("Image. a: from 5.99") and "held-out 3.5" in said and "entropy of the targets 4" in said
    unnamed = """[...document.querySelectorAll('input, select, img, progress, section, [role=img], [role=region]')]
        .filter((e) => !e.labels?.length && !['aria-label', 'aria-labelledby', 'alt'].some((n) => e.getAttribute(n)))
        .length"""
    assert browser.value(unnamed) == 0
    # By samples instead of steps: the same points elsewhere.
    browser.value("document.activeElement.blur()")
    browser.value("(axis.value = 'samples', axis.dispatchEvent(new Event('change')))")
    ticks = browser.value("[...document.querySelectorAll('[data-field=loss] text')].map((e) => e.textContent)")
    assert "500" in ticks  # of 960 samples
    is_sound(browser, 1400)


def test_a_run_that_has_just_begun(browser: Browser, tmp_path: Path) -> None:
    browser.look_like(390)
    text = opened(browser, tmp_path / "page.html", [told(run_folder(tmp_path / "a", steps=0), "a")])
    assert "no step yet" in text and "Recipe of a" in text
    is_sound(browser, 390)
    folder = run_folder(tmp_path / "b", steps=1)
    assert "1 of 200 steps" in opened(browser, tmp_path / "page.html", [told(folder, "b")])
    is_sound(browser, 390)


def test_a_million_steps_are_a_small_page_that_shows_the_spike(browser: Browser, tmp_path: Path) -> None:
    """The file would take half a minute to write and read: the history is filled as reading it would."""
    run = RunContents(run_folder(tmp_path / "a", steps=0))
    every = 40  # one record stands for so many, at its place
    run._steps.add(step(i, loss_image=50.0 if i == 400_000 else 3.0) for i in range(every, 1_000_001, every))
    shown = run.told("a") | {"why": "none", "pictures_version": "", "drawn": []}
    browser.look_like(1400)
    text = opened(browser, tmp_path / "page.html", [shown])
    size = (tmp_path / "page.html").stat().st_size
    assert size < 400_000, size
    assert "1,000,000 of 200 steps" in text
    high = np.array(shown["train"]["fields"]["loss_image"]["high"])
    assert high.max() == 50 and shown["train"]["steps"][int(high.argmax())] >= 400_000
    is_sound(browser, 1400)


def test_it_follows_a_run_that_goes_on(browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "EVERY_S", 0.05)
    folder = run_folder(tmp_path / "a", steps=3)
    run = Shown(folder, "a", 0, torch.device("cpu"), "report.py")
    run.read()
    ending = threading.Event()
    with live.server_of([run], [], 0, ending) as server:
        serving = threading.Thread(target=server.serve_forever, daemon=True)
        serving.start()
        browser.look_like(1400)
        browser.open(f"http://127.0.0.1:{server.server_port}/", DRAWN)
        assert "3 of 200 steps" in browser.value("document.body.innerText")
        assert "Following" in browser.value("document.getElementById('state').textContent")
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(step(4)) + "\n" + json.dumps(step(5))[:30])
        browser.wait("document.body.innerText.includes('4 of 200 steps')")
        assert browser.value("document.querySelectorAll('[data-field=loss] path.mean').length") == 1
        write(folder / "metrics.jsonl", step(1), step(2))  # it has gone back
        browser.wait("document.body.innerText.includes('2 of 200 steps')")
        is_sound(browser, 1400)
        folder.rename(tmp_path / "elsewhere")
        browser.wait("document.body.innerText.includes('its folder is gone')")
        assert "2 of 200 steps" in browser.value("document.body.innerText")
        (tmp_path / "elsewhere").rename(folder)
        browser.wait("!document.body.innerText.includes('its folder is gone')")
        for host, status in ((f"127.0.0.1:{server.server_port}", 200), ("elsewhere.example", 403)):
            asked = http.client.HTTPConnection("127.0.0.1", server.server_port)
            asked.request("GET", "/data", headers={"Host": host})
            assert asked.getresponse().status == status
        assert server.server_address[0] == "127.0.0.1"
        taken = f"--port {server.server_port}: .*name another one"
        with pytest.raises(ValueError, match=taken), live.server_of([run], [], server.server_port, threading.Event()):
            pass
        server.shutdown()
        serving.join()
        ending.set()
    browser.wait("document.getElementById('state').className.includes('lost')")
    browser.complaints.clear()  # that nobody answers any more


def test_the_command_writes_a_page_without_data_or_checkpoints(
    browser: Browser, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(run_folder(tmp_path / name / "run")) for name in "ab"]
    report.main([*runs, "--html", str(tmp_path / "page.html"), "--pictures", "0"])
    assert "page.html: 0.1 MB" in capsys.readouterr().out
    browser.open((tmp_path / "page.html").as_uri(), DRAWN)
    assert browser.value("document.title") == "2 runs: a/run, b/run"
    assert "No pictures were asked for." in browser.value("document.body.innerText")
    is_sound(browser, 1400)
