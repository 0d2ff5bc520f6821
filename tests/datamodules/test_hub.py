"""The hub: an answer within seconds without a network, the cache without a network, and what a refusal means."""

import json
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from huggingface_hub import constants

from datamodules import hub
from datamodules.errors import UserError
from datamodules.sources import hub_rows
from lightning_modules.pretrained.loading import Pretrained

COMMIT = "0" * 40


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Use an empty cache, and a hub at a port of this machine on which nothing listens."""
    hub._answers.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield tmp_path
    hub._answers.cache_clear()


@pytest.fixture
def refusing(monkeypatch):
    """Return a function that starts a hub which refuses every file with a status and an error code."""
    servers = []

    def start(status: int, code: str) -> None:
        class Refusing(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.send_response(200 if self.path in ("", "/") else status)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_HEAD

            def log_message(self, *args):
                pass

        servers.append(HTTPServer(("127.0.0.1", 0), Refusing))
        Thread(target=servers[0].serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{servers[0].server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )

    yield start
    for server in servers:
        server.shutdown()


@pytest.mark.parametrize("load", [Pretrained.load_config, Pretrained.load_tokenizer])
def test_without_a_network_an_unknown_model_is_refused_at_once(load):
    start = time.monotonic()
    with pytest.raises(UserError, match="from 'no/model': there is no such folder, and the hub cannot be reached"):
        load(Pretrained("no/model"))
    assert time.monotonic() - start < 10
    assert not constants.HF_HUB_OFFLINE


def test_without_a_network_an_unknown_data_set_is_refused_at_once():
    start = time.monotonic()
    with pytest.raises(
        UserError, match=r"^data.path: cannot read 'no/data' .*; data.source 'file' reads a local file$"
    ):
        next(hub_rows("no/data", split="train", local_source="file"))
    assert time.monotonic() - start < 10


def test_without_a_network_the_cache_is_read(cache):
    files = cache / "models--some--model" / "snapshots" / COMMIT
    files.mkdir(parents=True)
    (files / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    refs = cache / "models--some--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    assert Pretrained("some/model").load_config().hidden_size == 64


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [(403, "GatedRepo", "it is gated: ask for access"), (401, "RepoNotFound", "the hub has no such public entry")],
)
def test_a_refusal_is_told_as_such(refusing, status, code, said):
    refusing(status, code)
    with pytest.raises(UserError, match=f"'some/model': there is no such folder, and {said}"):
        Pretrained("some/model").load_config()
