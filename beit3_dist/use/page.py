"""A page to try models, made with Gradio and served to this machine alone.

It asks no other host for anything: a policy in its answers forbids the browser to. Pictures that are uploaded are
opened by `inference.open_image` alone, which refuses image bombs; Gradio hands on their paths.
"""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from beit3_dist.config import DataConfig
from beit3_dist.data.transforms import largest_file
from beit3_dist.inference import HIDDEN, Guess
from beit3_dist.leaving import SIGNALS
from beit3_dist.opening import one_line
from beit3_dist.optional import optional_module
from beit3_dist.reports.live import HOST
from beit3_dist.use import served
from beit3_dist.use.served import Models, Served

TITLE = "Try a model"
POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'none'; base-uri 'self'; "
    "form-action 'self'"
)
"""No script, style, font, picture or question of the page goes to another host. Gradio's own scripts stand in the page
and are made while it runs."""
FONTS = ["system-ui", "sans-serif"]
BUTTONS = ["download", "fullscreen"]
"""Of pictures: not the one that shares them with a hub."""
GALLERY: dict[str, Any] = {"object_fit": "contain", "height": "auto", "buttons": BUTTONS, "interactive": False}
CSS = """
.why { opacity: .75; padding: 1rem 0; }
footer { display: none !important; }
.grid-wrap { max-height: none !important; }
"""


@contextmanager
def gradio() -> Iterator[Any]:
    """Gradio without its reports home, its files in a folder that goes with the context: a signal to go is Ctrl-C
    inside, in the main thread."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    try:
        with tempfile.TemporaryDirectory(prefix="beit3_demo_") as folder:
            os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder, "HF_HUB_OFFLINE": "1"}
            yield optional_module("gradio", "the page of a model", "pip install 'beit3-dist[page]'")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def blocks_of(gr: Any, models: Models) -> Any:
    """The page: a tab for each use, which says why where none of the models serves for it."""
    tabs = (
        ("Ask", models.asking, _ask),
        ("Caption", models.captioning, _caption),
        ("Search", models.searching, _search),
        ("Classify", models.contrast, _classify),
        ("Fill in words", models.filling, _fill_in),
        ("Attention", models.attending, _attention),
        ("Hidden patches", models.rebuilding, _hidden_patches),
    )
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(f"# {TITLE}\n" + " · ".join(f"`{name}`" for name in models.opened))
        first = next((title for title, uses, _ in tabs if uses.models), tabs[0][0])
        with gr.Tabs(selected=first):
            for title, uses, fill in tabs:
                with gr.Tab(title, id=title):
                    if uses.models:
                        fill(gr, models, uses)
                    else:
                        gr.Markdown(uses.why_not, elem_classes="why")
    return page


def on(gr: Any, events: Sequence[Any], function: Callable[..., Any], inputs: list[Any], outputs: Any) -> None:
    """Has events call the function, one at a time of all on the page, which shows what it raises as the user's mistake
    in one line."""

    def called(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (ValueError, OSError) as error:
            raise gr.Error(one_line(error), duration=None, print_exception=False) from None

    for event in events:
        event(called, inputs, outputs, api_name=False, concurrency_limit=1, concurrency_id="models")


def _image(gr: Any, label: str = "Picture") -> Any:
    """A picture, whose path is handed on without Gradio's opening it."""
    image = gr.Image(type="filepath", label=label, sources=["upload", "clipboard"], height=280)
    image.preprocess = lambda payload: None if payload is None else payload.path
    return image


def _needed(image: str | None) -> str:
    if image is None:
        raise ValueError("Choose a picture.")
    return image


def _which(gr: Any, names: Mapping[str, Any]) -> Any:
    """The choice among several models; there with one, too, but not to be seen."""
    return gr.Dropdown([*names], value=next(iter(names)), label="Model", visible=len(names) > 1)


def _shares(guesses: list[Guess]) -> dict[str, float]:
    """As Gradio's labels take them."""
    return {str(guess.what): guess.score for guess in guesses}


def _ask(gr: Any, models: Models, uses: Served) -> None:
    def ask(name: str, image: str | None, question: str) -> dict[str, float]:
        return _shares(served.ask(uses.models[name], _needed(image), question))

    with gr.Row():
        with gr.Column():
            image, which = _image(gr), _which(gr, uses.models)
            question = gr.Textbox(label="Question", placeholder="what is on the table?")
            button = gr.Button("Ask", variant="primary")
        answers = gr.Label(label="Answers")
    on(gr, [button.click, question.submit], ask, [which, image, question], answers)


def _caption(gr: Any, models: Models, uses: Served) -> None:
    def caption(name: str, image: str | None) -> str:
        return uses.models[name].caption([_needed(image)])[0]

    with gr.Row():
        with gr.Column():
            image, which = _image(gr), _which(gr, uses.models)
            button = gr.Button("Write", variant="primary")
        text = gr.Textbox(label="Caption", lines=3)
    on(gr, [button.click], caption, [which, image], text)


def _search(gr: Any, models: Models, uses: Served) -> None:
    def search(name: str, words: str) -> Any:
        return served.search(models, name, words)

    gr.Markdown(f"{len(models.indexes[next(iter(uses.models))].vectors):,} images of `{models.pictures}`")
    which, words = _which(gr, uses.models), gr.Textbox(label="What to look for", placeholder="a red bicycle")
    button = gr.Button("Search", variant="primary")
    found = gr.Gallery(label="Best matches, with their cosines to the words", columns=4, **GALLERY)
    on(gr, [button.click, words.submit], search, [which, words], found)


def _classify(gr: Any, models: Models, uses: Served) -> None:
    def classify(name: str, image: str | None, names: str, template: str) -> dict[str, float]:
        return _shares(served.classify(uses.models[name], _needed(image), names, template))

    with gr.Row():
        with gr.Column():
            image, which = _image(gr), _which(gr, uses.models)
            names = gr.Textbox(label="Names of classes, one a line", lines=4, placeholder="a cat\na dog")
            template = gr.Textbox(label="Template, with {} for the name", value="{}")
            button = gr.Button("Classify", variant="primary")
        classes = gr.Label(label="Classes")
    on(gr, [button.click], classify, [which, image, names, template], classes)


def _fill_in(gr: Any, models: Models, uses: Served) -> None:
    def fill(name: str, text: str, image: str | None) -> list[list[Any]]:
        found = served.fill(uses.models[name], text, image)
        return [[place, guess.what, f"{guess.score:.3f}"] for place, guesses in found for guess in guesses]

    with gr.Row():
        with gr.Column():
            text = gr.Textbox(label=f"Text, with {HIDDEN} for a hidden word", value=f"a {HIDDEN} on a table")
            image, which = _image(gr, "Picture, if it is to be looked at"), _which(gr, uses.models)
            button = gr.Button("Fill in", variant="primary")
        guesses = gr.Dataframe(headers=["hidden", "word", "score"], label="Guesses", interactive=False, wrap=True)
    on(gr, [button.click, text.submit], fill, [which, text, image], guesses)


def _attention(gr: Any, models: Models, uses: Served) -> None:
    def attend(name: str, image: str | None, text: str, layer: float) -> Any:
        return served.attend(uses.models[name], _needed(image), text, int(layer))

    most = max(served.layers(model, words) for model in uses.models.values() for words in (False, True))
    with gr.Row():
        with gr.Column():
            image, which = _image(gr), _which(gr, uses.models)
            text = gr.Textbox(label="Words that look, instead of CLS")
            layer = gr.Slider(1, most, value=most, step=1, label="Layer")
            button = gr.Button("Look", variant="primary")
        label = "The more orange, the more attended to: mean over the heads"
        seen = gr.Image(label=label, interactive=False, buttons=BUTTONS)
    on(gr, [button.click], attend, [which, image, text, layer], seen)


def _hidden_patches(gr: Any, models: Models, uses: Served) -> None:
    def rebuild(name: str, image: str | None, share: float, seed: float) -> Any:
        pictures, right = served.rebuild(models.reconstructions[name], _needed(image), share, int(seed))
        captions = ("the picture", "what the model sees", "from guessed codes", "from true codes")
        return list(zip(pictures, captions, strict=True)), right

    with gr.Row():
        with gr.Column():
            image, which = _image(gr), _which(gr, uses.models)
            share = gr.Slider(0.1, 0.9, value=0.4, step=0.1, label="Share of the patches that is hidden")
            seed = gr.Slider(0, 99, value=0, step=1, label="Which of them")
            button = gr.Button("Hide and fill in", variant="primary")
        with gr.Column():
            shown = gr.Gallery(label="No picture from codes gets past the true ones", columns=2, **GALLERY)
            right = gr.Markdown()
    on(gr, [button.click], rebuild, [which, image, share, seed], [shown, right])


def application(gr: Any, models: Models) -> Any:
    """The page as an ASGI application, which answers under this machine's names alone."""
    from fastapi import FastAPI, Request
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    theme = gr.themes.Default(font=FONTS, font_mono=["ui-monospace", "monospace"])
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def with_policy(request: Request, answer: Callable[[Request], Any]) -> Any:
        response = await answer(request)
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    # A page of another origin may have its name lead here: it shall not use what is served.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    return gr.mount_gradio_app(
        app,
        blocks_of(gr, models).queue(api_open=False),
        path="/",
        theme=theme,
        css=CSS,
        footer_links=[],
        show_error=True,
        ssr_mode=False,
        max_file_size=largest_file(DataConfig.max_pixels),
    )


def server_of(app: Any, port: int) -> tuple[Any, socket.socket]:
    """A server of the page, and the socket to `serve` it on. Raises ValueError where the port cannot be had."""
    import uvicorn

    try:
        place = socket.create_server((HOST, port))
    except (OSError, OverflowError) as error:
        raise ValueError(f"--port {port}: {error}: name another one, or 0 for any that is free") from error
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", server_header=False)), place


def serve(server: Any, place: socket.socket) -> None:
    """Until Ctrl-C, which is heard here: in the main thread the server would show where it was."""
    serving = threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
    serving.start()
    with suppress(KeyboardInterrupt):
        serving.join()
    server.should_exit = True
    serving.join(timeout=5)
