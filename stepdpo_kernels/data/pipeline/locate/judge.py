"""Locator `judge`: a language model at a server of the OpenAI protocol names the first wrong step.

The prompt follows the idea of Step-DPO (Lai et al. 2024, arXiv 2406.18629, appendix): the judge sees the problem, a
correct solution and the wrong one, and gives a verdict on each step.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from os import PathLike
from typing import Any

from stepdpo_kernels.data.generation.openai_client import OpenAIClient, Reply, Session
from stepdpo_kernels.data.pipeline.locate.prompt import JudgePrompt
from stepdpo_kernels.data.pipeline.locate.protocol import Location, Verdicts, verify_by_locating
from stepdpo_kernels.data.pipeline.locate.reply import SCHEMA, read_reply
from stepdpo_kernels.data.pipeline.solution import Solution
from stepdpo_kernels.data.pipeline.stage import seed_for
from stepdpo_kernels.types import StepDPOError

AGAIN = 0.5  # least temperature of a further try: at 0 the same reply would come again
REFUSED = ("400:", "422:")  # how the error of a request begins that the server will not take as it is

_FORMAT = {"type": "json_schema", "json_schema": {"name": "verdicts", "strict": True, "schema": SCHEMA}}


class JudgeLocator:
    """First wrong steps by a judge.

    client:       the server, the model there, how many requests at a time, retries of what fails on the way
    prompt_file:  see `prompt`; None for the prompt that comes with the package
    structured:   ask for JSON of a schema (`response_format`). A server that refuses that is asked for text instead
    temperature:  of the first try; None leaves it to the server
    max_tokens:   most tokens of a reply
    tries:        how often a judge is asked whose reply cannot be read, before the solution is undecided
    price_in, price_out:  of a million prompt and completion tokens, for the count of costs

    Options that a server refuses by name (seed, temperature; max_tokens, which becomes max_completion_tokens) are left
    out from then on.

    The counts of the locations of one call add up to what the call took: "requests", "retries", "prompt_tokens",
    "completion_tokens", "unreadable_replies", and "cost_micros", millionths of the unit of the prices.

    Raises StepDPOError for options that make no sense and for a prompt file that cannot be used.
    """

    name = "judge"

    def __init__(
        self,
        client: OpenAIClient,
        *,
        prompt_file: str | PathLike[str] | None = None,
        structured: bool = True,
        temperature: float | None = 0.0,
        max_tokens: int = 4096,
        tries: int = 3,
        price_in: float = 0.0,
        price_out: float = 0.0,
    ) -> None:
        for name, value, ok, must in (
            ("temperature", temperature, temperature is None or temperature >= 0, "at least 0"),
            ("max_tokens", max_tokens, max_tokens >= 1, "at least 1"),
            ("tries", tries, tries >= 1, "at least 1"),
            ("price_in", price_in, price_in >= 0, "at least 0"),
            ("price_out", price_out, price_out >= 0, "at least 0"),
        ):
            if not ok:
                raise StepDPOError(f"{name} of the judge must be {must}, got {value!r}")
        self._client = client
        self._prompt = JudgePrompt(prompt_file)
        self._structured = structured and self._prompt.has_form
        self._temperature = temperature
        self._max_tokens = max_tokens
        self._tries = tries
        self._prices = (price_in, price_out)
        self._answered = False
        self._refused: frozenset[str] = frozenset()  # options that the server has been found to refuse

    @property
    def settings(self) -> dict[str, object]:
        return {
            "model": self._client.model,
            "prompt": hashlib.sha256(self._prompt.text.encode()).hexdigest()[:16],
            "structured": self._structured,
            "temperature": self._temperature,
            "max_tokens": self._max_tokens,
            "tries": self._tries,
        }

    def verify(self, solutions: Sequence[Solution], ks: Sequence[int], seed: int) -> Verdicts:
        return verify_by_locating(self, solutions, ks, seed)

    def locate(self, solutions: Sequence[Solution], seed: int) -> list[Location]:
        """As Locator says. Also raises StepDPOError when the server fails on each of two or more solutions, or refuses
        each of them and has taken none before."""
        before = asdict(self._client.usage)
        locations = self._client.map(self._judge, [(solution, seed) for solution in solutions])
        hopeless = ("no reply",) if self._answered else ("no reply", "request refused")
        failures = [location.explanation for location in locations if location.problem in hopeless]
        if len(failures) == len(locations) > 1:
            raise StepDPOError(f"the judge failed on all of {len(failures)} solutions, last with: {failures[-1]}")
        used = {name: count - before[name] for name, count in asdict(self._client.usage).items()}
        spent: Counter[str] = Counter(
            {name: used[name] for name in ("requests", "retries", "prompt_tokens", "completion_tokens")}
        )
        tokens = (used["prompt_tokens"], used["completion_tokens"])
        spent["cost_micros"] = round(sum(count * price for count, price in zip(tokens, self._prices, strict=True)))
        if locations:
            locations[0] = replace(locations[0], counts=locations[0].counts + spent)
        return locations

    async def _judge(self, session: Session, item: tuple[Solution, int]) -> Location:
        solution, seed = item
        count = len(solution.steps.steps)
        if not count:
            return Location(None, problem="no steps")
        for tried in range(self._tries):
            reply = await self._ask(session, solution, seed_for(seed, f"{solution.id}/{tried}"), again=tried > 0)
            if reply.error:
                problem = "request refused" if reply.error.startswith(REFUSED) else "no reply"
                return Location(None, reply.error, problem, Counter(unreadable_replies=tried))
            reading = read_reply(reply.text, count)
            if reading.step is not None:
                return Location(reading.step, reading.explanation, counts=Counter(unreadable_replies=tried))
        cut = reply.choice.get("finish_reason") == "length"
        problem = "reply cut off" if cut else reading.problem
        return Location(None, reading.explanation, problem, Counter(unreadable_replies=self._tries))

    async def _ask(self, session: Session, solution: Solution, seed: int, *, again: bool) -> Reply:
        """One reply. What the server refuses is left out, and stays so once it has answered without."""
        refused = self._refused
        while True:
            reply = await session.chat(**self._request(solution, seed, again, refused))
            if not reply.error:
                self._refused |= refused
                self._answered = True
                return reply
            blamed = self._blamed(reply.error, refused)
            if blamed is None:
                return reply
            refused |= {blamed}

    def _request(self, solution: Solution, seed: int, again: bool, refused: frozenset[str]) -> dict[str, Any]:
        structured = self._structured and "response_format" not in refused
        limit = "max_completion_tokens" if "max_tokens" in refused else "max_tokens"
        options: dict[str, Any] = {limit: self._max_tokens, "seed": seed}
        if self._temperature is not None:
            options["temperature"] = max(self._temperature, AGAIN) if again else self._temperature
        if structured:
            options["response_format"] = _FORMAT
        content = self._prompt.fill(solution, structured=structured)
        kept = {name: value for name, value in options.items() if name not in refused}
        return {"messages": [{"role": "user", "content": content}], **kept}

    def _blamed(self, error: str, refused: frozenset[str]) -> str | None:
        """The option that a refusal is about: one that it names, else the structured output, if it is asked for."""
        if not error.startswith(REFUSED):
            return None
        names = ["response_format"] * self._structured + ["max_tokens", "temperature", "seed"]
        left = [name for name in names if name not in refused]
        named = [name for name in left if name in error]
        return next(iter(named or left[: left[:1] == ["response_format"]]), None)
