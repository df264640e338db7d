"""Completions by vLLM in this process: paged attention, continuous batching, several GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stepdpo_kernels.data.generation.prompts import PromptRenderer
from stepdpo_kernels.data.generation.protocol import Completion, Prompt, Sampling
from stepdpo_kernels.data.generation.run import Run, begin, end
from stepdpo_kernels.types import StepDPOError


class VLLMGenerator:
    """Generates with `vllm.LLM.generate`.

    model:     path or hub id
    template:  how a problem becomes a prompt, one of templates.TEMPLATE_NAMES
    name:      for records; "vllm:" and `model` where left out
    options:   of `vllm.LLM`: tensor_parallel_size, dtype, max_model_len, gpu_memory_utilization, seed, ...

    Each completion has a seed of its own, made of the seed, its prompt and its number. vLLM's kernels may still round
    otherwise in another batch, and then another token may follow. Nothing of the model's own generation_config is used
    but its end tokens. Log-probs are vLLM's raw ones: before the temperature, top_p and any penalty.

    A prompt that leaves no room in `max_model_len` gives a Completion of finish "failed".
    Raises StepDPOError where vLLM is missing, and for an unknown template.
    """

    def __init__(self, model: str, *, template: str = "chat", name: str = "", **options: Any) -> None:
        try:
            from vllm import LLM
        except ImportError as error:
            raise StepDPOError("vLLM is not installed: pip install 'stepdpo-kernels[vllm]'") from error
        self.name = name or f"vllm:{model}"
        self.llm = LLM(model=model, **{"logprobs_mode": "raw_logprobs", **options})
        self.renderer = PromptRenderer(self.llm.get_tokenizer(), template)
        self.context: int = self.llm.llm_engine.model_config.max_model_len

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        """n completions of each prompt, in order."""
        runs = begin(prompts, sampling, self.renderer, self.context)
        todo = [run for run in runs if not run.error]
        if todo:
            ends = self.renderer.end_ids()
            outputs = self.llm.generate(
                [{"prompt_token_ids": run.prompt_ids} for run in todo],
                [self._params(run, sampling, ends) for run in todo],
                use_tqdm=False,
            )
            for run, output in zip(todo, outputs, strict=True):
                _take(run, output.outputs[0], ends)
        return end(runs, prompts, sampling)

    def _params(self, run: Run, sampling: Sampling, ends: set[int]) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            n=1,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=-1,
            min_p=0.0,
            repetition_penalty=1.0,
            seed=run.seed,
            max_tokens=run.room,
            stop=list(sampling.stop),
            stop_token_ids=sorted(ends),
            logprobs=0 if sampling.logps else None,  # of the chosen token alone
        )


def _take(run: Run, output: Any, ends: set[int]) -> None:
    tokens = list(output.token_ids)
    if output.finish_reason not in ("stop", "length"):
        run.error = f"vLLM ended it: {output.finish_reason}"
        return
    if output.finish_reason == "stop" and not isinstance(output.stop_reason, str):
        ends = ends | set(tokens[-1:])  # an end token of the model's own
    if output.logprobs:
        run.logps = [chosen[token].logprob for token, chosen in zip(tokens, output.logprobs, strict=True)]
    for token in tokens:
        run.add(token, ends)
    run.finish = run.finish or output.finish_reason
