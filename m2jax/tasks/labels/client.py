# SPDX-License-Identifier: Apache-2.0
"""A client of language models behind any endpoint that speaks OpenAI's chat completions.

Standard library alone. A key is read from the environment, is sent to the named address and nowhere
else (a redirect is refused), and is never written.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from m2jax.config import UserError
from m2jax.tasks.labels.instructions import Prompt

ANSWER_BYTES = 2**20  # of one response; more is no answer to what was asked
LONGEST_WAIT_S = 120.0  # that a server may ask for
AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}  # worth another try


@runtime_checkable
class Writer(Protocol):
    """Answers prompts."""

    @property
    def name(self) -> str:
        """What the answers come from; another name makes another corpus."""
        ...

    def __call__(self, prompt: Prompt) -> str:
        """The text of an answer, whatever it is."""
        ...


@dataclass
class ChatClient:
    """Asks one model, at most so often per minute, again where the server is busy."""

    url: str  # as far as /v1: the path of the chat is added
    model: str
    key_env: str = "OPENAI_API_KEY"  # the variable that holds the key; may be unset
    per_minute: float = 60.0
    tries: int = 5
    timeout_s: float = 60.0
    temperature: float = 1.0
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    _next: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        parts = _parts(self.url)
        if parts is None:
            raise UserError(f"--llm {self.url!r}: no http address: write https://HOST/v1")
        if parts.username or parts.password or parts.query:
            raise UserError(
                f"--llm: the address holds a password or a query: put the key in ${self.key_env}"
            )
        if not (self.per_minute > 0 and math.isfinite(self.per_minute)):
            raise UserError(f"--llm-per-minute {self.per_minute}: must be above 0")
        self._opener = urllib.request.build_opener(_NoRedirect)

    @property
    def name(self) -> str:
        """Model and address."""
        return f"{self.model} at {self.url}"

    def __call__(self, prompt: Prompt) -> str:
        """The model's answer.

        Raises:
            UserError: the server refuses, cannot be reached, or answers in no known form.
        """
        body = {
            "model": self.model,
            "temperature": self.temperature,
            "messages": [
                {"role": "system", "content": prompt.system},
                {"role": "user", "content": prompt.user},
            ],
        }
        for attempt in range(1, self.tries + 1):
            self._wait()
            try:
                return _content(self._post(body), self.url)
            except _Busy as busy:
                if attempt == self.tries:
                    raise UserError(
                        f"--llm {self.url}: {busy}, {self.tries} times: try later; what is "
                        "answered is kept"
                    ) from busy
                self.sleep(min(busy.wait_s or 2.0**attempt, LONGEST_WAIT_S))
        raise AssertionError("unreachable")

    def _wait(self) -> None:
        """Until the next request is allowed."""
        now = self.clock()
        if now < self._next:
            self.sleep(self._next - now)
        self._next = max(now, self._next) + 60.0 / self.per_minute

    def _post(self, body: dict[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        key = os.environ.get(self.key_env, "").strip()  # of the file that it was read from
        if key:
            # The library would refuse it too, in a message that shows it.
            if not (key.isascii() and key.isprintable()):
                raise UserError(f"${self.key_env}: holds characters that no key has: set it anew")
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers
        )
        try:
            with self._opener.open(request, timeout=self.timeout_s) as response:
                content = response.read(ANSWER_BYTES + 1)
        except urllib.error.HTTPError as error:
            with error:
                if error.code in AGAIN:
                    raise _Busy(f"HTTP {error.code}", _seconds(error)) from error
                raise UserError(
                    f"--llm {self.url}: HTTP {error.code}: check the address, --llm-model and the "
                    f"key in ${self.key_env}"
                ) from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            # No route, refused, timed out, broken off, no HTTP.
            reason = str(getattr(error, "reason", error)).strip()
            raise _Busy(reason or type(error).__name__, 0.0) from error
        if len(content) > ANSWER_BYTES:
            raise UserError(f"--llm {self.url}: an answer of over {ANSWER_BYTES:,} bytes: no chat")
        return content


class _Busy(Exception):
    """A failure that may pass."""

    def __init__(self, what: str, wait_s: float) -> None:
        super().__init__(what)
        self.wait_s = wait_s


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another address."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """None: the redirect is an error."""
        return


def _parts(url: str) -> urllib.parse.SplitResult | None:
    """The parts of an http address; ``None`` for what is none."""
    if not url.isprintable() or " " in url:
        return None
    try:
        parts = urllib.parse.urlsplit(url)
        _ = parts.port  # read for its check
    except ValueError:
        return None
    return parts if parts.scheme in ("http", "https") and parts.hostname else None


def _seconds(error: urllib.error.HTTPError) -> float:
    """What Retry-After asks for; 0 where it asks for nothing that we read."""
    try:
        return max(0.0, float(error.headers.get("Retry-After", "0")))
    except ValueError:
        return 0.0


def _content(response: bytes, url: str) -> str:
    try:
        text = json.loads(response)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise UserError(
            f"--llm {url}: no chat completion ({type(error).__name__}): use an address that speaks "
            "OpenAI's /v1/chat/completions"
        ) from error
    return text if isinstance(text, str) else ""
