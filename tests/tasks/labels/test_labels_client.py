# SPDX-License-Identifier: Apache-2.0
"""The client of a language model against a real server on this machine."""

import http.server
import json
import socket
import threading

import pytest

from m2jax.config import UserError
from m2jax.tasks.labels import client, instructions, vocabulary
from m2jax.tasks.labels.client import ChatClient

WORDS = vocabulary.checked([{"en": ["dog"]}, {"en": ["cat"]}])
PROMPT = instructions.prompt(WORDS, (0,), "en", number=0, captions=2)


class Server(http.server.BaseHTTPRequestHandler):
    """Answers with what the test has put in the queue."""

    replies: list = []  # noqa: RUF012
    seen: list = []  # noqa: RUF012

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append((self.path, dict(self.headers), json.loads(body)))
        code, headers, content = self.replies.pop(0)
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


def said(text):
    return 200, {}, json.dumps({"choices": [{"message": {"content": text}}]}).encode()


@pytest.fixture
def server():
    Server.replies, Server.seen = [], []
    found = http.server.HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{found.server_port}/v1"
    found.shutdown()
    thread.join()
    found.server_close()


class Time:
    """A clock that sleeping moves."""

    def __init__(self):
        self.now, self.slept = 0.0, []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


def made(url, **options):
    time = Time()
    return ChatClient(url, "m", clock=time, sleep=time.sleep, **options), time


def test_it_asks_as_openai_is_asked_and_gives_the_text(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    Server.replies = [said("hello")]
    ask, _ = made(server, key_env="MY_KEY")
    assert ask(PROMPT) == "hello"
    path, headers, body = Server.seen[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert body["model"] == "m"
    assert [m["role"] for m in body["messages"]] == ["system", "user"]
    assert body["messages"][1]["content"] == PROMPT.user
    assert "secret" not in ask.name + repr(ask)


def test_it_asks_no_more_often_than_allowed_and_again_where_the_server_is_busy(server):
    Server.replies = [said("a"), (429, {"Retry-After": "7"}, b""), (503, {}, b""), said("b")]
    ask, time = made(server, per_minute=6)
    assert [ask(PROMPT), ask(PROMPT)] == ["a", "b"]
    assert 7.0 in time.slept
    assert time.now >= 30  # four requests, six a minute


@pytest.mark.parametrize(
    ("reply", "match"),
    [
        ((401, {}, b""), "HTTP 401: check the address, --llm-model and the key in"),
        ((302, {"Location": "http://127.0.0.1:1/"}, b""), "HTTP 302"),
        ((200, {}, b"<html>"), "no chat completion"),
        ((200, {}, b'{"choices": []}'), "no chat completion"),
        ((200, {}, b"[" * 10_000), "no chat completion"),
    ],
)
def test_what_is_no_answer_is_one_line(server, reply, match):
    Server.replies = [reply]
    ask, _ = made(server)
    with pytest.raises(UserError, match=match) as error:
        ask(PROMPT)
    assert "\n" not in str(error.value)


def test_an_endless_answer_is_not_read_to_its_end(server, monkeypatch):
    monkeypatch.setattr(client, "ANSWER_BYTES", 100)
    Server.replies = [said("x" * 200)]
    with pytest.raises(UserError, match="over 100 bytes"):
        made(server)[0](PROMPT)


def test_a_server_that_stays_busy_or_is_not_there_is_given_up(server):
    Server.replies = [(500, {"Retry-After": "soon"}, b"")] * 3
    with pytest.raises(UserError, match=r"HTTP 500, 3 times: try later"):
        made(server, tries=3)[0](PROMPT)
    with pytest.raises(UserError, match="2 times"):
        made("http://127.0.0.1:9/v1", tries=2)[0](PROMPT)


def test_waits_double_and_no_server_can_ask_for_a_year(server):
    busy = 503, {}, b""
    Server.replies = [(429, {"Retry-After": "31536000"}, b""), busy, busy, said("hello")]
    ask, time = made(server)
    assert ask(PROMPT) == "hello"
    assert time.slept == [client.LONGEST_WAIT_S, 4.0, 8.0]


@pytest.mark.parametrize("reply", [b"garbage\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200])
def test_a_server_that_speaks_no_http_is_one_line(reply):
    def serve(listening):
        connection, _ = listening.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(reply)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,))
        thread.start()
        with pytest.raises(UserError, match="1 times: try later") as error:
            made(f"http://127.0.0.1:{listening.getsockname()[1]}/v1", tries=1)[0](PROMPT)
        thread.join()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["sk-secret\r\n", " sk-secret"])
def test_space_around_a_key_is_no_part_of_it(server, monkeypatch, key):
    monkeypatch.setenv("MY_KEY", key)
    Server.replies = [said("hello")]
    assert made(server, key_env="MY_KEY")[0](PROMPT) == "hello"
    assert Server.seen[0][1]["Authorization"] == "Bearer sk-secret"


@pytest.mark.parametrize("key", ["sk-se\ncret", "sk-sécret", "sk-se\x1bcret"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(monkeypatch, key):
    monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(UserError, match=r"\$MY_KEY: holds characters that no key has") as error:
        made("http://127.0.0.1:9/v1", key_env="MY_KEY")[0](PROMPT)
    assert "sk-" not in str(error.value)


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://x/v1", "x", "http://", "gopher://x", "http://[::1",
     "http://host:port/v1", "http://host/v 1", "http://host/v1\n", "http://host:99999/v1"],
)  # fmt: skip
def test_only_http_is_spoken(url):
    with pytest.raises(UserError, match="no http address"):
        made(url)


def test_keys_do_not_lie_in_the_address():
    with pytest.raises(UserError, match="put the key in"):
        made("https://me:secret@host/v1")
    with pytest.raises(UserError, match="must be above 0"):
        made("https://host/v1", per_minute=0)
    with pytest.raises(UserError, match="must be above 0"):
        made("https://host/v1", per_minute=float("nan"))
