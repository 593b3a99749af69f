"""The endpoint is a real HTTP server of this process that fails as it is told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.parts.chat_endpoint import ChatEndpoint, EndpointFailed


class Server:
    """Answers with an echo, after as many failures as are planned."""

    def __init__(self) -> None:
        self.failures: list[Any] = []
        self.seen: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.seen.append({**body, "path": self.path})
                outer.keys.append(self.headers.get("Authorization"))
                plan = outer.failures.pop(0) if outer.failures else None
                if plan == "hang":
                    time.sleep(0.6)
                    return
                if isinstance(plan, int):
                    self.send_error(plan)
                    return
                text = plan if isinstance(plan, str) else f"echo {body['messages'][0]['content']}"
                answer = (
                    b"no json"
                    if plan == "garbage"
                    else json.dumps({"choices": [{"message": {"content": text}}]}).encode()
                )
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def endpoint(server: Server, **settings: Any) -> ChatEndpoint:
    return ChatEndpoint(server.url, "small", **{"backoff": 0.0, "attempts": 3, "timeout": 5.0, **settings})


def test_a_prompt_is_asked_as_one_user_turn(server, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret")
    assert endpoint(server, key_variable="SOME_KEY").complete("hello") == "echo hello"
    assert server.seen[0]["path"] == "/v1/chat/completions"
    assert server.seen[0]["messages"] == [{"role": "user", "content": "hello"}]
    assert server.keys == ["Bearer secret"]


def test_a_busy_endpoint_is_asked_again(server):
    server.failures = [503, 429]
    assert endpoint(server).complete("hello") == "echo hello"
    assert len(server.seen) == 3


def test_a_timeout_is_retried_and_then_reported(server):
    server.failures = ["hang"]
    assert endpoint(server, timeout=0.2).complete("hello") == "echo hello"
    server.failures = ["hang"] * 2
    with pytest.raises(EndpointFailed, match=r"no answer in 2 attempts of 0\.2 seconds"):
        endpoint(server, timeout=0.2, attempts=2).complete("hello")


def test_a_refusal_is_not_repeated(server):
    server.failures = [401]
    with pytest.raises(EndpointFailed, match="HTTP 401"):
        endpoint(server).complete("hello")
    assert len(server.seen) == 1


def test_nobody_at_home_is_a_clear_error():
    closed = ChatEndpoint("http://127.0.0.1:9/v1", "small", attempts=2, backoff=0.0, timeout=2.0)
    with pytest.raises(EndpointFailed, match="no answer in 2 attempts"):
        closed.complete("hello")


@pytest.mark.parametrize(("plan", "message"), [("garbage", "no chat completion"), ("  ", "empty text")])
def test_answers_of_another_kind_are_errors(server, plan, message):
    server.failures = [plan]
    with pytest.raises(EndpointFailed, match=message):
        endpoint(server).complete("hello")


def test_what_was_answered_before_a_failure_is_kept_and_not_asked_again(server, tmp_path: Path):
    keep = tmp_path / "deep" / "answers.jsonl"
    server.failures = [None, None, 401]
    with pytest.raises(EndpointFailed):
        endpoint(server).complete_all(["a", "b", "c"], keep)
    with keep.open("a") as file:
        file.write('{"key": "cut sho')
    assert endpoint(server).complete_all(["a", "b", "a"], keep) == ["echo a", "echo b", "echo a"]
    assert len(server.seen) == 3


def test_the_key_is_neither_kept_nor_shown(server, monkeypatch, tmp_path):
    monkeypatch.setenv("SOME_KEY", "secret")
    asked = endpoint(server, key_variable="SOME_KEY")
    asked.complete_all(["a"], tmp_path / "kept.jsonl")
    assert "secret" not in repr(asked) and "secret" not in (tmp_path / "kept.jsonl").read_text()


@pytest.mark.parametrize(
    "settings",
    [
        {"url": "ftp://x"},
        {"model": ""},
        {"attempts": 0},
        {"timeout": 0.0},
        {"backoff": -1.0},
        {"key_variable": "NO_SUCH_KEY_HERE"},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(InvalidHyperparameter):
        ChatEndpoint(**{"url": "http://localhost/v1", "model": "small", **settings})
