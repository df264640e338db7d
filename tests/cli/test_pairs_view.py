"""Pairs shown in the terminal and as HTML: the right numbers, and text that does no harm."""

from __future__ import annotations

import io
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.console import Console

from stepdpo_kernels.cli import main
from stepdpo_kernels.cli.pairs_view import Sort, Step, View, choose, html_page, print_views, token_logps, views_of
from stepdpo_kernels.data import load_step_pairs
from stepdpo_kernels.types import StepDPOError

HOSTILE = "<script>alert(1)</script> [red]x[/red] \x1b[31m\x1b]0;t\x07 \u202eabc\u202c \x00 & 'q' \"d\" $\\frac{1}{2}$"


def view(name: str, margin: float | None = None, text: str = " x") -> View:
    chosen = Step(text, ((" x", -1.0),), -1.0) if margin is not None else Step(text)
    rejected = Step(text, ((" x", -1.0 - margin),), -1.0 - margin) if margin is not None else Step(text)
    return View(name, "g", text, text, chosen, rejected, ("a", "b") if margin is not None else ())


def printed(views: list[View], width: int = 120) -> str:
    stream = io.StringIO()
    print_views(Console(file=stream, width=width, highlight=False, markup=False, color_system="truecolor"), views)
    return stream.getvalue()


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("margin", [None, 0.5])
@pytest.mark.parametrize("width", [60, 120])
def test_hostile_text_is_shown_and_does_nothing(margin, width):
    views = [view(HOSTILE, margin, HOSTILE)]
    text = printed(views, width)
    assert "\x1b]0" not in text
    assert "\u202e" not in text
    assert "\x00" not in text
    assert "[red]x[/red]" in text
    page = html_page(views, HOSTILE, HOSTILE)
    tags = Tags()
    tags.feed(page)
    assert "script" not in tags.seen
    assert "<script>alert(1)</script>" in tags.text
    assert "\u202e" not in page
    assert "http" not in page.replace("http-equiv", "")


def test_long_texts_are_folded():
    text = "again and " * 10_000
    page = html_page([view("a", None, text)], "s", None)
    assert page.count("<details>") == 4
    assert "98,500 more characters" in page
    assert len(printed([view("a", None, text)])) < 20_000


def test_which_are_shown():
    views = [view("a", 0.5), view("b", -2.0), view("c", 1.0)]
    assert [v.id for v in choose(views, 2, Sort.FILE)] == ["a", "b"]
    assert [v.id for v in choose(views, 2, Sort.MARGIN)] == ["b", "a"]
    assert [v.id for v in choose(views, 1, Sort.FILE, "c, a")] == ["c", "a"]
    assert sorted(v.id for v in choose(views, 3, Sort.RANDOM, None, 1)) == ["a", "b", "c"]
    assert choose(views, 2, Sort.RANDOM, None, 1) == choose(views, 2, Sort.RANDOM, None, 1)
    with pytest.raises(StepDPOError, match="there is no pair 'z' among the 3"):
        choose(views, 2, Sort.FILE, "a,z")
    with pytest.raises(StepDPOError, match="--sort margin: margins need --model"):
        choose([view("a")], 2, Sort.MARGIN)


@pytest.fixture
def data(tmp_path, step_records) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in step_records(3, 2)))
    return path


def test_log_probs_are_those_of_the_plain_model(data, tiny_model, tiny_tokenizer):
    tokenizer, model = tiny_tokenizer("qwen2"), tiny_model("qwen2")
    pairs = load_step_pairs(data, tokenizer)
    logps = token_logps(model, pairs, max_tokens=200)
    for pair in pairs:
        for ids, values in zip((pair.chosen_ids, pair.rejected_ids), logps[pair.id], strict=True):
            whole = torch.tensor([[*pair.prefix_ids.tolist(), *ids.tolist()]])
            with torch.no_grad():
                plain = model(whole).logits.log_softmax(-1)
            at = range(len(pair.prefix_ids) - 1, whole.shape[1] - 1)
            wanted = [plain[0, i, whole[0, i + 1]].item() for i in at]
            assert values == pytest.approx(wanted, abs=1e-4)
    from stepdpo_kernels.cli.pairs_view import read_records

    (first, *_) = views_of(read_records(str(data), "step", 1), pairs, tokenizer, logps)
    assert first.chosen.logp == pytest.approx(sum(logps[first.id][0]))
    assert "".join(token for token, _ in first.chosen.tokens).strip() == first.chosen.text.strip()
    assert first.margin == pytest.approx(sum(logps[first.id][0]) - sum(logps[first.id][1]))


def run(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert not ended.value.code


def test_the_command_with_a_model(data, tmp_path, tiny_model, tiny_tokenizer, capsys):
    tiny_model("qwen2").save_pretrained(tmp_path / "model")
    tiny_tokenizer("qwen2").save_pretrained(tmp_path / "model")
    page = tmp_path / "pairs.html"
    run(
        "inspect", str(data), "--model", str(tmp_path / "model"), "--show", "2", "--sort", "margin", "--html", str(page)
    )
    said = capsys.readouterr().out
    assert said.count("margin ") == 2
    assert "log-prob -" in said
    assert page.read_text().count("<article>") == 2


def test_the_command_without_a_tokenizer_shows_text(data, tmp_path, capsys):
    page = tmp_path / "pairs.html"
    run("inspect", str(data), "--show", "1", "--html", str(page))
    assert capsys.readouterr().out.count("chosen") == 1
    assert "log-prob" not in page.read_text()


def test_nothing_is_half_written(data, tmp_path, capsys):
    for name in ("nowhere/x.html", "x.txt"):
        with pytest.raises(SystemExit) as ended:
            main(["inspect", str(data), "--html", str(tmp_path / name)])
        assert ended.value.code == 2
        assert "--html" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.html*"))
