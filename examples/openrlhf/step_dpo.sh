#!/usr/bin/env bash
# Step-DPO in OpenRLHF on packed forests. Not run by us with DeepSpeed: see docs/integrations/openrlhf.md.
set -euo pipefail

python -m examples.openrlhf.write_pairs pairs.jsonl --tokenizer Qwen/Qwen2-7B-Instruct --output step_pairs.jsonl

deepspeed --module stepdpo_kernels.integrations.openrlhf \
  --stepdpo.end_of_step drop \
  --model.model_name_or_path Qwen/Qwen2-7B-Instruct \
  --data.dataset step_pairs.jsonl \
  --data.prompt_key prompt \
  --data.max_len 1024 \
  --ds.zero_stage 3 \
  --ckpt.output_dir out \
  --model.beta 0.4 \
  --adam.lr 5e-7 \
  --train.max_epochs 2 \
  --train.micro_batch_size 8 \
  --train.batch_size 128 \
  --model.gradient_checkpointing_enable
