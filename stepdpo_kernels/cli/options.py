"""Groups of options that several commands have."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from stepdpo_kernels._errors import StepDPOError

if TYPE_CHECKING:
    from stepdpo_kernels.data.generation import Generator, Sampling
    from stepdpo_kernels.data.steps import StepFormat


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Lets a command have dataclasses as parameters: typer sees an option for each of their fields."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}

    @functools.wraps(command)
    def run(**values: Any) -> None:
        for name, kind in groups.items():
            values[name] = kind(**{field.name: values.pop(field.name) for field in fields(kind)})
        command(**values)

    parameters = []
    for parameter in inspect.signature(command).parameters.values():
        kind = groups.get(parameter.name)
        if kind is None:
            parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=hints[parameter.name]))
        else:
            kinds = get_type_hints(kind, include_extras=True)
            parameters += [_parameter(field, kinds[field.name]) for field in fields(kind)]
    run.__dict__["__signature__"] = inspect.Signature(parameters)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del run.__dict__["__wrapped__"]
    return run


def _parameter(field: Field[Any], annotation: Any) -> inspect.Parameter:
    default = inspect.Parameter.empty if field.default is MISSING else field.default
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


class Backend(StrEnum):
    TRANSFORMERS = "transformers"
    VLLM = "vllm"
    OPENAI = "openai"


class Api(StrEnum):
    COMPLETIONS = "completions"
    CHAT = "chat"


class OnBad(StrEnum):
    STOP = "stop"
    SKIP = "skip"


class StepsBy(StrEnum):
    MARKER = "marker"
    LINES = "lines"
    PATTERN = "pattern"


@dataclass(frozen=True)
class GeneratorOptions:
    """What generates text."""

    model: Annotated[str, typer.Option(help="Folder, GGUF file or hub id; with a server, the name it serves.")]
    backend: Annotated[
        Backend | None,
        typer.Option(help="What runs the model; without it transformers, and openai where --base-url is given."),
    ] = None
    base_url: Annotated[
        str | None, typer.Option(help="Address of a server of the OpenAI protocol, such as http://localhost:8000/v1.")
    ] = None
    api: Annotated[
        Api, typer.Option(help="Which of a server's APIs: completions takes rendered text, chat messages.")
    ] = Api.COMPLETIONS
    api_key_env: Annotated[str, typer.Option(help="Environment variable with the server's key.")] = "OPENAI_API_KEY"
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer whose chat template renders prompts; default: the model's.")
    ] = None
    template: Annotated[str, typer.Option(help="Prompt format: chat, alpaca, deepseek-math, qwen2-boxed or none.")] = (
        "chat"
    )
    dtype: Annotated[str, typer.Option(help="Of the weights: float32, bfloat16 or float16.")] = "bfloat16"
    device: Annotated[str | None, typer.Option(help="cuda, cpu, ...; default: a GPU where there is one.")] = None
    batch_size: Annotated[int, typer.Option(min=1, help="Samples generated at a time by transformers.")] = 64
    continuous: Annotated[
        bool,
        typer.Option(
            "--continuous",
            help="transformers on a GPU: continuous batching, without log-probs; samples then depend on which "
            "others run beside them.",
        ),
    ] = False
    concurrency: Annotated[int, typer.Option(min=1, help="Requests to a server at a time.")] = 16
    timeout: Annotated[float, typer.Option(help="Seconds a request may take.")] = 600.0
    retries: Annotated[int, typer.Option(min=0, help="How often a request that failed is sent again.")] = 5

    def _name(self, backend: Backend) -> str:
        """For records, and for the settings that a stage is resumed with: what decides its samples."""
        return f"{backend}:{self.model}" + (f" ({self.template})" if self.template != "chat" else "")

    def build(self) -> Generator:
        """Raises StepDPOError for options that do not fit together."""
        backend = self.backend or (Backend.OPENAI if self.base_url else Backend.TRANSFORMERS)
        if (backend is Backend.OPENAI) != bool(self.base_url):
            raise StepDPOError(
                f"--backend {backend}: a server and its address belong together, got --base-url {self.base_url!r}"
            )
        if self.continuous and backend is not Backend.TRANSFORMERS:
            raise StepDPOError(f"--continuous is of --backend transformers, got {backend}: leave it out")
        if backend is Backend.OPENAI:
            return self._openai()
        return self._vllm() if backend is Backend.VLLM else self._transformers()

    def _openai(self) -> Generator:
        from stepdpo_kernels.data.generation.openai_generator import OpenAIGenerator

        tokenizer = None
        if self.api is Api.COMPLETIONS and (self.tokenizer or self.template == "chat"):
            from stepdpo_kernels.trainer import load_tokenizer

            tokenizer = load_tokenizer(self.tokenizer or self.model)
        assert self.base_url is not None
        return OpenAIGenerator(
            self.base_url,
            self.model,
            tokenizer=tokenizer,
            template=self.template,
            api=self.api.value,
            key_variable=self.api_key_env,
            name=self._name(Backend.OPENAI),
            concurrency=self.concurrency,
            timeout=self.timeout,
            retries=self.retries,
        )

    def _vllm(self) -> Generator:
        from stepdpo_kernels.data.generation.vllm_generator import VLLMGenerator

        options = {"tokenizer": self.tokenizer} if self.tokenizer else {}
        return VLLMGenerator(
            self.model, template=self.template, dtype=self.dtype, name=self._name(Backend.VLLM), **options
        )

    def _transformers(self) -> Generator:
        import torch

        from stepdpo_kernels.data.generation.transformers_generator import TransformersGenerator
        from stepdpo_kernels.trainer import load_model, load_tokenizer

        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        return TransformersGenerator(
            load_model(self.model, self.dtype).to(device),
            load_tokenizer(self.tokenizer or self.model),
            template=self.template,
            batch_size=self.batch_size,
            name=self._name(Backend.TRANSFORMERS),
            continuous=self.continuous,
        )


@dataclass(frozen=True)
class SamplingOptions:
    """How text is drawn. The number of samples is each command's own option."""

    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.8
    top_p: Annotated[float, typer.Option(help="Nucleus; 1 for all tokens.")] = 0.95
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of a sample.")] = 1024
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0

    def build(self, n: int, logps: bool = True) -> Sampling:
        from stepdpo_kernels.data.generation import Sampling

        return Sampling(
            n=n,
            temperature=self.temperature,
            top_p=self.top_p,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            logps=logps,
        )


@dataclass(frozen=True)
class StepOptions:
    """How solutions are cut into steps."""

    steps: Annotated[StepsBy, typer.Option(help="What separates steps.")] = StepsBy.MARKER
    step_pattern: Annotated[str, typer.Option(help="Regular expression of a marker, with --steps pattern.")] = ""
    closing: Annotated[
        str, typer.Option(help="Regular expression; what it first matches ends the last step, such as '\\s*Answer:'.")
    ] = ""

    def build(self) -> StepFormat:
        from stepdpo_kernels.data.steps import StepFormat

        return StepFormat(self.steps.value, self.step_pattern, self.closing)


@dataclass(frozen=True)
class RunOptions:
    """How records are read and written; the fields are parameters of the functions that do it."""

    limit: Annotated[int | None, typer.Option(min=1, help="Read only the first so many records.")] = None
    on_bad: Annotated[OnBad, typer.Option(help="A record that cannot be read: stop, or skip and count it.")] = (
        OnBad.STOP
    )
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin again, whatever is there.")] = False


@dataclass(frozen=True)
class ConversionOptions(RunOptions):
    """How pairs are imported and exported."""

    split: Annotated[str, typer.Option(help="Of a hub dataset or a folder.")] = "train"


@dataclass(frozen=True)
class StageOptions(RunOptions):
    """How a stage runs."""

    chunk: Annotated[
        int, typer.Option(min=1, help="Records done together; a killed stage goes on after the last whole chunk.")
    ] = 64


@dataclass(frozen=True)
class LaterStageOptions(StageOptions):
    """How a stage runs that reads what another one wrote."""

    partial: Annotated[
        bool, typer.Option("--partial", help="Take the file of a stage that has not come to its end.")
    ] = False
