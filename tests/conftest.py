"""Fixtures for every test: tiny models and tokenizers made on the spot, synthetic records, no network.

tiny_model(kind, ...)      a small random causal language model of one of tests/families.py
tiny_tokenizer(kind, ...)  a small byte-level BPE with a chat template; "llama" begins every text with a BOS
step_records(...)          records of the released schema, several pairs for each problem
shared_data                folder with the maintainers' real data, or the test is skipped
"""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

# Libraries read these when they are imported, so they are set before anything else is.
_CACHES = Path(tempfile.mkdtemp(prefix="stepdpo-tests-"))
os.environ.update(
    HF_DATASETS_OFFLINE="1",
    HF_HOME=str(_CACHES / "huggingface"),
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_OFFLINE="1",
    MPLBACKEND="agg",
    OMP_WAIT_POLICY="PASSIVE",  # threads that wait for one another leave the cores to other processes
    TOKENIZERS_PARALLELISM="false",
    TRANSFORMERS_OFFLINE="1",
    XDG_CACHE_HOME=str(_CACHES),
)
for _name in [name for name in os.environ if name.startswith("STEPDPO_") and name != "STEPDPO_SHARED_DATA"]:
    del os.environ[_name]

import pytest  # noqa: E402 (after the environment)
import torch  # noqa: E402

from tests import families  # noqa: E402

# Without a GPU Triton kernels run in its interpreter, which it asks for when a kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))

if importlib.util.find_spec("hypothesis"):
    from hypothesis import settings

    # The same examples in every run, and no failure for being slow on a busy machine.
    settings.register_profile("stepdpo", deadline=None, derandomize=True, database=None)
    settings.load_profile("stepdpo")


def pytest_unconfigure() -> None:
    shutil.rmtree(_CACHES, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_configure(config: pytest.Config) -> None:
    """Hot paths are timed where that is asked for (`make bench`), and run once otherwise."""
    if hasattr(config.option, "benchmark_disable") and not config.option.benchmark_enable:
        config.option.benchmark_disable = True


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """families.tiny_model: a new small random model of one of the families."""
    return families.tiny_model


_TEXT = (
    "Question: Solve this problem and put the answer in a box. Let's think step by step.",
    "Step 1: Ann has 12 apples and buys 7 more, so she has 12 + 7 = 19 apples.",
    "Step 2: She gives 5 away, so 19 - 5 = 14 remain. The answer is \\boxed{14}.",
    "Step 3: Each box holds 6 books, so 4 boxes hold 4 * 6 = 24 books.",
    "Below is an instruction that describes a task. Write a response that completes the request.",
    "### Instruction: ### Response: User: Assistant: system user assistant helpful",
)
_CHAT_TEMPLATES = {
    "llama": (
        "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "qwen2": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}


@cache
def _tokenizer_json(kind: str, vocab_size: int) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    special = {
        "llama": ["<s>", "</s>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
        "qwen2": ["<|endoftext|>", "<|im_end|>", "<pad>", "<|im_start|>"],
    }[kind]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    if kind == "llama":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    return tokenizer.to_str()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """tiny_tokenizer(kind="llama", *, vocab_size=400): a new tokenizer of at most that many tokens, at least 300.

    "llama" adds the BOS <s> to every text and writes it in its chat template as well, as Llama 3 does; "qwen2" has no
    BOS. Token 0 is the BOS (unused in "qwen2"), 1 the end of a turn, 2 the padding, as in tiny_model.
    """

    def make(kind: str = "llama", *, vocab_size: int = 400) -> PreTrainedTokenizerFast:
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast

        names = {
            "llama": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
            "qwen2": {"eos_token": "<|im_end|>", "pad_token": "<pad>"},
        }[kind]
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(_tokenizer_json(kind, vocab_size)),
            chat_template=_CHAT_TEMPLATES[kind],
            clean_up_tokenization_spaces=False,
            **names,
        )

    return make


@pytest.fixture(scope="session")
def step_records() -> Callable[..., list[dict[str, str]]]:
    """step_records(problems=3, pairs=4, *, steps=3, seed=0): `problems * pairs` records of the released schema.

    The pairs of a problem share its prompt and begin at step 1, 2, ... `steps` in turn, so that their prefixes nest;
    from pair `steps` on, prefixes repeat with another rejected step. Rejected steps are wrong by a small number, and
    no two pairs are equal.
    """

    def make(problems: int = 3, pairs: int = 4, *, steps: int = 3, seed: int = 0) -> list[dict[str, str]]:
        rng = random.Random(seed)
        records = []
        for problem in range(problems):
            start = 10 * (problem + 1) + rng.randrange(10)  # no two problems alike
            changes = [rng.randrange(2, 10) for _ in range(steps)]
            values = [start]
            for change in changes:
                values.append(values[-1] + change)
            solution = [f" {a} + {d} = {b} apples." for a, d, b in zip(values, changes, values[1:], strict=False)]
            bought = ", then ".join(str(change) for change in changes)
            for pair in range(pairs):
                k, error = pair % steps, 1 + pair // steps
                before = "".join(f"Step {i + 1}:{solution[i]}\n" for i in range(k))
                marker = f"Let's think step by step.\n{before}Step {k + 1}:"
                after = "".join(f"\nStep {i + 1}:{solution[i]}" for i in range(k + 1, steps))
                wrong = f" {values[k]} + {changes[k]} = {values[k + 1] + error} apples."
                records.append(
                    {
                        "dataset": "synthetic",
                        "prompt": f"Ann has {start} apples and buys {bought} more. How many apples has she?",
                        "initial_reason_steps": marker,
                        "chosen": solution[k],
                        "rejected": wrong,
                        "full_chosen": f"{solution[k]}{after}",
                        "full_rejected": wrong,
                        "answer": str(values[-1]),
                    }
                )
        return records

    return make


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real data: STEPDPO_SHARED_DATA, or ../shared/data beside the checkout; skips where it is absent."""
    folder = Path(os.environ.get("STEPDPO_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no folder with shared data; set STEPDPO_SHARED_DATA")
    return folder
