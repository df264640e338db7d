r"""The final answer of a solution.

In this order, each by its last occurrence:

    1. what is in \boxed{...} or \fbox{...}, braces nested ("\boxed 5" is the next token)
    2. what follows "####", to the end of the line, unless that is a heading
    3. what follows "answer is" or "answer:", to the end of the sentence, line or displayed formula
    4. the last number, other than that of a step ("Step 3:")
"""

from __future__ import annotations

import re
from collections import deque

BOX = re.compile(r"\\(?:boxed|fbox)\s*")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # and what is escaped, which is no brace
PHRASE = re.compile(r"\banswers?(?:\*\*)?(?: is| are|:| to [^.\n]{1,200} is)(?:\*\*)?:?", re.IGNORECASE)
DISPLAYED = (("$$", "$$"), ("\\[", "\\]"))
SENTENCE_END = re.compile(r"\.(?=\s|$)|\n")
NUMBER = re.compile(r"(?:(?<!\d)[-\u2212])?\$?(?:(?:\d[\d,]*\d|\d)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+|/\d+)?%?")
STEP = re.compile(r"\bstep\s+\d+\s*:", re.IGNORECASE)
LAST = 4000  # characters of the end in which the last number is looked for
TOKEN = re.compile(r"[^\s$,;.]{1,50}")


def extract_answer(text: str) -> str | None:
    """The final answer as it is written, or None where there is none. Its time is linear in the length of the text."""
    for find in (_boxed, _hashes, _phrase, _last_number):
        answer = find(text)
        if answer is not None and (answer := _bare(answer)):
            return answer
    return None


def _boxed(text: str) -> str | None:
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    found = BOX.match(text, start) if start >= 0 else None
    if found is None:
        return None
    at = found.end()
    if not text.startswith("{", at):
        token = TOKEN.match(text, at)
        return token[0] if token else None
    depth = 0
    for brace in BRACE.finditer(text, at):
        depth += (brace[0] == "{") - (brace[0] == "}")
        if not depth:
            return text[at + 1 : brace.start()]
    return None


def _hashes(text: str) -> str | None:
    _, mark, after = text.rpartition("####")
    line, _, rest = after.partition("\n")
    heading = STEP.search(line) or PHRASE.search(line) or (rest.strip() and not re.search(r"\d", line))
    return line if mark and not heading else None


def _phrase(text: str) -> str | None:
    found = deque(PHRASE.finditer(text), maxlen=1)
    if not found:
        return None
    last = found[0]
    after = text[last.end() : last.end() + 1000].lstrip(" *")
    if after.startswith("\n"):
        after = after.lstrip()
    for opening, closing in DISPLAYED:
        if after.startswith(opening) and closing in after[2:]:
            return after[2 : after.index(closing, 2)]
    end = SENTENCE_END.search(after)
    return after[: end.start()] if end else after


def _last_number(text: str) -> str | None:
    found = NUMBER.findall(STEP.sub(" ", text[-LAST:]))
    return found[-1] if found else None


def _bare(answer: str) -> str:
    """Without the dollar signs of LaTeX, Markdown's asterisks and a full stop around it."""
    answer = answer.strip()
    if answer.endswith("*."):
        answer = answer[:-1]
    answer = answer.strip("*").strip()
    for before, after in (*DISPLAYED, ("\\(", "\\)"), ("$", "$"), ("`", "`")):
        if len(answer) > len(before) + len(after) and answer.startswith(before) and answer.endswith(after):
            answer = answer[len(before) : -len(after)].strip()
            break
    answer = answer.rstrip(".").strip() if not answer.endswith("..") else answer
    return answer
