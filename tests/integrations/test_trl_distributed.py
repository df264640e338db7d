"""Two processes under torchrun (gloo, on the CPU): TRL with and without `accelerate_dpo` logs the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("trl")

from tests.conftest import ROOT
from tests.integrations.test_trl import assert_same
from tests.integrations.trl_runs import plain_rows

pytestmark = pytest.mark.slow
LIMIT = 300  # seconds


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"precompute_ref_log_probs": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        {"lora": True, "ddp_find_unused_parameters": True},
        {"fsdp": True, "fsdp_config": {"version": 2}},
    ],
    ids=["ddp", "ddp, precomputed", "ddp, adapter", "fsdp2"],
)
def test_two_processes_log_what_trl_logs(settings, tiny_model, tiny_tokenizer, step_records, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer("qwen2").save_pretrained(tmp_path / "model")
    plain_rows(step_records(4, 6)).to_json(tmp_path / "rows.jsonl")
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
            *("-m", "tests.integrations.trl_worker", str(tmp_path)),
            json.dumps({"max_steps": 5, "per_device_train_batch_size": 2, **settings}),
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT)))),
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _, said = process.communicate(timeout=LIMIT)
    finally:
        process.terminate()  # the launcher ends its processes with it, which may wait for one another
        process.wait()
    assert process.returncode == 0, said
    theirs, ours = json.loads((tmp_path / "histories.json").read_text())
    assert_same(ours, theirs)
