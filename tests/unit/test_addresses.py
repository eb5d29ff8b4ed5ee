"""Images at an address: from a server with a certificate of this test's, and what is refused."""

from __future__ import annotations

import ssl
import subprocess
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from beit3_dist.data import addresses
from beit3_dist.data.faults import BadSample
from beit3_dist.inference import open_image
from tests.unit.tar_fixtures import picture

PICTURE = picture(0)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:  # noqa: N802 (its name)
        to = {"/plain": "http://localhost/a.png", "/local": "file:///etc/passwd", "/on": "/a.png"}.get(self.path)
        self.send_response(302 if to else 200 if self.path == "/a.png" else 404)
        if to:
            self.send_header("Location", to)
        self.end_headers()
        self.wfile.write(PICTURE)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
            "-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]  # fmt: skip
    try:
        subprocess.run(made, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl makes the certificate")
    server = HTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(certificate))
        patch.setenv("no_proxy", "localhost")
        addresses._opener.cache_clear()
        yield f"https://localhost:{server.server_port}"
    addresses._opener.cache_clear()
    server.shutdown()


def test_an_image_of_a_server(server: str) -> None:
    assert open_image(f"{server}/a.png").size == open_image(f"{server}/on").size == (40, 30)
    with pytest.raises(BadSample, match="an image of 11 bytes: no more than 10 are read"):
        addresses.fetched(f"{server}/a.png", 10)


@pytest.mark.parametrize(
    ("path", "error"),
    [("/none", "404"), ("/plain", "unknown url type: http"), ("/local", "redirect.* not allowed|not allowed")],
)
def test_what_a_server_may_not_do(path: str, error: str, server: str) -> None:
    with pytest.raises(OSError, match=error):
        open_image(server + path)


def test_a_certificate_that_nobody_vouches_for(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/dev/null")
    addresses._opener.cache_clear()
    with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
        open_image(f"{server}/a.png")
    addresses._opener.cache_clear()


def test_other_addresses(tmp_path: Path) -> None:
    (tmp_path / "a picture.png").write_bytes(PICTURE)
    assert open_image((tmp_path / "a picture.png").as_uri()).size == (40, 30)
    for address, error in (
        ("http://localhost/a.png", "files, file:// and https:// alone"),
        ("ftp://localhost/a.png", "files, file:// and https:// alone"),
        ("file://elsewhere/a.png", "names no other machine"),
    ):
        with pytest.raises(ValueError, match=error):
            open_image(address)
    with pytest.raises(FileNotFoundError):
        open_image("file:///none.png")
