"""The reports say what the numbers say, and show texts as texts."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from stepdpo_kernels.answers import AnswerChecker
from stepdpo_kernels.data.generation import Completion, Sampling
from stepdpo_kernels.evaluation.documents import Heading, Paragraph, Quoted, Table, to_html, to_markdown
from stepdpo_kernels.evaluation.metrics import estimate
from stepdpo_kernels.evaluation.report import LONGEST, read_results, write_report
from stepdpo_kernels.evaluation.run import evaluate
from stepdpo_kernels.evaluation.tasks import find_task
from stepdpo_kernels.types import StepDPOError
from tests.evaluation.scripted import Scripted, answer_of, sums, write_jsonl

GREEDY = Sampling(temperature=0, max_new_tokens=100)
EVIL = "<script>alert(1)</script> | `x` ```` \\ *b* & <!-- $\\frac{1}{2}$"


class Page(HTMLParser):
    """Tags that are open at the end, every tag with its attributes, and the text outside <style>."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)


def test_html_is_whole_and_escaped():
    blocks = [
        Heading(EVIL),
        Paragraph(EVIL, bold=True),
        Table(("", EVIL), [(EVIL, "1")]),
        Quoted(EVIL, [("Solution", EVIL)], "wrong"),
    ]
    html = to_html(EVIL, blocks)
    page = Page(html)
    assert page.open == []
    assert page.texts.count(EVIL) == 8
    assert {tag for tag, _ in page.tags} <= {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "strong", "div", "table", "tr", "th"),
        *("td", "details", "summary", "pre"),
    }
    assert not any({"src", "href"} & attributes.keys() for _, attributes in page.tags)
    assert "url(" not in html
    assert "http" not in html
    assert "prefers-color-scheme: dark" in html


def test_markdown_keeps_texts_apart():
    table = to_markdown("t", [Table(("a", "b"), [("x|y\nz", "1")])]).splitlines()
    assert table[2:] == ["| a | b |", "| --- | ---: |", "| x\\|y z | 1 |"]
    text = "```\n# no heading\n````"
    lines = to_markdown("t", [Quoted("q", [("Solution", text)])]).splitlines()
    assert lines[-5:] == ["`````text", *text.split("\n"), "`````"]
    assert to_markdown("a_b <i>", []) == "# a\\_b \\<i\\>\n"


# ---- of runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checker():
    with AnswerChecker() as checker:
        yield checker


def say(wrong: set[int]):
    def answer(problem: str, i: int) -> str | Completion:
        number = answer_of(problem) // 2
        if number == 5:
            return Completion(" on and on", "length")
        return f" {EVIL}\nStep 2: The answer is \\boxed{{{2 * number + (number in wrong)}}}."

    return answer


@pytest.fixture
def data(tmp_path) -> Path:
    return write_jsonl(tmp_path / "sums.jsonl", sums(20))


def run(data: Path, out: Path, checker, wrong: set[int], name: str = "model-a", sampling: Sampling = GREEDY):
    evaluate(find_task(data=data), out, Scripted(say(wrong), name), checker, sampling, settings={"template": "none"})
    return read_results(out)


def rows_of(markdown: str) -> dict[str, list[str]]:
    lines = [re.split(r" (?<!\\)\| ", line[2:-2]) for line in markdown.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in lines}


def test_report_of_a_run(data, tmp_path, checker):
    results = run(data, tmp_path / "a", checker, {1, 2, 3})
    files = write_report(results)
    assert [file.name for file in files] == ["report.md", "report.html", "metrics.json"]
    markdown, html, numbers = (file.read_text() for file in files)
    found = estimate([1.0] * 16 + [0.0] * 4)
    assert "**Accuracy 80.0%, standard error 9.18 points, 95% interval 58.4 to 91.9, on 20 items.**" in markdown
    assert 100 * found.standard_error == pytest.approx(9.18, abs=0.005)
    rows = rows_of(markdown)
    assert rows["accuracy"] == ["80.0%", "9.18", "58.4 to 91.9"]
    assert rows["unfinished: cut off at 100 tokens, counted as not right"] == ["5.0%"]
    assert rows["even"][:2] == ["10", "90.0%"]
    assert rows["odd"][:2] == ["10", "70.0%"]
    assert [name for name in rows if name.startswith("Level")] == ["Level 1", "Level 2", "Level 3"]
    assert rows["template"] == ["none"]
    assert rows["samples of each item"] == ["1, greedy"]
    wrong, right = markdown.index("## Not right"), markdown.index("## Right")
    assert set(re.findall(r"### (q\d+): (.*), right is", markdown[wrong:right])) == {
        ("q1", "answered 3"),
        ("q2", "answered 5"),
        ("q3", "answered 7"),
        ("q5", "unfinished"),
    }
    assert markdown[right:].count("### q") == 5
    assert f"{EVIL}\nStep 2: The answer is" in markdown
    page = Page(html)
    assert page.open == []
    assert "script" not in {tag for tag, _ in page.tags}
    assert any(text.startswith(f"Let's think step by step.\nStep 1: {EVIL}") for text in page.texts)
    value = json.loads(numbers)
    assert value["accuracy"] == pytest.approx(found._asdict())
    assert (value["items"], value["settings"]["generator"], value["settings"]["counts"]["right"]) == (20, "model-a", 16)
    assert [row["name"] for row in value["subjects"]] == ["even", "odd"]


def test_items_shown_do_not_change(data, tmp_path, checker):
    first = [item.id for item in run(data, tmp_path / "a", checker, set()).right]
    assert [item.id for item in read_results(tmp_path / "a").right] == first
    assert len(set(first)) == 5
    second = run(data, tmp_path / "b", checker, {int(first[1][1:])})
    assert [item.id for item in second.right[:4]] == [first[0], *first[2:]]
    assert [item.id for item in second.wrong if item.id != "q5"] == [first[1]]


def test_report_of_several_samples(data, tmp_path, checker):
    generator = Scripted(lambda problem, i: f" \\boxed{{{answer_of(problem) + (i == 0) + (problem[0] == '7')}}}")
    evaluate(find_task(data=data), tmp_path / "a", generator, checker, Sampling(n=4, temperature=0.8))
    markdown = write_report(read_results(tmp_path / "a"))[0].read_text()
    rows = rows_of(markdown)
    assert rows["mean over 4 samples"][:2] == ["71.2%", "3.75"]
    for name in ("maj@4", "pass@2", "pass@4"):
        assert rows[name] == ["95.0%", "5.00", "76.4 to 99.1"]
    assert list(rows).index("maj@4") < list(rows).index("pass@2") < list(rows).index("pass@4")
    assert rows["samples of each item"] == ["4, temperature 0.8, top-p 0.95, seed 0"]
    assert "The items are the clusters of the standard errors" in markdown


def test_comparison_in_the_report(data, tmp_path, checker):
    a = run(data, tmp_path / "a", checker, {1})
    b = run(data, tmp_path / "b", checker, {1, 2, 3, 4, 6, 7, 8}, "model-b")
    markdown, _, numbers = (file.read_text() for file in write_report(a, b))
    rows = rows_of(markdown)
    assert rows["model-a"][0] == "90.0%"
    assert rows["model-b"][0] == "60.0%"
    assert rows["difference"][:2] == ["+30.0", "10.51"]
    sentence = "better on 6, worse on 0; McNemar's exact test, two-sided: p = 0.0312."
    assert f"model-a against model-b on the same 20 items: +30.0 points (standard error 10.51); {sentence}" in markdown
    assert json.loads(numbers)["comparison"]["with"] == "model-b"
    assert json.loads(numbers)["comparison"]["p_value"] == 2 * 2**-6
    # One model twice goes by its folders.
    again = run(data, tmp_path / "c", checker, {1})
    assert f"{tmp_path / 'a'} against" in write_report(a, again)[0].read_text().replace("\\", "")


def test_comparison_with_other_items(data, tmp_path, checker):
    a = run(data, tmp_path / "a", checker, {1})
    before = (write_report(a)[0]).read_text()
    write_jsonl(data, sums(19))
    b = run(data, tmp_path / "b", checker, {1})
    with pytest.raises(StepDPOError, match=r"1 only in the first run \('q19'\); none only in the second run"):
        write_report(a, b)
    assert (tmp_path / "a" / "report.md").read_text() == before


def test_long_texts_are_cut(data, tmp_path, checker):
    write_jsonl(data, sums(1))
    long = Scripted(lambda *_: " begin" + "x" * 3 * LONGEST + "end \\boxed{0}")
    evaluate(find_task(data=data), tmp_path / "a", long, checker, GREEDY)
    files = write_report(read_results(tmp_path / "a"))
    for file in files[:2]:
        assert "characters left out" in file.read_text()
        assert len(file.read_text()) < 2 * LONGEST
    assert json.loads(files[2].read_text())["accuracy"]["standard_error"] is None
