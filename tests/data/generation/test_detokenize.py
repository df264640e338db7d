"""Tokens one at a time give the text of all of them, and each token's end."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stepdpo_kernels.data.generation.detokenize import Detokenizer

PROMPT = "Let's think step by step.\nStep 1:"
texts = st.lists(
    st.sampled_from([" We", "know", " ", "  ", "\n", "é", "e\u0301", "€", "日本", "😀", "12", ".", " naïve", "\ufffd"]),
    max_size=8,
).map("".join)


def added(tokenizer: Any, prompt_ids: list[int], ids: list[int]) -> Detokenizer:
    found = Detokenizer(tokenizer, prompt_ids)
    for token in ids:
        found.add(token)
    found.finish()
    return found


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=texts.filter(lambda text: "\ufffd" not in text))  # which looks like an incomplete character
def test_ends_of_byte_level_tokens_are_exact(byte_level: Any, text: str) -> None:
    tokenizer = byte_level()
    prompt, ids = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (PROMPT, text))
    found = added(tokenizer, prompt, ids)
    assert found.text == text
    # The characters whose last byte lies in the tokens so far: one of these tokens is one character a byte.
    pieces = tokenizer.convert_ids_to_tokens(ids)
    done = [sum(map(len, pieces[: i + 1])) for i in range(len(ids))]  # bytes
    whole = [len(text[: i + 1].encode()) for i in range(len(text))]
    assert found.ends == [sum(end <= bytes_ for end in whole) for bytes_ in done]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=texts)
@pytest.mark.parametrize("kind", ["qwen2", "llama", "metaspace"])
def test_the_text_continues_the_prompt(kind: str, tiny_tokenizer: Any, metaspace: Any, text: str) -> None:
    tokenizer = metaspace if kind == "metaspace" else tiny_tokenizer(kind)
    prompt = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    whole = tokenizer(PROMPT + text, add_special_tokens=False)["input_ids"]
    if whole[: len(prompt)] != prompt:
        return
    found = added(tokenizer, prompt, whole[len(prompt) :])
    assert PROMPT + found.text == tokenizer.decode(whole, skip_special_tokens=True)
    assert found.ends == sorted(found.ends)
    assert len(found.ends) == len(whole) - len(prompt)
    assert not found.ends or found.ends[-1] == len(found.text)


def test_a_first_token_keeps_its_space(metaspace: Any) -> None:
    prompt = metaspace(PROMPT, add_special_tokens=False)["input_ids"]
    piece = min(piece for piece in metaspace.get_vocab() if piece[0] == "▁" and piece[1:].isalpha())
    token = metaspace.convert_tokens_to_ids(piece)
    assert metaspace.decode([token]) == piece[1:]
    assert added(metaspace, prompt, [token]).text == " " + piece[1:]


def test_special_tokens_have_no_text(tiny_tokenizer: Any) -> None:
    tokenizer = tiny_tokenizer("llama")
    ids = tokenizer("12<|end|><|end|> boxes", add_special_tokens=False)["input_ids"]
    found = added(tokenizer, [], ids)
    assert found.text == "12 boxes"
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert [at for token, at in zip(ids, found.ends, strict=True) if token == end] == [2, 2]


def test_a_character_that_stays_incomplete_is_written_as_the_tokenizer_does(tiny_tokenizer: Any) -> None:
    tokenizer = tiny_tokenizer("qwen2")
    ids = tokenizer("a😀", add_special_tokens=False)["input_ids"][:-1]
    found = added(tokenizer, [], ids)
    assert found.text == tokenizer.decode(ids) == "a�"
    assert found.ends[0] == 1
    assert found.ends[-1] == 2


def test_a_slow_tokenizer() -> None:
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    ids = tokenizer("naïve 😀", add_special_tokens=False)["input_ids"]
    found = added(tokenizer, [], ids)
    assert found.text == "naïve 😀"
    assert found.ends == [1, 2, 2, 3, 4, 5, 6, 6, 6, 6, 7]
