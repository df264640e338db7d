"""One process of a run: `python sharded_worker.py SETTINGS.json`, started by torchrun or accelerate launch.

Settings: model, data and eval_data (paths); lora (of peft), ref_model, evaluate_first and resume, if any; and
`config`, fields of StepDPOConfig.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from stepdpo_kernels.data import load_step_pairs
from stepdpo_kernels.trainer import StepDPOConfig, StepDPOTrainer, load_model, load_tokenizer


def main(settings: dict[str, Any]) -> None:
    deepspeed = settings["config"].get("deepspeed") or "ACCELERATE_USE_DEEPSPEED" in os.environ
    if deepspeed and not torch.accelerator.is_available():
        # DeepSpeed itself runs on CPUs (DS_ACCELERATOR=cpu); accelerate would start no process group for it there.
        PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    config = StepDPOConfig(**settings["config"])
    tokenizer = load_tokenizer(settings["model"])
    lora = None
    if settings.get("lora"):
        from peft import LoraConfig

        lora = LoraConfig(**settings["lora"], task_type="CAUSAL_LM")
    eval_data = settings.get("eval_data")
    trainer = StepDPOTrainer(
        load_model(settings["model"]),
        config,
        load_step_pairs(settings["data"], tokenizer),
        tokenizer,
        ref_model=load_model(settings["model"]) if settings.get("ref_model") else None,
        peft_config=lora,
        eval_dataset=None if eval_data is None else load_step_pairs(eval_data, tokenizer),
    )
    if settings.get("evaluate_first"):
        trainer.evaluate()
    trainer.train(resume_from_checkpoint=settings.get("resume"))
    trainer.save_model()
    leave()


def leave() -> None:
    """Ends the process where there are several: gloo's own threads now and then abort one that is exiting by itself."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        os._exit(0)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
