"""Cutting prompt + steps + step into one shared prefix and two branches."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from stepdpo_kernels.data.records import StepRecord
from stepdpo_kernels.data.templates import TEMPLATE_NAMES
from stepdpo_kernels.data.tokenization import StepTokenizer
from stepdpo_kernels.types import StepDPOError

# Text that meets the traps: spaces at both ends, characters of several bytes, accents that combine, line ends.
pieces = st.sampled_from(
    [
        "Step 1:",
        "Step 12: ",
        " We",
        "We",
        "know",
        " ",
        "  ",
        "\n",
        "\n\n",
        "é",
        "e\u0301",
        "€",
        "日本",
        "😀",
        "\u200d",
        "3",
        ".",
    ]
)
texts = st.one_of(
    st.lists(pieces, max_size=6).map("".join),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
)
BYTE_LEVEL = [
    pytest.param(
        dict(trim_offsets=trim, use_regex=regex, add_prefix_space=space), id=f"trim{trim}-regex{regex}-space{space}"
    )
    for trim in (False, True)
    for regex in (False, True)
    for space in (False, True)
]


def step_record(prompt: str, steps: str, chosen: str, rejected: str) -> StepRecord:
    return StepRecord("here", "id", "", 1.0, prompt, steps, chosen, rejected)


def joint_ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def text_of(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def byte_length(tokenizer: Any, ids: list[int]) -> int:
    """A byte-level token spells each of its bytes with one character."""
    return sum(map(len, tokenizer.convert_ids_to_tokens(ids)))


@pytest.mark.parametrize("options", BYTE_LEVEL)
@given(texts, texts, texts, texts)
@settings(max_examples=60, deadline=None)
def test_joint_cut_of_byte_level_tokenizers(
    byte_level: Any, options: dict[str, bool], prompt: str, steps: str, chosen: str, rejected: str
):
    tokenizer = byte_level(**options)
    prompt = "Q" + prompt
    (pair,) = StepTokenizer(tokenizer, template="none")([step_record(prompt, steps, chosen, rejected)])
    before = prompt + steps
    right, wrong = joint_ids(tokenizer, before + chosen), joint_ids(tokenizer, before + rejected)
    bos, shared = pair.prefix_ids[:1], pair.prefix_ids[1:]
    assert bos == [tokenizer.bos_token_id]
    assert shared + pair.chosen_ids == right
    assert shared + pair.rejected_ids == wrong
    assert tokenizer.bos_token_id not in shared + right + wrong
    assert tokenizer.eos_token_id not in right + wrong
    if not options["add_prefix_space"]:
        assert text_of(tokenizer, shared + pair.chosen_ids) == before + chosen
        assert text_of(tokenizer, shared + pair.rejected_ids) == before + rejected

    # The prefix is the longest: a token more would reach into the step, or differ.
    added = [
        byte_length(tokenizer, ids) - len((before + step).encode())
        for ids, step in ((right, chosen), (wrong, rejected))
    ]
    limits = [len(before.encode()) + extra for extra in added]
    assert not shared or byte_length(tokenizer, shared) <= min(limits)
    if pair.chosen_ids and pair.rejected_ids and pair.chosen_ids[0] == pair.rejected_ids[0]:
        assert byte_length(tokenizer, [*shared, pair.chosen_ids[0]]) > min(limits)


@given(texts, texts, texts, texts)
@settings(max_examples=100, deadline=None)
def test_joint_cut_with_a_space_before_every_text_and_byte_fallback(
    metaspace: Any, prompt: str, steps: str, chosen: str, rejected: str
):
    tokenizer = metaspace
    (pair,) = StepTokenizer(tokenizer, template="none")([step_record(prompt, steps, chosen, rejected)])
    for branch, step in ((pair.chosen_ids, chosen), (pair.rejected_ids, rejected)):
        ids = pair.prefix_ids + branch
        assert ids == [0, *joint_ids(tokenizer, prompt + steps + step)]
        assert ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.eos_token_id not in ids
        assert text_of(tokenizer, ids[1:]).removeprefix(" ") == (prompt + steps + step).removeprefix(" ")
    assert len(text_of(tokenizer, pair.prefix_ids[1:])) <= len(prompt + steps) or "\ufffd" in text_of(
        tokenizer, pair.prefix_ids[1:]
    )


@pytest.mark.parametrize("name", ["smollm2", "deepseek", "qwen"])
def test_joint_cut_of_real_tokenizers(name: str, request: pytest.FixtureRequest):
    tokenizer = request.getfixturevalue(name)
    tokenize = StepTokenizer(tokenizer, template="none")

    @given(texts, texts, texts, texts)
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    def check(prompt: str, steps: str, chosen: str, rejected: str) -> None:
        (pair,) = tokenize([step_record("Q" + prompt, steps, chosen, rejected)])
        before = "Q" + prompt + steps
        for branch, step in ((pair.chosen_ids, chosen), (pair.rejected_ids, rejected)):
            assert pair.prefix_ids + branch == joint_ids(tokenizer, before + step)
            if name != "smollm2":  # its vocabulary lacks some control characters and drops them
                assert text_of(tokenizer, pair.prefix_ids + branch) == before + step
            assert tokenizer.eos_token_id not in branch
        assert byte_length(tokenizer, pair.prefix_ids) <= len(before.encode())

    check()


@pytest.mark.parametrize("name", ["smollm2", "deepseek", "qwen"])
def test_a_token_across_the_boundary_belongs_to_the_branch(name: str, request: pytest.FixtureRequest):
    tokenizer = request.getfixturevalue(name)
    unstable, stable = StepTokenizer(tokenizer, template="none")(
        [step_record("Q", "\nStep 1: ", "We add", "They add"), step_record("Q", "\nStep 4:", " Now", " Then")]
    )
    assert text_of(tokenizer, unstable.prefix_ids) == "Q\nStep 1:"
    assert text_of(tokenizer, unstable.chosen_ids) == " We add"
    assert text_of(tokenizer, unstable.rejected_ids) == " They add"
    separate, also_stable = StepTokenizer(tokenizer, template="none", boundary="separate")(
        [step_record("Q", "\nStep 1: ", "We add", "They add"), step_record("Q", "\nStep 4:", " Now", " Then")]
    )
    assert text_of(tokenizer, separate.prefix_ids) == "Q\nStep 1: "
    assert text_of(tokenizer, separate.chosen_ids) == "We add"
    assert stable == also_stable
    assert text_of(tokenizer, stable.chosen_ids) == " Now"


def test_only_one_branch_crosses_the_boundary(byte_level: Any):
    """The prefix is cut back for both, so that they share it."""
    tokenizer = byte_level()
    (pair,) = StepTokenizer(tokenizer, template="none")([step_record("Q", "\nStep 1: ", "We know", "\nWe know")])
    assert text_of(tokenizer, pair.prefix_ids) == "<s>Q\nStep 1:"
    assert text_of(tokenizer, pair.chosen_ids) == " We know"
    assert text_of(tokenizer, pair.rejected_ids) == " \nWe know"


def test_spaces_that_offsets_leave_out_are_counted(byte_level: Any):
    """The offsets of a token "e " may be those of "e" alone; it still reaches over a boundary before the space."""
    for trim in (False, True):
        tokenizer = byte_level(trim_offsets=trim, use_regex=False)
        encoding = tokenizer("Qbe x", add_special_tokens=False, return_offsets_mapping=True)
        assert tokenizer.convert_ids_to_tokens(encoding["input_ids"]) == ["Q", "b", "eĠ", "x"]
        assert encoding["offset_mapping"][2] == ((2, 3) if trim else (2, 4))
        (pair,) = StepTokenizer(tokenizer, template="none")([step_record("Q", "be", " x", " y")])
        assert text_of(tokenizer, pair.prefix_ids) == "<s>Qb"
        assert text_of(tokenizer, pair.chosen_ids) == "e x"
        assert text_of(tokenizer, pair.rejected_ids) == "e y"


@pytest.mark.parametrize("boundary", ["joint", "separate"])
@pytest.mark.parametrize("template", TEMPLATE_NAMES)
@pytest.mark.parametrize("eos", [False, True])
def test_one_bos_and_no_eos(byte_level: Any, template: str, boundary: str, eos: bool):
    tokenizer = byte_level(eos=eos)
    assert tokenizer("We")["input_ids"][-1:] == [1] or not eos
    tokenize = StepTokenizer(tokenizer, template=template, boundary=boundary)
    for pair in tokenize([step_record("Q", "Step 1:", " We", " No"), step_record("R", "", "We", "No")]):
        assert pair.prefix_ids[0] == 0
        for branch in (pair.chosen_ids, pair.rejected_ids):
            assert (pair.prefix_ids + branch).count(0) == 1
            assert 1 not in pair.prefix_ids + branch


@pytest.mark.parametrize("boundary", ["joint", "separate"])
def test_a_bos_that_the_prompt_has_is_not_doubled(byte_level: Any, boundary: str):
    tokenizer = byte_level()
    tokenize = StepTokenizer(tokenizer, template="none", boundary=boundary)
    with_bos, without = tokenize([step_record("<s>Q", ":", " We", " No"), step_record("Q", ":", " We", " No")])
    assert with_bos == without
    assert with_bos.prefix_ids[0] == 0
    tokenize = StepTokenizer(tokenizer, template="none", boundary=boundary)
    only_bos, after = tokenize([step_record("<s>", "", "We", "No"), step_record("Q", "", "We", "No")])
    assert only_bos.prefix_ids == [0]
    assert after.prefix_ids[0] == 0


def test_a_chat_template_writes_its_own_bos_or_none(byte_level: Any):
    tokenizer = byte_level()
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{{ messages[0]['content'] }}|"
    (pair,) = StepTokenizer(tokenizer)([step_record("Q", "", "We", "No")])
    assert text_of(tokenizer, pair.prefix_ids) == "Q|"


def test_separate_lays_the_pieces_end_to_end(metaspace: Any):
    tokenizer = metaspace
    (pair,) = StepTokenizer(tokenizer, template="none", boundary="separate")([step_record("Q", "Step 1:", "We", "So")])
    assert pair.prefix_ids == [0, *joint_ids(tokenizer, "QStep 1:")]
    assert pair.chosen_ids == joint_ids(tokenizer, "We")
    assert tokenizer.convert_ids_to_tokens(pair.chosen_ids)[0].startswith("▁")


def test_slow_tokenizer():
    slow = ByT5Tokenizer()
    assert not slow.is_fast
    with pytest.raises(
        StepDPOError, match=r"ByT5Tokenizer does not report; .*fast tokenizer, or choose boundary='separate'"
    ):
        StepTokenizer(slow, template="none")
    (pair,) = StepTokenizer(slow, template="none", boundary="separate")([step_record("Q", ":", " We", " No")])
    assert slow.decode(pair.prefix_ids + pair.chosen_ids) == "Q: We"
    assert slow.eos_token_id not in pair.prefix_ids + pair.chosen_ids + pair.rejected_ids


def test_batches_do_not_depend_on_their_neighbours(byte_level: Any):
    tokenize = StepTokenizer(byte_level(trim_offsets=True), template="alpaca")
    records = [step_record(f"Q{i % 3}", "Step 1:" * (i % 2), f" We {i}", f" We {i + 1}") for i in range(20)]
    assert tokenize(records) == [pair for record in records for pair in tokenize([record])]


def test_no_warning_about_long_texts(byte_level: Any, caplog: pytest.LogCaptureFixture):
    tokenizer = byte_level()
    tokenizer.model_max_length, before = 8, tokenizer.model_max_length
    try:
        (pair,) = StepTokenizer(tokenizer, template="none")([step_record("Q" * 200, "", "We", "No")])
    finally:
        tokenizer.model_max_length = before
    assert len(pair.prefix_ids) > 100
    assert not caplog.records


@pytest.mark.parametrize("name", ["smollm2", "deepseek", "qwen"])
def test_real_pairs(name: str, shared_data: Any, request: pytest.FixtureRequest):
    tokenizer = request.getfixturevalue(name)
    with (shared_data / "gsm8k_step_pairs.jsonl").open() as file:
        rows = [json.loads(line) for _, line in zip(range(200), file, strict=False)]
    fields = ("prompt", "initial_reason_steps", "chosen", "rejected")
    pairs = StepTokenizer(tokenizer, template="qwen2-boxed")([step_record(*(row[f] for f in fields)) for row in rows])
    for row, pair in zip(rows, pairs, strict=True):
        assert row["prompt"] in text_of(tokenizer, pair.prefix_ids)
        for branch, step in ((pair.chosen_ids, row["chosen"]), (pair.rejected_ids, row["rejected"])):
            assert text_of(tokenizer, pair.prefix_ids + branch).endswith(row["initial_reason_steps"] + step)
            assert text_of(tokenizer, branch).lstrip().startswith(step.strip()[:3])
