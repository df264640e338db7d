"""Completions by a server of the OpenAI protocol: vLLM, SGLang, llama.cpp and others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from stepdpo_kernels.data.generation.openai_client import KEY_VARIABLE, OpenAIClient, Reply, Session
from stepdpo_kernels.data.generation.openai_logprobs import read_logprobs
from stepdpo_kernels.data.generation.prompts import PromptRenderer, derive_seed
from stepdpo_kernels.data.generation.protocol import Completion, Prompt, Sampling
from stepdpo_kernels.data.generation.run import cut
from stepdpo_kernels.types import StepDPOError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

APIS = ("completions", "chat")
# Servers have filters and penalties of their own (llama.cpp: top_k 40, min_p 0.05; vLLM: those of the model's
# generation_config). These turn them off, and servers that do not know one ignore it.
NO_FILTERS: Mapping[str, Any] = MappingProxyType({"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0})
REFUSED = ("400:", "413:", "422:")  # what is wrong is the request, not the server
FINISHES = {"stop": "stop", "eos_token": "stop", "stop_sequence": "stop", "length": "length"}


class OpenAIGenerator:
    """Asks a server for completions, one request each, so that servers that know no `n` will do.

    base_url:      with its path, such as "http://localhost:8000/v1"
    model:         its name there
    tokenizer:     the model's; only for its chat template and BOS, so only needed with "completions" and "chat"
    template:      with "completions": how a problem becomes a prompt, one of templates.TEMPLATE_NAMES
    api:           "completions": the rendered prompt is sent as a text;
                   "chat": the problem is sent as a message, and the begun answer as one of the assistant, which the
                   server is asked to continue (`continue_final_message` of vLLM and SGLang; llama.cpp does so anyway).
                   The server's own chat template decides what the model sees
    name:          for records; "openai:" and `model` where left out
    extra:         fields that are added to every request; those of the default turn off what servers filter of their
                   own. {} for a server that refuses fields it does not know, as OpenAI's does
    key_variable, concurrency, timeout, retries, backoff:  as in OpenAIClient

    Each request has a seed made of the seed, its prompt and its number; what that promises is the server's affair.
    Log-probs are as the server reports them: vLLM's and llama.cpp's are the model's own by default, at temperature 1;
    others may have applied the temperature (SGLang does, unless told otherwise). They are None where the server's
    tokens do not spell the text.

    A request that the server refuses, or that fails on every try, gives a Completion of finish "failed".
    Raises StepDPOError for options that make no sense, and from `generate` where no request can succeed.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        template: str = "chat",
        api: str = "completions",
        name: str = "",
        extra: Mapping[str, Any] = NO_FILTERS,
        key_variable: str = KEY_VARIABLE,
        concurrency: int = 16,
        timeout: float = 600.0,
        retries: int = 6,
        backoff: float = 1.0,
    ) -> None:
        if api not in APIS:
            raise StepDPOError(f"api must be one of {', '.join(APIS)}; got {api!r}")
        if api == "chat" and template != "chat":
            raise StepDPOError(f"api 'chat' uses the server's chat template; template {template!r} needs 'completions'")
        self.client = OpenAIClient(
            base_url,
            model,
            key_variable=key_variable,
            concurrency=concurrency,
            timeout=timeout,
            retries=retries,
            backoff=backoff,
        )
        self.renderer = PromptRenderer(tokenizer, template) if api == "completions" else None
        self.extra = dict(extra)
        self.name = name or f"openai:{model}"

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        """n completions of each prompt, in order. Also raises StepDPOError where the server fails on two or more
        requests and answers none."""
        requests = [(prompt, sample) for prompt in prompts for sample in range(sampling.n)]

        async def ask(session: Session, request: tuple[Prompt, int]) -> Completion:
            prompt, sample = request
            options: dict[str, Any] = {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "max_tokens": sampling.max_new_tokens,
                "seed": derive_seed(sampling.seed, prompt, sample),
            }
            if sampling.stop:
                options["stop"] = list(sampling.stop)
            send = self._chat if self.renderer is None else self._complete
            return _completion(await send(session, prompt, sampling, options), sampling)

        completions = self.client.map(ask, requests)
        errors = [completion.error for completion in completions if completion.finish == "failed"]
        if len(errors) == len(requests) > 1 and not any(error.startswith(REFUSED) for error in errors):
            raise StepDPOError(
                f"{self.name}: the server failed on all of {len(errors)} requests, last with: {errors[-1]}"
            )
        found = iter(completions)
        return [[next(found) for _ in range(sampling.n)] for _ in prompts]

    async def _complete(self, session: Session, prompt: Prompt, sampling: Sampling, options: dict[str, Any]) -> Reply:
        assert self.renderer is not None
        if sampling.logps:
            options["logprobs"] = 1  # 0 means none to llama.cpp
        return await session.complete(prompt=self.renderer.served_text(prompt), extra_body=self.extra, **options)

    async def _chat(self, session: Session, prompt: Prompt, sampling: Sampling, options: dict[str, Any]) -> Reply:
        messages = [{"role": "user", "content": prompt.problem}]
        extra = self.extra
        if prompt.begun:
            messages.append({"role": "assistant", "content": prompt.begun})
            extra = {**extra, "add_generation_prompt": False, "continue_final_message": True}
        if sampling.logps:
            options |= {"logprobs": True, "top_logprobs": 1}
        return await session.chat(messages=messages, extra_body=extra, **options)


def _completion(reply: Reply, sampling: Sampling) -> Completion:
    if reply.error:
        return Completion("", "failed", reply.error)
    reason = reply.choice.get("finish_reason")
    finish = FINISHES.get(reason) if isinstance(reason, str) else None
    if finish is None:
        return Completion("", "failed", f"the server ended it: finish_reason is {reason!r}")
    text = reply.text
    read = read_logprobs(reply.choice.get("logprobs"), text) if sampling.logps else None
    logps, ends = read or ((), ())
    at = min((text.find(stop) for stop in sampling.stop if stop in text), default=None)
    if at is not None:  # a server that leaves the stop text in
        text, kept = cut(text, ends, at)
        logps, ends, finish = logps[: len(kept)], tuple(kept), "stop"
    if read is None:
        return Completion(text, finish)
    return Completion(text, finish, logps=logps, ends=ends)
