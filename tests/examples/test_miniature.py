"""The demonstration: its checker, its files, and one run of every stage with tiny counts."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.miniature import evaluate, pairs, run, sft, task
from examples.miniature.model import EOS, make_model, make_tokenizer
from examples.miniature.report import Results
from examples.miniature.settings import QUICK, Settings
from examples.miniature.task import Problem
from stepdpo_kernels import StepDPOError, load_step_pairs

ROOT = Path(__file__).resolve().parents[2]
PROBLEM = Problem(97, (8, -3, 4))
RIGHT = "Step 1: 97+8=05. Step 2: taking 3 gives 02. Step 3: 02+4=06. Answer: 06"


def test_checker_takes_both_forms_and_finds_the_first_wrong_step():
    assert PROBLEM.prompt == "Compute 97+8-3+4:\n"
    assert PROBLEM.states == [97, 5, 2, 6]
    assert task.first_wrong_step(PROBLEM, RIGHT) is None
    assert task.first_wrong_step(PROBLEM, RIGHT.replace("97+8=05", "adding 8 gives 05")) is None
    for wrong, k in (
        (RIGHT.replace("97+8=05", "97+8=95"), 1),
        (RIGHT.replace("gives 02", "gives 12"), 2),
        (RIGHT.replace("taking 3", "taking 4"), 2),
        (RIGHT.replace("02+4", "03+4"), 3),
        (RIGHT.replace("Step 2:", "Step 3:"), 2),
        (RIGHT.replace("Step 2:", "so Step 2:"), 2),
        (RIGHT[: RIGHT.index("Step 3")], 3),
        ("", 1),
    ):
        assert task.first_wrong_step(PROBLEM, wrong) == k, wrong


def test_answers_are_compared_exactly():
    assert task.is_right(PROBLEM, RIGHT)
    for wrong in (RIGHT[:-1], RIGHT + "0", RIGHT.replace("Answer: 06", "Answer: 6"), "06", ""):
        assert not task.is_right(PROBLEM, wrong), wrong


def test_prompts_parse_back():
    for problem in islice(task.problems("sft", 5, 0), 200):
        assert Problem.parse(problem.prompt) == problem
    for text in ("Compute 7+8:\n", "Compute 97+8:", "Compute 97+0:\n", "97+8:\n", "Compute 97:\n"):
        with pytest.raises(ValueError, match="not a problem"):
            Problem.parse(text)


def test_corpus_errs_by_the_habit_alone_and_as_often_as_stated():
    random, with_chance, dropped = Random(1), 0, 0
    for problem in islice(task.problems("sft", 5, 1), 4000):
        solution = task.habitual_solution(problem, random)
        k = task.first_wrong_step(problem, solution)
        seen = problem.states[: k or 5]  # the states that the right part of the solution goes through
        chances = [i for i, before in enumerate(seen, 1) if task.drops_carry(before, problem.terms[i - 1])]
        with_chance += len(chances)
        if k is not None:
            dropped += 1
            assert k == chances[-1], (problem, solution)
            tens = problem.states[k - 1] // 10
            wrong = f"{10 * tens + problem.states[k] % 10:02}."
            steps = pairs.STEPS.split(solution)
            assert task.check_steps(problem.prompt, [step.text for step in steps.steps]) == k
            assert steps.steps[k - 1].text.endswith(wrong)
        else:
            assert task.is_right(problem, solution)
    error = math.sqrt(task.HABIT_PROBABILITY * (1 - task.HABIT_PROBABILITY) / with_chance)
    assert abs(dropped / with_chance - task.HABIT_PROBABILITY) < 5 * error


def test_splits_are_disjoint_and_fixed():
    drawn = {split: set(islice(task.problems(split, 5, 0), 500)) for split in task.SPLITS}
    assert all(len(problems) == 500 for problems in drawn.values())
    counts = evaluate.shared_problems({split: {p.prompt for p in problems} for split, problems in drawn.items()})
    assert set(counts.values()) == {0}
    assert drawn["collect"] == set(islice(task.problems("collect", 5, 0), 500))
    assert drawn["collect"] != set(islice(task.problems("collect", 5, 1), 500))


def test_shared_problems_counts_what_is_shared():
    assert evaluate.shared_problems({"a": {"x", "y"}, "b": {"y", "z"}, "c": set()}) == {
        "a and b": 1,
        "a and c": 0,
        "b and c": 0,
    }


def test_tokenizer_loses_nothing_and_plain_transformers_loads_it(tmp_path):
    tokenizer = make_tokenizer()
    texts = [p.prompt + task.habitual_solution(p, Random(0)) for p in islice(task.problems("sft", 5, 0), 100)]
    encoded = tokenizer([text + EOS for text in texts])["input_ids"]
    assert tokenizer.batch_decode(encoded, skip_special_tokens=True) == texts
    assert all(ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id for ids in encoded)
    # One token a word: the longest step has 13.
    assert max(map(len, encoded)) <= 15 + 13 * 5 + 6
    make_model(QUICK, tokenizer).save_pretrained(tmp_path)  # AutoTokenizer looks at the model beside it
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)([text + EOS for text in texts])["input_ids"] == encoded


def test_solutions_are_cut_into_steps():
    steps = pairs.STEPS.split(RIGHT)
    assert steps.text == RIGHT
    assert [step.text for step in steps.steps] == [" 97+8=05.", " taking 3 gives 02.", " 02+4=06."]
    assert (steps.before(2), steps.closing) == ("Step 1: 97+8=05. Step 2:", " Answer: 06")
    texts = [step.text for step in steps.steps]
    assert task.check_steps(PROBLEM.prompt, texts) == 0
    assert task.check_steps(PROBLEM.prompt, [*texts, " 06+1=07."]) == 4
    assert task.check_steps(PROBLEM.prompt, [texts[0], " taking 3 gives 12."]) == 2


def test_verification_refuses_pairs_that_are_not_what_they_say(tmp_path):
    record = {
        "prompt": PROBLEM.prompt,
        "initial_reason_steps": "Step 1: 97+8=05. Step 2:",
        "chosen": " taking 3 gives 02.",
        "rejected": " taking 3 gives 12.",
    }
    path = tmp_path / "pairs.jsonl"
    pairs.write(path, [record])
    assert pairs.read_verified(path, 3) == [record]
    for change in (
        {"chosen": " taking 3 gives 03."},
        {"rejected": " 05-3=02."},
        {"initial_reason_steps": "Step 1: 97+8=95. Step 2:"},
    ):
        pairs.write(path, [record, {**record, **change}])
        with pytest.raises(ValueError, match=r"pairs\.jsonl, line 2"):
            pairs.read_verified(path, 3)


def test_paired_standard_error():
    one = evaluate.Accuracy((True, True, True, False), 0)
    other = evaluate.Accuracy((True, False, True, False), 2)
    assert one.mean == 0.75
    assert one.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    difference, error = one.minus(other)
    assert difference == 0.25
    assert error == pytest.approx(0.5 / 2)  # the differences 0, 1, 0, 0 have a standard deviation of 1/2


# ---- one run of everything ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Demo:
    folder: Path
    results: Results


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Demo:
    folder = tmp_path_factory.mktemp("miniature") / "demo"
    return Demo(folder, run.run(folder, QUICK))


def test_every_file_is_there(demo):
    for name in (run.OWN, run.HELD_OUT, run.FOREIGN, run.REPORT, run.CURVES, run.SETTINGS):
        assert (demo.folder / name).stat().st_size > 0, name
    assert (demo.folder / run.CURVES).read_bytes().startswith(b"\x89PNG")
    text = (demo.folder / run.REPORT).read_text()
    for accuracy in (demo.results.before, demo.results.own, demo.results.foreign):
        assert f"{100 * accuracy.mean:.1f}% ± {100 * accuracy.standard_error:.1f}" in text
    assert "did as well as Step-DPO" in text


def test_pairs_are_verified_and_in_the_released_schema(demo):
    fields = ["dataset", "prompt", "initial_reason_steps", "chosen", "rejected"]
    fields += ["full_chosen", "full_rejected", "answer", "id", "group", "step_index", "chosen_logp", "rejected_logp"]
    records = {name: pairs.read_verified(demo.folder / name, QUICK.chain) for name in (run.OWN, run.HELD_OUT)}
    assert demo.results.pairs == len(records[run.OWN]) > 0
    assert demo.results.held_out == len(records[run.HELD_OUT]) > 0
    for record in records[run.OWN] + records[run.HELD_OUT]:
        assert list(record) == fields
        assert record["initial_reason_steps"].endswith(":")
        assert record["full_chosen"].startswith(record["chosen"])
        assert record["full_rejected"].startswith(record["rejected"])
        assert record["answer"] == Problem.parse(record["prompt"]).answer
    keys = Counter((r["prompt"], r["initial_reason_steps"], r["chosen"]) for r in records[run.OWN])
    assert set(keys.values()) == {1}
    assert not {r["prompt"] for r in records[run.OWN]} & {r["prompt"] for r in records[run.HELD_OUT]}


def test_random_numbers_change_the_rejected_step_alone(demo):
    own, foreign = (pairs.read_verified(demo.folder / name, QUICK.chain) for name in (run.OWN, run.FOREIGN))
    assert len(own) == len(foreign)
    for one, other in zip(own, foreign, strict=True):
        changed = {name for name in one if one[name] != other[name]}
        assert changed == {"rejected", "full_rejected"}
        assert one["rejected"][:-3] == other["rejected"][:-3] or not one["rejected"][-3:-1].isdigit()


def test_training_starts_at_log_2_and_nothing_leaked(demo):
    assert demo.results.first_loss == pytest.approx(math.log(2), abs=1e-6)
    assert len(demo.results.shared_problems) == 6
    assert set(demo.results.shared_problems.values()) == {0}


def test_sharing_encodes_fewer_tokens_and_changes_no_loss(demo):
    none, tree = demo.results.packing["none"], demo.results.packing["tree"]
    assert tree.tokens < none.tokens
    assert len(tree.seconds) == len(none.seconds) == QUICK.timing_steps
    assert tree.losses == pytest.approx(none.losses, abs=1e-5)


def test_models_moved_and_load_in_plain_transformers(demo):
    weights = {}
    for name in (run.SFT_MODEL, run.OWN_MODEL, run.FOREIGN_MODEL):
        model = AutoModelForCausalLM.from_pretrained(demo.folder / name)
        weights[name] = model.lm_head.weight.detach().clone()
        tokenizer = AutoTokenizer.from_pretrained(demo.folder / name)
        assert len(load_step_pairs(demo.folder / run.OWN, tokenizer, template="none")) == demo.results.pairs
    assert not weights[run.SFT_MODEL].equal(weights[run.OWN_MODEL])
    assert not weights[run.OWN_MODEL].equal(weights[run.FOREIGN_MODEL])


def test_second_run_takes_the_fine_tuned_model_and_gives_the_same(demo, monkeypatch):
    pairs_before = (demo.folder / run.OWN).read_bytes()
    monkeypatch.setattr(sft, "_train", lambda *_: pytest.fail("fine-tuned again"))
    again = run.run(demo.folder, QUICK)
    assert (demo.folder / run.OWN).read_bytes() == pairs_before
    assert (again.before, again.own, again.foreign) == (demo.results.before, demo.results.own, demo.results.foreign)
    assert again.packing["tree"].losses == demo.results.packing["tree"].losses


def test_fine_tuned_model_of_other_settings_is_not_taken(demo):
    record = (demo.folder / run.SFT_MODEL / sft.MADE_BY).read_text()
    assert record == sft.made_by(QUICK)
    assert json.loads(record)["sft_steps"] == QUICK.sft_steps
    for other in (Settings(), replace(QUICK, seed=1), replace(QUICK, sft_steps=QUICK.sft_steps + 1)):
        assert sft.made_by(other) != record
    assert sft.made_by(replace(QUICK, epochs=7)) == record


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StepDPOError, match="holds something else"):
        run.run(tmp_path, QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_command_line_names_a_folder_it_will_not_use(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    command = [sys.executable, "-m", "examples.miniature", "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "holds something else" in done.stderr
    assert "Traceback" not in done.stderr
