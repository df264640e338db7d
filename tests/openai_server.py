"""A server of the OpenAI protocol on loopback, which fails when told to.

    with OpenAIServer(lambda request: "the text") as server:
        server.faults += [Status(429, headers={"Retry-After": "0"}), Cut()]  # for the next requests, in order
        OpenAIClient(server.url, "tiny", ...)
        server.requests[0].body["messages"]

It speaks /v1/completions, /v1/chat/completions and /v1/models.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Status:
    """An error of the protocol."""

    code: int
    message: str = "it failed"
    headers: dict[str, str] = field(default_factory=dict)
    error_code: str | None = None


@dataclass(frozen=True)
class Raw:
    """A status of 200 and any bytes."""

    data: bytes
    content_type: str = "application/json"


@dataclass(frozen=True)
class Cut:
    """The right answer's first half, as if that were all of it."""


@dataclass(frozen=True)
class Reset:
    """The right answer's first half, then a connection reset."""


@dataclass(frozen=True)
class Hang:
    """Nothing, until the server is closed."""


@dataclass(frozen=True)
class Endless:
    """One space after the other, until the server is closed."""


Fault = Status | Raw | Cut | Reset | Hang | Endless


class Request(NamedTuple):
    """path: "/v1/completions" or "/v1/chat/completions"; headers: their names in lower case."""

    path: str
    body: dict[str, Any]
    headers: dict[str, str]


@dataclass
class OpenAIServer:
    """answer: the text for a request, or {"text", "finish_reason", "logprobs"} (the first alone is needed), or a Fault.

    models:        names that are known; for another one 404
    key:           the only bearer token that is accepted; "" for any
    faults:        what happens to the next requests, whatever `answer` says; the first is taken first
    requests:      all that came, in order of their arrival
    most_at_once:  the most requests that were under way at a time
    """

    answer: Callable[[Request], str | dict[str, Any] | Fault]
    models: tuple[str, ...] = ("tiny",)
    key: str = ""
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    most_at_once: int = 0

    def __enter__(self) -> OpenAIServer:
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._under_way = 0
        outer = self

        class Handler(_Handler):
            server_ = outer

        self._http = _HTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def _take(self, request: Request) -> Fault | None:
        with self._lock:
            self.requests.append(request)
            return self.faults.pop(0) if self.faults else None

    def _count(self, change: int) -> None:
        with self._lock:
            self._under_way += change
            self.most_at_once = max(self.most_at_once, self._under_way)


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that has gone away


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server_: OpenAIServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path != "/v1/models":
            return self._status(Status(404, "no such path"))
        self._json({"object": "list", "data": [{"id": name, "object": "model"} for name in self.server_.models]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        request = Request(self.path, body, {name.lower(): value for name, value in self.headers.items()})
        self.server_._count(1)
        try:
            self._act(request, self.server_._take(request))
        finally:
            self.server_._count(-1)

    def _act(self, request: Request, fault: Fault | None) -> None:
        server = self.server_
        if server.key and request.headers.get("authorization") != f"Bearer {server.key}":
            return self._status(Status(401, f"wrong key: {request.headers.get('authorization')}"))
        if request.path not in ("/v1/completions", "/v1/chat/completions"):
            return self._status(Status(404, "no such path"))
        if request.body["model"] not in server.models:
            return self._status(Status(404, f"no model {request.body['model']}"))
        answer = fault or server.answer(request)
        fault = answer if isinstance(answer, Fault) else None
        text = "half of this" if isinstance(answer, Fault) else answer
        data = json.dumps(_answer(request, text)).encode()
        match fault:
            case Status() as status:
                self._status(status)
            case Raw(raw, content_type):
                self._send(raw, content_type)
            case Cut():
                self._send(data[: len(data) // 2])
            case Reset():
                self._send(data[: len(data) // 2], length=len(data))
                # Closed with a linger of zero seconds, a connection is reset.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True
            case Hang():
                server._closing.wait()
            case Endless():
                self._send(b"", length=2**40)
                while not server._closing.wait(0.02):
                    self.wfile.write(b" ")
            case _:
                self._send(data)

    def _status(self, status: Status) -> None:
        error = {"message": status.message, "type": "error", "code": status.error_code}
        self._send(json.dumps({"error": error}).encode(), code=status.code, headers=status.headers)

    def _json(self, value: Any) -> None:
        self._send(json.dumps(value).encode())

    def _send(
        self,
        data: bytes,
        content_type: str = "application/json",
        *,
        code: int = 200,
        length: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.send_response(code)
        for name, value in {"Content-Type": content_type, **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()


def _answer(request: Request, answer: str | dict[str, Any]) -> dict[str, Any]:
    given = {"text": answer} if isinstance(answer, str) else answer
    chat = request.path.endswith("chat/completions")
    text = given["text"]
    choice = {"index": 0, "finish_reason": given.get("finish_reason", "stop"), "logprobs": given.get("logprobs")}
    choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    asked = request.body["messages"][-1]["content"] if chat else request.body["prompt"]
    counts = {"prompt_tokens": len(asked.split()), "completion_tokens": len((text or "").split())}
    return {
        "id": "1",
        "object": "chat.completion" if chat else "text_completion",
        "created": 0,
        "model": request.body["model"],
        "choices": [choice],
        "usage": {**counts, "total_tokens": sum(counts.values())},
    }
