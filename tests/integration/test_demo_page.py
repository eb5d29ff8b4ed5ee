"""The page of models in a real browser: every tab used once, on a phone, in the dark, with pictures that are none."""

from __future__ import annotations

import http.client
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from beit3_dist.use.page import application, gradio, serve, server_of
from beit3_dist.use.served import Models, open_models
from tests.browser import Browser, browsing
from tests.integration.runs import save_random_tokenizer
from tests.unit.test_inference import OBJECTIVES, pretrained, save, tokenizer  # noqa: F401 (a fixture)
from tools import demo

pytest.importorskip("gradio", reason="needs Gradio: pip install 'beit3-dist[page]'")
UNHEARD = '[{"type": "string", "value": "Method not implemented."}]'
"""What Gradio's client warns of whenever an answer has come."""
PANEL = "[...document.querySelectorAll('[role=tabpanel]')].find((e) => e.offsetParent !== null)"
"""The open tab."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:  # noqa: F811
    """A pretrained model with all heads, one fine-tuned for vqa, and pictures."""
    folder = tmp_path_factory.mktemp("models")
    pretrained(folder / "pretrained", tokenizer, OBJECTIVES)
    save(folder / "answers", "vqa", tokenizer)
    save_random_tokenizer(folder / "codes.pth", codebook_size=8)
    draw = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    for number in range(6):
        Image.fromarray(draw.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(folder / f"pictures/{number}.png")
    (folder / "none.png").write_bytes(b"no picture")
    bomb = Image.new("1", (30_000, 30_000))
    bomb.save(folder / "bomb.png")
    return folder


def opened(folder: Path, *models: str, pictures: bool = True) -> Models:
    paths, shown = [folder / name for name in models], folder / "pictures" if pictures else None
    return open_models(paths, shown, folder / "codes.pth", None, str(folder / "cache"), "cpu", lambda line: None)


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[tuple[str, int]]:
    with gradio() as gr:
        server, place = server_of(application(gr, opened(folder, "pretrained", "answers")), 0)
        serving = threading.Thread(target=server.run, kwargs={"sockets": [place]})
        serving.start()
        yield "127.0.0.1", place.getsockname()[1]
        server.should_exit = True
        serving.join()


class Page:
    """What a person does on the page."""

    def __init__(self, browser: Browser) -> None:
        self.browser = browser

    def tab(self, title: str) -> None:
        tabs = "[...document.querySelectorAll('[role=tab]')]"
        self.browser.value(f"{tabs}.find((e) => e.textContent.trim() === '{title}').click()")
        self.browser.wait(f"{tabs}.some((e) => e.ariaSelected === 'true' && e.textContent.trim() === '{title}')")
        self.browser.wait(PANEL)

    def upload(self, picture: Path) -> None:
        self.browser.wait(f"{PANEL}.querySelector('input[type=file]')")
        found = self.browser("Runtime.evaluate", expression=f"{PANEL}.querySelector('input[type=file]')")
        self.browser("DOM.setFileInputFiles", files=[str(picture)], objectId=found["result"]["objectId"])
        self.browser.wait(f"{PANEL}.querySelector('img[src*=upload], img[src*=\"file=\"], img[src^=blob]')")

    def write(self, label: str, text: str) -> None:
        field = f"[...{PANEL}.querySelectorAll('label')].find((e) => e.textContent.includes({label!r}))"
        self.browser.value(
            f"(() => {{ const field = {field}.querySelector('textarea, input');"
            "Object.getOwnPropertyDescriptor(Object.getPrototypeOf(field), 'value').set.call(field, "
            f"{text!r}); field.dispatchEvent(new Event('input', {{bubbles: true}})); }})()"
        )

    def press(self, title: str) -> None:
        self.browser.value(
            f"[...{PANEL}.querySelectorAll('button')].find((e) => e.textContent.trim() === '{title}').click()"
        )

    def shows(self, words: str) -> None:
        self.browser.wait(f"document.body.innerText.includes({words!r})")

    def is_sound(self, width: int) -> None:
        """Nothing is complained of, nothing was asked of another host, nothing sticks out to the side."""
        assert [told for told in self.browser.complaints if told != UNHEARD] == []
        elsewhere = "performance.getEntriesByType('resource').filter((e) => !e.name.startsWith(location.origin)).length"
        assert self.browser.value(elsewhere) == 0
        assert self.browser.value("document.documentElement.scrollWidth") <= width


def test_every_tab_is_used_once(tmp_path: Path, folder: Path, address: tuple[str, int]) -> None:
    picture = folder / "pictures" / "0.png"
    with browsing(tmp_path / "profile") as browser:
        page = Page(browser)
        browser.look_like(1300)
        browser.open(f"http://{address[0]}:{address[1]}/", "document.querySelectorAll('[role=tab]').length >= 7")

        page.tab("Ask")
        for wrong, words in ((folder / "none.png", "undecodable"), (folder / "bomb.png", "pixels")):
            page.upload(wrong)
            page.write("Question", "what shape is this?")
            page.press("Ask")
            page.shows(words)
            browser.value(f"{PANEL}.querySelector('button[aria-label=Clear], button[title=Clear]')?.click()")
        page.upload(picture)
        page.press("Ask")
        for answer in ("yes", "no", "red", "green"):
            page.shows(answer)
        page.is_sound(1300)

        page.tab("Caption")
        page.upload(picture)
        page.press("Write")
        browser.wait(f"{PANEL}.querySelector('textarea').value.length > 0")
        page.tab("Search")
        page.write("What to look for", "a red circle")
        page.press("Search")
        browser.wait(f"{PANEL}.querySelectorAll('button img').length === 6")
        page.tab("Classify")
        page.press("Classify")
        page.shows("Choose a picture.")
        page.upload(picture)
        page.write("Names of classes", "a red circle\na blue square")
        page.press("Classify")
        page.shows("%")
        page.tab("Fill in words")
        page.write("Text, with", "a red [MASK] [MASK]")
        page.press("Fill in")
        page.shows("[MASK] 2")
        page.tab("Attention")
        page.upload(picture)
        page.press("Look")
        browser.wait(f"{PANEL}.querySelectorAll('img').length >= 2")
        page.tab("Hidden patches")
        page.upload(picture)
        page.press("Hide and fill in")
        page.shows("of the 2 hidden codes are guessed")
        page.is_sound(1300)
        browser.screenshot(tmp_path / "page.png")

        browser.look_like(390, dark=True)
        browser.wait("document.body.classList.contains('dark') || document.querySelector('.dark')")
        page.is_sound(390)
        browser.screenshot(tmp_path / "phone.png")


def test_it_answers_this_machine_alone(folder: Path, address: tuple[str, int]) -> None:
    for host, status in ((f"127.0.0.1:{address[1]}", 200), ("elsewhere.example", 400)):
        asked = http.client.HTTPConnection(*address)
        asked.request("GET", "/", headers={"Host": host})
        answer = asked.getresponse()
        assert answer.status == status
    asked = http.client.HTTPConnection(*address)
    asked.request("GET", "/")
    assert "default-src 'self'" in str(asked.getresponse().headers["Content-Security-Policy"])
    with pytest.raises(ValueError, match=f"--port {address[1]}: .*name another one"):
        server_of(None, address[1])


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Ctrl-C is heard, also where the tests were started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_without_a_word(
    number: signal.Signals, interrupts: None, capsys: pytest.CaptureFixture[str]
) -> None:
    async def nothing(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "lifespan"
        for word in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{word}.complete"})

    server, place = server_of(nothing, 0)

    main = threading.get_ident()

    def press() -> None:
        while not server.started:
            time.sleep(0.02)
        signal.pthread_kill(main, number)

    with gradio():
        files = Path(os.environ["GRADIO_TEMP_DIR"])
        threading.Thread(target=press).start()
        serve(server, place)
        assert files.is_dir()
    assert not files.exists()
    assert capsys.readouterr() == ("", "")


def test_what_no_model_serves_for_says_why(folder: Path) -> None:
    models = opened(folder, "answers", pictures=False)
    told = {
        "asking": "", "attending": "",
        "captioning": "No model here was fine-tuned for captioning, nor pretrained by prefix_language_modeling",
        "searching": "No model here was fine-tuned for retrieval, nor pretrained by contrastive",
        "contrast": "No model here was fine-tuned for retrieval, nor pretrained by contrastive",
        "filling": "No model here has its head for masked words",
        "rebuilding": "No model here has its head for the visual",
    }  # fmt: skip
    for name, words in told.items():
        uses: Any = getattr(models, name)
        assert uses.why_not.startswith(words) and bool(uses.models) == (words == "")
        assert "\n" not in uses.why_not
    models = opened(folder, "pretrained", pictures=False)
    assert set(models.opened) == {"pretrained (captioning)", "pretrained (retrieval)"}
    assert models.searching.why_not == "No folder was named to search: give --pictures FOLDER."
    assert models.rebuilding.why_not == "What codes look like is told by images: give --pictures FOLDER."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/nothing"], "there is no .*/nothing"),
        (["{}/answers", "--pictures", "{}/none.png"], "--pictures .*none.png is no folder"),
        (["{}/answers", "--image_tokenizer", "{}/no.pth"], "--image_tokenizer .*no.pth: there is no such file"),
        (["{}/pictures"], "is neither a model folder nor a checkpoint"),
        (["{}/answers", "{}/answers"], "answers: a model is given twice"),
        (["{}/pretrained", "--pictures", "{}/pictures", "--image_tokenizer", "{}/none.png"], "image_tokenizer=.*none"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="^2$"):
        demo.main([*(argument.format(folder) for argument in arguments), "--cache", str(tmp_path), "--port", "0"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("demo.py: error: ")
    assert re.search(message, error)
