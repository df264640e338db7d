"""`stepdpo train`: step pairs on disk to a trained model in a folder."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
import typer
import yaml
from rich.console import Console
from transformers import EarlyStoppingCallback, HfArgumentParser
from transformers.trainer_utils import get_last_checkpoint

from stepdpo_kernels.cli.inspect import print_pair
from stepdpo_kernels.data import load_step_pairs
from stepdpo_kernels.model import causal_lm
from stepdpo_kernels.trainer import StepDPOConfig, StepDPOTrainer, load_model, load_tokenizer
from stepdpo_kernels.trainer.run_folder import check_output_dir, put_in_place, staged
from stepdpo_kernels.types import StepDPOError

INTERRUPTED = 130  # exit status, as shells give it for Ctrl-C
ALL_LINEAR = "all-linear"  # peft's word


@dataclass
class DataAndModel:
    """What `stepdpo train` takes beside the fields of StepDPOConfig."""

    model: str = field(metadata={"help": "Model to train: a folder, a GGUF file or a hub id."})
    data: str = field(metadata={"help": "Step pairs: JSONL, JSON, Parquet, a folder of such files, or a hub id."})
    eval_data: str | None = field(default=None, metadata={"help": "Step pairs to evaluate on; see eval_strategy."})
    ref_model: str | None = field(
        default=None, metadata={"help": "The reference, where it is not the model itself; see reference."}
    )
    tokenizer: str | None = field(default=None, metadata={"help": "Tokenizer, where it is not the model's."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Weights in memory: float32 (with --bf16 computing in bfloat16), bfloat16 or float16."},
    )
    template: str = field(
        default="chat", metadata={"help": "Prompt format: chat, alpaca, deepseek-math, qwen2-boxed or none."}
    )
    boundary: str = field(default="joint", metadata={"help": "How a step is cut from its prefix: joint or separate."})
    unit: str = field(
        default="step", metadata={"help": "What is preferred: a step (Step-DPO), or a whole solution (DPO)."}
    )
    max_length: int = field(
        default=1024, metadata={"help": "Longest prefix and step in tokens; longer pairs are left out."}
    )
    strict: bool = field(default=False, metadata={"help": "Fail at the first pair that would be left out."})
    limit: int | None = field(default=None, metadata={"help": "Read only the first so many records."})
    lora_r: int = field(default=0, metadata={"help": "Rank of a LoRA adapter to train; 0 trains the model itself."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Its scale; twice the rank unless given."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Its dropout."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: [ALL_LINEAR],
        metadata={"help": "Layers that get one: names, or all-linear, which leaves the head out."},
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "QLoRA: the model's linear layers in 4 bits, under a LoRA adapter."}
    )
    merge_adapter: bool = field(
        default=False, metadata={"help": "Also save the model with the adapter merged into it, in OUTPUT_DIR/merged."}
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Load everything, pack an epoch, print the plan and the first pair; write nothing."},
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after so many evaluations without a better metric_for_best_model."},
    )


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise StepDPOError(f"stepdpo train: {message} (stepdpo train --help lists every option)")


def parse(arguments: list[str]) -> tuple[DataAndModel, StepDPOConfig]:
    """Command-line arguments over those of a YAML file named by --config; StepDPOError for what fits neither."""
    parser = _Parser(
        [DataAndModel, StepDPOConfig],
        prog="stepdpo train",
        description="Train a causal language model on step pairs (Step-DPO).",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="A YAML file with any of these options.")
    known = _Parser(add_help=False, allow_abbrev=False)
    known.add_argument("--config")
    config_file = known.parse_known_args(arguments)[0].config
    from_file = _yaml_arguments(config_file) if config_file is not None else []
    try:
        options, config, _, unknown = parser.parse_args_into_dataclasses(
            [*from_file, *arguments], look_for_args_file=False, return_remaining_strings=True
        )
    except StepDPOError:
        raise
    except ValueError as error:  # of TrainingArguments
        parser.error(str(error))
    if unknown:
        parser.error(f"unknown option {unknown[0]!r}")
    if config.eval_strategy != "no" and options.eval_data is None:
        parser.error(f"eval_strategy {config.eval_strategy.value!r} needs eval_data")
    if not options.lora_r:
        for name in ("load_in_4bit", "merge_adapter", "lora_dropout", "lora_alpha"):
            if getattr(options, name):
                parser.error(f"{name} needs an adapter: give lora_r")
        if options.lora_target_modules != [ALL_LINEAR]:
            parser.error("lora_target_modules needs an adapter: give lora_r")
    if options.early_stopping_patience is not None:
        if config.eval_strategy == "no" or config.metric_for_best_model is None:
            parser.error("early_stopping_patience needs eval_strategy and metric_for_best_model")
        config.restore_callback_states_from_checkpoint = True  # a resumed run goes on counting
    if config.eval_strategy == "no" and not config.eval_on_start and options.eval_data is not None:
        parser.error("eval_data needs eval_strategy: nobody would evaluate on it")
    return options, config


def _yaml_arguments(path: str) -> list[str]:
    """The options of a YAML file as command-line arguments."""
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise StepDPOError(f"config {path!r}: cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise StepDPOError(f"config {path!r}: must be a mapping of options to values, got {type(values).__name__}")
    names = {f.name for kind in (DataAndModel, StepDPOConfig) for f in fields(kind)}
    arguments: list[str] = []
    for name, value in values.items():
        if str(name).replace("-", "_") not in names:
            raise StepDPOError(f"config {path!r}: unknown option {name!r}")
        if value is None:
            continue
        items = value if isinstance(value, list) else [value]
        arguments += [f"--{name}", *(json.dumps(item) if isinstance(item, dict) else str(item) for item in items)]
    return arguments


def train(context: typer.Context) -> None:
    """Train a model on step pairs; --help lists every option."""
    options, config = parse(context.args)
    resume = _resume(config.resume_from_checkpoint)
    output_dir = Path(config.output_dir)
    check_output_dir(output_dir, resume)
    made = [folder for folder in (output_dir, *output_dir.parents) if not folder.exists()]
    try:
        _run(options, config, resume)
    except KeyboardInterrupt:
        typer.secho(_where_to_resume(output_dir), fg="yellow", err=True)
        raise typer.Exit(INTERRUPTED) from None
    finally:
        for folder in made:
            with suppress(OSError):  # one that holds something, or that another process has removed
                folder.rmdir()


def _resume(value: str | None) -> str | bool | None:
    """What `StepDPOTrainer.train` takes: "true" and "false" of a command line or a YAML file are no paths."""
    return {"true": True, "false": None, "none": None, "": None}.get(str(value).lower(), value)


def _run(options: DataAndModel, config: StepDPOConfig, resume: str | bool | None) -> None:
    speaks = config.process_index == 0
    tokenizer = load_tokenizer(options.tokenizer or options.model)

    def load(path: str) -> Any:
        pairs = load_step_pairs(
            path,
            tokenizer,
            template=options.template,
            boundary=options.boundary,
            unit=options.unit,
            max_length=options.max_length,
            max_tokens=config.max_tokens_per_batch,
            share=config.share,
            strict=options.strict,
            limit=options.limit,
        )
        if speaks:
            typer.echo(str(pairs.report))
        return pairs

    if options.dry_run:
        config.output_dir = os.curdir  # Trainer makes its folder when it is built
        config.push_to_hub = False
    pairs = load(options.data)
    eval_pairs = None if options.eval_data is None else load(options.eval_data)
    patience = options.early_stopping_patience
    trainer = StepDPOTrainer(
        model=load_model(options.model, options.dtype, load_in_4bit=options.load_in_4bit),
        args=config,
        ref_model=None if options.ref_model is None else load_model(options.ref_model, options.dtype),
        peft_config=_adapter(options),
        train_dataset=pairs,
        processing_class=tokenizer,
        eval_dataset=eval_pairs,
        callbacks=None if patience is None else [EarlyStoppingCallback(patience)],
    )
    if options.merge_adapter:
        _check_mergeable(trainer.model)
    if options.dry_run:
        plan = trainer.plan()
        if speaks:
            typer.echo(str(plan))
            print_pair(Console(highlight=False), pairs[0], tokenizer)
            typer.echo("\ndry run: nothing was trained or written")
        return
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    report = trainer.write_report()
    if not speaks:
        return
    typer.echo(f"trained {trainer.state.global_step} steps on {len(pairs)} pairs; the model is in {config.output_dir}")
    typer.echo(f"what came of it is in {report}")
    if options.merge_adapter:
        _save_merged(options, config)


def _adapter(options: DataAndModel) -> Any:
    if not options.lora_r:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=options.lora_r,
        lora_alpha=2 * options.lora_r if options.lora_alpha is None else options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=ALL_LINEAR if options.lora_target_modules == [ALL_LINEAR] else options.lora_target_modules,
        task_type="CAUSAL_LM",
    )


def _check_mergeable(model: Any) -> None:
    """Raises StepDPOError for an adapter of embeddings that are the head's weights, too."""
    lm = causal_lm(model)
    if lm.config.tie_word_embeddings and type(lm.get_input_embeddings()) is not torch.nn.Embedding:
        raise StepDPOError(
            "merge_adapter: the embeddings are also the head's weights, which their adapter does not change: leave "
            "them out of lora_target_modules, or load the adapter beside the model"
        )


def _save_merged(options: DataAndModel, config: StepDPOConfig) -> None:
    """Merged into the weights as they are on disk, also where those trained on were quantised."""
    from peft import PeftModel

    target = Path(config.output_dir) / "merged"
    model = PeftModel.from_pretrained(load_model(options.model, options.dtype), config.output_dir).merge_and_unload()
    with staged(config.output_dir) as folder:
        model.save_pretrained(folder / target.name)
        load_tokenizer(options.tokenizer or options.model).save_pretrained(folder / target.name)
        put_in_place(folder / target.name, target)
    typer.echo(f"the model with its adapter merged is in {target}")


def _where_to_resume(output_dir: Path) -> str:
    last = get_last_checkpoint(str(output_dir)) if output_dir.is_dir() else None
    if last is None:
        return "interrupted before the first checkpoint"
    return f"interrupted; the last checkpoint is {last}, continue with --resume_from_checkpoint true"
