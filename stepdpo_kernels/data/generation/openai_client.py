"""Requests to a server of the OpenAI protocol, many at a time, each retried until it is answered or will not be.

The key is read from the environment when requests are sent. It is kept in no object of this module, and blotted out of
whatever a server says about it.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit, urlunsplit

from stepdpo_kernels.types import StepDPOError

if TYPE_CHECKING:
    from openai import APIError, AsyncOpenAI

_Item = TypeVar("_Item")
_T = TypeVar("_T")

KEY_VARIABLE = "OPENAI_API_KEY"
NO_KEY = "EMPTY"  # what local servers are given by convention; the client refuses to send none
MAX_BYTES = 64 * 2**20  # of one answer
CONNECT_TIMEOUT = 20.0  # seconds
LONGEST_WAIT = 120.0  # seconds, whatever the server asks for


@dataclass
class Usage:
    """What a client has asked for so far. Tokens are as the server counts them, 0 where it does not."""

    requests: int = 0
    retries: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Reply(NamedTuple):
    """The answer to one request.

    choice:  the first of the answer's `choices`, as parsed: `text` or `message`, `finish_reason`, perhaps `logprobs`;
             {} where there is no answer
    error:   why there is none: refused, or tried as often as allowed; "" where there is one
    """

    choice: dict[str, Any]
    error: str = ""

    @property
    def text(self) -> str:
        """What was generated; "" for none."""
        value = self.choice.get("text") or (self.choice.get("message") or {}).get("content")
        return value or ""


class OpenAIClient:
    """A model at a server of the OpenAI protocol.

    base_url:      with its path, such as "http://localhost:8000/v1"
    model:         its name there
    key_variable:  the environment variable that holds the key; OPENAI_API_KEY may be absent (local servers need none)
    concurrency:   requests under way at a time
    timeout:       seconds for one whole answer
    retries:       further tries after a timeout, a connection that broke, 408, 409, 429, 5xx or an answer that is not
                   JSON of the protocol
    backoff:       seconds before the first of them, then doubled each time (with up to a quarter less, by chance); a
                   Retry-After of the server takes its place; never more than two minutes

    Raises StepDPOError for options that make no sense, and where the package openai is missing.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        key_variable: str = KEY_VARIABLE,
        concurrency: int = 16,
        timeout: float = 600.0,
        retries: int = 6,
        backoff: float = 1.0,
    ) -> None:
        try:
            import openai  # noqa: F401
        except ImportError as error:
            raise StepDPOError(
                "a server of the OpenAI protocol needs the package openai: pip install 'stepdpo-kernels[openai]'"
            ) from error
        for name, ok, must, value in (
            ("concurrency", concurrency >= 1, "at least 1", concurrency),
            ("timeout", timeout > 0, "above 0", timeout),
            ("retries", retries >= 0, "at least 0", retries),
            ("backoff", backoff >= 0, "at least 0", backoff),
        ):
            if not ok:
                raise StepDPOError(f"{name} must be {must}, got {value!r}")
        self.url = _shown(base_url)
        self._base_url = base_url
        self.model = model
        self.key_variable = key_variable
        self.concurrency = concurrency
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff
        self.usage = Usage()
        self._answered = False
        self._key()

    def __repr__(self) -> str:
        return f"OpenAIClient({self.url!r}, {self.model!r})"

    def map(self, work: Callable[[Session, _Item], Awaitable[_T]], items: Sequence[_Item]) -> list[_T]:
        """`await work(session, item)` for every item, `concurrency` of them at a time; what they return, in order.

        `work` sends its requests by `session.chat` and `session.complete`. Whatever it raises ends the whole call.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(self._map(work, items))
        with ThreadPoolExecutor(1) as pool:  # a notebook has a loop of its own in this thread
            return pool.submit(asyncio.run, self._map(work, items)).result()

    async def _map(self, work: Callable[[Session, _Item], Awaitable[_T]], items: Sequence[_Item]) -> list[_T]:
        results: dict[int, _T] = {}
        rest = iter(enumerate(items))

        async def worker(session: Session) -> None:
            for index, item in rest:
                results[index] = await work(session, item)

        async with self._open() as session:
            workers = [asyncio.create_task(worker(session)) for _ in range(min(self.concurrency, len(items)))]
            try:
                await asyncio.gather(*workers)
            finally:
                for task in workers:
                    task.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        return [results[index] for index in range(len(items))]

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[Session]:
        from openai import AsyncOpenAI, Timeout

        timeout = Timeout(self.timeout, connect=min(self.timeout, CONNECT_TIMEOUT))
        async with AsyncOpenAI(
            base_url=self._base_url, api_key=self._key() or NO_KEY, timeout=timeout, max_retries=0
        ) as api:
            yield Session(self, api)

    def _key(self) -> str:
        key = os.environ.get(self.key_variable, "").strip()
        if not key and self.key_variable != KEY_VARIABLE:
            raise StepDPOError(f"the environment variable {self.key_variable}, which is to hold the key, is not set")
        if not (key.isascii() and key.isprintable()):
            raise StepDPOError(f"the environment variable {self.key_variable} holds characters that no key has")
        return key

    def _clean(self, text: str) -> str:
        """Without the key and the password of the address, on one line, not too long."""
        for secret in (self._key(), urlsplit(self._base_url).password):
            if secret and secret != NO_KEY:
                text = text.replace(secret, "***")
        text = " ".join(text.split())
        return text if len(text) <= 300 else text[:300] + "..."


class Session:
    """The connections of one `OpenAIClient.map`."""

    def __init__(self, client: OpenAIClient, api: AsyncOpenAI) -> None:
        self._client = client
        self._api = api
        self._random = random.Random()  # waits must not move the global generator

    async def chat(self, **request: Any) -> Reply:
        """`chat.completions.create` of the client's model with these arguments; its first choice.

        What the package does not know goes into `extra_body`. A request that the server refuses (400, 413, 422), or
        that failed on every try, is a Reply with `error`.
        Raises StepDPOError where no request can succeed: no server at the address, a refused key, no such model or
        path, no credit left.
        """
        return await self._ask(self._api.chat.completions.with_streaming_response.create, _chat_fault, request)

    async def complete(self, **request: Any) -> Reply:
        """The same for `completions.create`."""
        return await self._ask(self._api.completions.with_streaming_response.create, _text_fault, request)

    async def _ask(self, create: Any, fault: Callable[[dict[str, Any]], str], request: dict[str, Any]) -> Reply:
        client = self._client
        client.usage.requests += 1
        tried = 0
        while True:
            try:
                return Reply(await self._once(create, fault, request))
            except _FailedError as failed:
                failure = failed
            said = client._clean(str(failure))
            if failure.final or tried == client.retries:
                client.usage.failed += 1
                if failure.gone:
                    raise StepDPOError(f"the server at {client.url} is gone ({said}, tried {tried + 1} times)")
                return Reply({}, said if failure.final else f"{said} (tried {tried + 1} times)")
            await asyncio.sleep(self._wait(tried, failure.wait))
            tried += 1
            client.usage.retries += 1

    async def _once(
        self, create: Any, fault: Callable[[dict[str, Any]], str], request: dict[str, Any]
    ) -> dict[str, Any]:
        import openai

        client = self._client
        try:
            async with asyncio.timeout(client.timeout), create(model=client.model, **request) as response:
                client._answered = True
                body = await _read(response)
        except TimeoutError:
            raise _FailedError(f"no answer within {client.timeout:g} s") from None
        except openai.APIStatusError as error:
            client._answered = True
            raise await self._refused(error) from None
        except openai.APIConnectionError as error:
            raise self._unreachable(error) from None
        choice = _first_choice(body, fault)
        usage = body.get("usage")
        for name in ("prompt_tokens", "completion_tokens"):
            count = usage.get(name) if isinstance(usage, dict) else None
            setattr(client.usage, name, getattr(client.usage, name) + (count if isinstance(count, int) else 0))
        return choice

    async def _refused(self, error: Any) -> _FailedError:
        """What is to be done about a status of 4xx or 5xx; raises where nothing can be."""
        client = self._client
        status = error.status_code
        words = f"{status}: {_said(error)}"
        said = client._clean(words)
        if status in (401, 403):
            has = f"the key in {client.key_variable}" if client._key() else f"no key: set {client.key_variable}"
            raise StepDPOError(f"{client.url} refused {has} ({said})")
        if status == 404:
            raise StepDPOError(
                f"{client.url} knows no model {client.model!r}, or no such path ({said}); {await self._models()}"
            )
        if error.code == "insufficient_quota":
            raise StepDPOError(f"{client.url}: no credit left for the key in {client.key_variable} ({said})")
        retried = status in (408, 409, 429) or status >= 500
        return _FailedError(words, wait=_retry_after(error.response.headers), final=not retried)

    def _unreachable(self, error: APIError) -> _FailedError:
        client = self._client
        cause = error.__cause__
        said = f"{type(cause).__name__}: {cause}" if str(cause or "") else type(cause or error).__name__
        gone = type(cause).__name__ in ("ConnectError", "ConnectTimeout")
        if gone and not client._answered:
            said = client._clean(said)
            raise StepDPOError(f"no server answers at {client.url} ({said}); is it running, and is the address right?")
        return _FailedError(said, gone=gone)

    async def _models(self) -> str:
        import openai

        names: list[str] = []
        try:
            async with asyncio.timeout(min(10.0, self._client.timeout)):
                found = await self._api.models.list()
                names = [model.id for model in found.data if isinstance(model.id, str)][:10]
        except (openai.OpenAIError, TimeoutError, AttributeError, TypeError, ValueError):
            pass
        if names:
            return self._client._clean(f"it has {', '.join(names)}")
        return "it lists no models: does the address need a /v1 at its end?"

    def _wait(self, tried: int, asked: float | None) -> float:
        wait = self._client.backoff * 2**tried * self._random.uniform(0.75, 1) if asked is None else asked
        return min(wait, LONGEST_WAIT)


class _FailedError(Exception):
    """One try came to nothing.

    wait: seconds that the server asks for; final: another try would be no better; gone: there is no server any more
    """

    def __init__(self, message: str, *, wait: float | None = None, final: bool = False, gone: bool = False) -> None:
        super().__init__(message)
        self.wait = wait
        self.final = final
        self.gone = gone


async def _read(response: Any) -> dict[str, Any]:
    data = bytearray()
    try:
        async for chunk in response.iter_bytes():
            data += chunk
            if len(data) > MAX_BYTES:
                raise _FailedError(f"an answer of more than {MAX_BYTES} bytes")
    except _FailedError:
        raise
    except Exception as error:  # of whichever HTTP library the client uses: all say that the answer broke off
        raise _FailedError(f"the answer broke off: {type(error).__name__}") from None
    try:
        body = json.loads(bytes(data))
    except (ValueError, RecursionError):
        raise _FailedError(f"the answer is not JSON: {data.decode('utf-8', 'replace')}") from None
    if not isinstance(body, dict):
        raise _FailedError(f"the answer is no JSON object: {body}")
    return body


def _first_choice(body: dict[str, Any], fault: Callable[[dict[str, Any]], str]) -> dict[str, Any]:
    if body.get("error"):  # some servers answer 200 and then fail
        raise _FailedError(f"the server failed: {body['error']}")
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise _FailedError(f"the answer has no `choices`: {body}")
    wrong = fault(choices[0])
    if wrong:
        raise _FailedError(f"{wrong}: {choices[0]}")
    return choices[0]


def _text_fault(choice: dict[str, Any]) -> str:
    return "" if isinstance(choice.get("text"), str) else "the answer has no `text`"


def _chat_fault(choice: dict[str, Any]) -> str:
    message = choice.get("message")
    if not isinstance(message, dict):
        return "the answer has no `message`"
    content = message.get("content")
    return "" if content is None or isinstance(content, str) else "the answer's `content` is no text"


def _said(error: Any) -> str:
    """The server's own words in an error: {"message": ...} as OpenAI writes it, or whatever else it sent."""
    body = error.body
    if isinstance(body, dict) and isinstance(body.get("message"), str):
        return body["message"]
    return str(body) if body else error.message


def _retry_after(headers: Any) -> float | None:
    """Seconds, from the header's number of seconds or date; None where it has none."""
    value = headers.get("retry-after")
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        then = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (then.astimezone(UTC) - datetime.now(UTC)).total_seconds())


def _shown(base_url: str) -> str:
    """The address without user, password and query. Raises StepDPOError where it is none."""
    try:
        parts = urlsplit(base_url)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        parts, port = urlsplit(""), ""
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise StepDPOError("base_url must be an address such as http://localhost:8000/v1, with scheme and host")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return urlunsplit((parts.scheme, host + port, parts.path, "", ""))
