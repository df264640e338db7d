"""Completions by a transformers model in this process."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from stepdpo_kernels.data.generation.prompts import PromptRenderer
from stepdpo_kernels.data.generation.protocol import Completion, Prompt, Sampling
from stepdpo_kernels.data.generation.run import Run, begin, end
from stepdpo_kernels.data.generation.sampler import SeededSampler
from stepdpo_kernels.types import StepDPOError

if TYPE_CHECKING:
    from transformers import ContinuousBatchingConfig, PreTrainedTokenizerBase


class TransformersGenerator:
    """Generates with `model.generate`, in left-padded batches of prompts of about equal length.

    model:       a causal language model of transformers, or one of PEFT around it
    tokenizer:   the model's
    template:    how a problem becomes a prompt, one of templates.TEMPLATE_NAMES
    batch_size:  completions that are generated at a time
    name:        for records; "transformers:" and the model's path where left out
    continuous:  continuous batching (`model.generate_batch`): a completion that ends makes room for the next one. True
                 needs a GPU, whose free memory sizes the cache; a ContinuousBatchingConfig sizes it on any device. What
                 is drawn then depends on which completions run beside one another, so seeds promise nothing unless
                 the temperature is 0. Where log-probs are asked for, it is `generate` all the same

    A completion depends on the seed, its prompt and its number alone, up to rounding: not on its batch, nor on what was
    generated before. torch's random state is left as it was, and so is the model's training mode. Nothing of the
    model's own generation_config is used but its end tokens. Log-probs are of the logits that the model returns, in
    their precision.

    A prompt that leaves no room in the model's context (`max_position_embeddings`), or whose logits are not finite,
    gives a Completion of finish "failed"; one that reaches the end of the context, "length".
    Raises StepDPOError for an unknown template and for options that make no sense.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str = "chat",
        batch_size: int = 32,
        name: str = "",
        continuous: bool | ContinuousBatchingConfig = False,
    ) -> None:
        if batch_size < 1:
            raise StepDPOError(f"batch_size must be at least 1, got {batch_size!r}")
        if continuous:
            _check_continuous(model, continuous)
        self.model = model
        self.tokenizer = tokenizer
        self.renderer = PromptRenderer(tokenizer, template)
        self.batch_size = batch_size
        self.continuous = continuous
        config = model.config.get_text_config()
        self.name = name or f"transformers:{model.config._name_or_path or config.model_type}"
        self._vocabulary = max(tokenizer.get_vocab().values()) + 1
        self.context: int | None = getattr(config, "max_position_embeddings", None)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        """n completions of each prompt, in order. Raises StepDPOError where a batch does not fit into memory."""
        runs = begin(prompts, sampling, self.renderer, self.context)
        # The longest first: what does not fit into memory is known at once.
        todo = sorted((run for run in runs if not run.error), key=lambda run: (-len(run.prompt_ids), run.room))
        with self._generating() as ends:
            # In one batch all have the same room: a completion at the end of the context must not go on beside others.
            for _, same in groupby(todo, key=lambda run: run.room):
                group = list(same)
                if self.continuous and not sampling.logps:
                    self._continuous(group, sampling, ends)
                    continue
                for start in range(0, len(group), self.batch_size):
                    self._batch(group[start : start + self.batch_size], sampling, ends)
        return end(runs, prompts, sampling)

    def _batch(self, runs: list[Run], sampling: Sampling, ends: set[int]) -> None:
        longest = max(len(run.prompt_ids) for run in runs)
        # Where a row is padded it is masked, so any token will do.
        rows = [[0] * (longest - len(run.prompt_ids)) + run.prompt_ids for run in runs]
        mask = [[0] * (longest - len(run.prompt_ids)) + [1] * len(run.prompt_ids) for run in runs]
        sampler = SeededSampler(
            [run.seed for run in runs],
            runs[0].room,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            vocabulary=self._vocabulary,
        )
        try:
            self.model.generate(
                input_ids=torch.tensor(rows, device=self.model.device),
                attention_mask=torch.tensor(mask, device=self.model.device),
                generation_config=GenerationConfig(max_new_tokens=runs[0].room, do_sample=False, use_cache=True),
                logits_processor=LogitsProcessorList([sampler]),
                stopping_criteria=StoppingCriteriaList([_Stopping(runs, ends)]),
            )
        except torch.OutOfMemoryError as error:
            raise StepDPOError(
                f"{len(runs)} completions of up to {longest + runs[0].room} tokens do not fit into memory; "
                f"batch_size is {self.batch_size}: choose a smaller one"
            ) from error
        for run, logps in zip(runs, sampler.logps().tolist(), strict=True):
            run.logps = logps

    def _continuous(self, runs: list[Run], sampling: Sampling, ends: set[int]) -> None:
        drawn = dict(temperature=sampling.temperature, top_p=sampling.top_p, top_k=0) if sampling.temperature else {}
        nothing = list(range(self._vocabulary, self.model.config.get_text_config().vocab_size))  # as in SeededSampler
        device = self.model.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(runs[0].seed)  # other prompts, other numbers
            found = self.model.generate_batch(
                inputs=[run.prompt_ids for run in runs],
                generation_config=GenerationConfig(
                    max_new_tokens=runs[0].room,
                    do_sample=bool(drawn),
                    eos_token_id=sorted(ends) or -1,
                    pad_token_id=0,
                    suppress_tokens=nothing or None,
                    **drawn,
                ),
                continuous_batching_config=None if self.continuous is True else self.continuous,
            )
        outputs = defaultdict(list)
        for output in found.values():
            outputs[tuple(output.prompt_ids)].append(output)
        for run in runs:
            same = outputs[tuple(run.prompt_ids)]
            output = same.pop(0) if same else None
            for token in output.generated_tokens if output else ():
                run.add(token, ends)
            if not run.finish:
                run.error = (output and output.error) or "continuous batching returned nothing for this prompt"

    @contextmanager
    def _generating(self) -> Iterator[set[int]]:
        """The tokens that end a completion; meanwhile the model evaluates, without a generation_config of its own."""
        modes = {module: module.training for module in self.model.modules()}
        configs = {module: vars(module)["generation_config"] for module in modes if "generation_config" in vars(module)}
        ends = self.renderer.end_ids()
        for config in filter(None, configs.values()):
            own = config.eos_token_id
            ends |= {own} if isinstance(own, int) else set(own or ())
        try:
            self.model.eval()
            for module in configs:
                module.generation_config = GenerationConfig()
            yield ends
        finally:
            for module, training in modes.items():
                module.training = training
            for module, config in configs.items():
                module.generation_config = config


def _check_continuous(model: Any, continuous: bool | ContinuousBatchingConfig) -> None:
    if not hasattr(model, "generate_batch"):
        raise StepDPOError(f"continuous: {type(model).__name__} has no generate_batch; leave continuous out")
    attention = model.config._attn_implementation
    if attention.startswith("stepdpo_tree"):
        raise StepDPOError(
            f"continuous: the model's attention is {attention!r}, which has no paged form; leave continuous out, or "
            "call disable_packed_forward first"
        )
    if continuous is True and model.device.type == "cpu":
        raise StepDPOError(
            "continuous: on a CPU the cache would take most of the memory; leave continuous out, or pass a "
            "transformers.ContinuousBatchingConfig with num_blocks and max_batch_tokens"
        )


class _Stopping(StoppingCriteria):
    """Hands each row its new token and ends the rows that are finished."""

    def __init__(self, runs: list[Run], ends: set[int]) -> None:
        self.runs = runs
        self.ends = ends

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        for run, token in zip(self.runs, input_ids[:, -1].tolist(), strict=True):
            run.add(token, self.ends)
        return torch.tensor([bool(run.finish) for run in self.runs], device=input_ids.device)
