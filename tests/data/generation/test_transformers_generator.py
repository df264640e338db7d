"""What Sampling says is what a transformers model does, whatever else runs beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from stepdpo_kernels.data.generation import Completion, Prompt, Sampling
from stepdpo_kernels.data.generation.prompts import PromptRenderer
from stepdpo_kernels.data.generation.run import cut
from stepdpo_kernels.data.generation.transformers_generator import TransformersGenerator
from stepdpo_kernels.types import StepDPOError
from tests.families import FAMILIES

PROMPTS = [Prompt(f"Ann has {'12 and ' * i}7 apples. How many?", "Step 1:") for i in (3, 0, 5, 1, 2)]
SHORT = Sampling(max_new_tokens=12, logps=True)


@pytest.fixture
def make(tiny_model: Any, tiny_tokenizer: Any) -> Callable[..., TransformersGenerator]:
    def build(kind: str = "llama", config: dict[str, Any] | None = None, **options: Any) -> TransformersGenerator:
        return TransformersGenerator(tiny_model(kind, **config or {}), tiny_tokenizer("llama"), **options)

    return build


def greedy_by_hand(generator: TransformersGenerator, prompt: Prompt, tokens: int) -> tuple[list[int], list[float]]:
    """One forward for each token, no cache, no padding."""
    renderer = PromptRenderer(generator.tokenizer, "chat")
    (ids,) = renderer.ids([prompt])
    chosen: list[int] = []
    logps: list[float] = []
    for _ in range(tokens):
        with torch.no_grad():
            logits = generator.model(torch.tensor([ids + chosen])).logits[0, -1]
        token = int(logits[: len(generator.tokenizer)].argmax())
        if token in (1, 6):  # "</s>", "<|end|>"
            break
        chosen.append(token)
        logps.append(float(logits.log_softmax(-1)[token]))
    return chosen, logps


def texts(completions: list[list[Completion]]) -> list[list[str]]:
    return [[completion.text for completion in each] for each in completions]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2"])
def test_greedy_is_the_argmax_of_each_forward(make: Any, kind: str) -> None:
    generator = make(kind, FAMILIES[kind].config, batch_size=2)
    found = generator.generate(PROMPTS, Sampling(temperature=0, max_new_tokens=12, logps=True))
    for prompt, (completion,) in zip(PROMPTS, found, strict=True):
        ids, logps = greedy_by_hand(generator, prompt, 12)
        assert completion.text == generator.tokenizer.decode(ids, skip_special_tokens=True)
        assert completion.logps == pytest.approx(logps, abs=1e-4)
        assert completion.finish == ("length" if len(ids) == 12 else "stop")


def test_a_completion_depends_on_seed_prompt_and_number_alone(make: Any) -> None:
    sampling = Sampling(n=3, max_new_tokens=12, logps=True)
    first = make(batch_size=4).generate(PROMPTS, sampling)
    other = make(batch_size=7)
    torch.manual_seed(17)
    torch.rand(3)
    assert texts(other.generate(PROMPTS[::-1], sampling))[::-1] == texts(first)
    assert texts(other.generate(PROMPTS[2:3], sampling)) == texts(first[2:3])
    assert texts(other.generate(PROMPTS, Sampling(n=1, max_new_tokens=12))) == [each[:1] for each in texts(first)]
    assert len({completion.text for each in first for completion in each}) == 15
    assert texts(other.generate(PROMPTS, Sampling(n=3, max_new_tokens=12, seed=1))) != texts(first)


def test_the_random_state_is_left_alone(make: Any) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    make().generate(PROMPTS, SHORT)
    assert torch.equal(torch.get_rng_state(), before)


def test_logps_are_those_of_a_forward_at_temperature_one(make: Any) -> None:
    generator = make(batch_size=5)
    for prompt, (completion,) in zip(PROMPTS, generator.generate(PROMPTS, SHORT), strict=True):
        # The tokens are not kept, so they are looked for: each has the log-prob of some token with the text that ends
        # where it ends. One forward over all of them is then their joint probability.
        (ids,) = generator.renderer.ids([prompt])
        chosen = tokens_of(generator, ids, completion)
        with torch.no_grad():
            logits = generator.model(torch.tensor([ids + chosen])).logits[0, len(ids) - 1 : -1]
        logps = logits.log_softmax(-1).gather(-1, torch.tensor(chosen)[:, None])[:, 0]
        assert completion.logps == pytest.approx(logps.tolist(), abs=1e-4)


def tokens_of(generator: TransformersGenerator, ids: list[int], completion: Completion) -> list[int]:
    assert completion.logps is not None
    chosen: list[int] = []
    for logp in completion.logps:
        with torch.no_grad():
            logps = generator.model(torch.tensor([ids + chosen])).logits[0, -1].log_softmax(-1)
        chosen.append(int((logps - logp).abs().argmin()))
    assert generator.tokenizer.decode(chosen, skip_special_tokens=True) == completion.text
    return chosen


def test_nothing_of_the_models_own_generation_config_leaks_in(make: Any) -> None:
    plain, loaded = make(), make()
    own = loaded.model.generation_config
    own.update(
        do_sample=True,
        top_k=1,
        temperature=0.1,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        min_new_tokens=3,
        max_length=20,
        num_beams=3,
        num_return_sequences=2,
        suppress_tokens=[5, 6, 7],
        bad_words_ids=[[9]],
        use_cache=False,
    )
    for sampling in (SHORT, Sampling(temperature=0, max_new_tokens=12)):
        assert texts(loaded.generate(PROMPTS, sampling)) == texts(plain.generate(PROMPTS, sampling))
    assert loaded.model.generation_config is own


@pytest.mark.parametrize("ends", [[300, 17], 17, None])
def test_the_models_own_end_tokens_end(make: Any, ends: Any) -> None:
    generator = make()
    generator.model.generation_config.eos_token_id = ends
    rigged(generator, [100, 101, 17, 102])
    ((completion,),) = generator.generate(PROMPTS[:1], Sampling(temperature=0, max_new_tokens=4, logps=True))
    ids = [100, 101] if ends else [100, 101, 17, 102]
    assert completion.text == generator.tokenizer.decode(ids)
    assert completion.finish == ("stop" if ends else "length")
    assert completion.logps is not None
    assert completion.ends is not None
    assert len(completion.logps) == len(completion.ends) == len(ids)


@pytest.mark.parametrize("end", ["</s>", "<|end|>"])
def test_the_end_of_the_turn_ends(make: Any, end: str) -> None:
    generator = make()
    generator.model.generation_config.eos_token_id = None
    rigged(generator, [100, generator.tokenizer.convert_tokens_to_ids(end), 101])
    ((completion,),) = generator.generate(PROMPTS[:1], Sampling(temperature=0, max_new_tokens=3))
    assert completion == Completion(generator.tokenizer.decode([100]), "stop")


def rigged(generator: TransformersGenerator, tokens: list[int], value: float = 40.0) -> None:
    """The model now writes these tokens, whatever it is asked; a NaN as value makes a broken model."""
    forward = generator.model.forward
    step = iter(tokens)

    def write(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits[:, -1] = 0.0
        output.logits[:, -1, next(step)] = value
        return output

    generator.model.forward = write


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (("\nStep 2",), "We add 12.\nStep"),
        (("Step 2", "\nStep"), "We add 12."),
        (("12.\nSt",), "We add "),
        (("d 1",), "We ad"),
        (("We",), ""),
        (("Step 3", "zzz"), "We add 12.\nStep 1: é😀"),
        (("😀",), "We add 12.\nStep 1: é"),
        (("é",), "We add 12.\nStep 1: "),
        (("Step 1", "2.\n"), "We add 1"),
    ],
)
def test_a_stop_text_ends_and_is_cut_off(make: Any, stop: tuple[str, ...], text: str) -> None:
    generator = make()
    whole = "We add 12.\nStep 1: é😀"
    text = "We add 12.\nStep 1: é😀" if stop == ("\nStep 2",) else text
    ids = generator.tokenizer(whole, add_special_tokens=False)["input_ids"]
    rigged(generator, ids)
    sampling = Sampling(temperature=0, max_new_tokens=len(ids), stop=stop, logps=True)
    ((completion,),) = generator.generate(PROMPTS[:1], sampling)
    assert completion.text == text
    assert completion.finish == ("length" if text == whole else "stop")
    assert completion.ends is not None
    assert completion.logps is not None
    assert len(completion.ends) == len(completion.logps)
    assert completion.ends == tuple(sorted(completion.ends))
    assert (completion.ends[-1] if completion.ends else 0) == len(text)
    # As few tokens as hold the text.
    pieces = [generator.tokenizer.decode(ids[:i]) for i in range(len(ids) + 1)]
    assert len(completion.ends) == next(i for i, piece in enumerate(pieces) if piece.startswith(text))


def test_cut_drops_the_tokens_that_begin_behind_it() -> None:
    assert cut("abcdef", [2, 2, 4, 6, 6], 3) == ("abc", [2, 2, 3])
    assert cut("abcdef", [2, 4, 6], 4) == ("abcd", [2, 4])
    assert cut("abc", [3], 0) == ("", [])


def test_a_context_that_is_full(make: Any) -> None:
    generator = make(config={"max_position_embeddings": 32}, batch_size=3)
    lengths = [len(ids) for ids in generator.renderer.ids(PROMPTS)]
    assert max(lengths) > 32 > min(lengths)
    found = generator.generate(PROMPTS, Sampling(n=2, max_new_tokens=20, logps=True))
    whole = make().generate(PROMPTS, Sampling(n=2, max_new_tokens=20, logps=True))
    for length, each, free in zip(lengths, found, whole, strict=True):
        for completion, unbounded in zip(each, free, strict=True):
            if length >= 32:
                assert completion.finish == "failed"
                assert completion.error == f"a prompt of {length} tokens leaves no room in a context of 32"
                continue
            assert completion.logps is not None
            assert unbounded.logps is not None
            assert len(completion.logps) <= 32 - length
            assert completion.logps == pytest.approx(unbounded.logps[: 32 - length], abs=1e-4)
            if len(unbounded.logps) > 32 - length:
                assert completion.finish == "length"


def test_learned_positions_are_never_passed(tiny_tokenizer: Any) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=400, n_positions=32, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)
    generator = TransformersGenerator(GPT2LMHeadModel(config).eval(), tiny_tokenizer("llama"))
    lengths = [len(ids) for ids in generator.renderer.ids(PROMPTS)]
    found = generator.generate(PROMPTS, Sampling(max_new_tokens=60, logps=True))
    for length, (completion,) in zip(lengths, found, strict=True):
        assert (completion.finish == "failed") == (length >= 32)
        assert len(completion.logps or ()) <= max(0, 32 - length)


def test_logits_that_are_not_finite(make: Any) -> None:
    generator = make()
    rigged(generator, [100, 101, 102], float("nan"))
    ((completion,),) = generator.generate(PROMPTS[:1], Sampling(max_new_tokens=3))
    assert completion == Completion("", "failed", "the model's logits are not finite")


def test_the_training_mode_is_put_back(make: Any) -> None:
    generator = make(config={"attention_dropout": 0.9})
    evaluated = texts(generator.generate(PROMPTS, SHORT))
    model = generator.model.train()
    model.model.layers[0].eval()
    model.config.use_cache = False
    before = [module.training for module in model.modules()]
    assert texts(generator.generate(PROMPTS, SHORT)) == evaluated
    assert [module.training for module in model.modules()] == before
    with pytest.raises(RuntimeError, match="broken"):
        broken(generator)
    assert [module.training for module in model.modules()] == before


def broken(generator: TransformersGenerator) -> None:
    def forward(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("broken")

    generator.model.forward = forward
    generator.generate(PROMPTS[:1], SHORT)


def test_out_of_memory_says_what_to_do(make: Any) -> None:
    def forward(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    generator = make(batch_size=3)
    generator.model.forward = forward
    with pytest.raises(StepDPOError, match=r"3 completions of up to \d+ tokens .* batch_size is 3"):
        generator.generate(PROMPTS, SHORT)


def test_a_model_that_is_switched_to_packed_batches(make: Any) -> None:
    from stepdpo_kernels.model import enable_packed_forward

    generator = make()
    expected = texts(generator.generate(PROMPTS, SHORT))
    enable_packed_forward(generator.model)
    assert generator.model.config._attn_implementation.startswith("stepdpo_tree")
    assert texts(generator.generate(PROMPTS, SHORT)) == expected
    with pytest.raises(StepDPOError, match="has no paged form"):
        TransformersGenerator(generator.model, generator.tokenizer, continuous=True)


def test_a_model_with_adapters(make: Any) -> None:
    peft = pytest.importorskip("peft")
    generator = make()
    expected = texts(generator.generate(PROMPTS, SHORT))
    adapted = peft.get_peft_model(generator.model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.base_model.model.generation_config.repetition_penalty = 9.0
    again = TransformersGenerator(adapted, generator.tokenizer)
    assert texts(again.generate(PROMPTS, SHORT)) == expected


def test_continuous_batching_gives_the_same_greedy_completions(make: Any) -> None:
    from transformers import ContinuousBatchingConfig

    small = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=256, page_size=32)
    sampling = Sampling(temperature=0, max_new_tokens=10, stop=("e",))
    generator = make(continuous=small)
    generator.model.generation_config.repetition_penalty = 9.0
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert generator.generate(PROMPTS, sampling) == make().generate(PROMPTS, sampling)
    drawn = generator.generate(PROMPTS[:2], Sampling(n=2, max_new_tokens=5))
    assert [len(each) for each in drawn] == [2, 2]
    assert len({completion.text for each in drawn for completion in each}) > 1
    assert torch.equal(torch.get_rng_state(), before)
    ((with_logps,),) = generator.generate(PROMPTS[:1], Sampling(temperature=0, max_new_tokens=3, logps=True))
    assert with_logps.logps is not None


def test_options_that_make_no_sense(make: Any, tiny_model: Any, tiny_tokenizer: Any) -> None:
    with pytest.raises(StepDPOError, match="batch_size must be at least 1, got 0"):
        make(batch_size=0)
    with pytest.raises(StepDPOError, match="on a CPU the cache would take most of the memory"):
        make(continuous=True)
    with pytest.raises(StepDPOError, match="template must be one of"):
        make(template="other")
    assert make().name == "transformers:llama"
    assert make(name="mine").name == "mine"
    empty = TransformersGenerator(tiny_model("qwen2"), tiny_tokenizer("qwen2"), template="none")
    ((completion,),) = empty.generate([Prompt("")], SHORT)
    assert completion.error == "the prompt has no tokens"
    assert empty.generate([], SHORT) == []
