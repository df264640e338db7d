"""A process of test_trl_distributed: TRL's DPOTrainer as it comes, then accelerated. Arguments: folder, settings."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from stepdpo_kernels.integrations.trl import accelerate_dpo
from tests.integrations.trl_runs import history, make_trainer
from tests.trainer.sharded_worker import leave


def main() -> None:
    folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    adapter = settings.pop("lora", False)
    rows = Dataset.from_json(str(folder / "rows.jsonl"))
    found = []
    for accelerated in (False, True):
        arguments: dict[str, Any] = {}
        if adapter:
            arguments["peft_config"] = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        elif not settings.get("precompute_ref_log_probs"):
            arguments["ref_model"] = AutoModelForCausalLM.from_pretrained(folder / "model")
        trainer = make_trainer(
            folder / ("ours" if accelerated else "trl"),
            rows,
            AutoTokenizer.from_pretrained(folder / "model"),
            model=AutoModelForCausalLM.from_pretrained(folder / "model"),
            arguments=arguments,
            **settings,
        )
        if accelerated:
            accelerate_dpo(trainer)
        trainer.train()
        found.append(history(trainer))
    if trainer.is_world_process_zero():
        (folder / "histories.json").write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main()
