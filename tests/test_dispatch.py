"""Who is chosen, who is refused and why, and who may ask."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from typing import Any

import pytest

from stepdpo_kernels import _dispatch
from stepdpo_kernels._dispatch import PREFERENCE, choose, implementations, register, use_impl

_REASONS = {"triton": ["no GPU", "no Triton"], "cpu": ["it is Tuesday"]}


@pytest.fixture(autouse=True)
def _two_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """`head` has triton (refuses for two reasons), cpu (refuses large inputs), chunked; `mixer` has cpu, reference."""
    monkeypatch.setattr(_dispatch, "_implementations", {})
    monkeypatch.delenv("STEPDPO_IMPL", raising=False)
    _dispatch._log_choice.cache_clear()
    _dispatch._parse_environment.cache_clear()
    # against the order of preference
    register("head", "chunked", lambda: "chunked", lambda inputs: [])
    register("head", "cpu", lambda: "cpu", lambda inputs: _REASONS["cpu"] if inputs.get("large") else [])
    register("head", "triton", lambda: "triton", lambda inputs: _REASONS["triton"])
    register("mixer", "reference", lambda: "reference", lambda inputs: [])
    register("mixer", "cpu", lambda: "cpu", lambda inputs: ["too wide"] if inputs.get("wide") else [])


def _name(op: str, impl: str = "auto", **inputs: Any) -> str:
    return choose(op, impl, inputs).name


def test_implementations_stand_in_order_of_preference() -> None:
    assert implementations("head") == ["triton", "cpu", "chunked"]
    kernels = ["flash", "varlen", "triton", "triton_chunked", "triton_fused", "flex"]
    assert list(PREFERENCE) == [*kernels, "cpu", "chunked", "torch", "reference"]


def test_auto_takes_the_first_that_can() -> None:
    assert _name("head") == "cpu"
    assert _name("head", large=True) == "chunked"
    assert choose("head", "auto", {}).run() == "cpu"


def test_a_name_is_taken_at_its_word() -> None:
    assert _name("head", "chunked") == "chunked"
    assert _name("head", "cpu") == "cpu"


def test_a_refusal_gives_every_reason_and_never_falls_back() -> None:
    with pytest.raises(ValueError, match="implementation 'triton' of head cannot take these inputs: no GPU; no Triton"):
        choose("head", "triton", {})
    with use_impl("cpu"), pytest.raises(ValueError, match="'cpu' of head cannot take these inputs: it is Tuesday"):
        choose("head", "auto", {"large": True})


def test_when_nobody_can_all_reasons_are_given() -> None:
    register("head", "chunked", lambda: None, lambda inputs: ["out of chunks"])
    with pytest.raises(ValueError, match="not triton: no GPU, no Triton; not cpu: it is Tuesday; not chunked: out of"):
        choose("head", "auto", {"large": True})


def test_a_self_test_is_asked_last() -> None:
    asked = []

    def self_test(inputs: dict[str, Any]) -> list[str]:
        asked.append(inputs)
        return ["it is broken"] if inputs.get("broken") else []

    def why_not_auto(inputs: dict[str, Any]) -> list[str]:
        return ["it is slow"] if inputs.get("slow") else []

    register("mixer", "triton", lambda: None, lambda inputs: [], why_not_auto, self_test)
    assert _name("mixer", slow=True) == "cpu"
    assert not asked
    assert _name("mixer") == _name("mixer", "triton", slow=True) == "triton"
    assert _name("mixer", broken=True) == "cpu"
    with pytest.raises(ValueError, match="'triton' of mixer cannot take these inputs: it is broken"):
        choose("mixer", "triton", {"broken": True})
    assert len(asked) == 4


def test_unknown_names() -> None:
    with pytest.raises(
        ValueError, match="no implementation 'varlen' of operation 'head'; there are: auto, triton, cpu"
    ):
        choose("head", "varlen", {})
    with pytest.raises(ValueError, match="'fast' of head is not one of flash, varlen, triton, "):
        register("head", "fast", lambda: None, lambda inputs: [])
    with pytest.raises(ValueError, match="no operation 'body'; there are: head, mixer"), use_impl(body="cpu"):
        pass
    with pytest.raises(ValueError, match="no implementation 'triton' of operation 'mixer'"), use_impl(mixer="triton"):
        pass
    with pytest.raises(ValueError, match="no implementation 'varlen' of any operation"), use_impl("varlen"):
        pass


def test_use_impl_everywhere_means_every_operation_that_has_it() -> None:
    with use_impl("reference"):
        assert (_name("head"), _name("mixer")) == ("cpu", "reference")
    with use_impl("chunked"):
        assert (_name("head"), _name("mixer")) == ("chunked", "cpu")
    assert (_name("head"), _name("mixer")) == ("cpu", "cpu")


def test_use_impl_nests_and_the_innermost_wins() -> None:
    with use_impl(head="chunked", mixer="reference"):
        with use_impl(head="cpu"):
            assert (_name("head"), _name("mixer")) == ("cpu", "reference")
            with use_impl("chunked"):
                assert _name("head") == "chunked"
            with use_impl("chunked", head="auto"):
                assert _name("head", large=True) == "chunked"
                assert _name("head") == "cpu"
            with use_impl():
                assert (_name("head"), _name("mixer")) == ("cpu", "reference")
        assert (_name("head"), _name("mixer")) == ("chunked", "reference")


def test_use_impl_ends_with_an_error() -> None:
    with pytest.raises(RuntimeError, match="inside"), use_impl("chunked"):
        raise RuntimeError("inside")
    assert _name("head") == "cpu"


def test_the_argument_is_stronger_than_the_context_and_the_context_than_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STEPDPO_IMPL", "chunked")
    assert _name("head") == "chunked"
    with use_impl(head="cpu"):
        assert _name("head") == "cpu"
        assert _name("head", "chunked") == "chunked"
    with use_impl(head="auto"):
        assert _name("head") == "cpu"


def test_auto_everywhere_is_stronger_than_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPDPO_IMPL", "chunked")
    with use_impl("auto"):
        assert _name("head") == "cpu"


def test_another_thread_does_not_see_the_context() -> None:
    seen = []
    with use_impl("chunked"):
        thread = threading.Thread(target=lambda: seen.append(_name("head")))
        thread.start()
        thread.join()
    assert seen == ["cpu"]


@pytest.mark.parametrize(
    ("text", "head", "mixer"),
    [
        ("", "cpu", "cpu"),
        ("auto", "cpu", "cpu"),
        ("chunked", "chunked", "cpu"),
        ("reference", "cpu", "reference"),
        ("head=chunked", "chunked", "cpu"),
        (" head = chunked , mixer = reference ,", "chunked", "reference"),
        ("reference,head=chunked", "chunked", "reference"),
        ("chunked,head=auto", "cpu", "cpu"),
    ],
)
def test_the_variable(monkeypatch: pytest.MonkeyPatch, text: str, head: str, mixer: str) -> None:
    monkeypatch.setenv("STEPDPO_IMPL", text)
    assert (_name("head"), _name("mixer")) == (head, mixer)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fast", "no implementation 'fast' of any operation; there are: auto, triton, cpu, chunked, reference"),
        ("head=fast", "no implementation 'fast' of operation 'head'"),
        ("head=", "no implementation '' of operation 'head'"),
        ("body=cpu", "no operation 'body'; there are: head, mixer"),
        ("head=cpu;mixer=cpu", "no operation 'head=cpu;mixer'"),
    ],
)
def test_a_bad_variable_is_quoted(monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    monkeypatch.setenv("STEPDPO_IMPL", text)
    for _ in range(2):  # an error is not remembered as a success
        with pytest.raises(ValueError, match=f"environment variable STEPDPO_IMPL='{text}': {message}"):
            _name("head")


def test_the_variable_may_ask_for_what_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPDPO_IMPL", "triton")
    with pytest.raises(ValueError, match="'triton' of head cannot take these inputs: no GPU; no Triton"):
        _name("head")


def test_a_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="stepdpo_kernels"):
        for large in (False, False, True, True, False):
            _name("head", large=large)
        _name("head", "chunked")  # asked for: nothing to report
    assert [record.getMessage() for record in caplog.records] == [
        "head: using cpu (not triton: no GPU, no Triton)",
        "head: using chunked (not triton: no GPU, no Triton; not cpu: it is Tuesday)",
    ]


_FIRST_USE = "import torch; h, w, t = torch.ones(2, 3), torch.ones(5, 3), torch.tensor([0, 4]); "


@pytest.mark.parametrize(
    ("variable", "code"),
    [
        ("", "import stepdpo_kernels as s\nwith s.use_impl('reference'): s.linear_logprob(h, w, t)"),
        ("", "import stepdpo_kernels as s\nwith s.use_impl(tree_attention='reference'): s.linear_logprob(h, w, t)"),
        ("tree_attention=reference", "import stepdpo_kernels as s; s.linear_logprob(h, w, t)"),
    ],
    ids=["everywhere", "by name", "variable"],
)
def test_implementations_can_be_named_before_the_first_use(variable: str, code: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _FIRST_USE + code],
        env={**os.environ, "STEPDPO_IMPL": variable, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
