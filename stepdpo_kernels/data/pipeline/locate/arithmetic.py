r"""The arithmetic that a text states, checked exactly. No text is evaluated: numbers and operators are parsed here.

    check("She has 3 * 4 = 12 eggs, and 12 - 5 = 8 are left")
    [Equation("3 * 4 = 12", True), Equation("12 - 5 = 8", False)]

What is read: + - * / ^, x and × between numbers, "plus", "divided by", parentheses, products such as 2(3 + 4),
decimals, thousands' separators, money, percent ("20% of 50", "50 * 20%"), mixed numbers, LaTeX (\frac, \times, \cdot,
\$, \%), GSM8K's notes <<48/2=24>>, words after numbers ("5 eggs * 2 = 10 eggs", "$2/egg"), and chains a = b = c.

What holds: both sides have the same exact value (fractions, no floating point). A right side with a decimal point is
also right when the left side, rounded or cut off to as many places, is the same; after ≈ a whole number is, too. With a
modulus, sides that differ by a multiple of it are the same.

What is left alone, because a false alarm is worse: equations with a variable, without an operator on either side
("12 inches = 1 foot"), with a percentage or another unit that is added ("1 hour + 30 minutes"), whose sides do not hold
and are measured in different units, or that begin or go on in a way which is not read.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

SPAN = 80  # tokens of a side
DEPTH = 20  # of parentheses
DIGITS = 40  # of a number
BITS = 2048  # of a power
FLOAT_PLACES = 10  # after the point; more of them are a computer's, and the last ones are wrong


class Equation(NamedTuple):
    """text: as it stands, between two neighbouring equals signs; holds: whether it is right."""

    text: str
    holds: bool


class _Token(NamedTuple):
    """kind: "number", "word", one of + - * / ^ ( ) = ~ %, or "" for what ends an expression."""

    kind: str
    text: str
    start: int
    end: int


class _Value(NamedTuple):
    """value: exact; places: digits after a decimal point; None for a plain number without one; unit: the last words.

    operators: how many there were; percent: the number has the sign; added: a percentage was added to something, or
    minutes to hours
    """

    value: Fraction
    places: int | None = None
    unit: str = ""
    operators: int = 0
    percent: bool = False
    added: bool = False


class _Unread(Exception):  # noqa: N818 (never leaves this module)
    pass


_LATEX = (
    (re.compile(r"(?<=\d)\s*\\[dt]?frac\s*\{(\d{1,3})\}\s*\{(\d{1,3})\}"), r" \1/\2"),
    (re.compile(r"\\[dt]?frac\s*(\d)\s*(\d)"), r"((\1)/(\2))"),
    (re.compile(r"\\[dt]?frac\s*\{([^{}]{1,60})\}\s*\{([^{}]{1,60})\}"), r"((\1)/(\2))"),
    (re.compile(r"\\(?:times|cdot|ast)(?![a-zA-Z])"), "*"),
    (re.compile(r"\\div(?![a-zA-Z])"), "/"),
    (re.compile(r"\\(?:approx|simeq)(?![a-zA-Z])"), "≈"),
    (re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\[,;:! ]"), " "),
    (re.compile(r"\\(?:text|mathrm|textbf|mbox)\s*\{([^{}]{0,60})\}"), r" \1 "),
    (re.compile(r"\^\{(-?\d{1,4})\}"), r"^\1"),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"<<([^<>]{0,200})>>"), r" ; \1 ; "),
    (re.compile(r"\{,\}"), ","),
    (re.compile("²"), "^2"),
    (re.compile("³"), "^3"),
    (re.compile(r"\\\(|\\\)|\\\[|\\\]|\*\*(?=\D)|(?<=\D)\*\*"), " "),
)
_TOKEN = re.compile(
    r"(?P<number>(?:\d{1,3}(?:,\d{3})+(?![\d])|\d+)(?:\.\d+)?|\.\d+)"
    r"|(?P<word>[A-Za-z]+(?:['’-][A-Za-z]+)*)"
    r"|(?P<sign>[-+*/^()=~≈%−–×·÷$€£])"
    r"|(?P<space>\s+)"
    r"|(?P<other>.)",
    re.DOTALL,
)  # fmt: skip
_SIGNS = {"−": "-", "–": "-", "×": "*", "·": "*", "÷": "/", "≈": "~"}
_SPELLED = {"plus": "+", "minus": "-", "times": "*", "x": "*", "X": "*"}
_SCALES = frozenset(["hundred", "thousand", "million", "billion", "trillion", "k", "dozen", "half", "third", "quarter"])
_MEASURES = (
    "second seconds sec minute minutes min mins hour hours hr hrs day days week weeks month months year years decade",
    "mm cm m km inch inches in foot feet ft yard yards yd mile miles meter meters centimeter centimeters kilometer",
    "mg g gram grams kg kilogram kilograms ounce ounces oz pound pounds lb lbs ton tons",
    "cent cents dollar dollars $ quarter quarters dime dimes nickel nickels penny pennies",
    "ml l liter liters milliliter milliliters cup cups pint pints quart quarts gallon gallons",
)
_FAMILY = {word: number for number, words in enumerate(_MEASURES) for word in words.split()}
# After these words a number is only a part of what is meant.
_PARTIAL = frozenset(["and", "of", "by", "than", "remaining", "twice", "thrice", "half", "double", "triple"])
_WHOLE_OF = frozenset(["total", "sum", "cost", "result"])


def check(text: str, modulus: int | None = None) -> list[Equation]:
    """The equations of a text that can be checked, in order. Its time is linear in the length of the text."""
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    tokens = _tokens(text)
    equals = [i for i, token in enumerate(tokens) if token.kind in ("=", "~")]
    equations = []
    for number, at in enumerate(equals):
        before = equals[number - 1] if number else -1
        after = equals[number + 1] if number + 1 < len(equals) else len(tokens)
        equation = _equation(text, tokens, before + 1, at, after, modulus)
        if equation is not None:
            equations.append(equation)
    return equations


def _tokens(text: str) -> list[_Token]:
    tokens: list[_Token] = []
    for match in _TOKEN.finditer(text):
        kind = match.lastgroup or ""
        if kind == "space":
            if match[0].count("\n") > 1:
                tokens.append(_Token("", "", *match.span()))
            continue
        name = kind
        if kind == "sign":
            name = _SIGNS.get(match[0], match[0])
            name = "money" if name in "$€£" else name
        elif kind == "other":
            name = ""
        tokens.append(_Token(name, match[0], *match.span()))
    return _with_spelled(tokens)


def _with_spelled(tokens: list[_Token]) -> list[_Token]:
    """Words that are operators where they stand between numbers."""
    result: list[_Token] = []
    for i, token in enumerate(tokens):
        following = tokens[i + 1] if i + 1 < len(tokens) else _Token("", "", 0, 0)
        if token.kind == "word" and result and result[-1].kind in ("number", "word", ")", "%"):
            numeric = following.kind in ("number", "money", "(")
            if token.text in _SPELLED and numeric and (token.text not in "xX" or result[-1].kind != "word"):
                token = token._replace(kind=_SPELLED[token.text])
            elif token.text == "by" and numeric and result[-1].text in ("divided", "multiplied"):
                operator = "/" if result.pop().text == "divided" else "*"
                token = token._replace(kind=operator)
        result.append(token)
    return result


def _equation(text: str, tokens: list[_Token], low: int, at: int, high: int, modulus: int | None) -> Equation | None:
    left = _side_before(tokens, max(low, at - SPAN), at)
    if left is None:
        return None
    start, a = left
    try:
        reader = _Reader(tokens, at + 1, min(high, at + 1 + SPAN))
        b = reader.expression()
    except _Unread:
        return None
    end = reader.at
    if not a.operators + b.operators or a.added or b.added or not _ends(tokens, end, high):
        return None
    holds = _same(a, b, tokens[at].kind == "~", modulus)
    if not holds and (_may_be_meant_otherwise(tokens, start, low, a, b) or _loosely_written(tokens[start:end])):
        return None
    return Equation(text[tokens[start].start : tokens[end - 1].end].strip(), holds)


def _side_before(tokens: list[_Token], low: int, at: int) -> tuple[int, _Value] | None:
    """The longest expression that ends just before `at`, and where it begins."""
    for start in range(low, at):
        if tokens[start].kind not in ("number", "money", "(", "-"):
            continue
        if start > low and tokens[start].kind == "-" and not _is_sign(tokens, start):
            continue
        try:
            reader = _Reader(tokens, start, at)
            value = reader.expression()
        except _Unread:
            continue
        if reader.at == at:
            return start, value
    return None


def _is_sign(tokens: list[_Token], at: int) -> bool:
    """Whether a minus belongs to the number after it: "we get -3", but not "5 - 3", "eggs - 3", "5 -3"."""
    previous, minus, following = tokens[at - 1 : at + 2]
    if previous.kind in ("number", ")", "%"):
        return False
    return previous.kind != "word" or (previous.end < minus.start and minus.end == following.start)


def _ends(tokens: list[_Token], end: int, high: int) -> bool:
    """Whether the right side ends where reading did: what follows does not go on with it."""
    if end >= high:
        return True
    follows = tokens[end]
    if follows.kind == "word":
        if follows.text in ("and", "plus", "with") and end + 1 < high and tokens[end + 1].kind in ("number", "money"):
            return False  # 17/3 = 5 and 2/3
        return len(follows.text) > 1 and follows.text.casefold() not in _SCALES
    if follows.text == ":":  # 10/6 = 5:3
        return end + 1 >= high or tokens[end + 1].kind != "number"
    if follows.kind == "-":  # before a word it is a dash
        return end + 1 < high and tokens[end + 1].kind == "word" and len(tokens[end + 1].text) > 1
    return follows.kind in (")", "money") or (follows.kind == "" and follows.text not in ("!", "√", "π", "\\"))


def _may_be_meant_otherwise(tokens: list[_Token], start: int, low: int, a: _Value, b: _Value) -> bool:
    """Whether an equation that does not hold as it was read may be part of something that does."""
    if not a.operators or any(len(value.unit) == 1 and value.unit.isalpha() for value in (a, b)):
        return True  # "8 batches = 5 * 8 = 40 cups"; the s of 9s may be a variable
    families = {_FAMILY.get(value.unit.casefold()) for value in (a, b)}
    if a.unit != b.unit and len(families) == 1 and None not in families:
        return True
    if start <= low:
        return low > 0 and tokens[start - 1].kind in ("+", "-", "*", "/", "^", "(", "%")
    previous = tokens[start - 1]
    joined = previous.end == tokens[start].start  # 6:00 + 48, 16,0000 / 10, a_1 + 3, sqrt(16) + 1
    if joined and (previous.text in tuple(":,._'√") or (previous.kind == "word" and tokens[start].kind == "(")):
        return True
    if previous.kind in ("+", "-", "*", "/", "^", "(", "%", "number"):
        return True
    if previous.kind != "word":
        return False
    earlier = tokens[start - 2] if start - 2 >= low else _Token("", "", 0, 0)
    partial = previous.text.casefold() in _PARTIAL and earlier.kind and earlier.text.casefold() not in _WHOLE_OF
    return len(previous.text) == 1 or bool(partial)


def _loosely_written(tokens: list[_Token]) -> bool:
    """Whether it divides by a fraction without parentheses, 3 / 1/4 or 5 x 1/2, or says "times" without a sign."""
    kinds = [token.kind for token in tokens]
    fractions = (["/", "number", "/", "number"], ["*", "number", "/", "number"])
    if any(kinds[i : i + 4] in fractions for i in range(len(kinds))):
        return True
    return any(token.kind == "*" and token.text == "times" for token in tokens)


def _same(a: _Value, b: _Value, roughly: bool, modulus: int | None) -> bool:
    if a.value == b.value:
        return True
    if modulus is not None and (a.value - b.value) % modulus == 0:
        return True
    if a.percent != b.percent and not b.operators:  # 20% for 20, 20 for 20%
        scaled = b._replace(value=b.value / 100 if a.percent else b.value * 100, percent=a.percent)
        if _same(a, scaled, roughly, modulus):
            return True
    places = b.places if b.places is not None else 0 if roughly else None
    if places is None or b.operators:
        return False
    places = min(places, FLOAT_PLACES)
    unit = Fraction(1, 10**places) / (100 if b.percent else 1)
    difference = abs(a.value - b.value)
    return difference <= unit / 2 or (difference < unit and abs(b.value) < abs(a.value))


def _mixed(a: str, b: str) -> bool:
    """Whether these are two units of one kind, such as hours and minutes."""
    a, b = a.casefold(), b.casefold()
    return a.removesuffix("s") != b.removesuffix("s") and a in _FAMILY and _FAMILY[a] == _FAMILY.get(b)


class _Reader:
    """Precedence climbing over tokens[at:end]. Raises _Unread for what is no expression."""

    def __init__(self, tokens: list[_Token], at: int, end: int) -> None:
        self.tokens, self.at, self.end, self.depth = tokens, at, end, 0

    def kind(self, ahead: int = 0) -> str:
        return self.tokens[self.at + ahead].kind if self.at + ahead < self.end else ""

    def expression(self) -> _Value:
        value = self.term()
        while self.kind() in ("+", "-") and self._starts_number(1):
            sign = 1 if self.kind() == "+" else -1
            self.at += 1
            other = self.term()
            added = value.added or other.added or value.percent != other.percent or _mixed(value.unit, other.unit)
            value = _Value(
                value.value + sign * other.value,
                None,
                other.unit or value.unit,
                value.operators + other.operators + 1,
                value.percent and other.percent,
                added,
            )
        return value

    def _starts_number(self, ahead: int) -> bool:
        kind = self.kind(ahead)
        return kind in ("number", "money", "(") or (kind == "-" and self.kind(ahead + 1) in ("number", "money", "("))

    def term(self) -> _Value:
        value = self.factor()
        while True:
            operator = self.kind()
            if operator in ("*", "/") and self._starts_number(1):
                self.at += 1
            elif operator == "(" and self._starts_number(1):
                if self.kind(2) == "%":
                    raise _Unread  # "70 (70%) - 60"
                operator = "*"
            elif value.percent and operator == "word" and self.tokens[self.at].text == "of" and self._starts_number(1):
                operator = "*"
                self.at += 1
            else:
                return value
            other = self.factor()
            if operator == "/" and not other.value:
                raise _Unread
            result = value.value * other.value if operator == "*" else value.value / other.value
            operators = value.operators + other.operators + 1
            percent = operator == "*" and other.percent and other.value == 1
            value = _Value(result, None, other.unit or value.unit, operators, percent, value.added or other.added)

    def factor(self) -> _Value:
        if self.kind() == "-":
            self.at += 1
            value = self.factor()
            return value._replace(value=-value.value)
        value = self.primary()
        if self.kind() == "^":
            self.at += 1
            power = self.factor().value
            if power.denominator != 1 or abs(power) > 64 or (power < 0 and not value.value):
                raise _Unread
            size = max(value.value.numerator.bit_length(), value.value.denominator.bit_length())
            if size * abs(power) > BITS:
                raise _Unread
            value = _Value(value.value ** int(power), None, value.unit, value.operators + 1)
        return value

    def primary(self) -> _Value:
        kind = self.kind()
        if kind == "(":
            self.depth += 1
            self.at += 1
            if self.depth > DEPTH:
                raise _Unread
            value = self.expression()
            if self.kind() != ")":
                raise _Unread
            self.at += 1
            self.depth -= 1
            return self._with_unit(value._replace(places=None))
        unit = ""
        if kind == "money":
            unit, kind = "$", "number"
            self.at += 1
        if self.kind() != "number" or kind != "number":
            raise _Unread
        text = self.tokens[self.at].text.replace(",", "")
        if len(text) > DIGITS:
            raise _Unread
        places = len(text.partition(".")[2]) if "." in text else None
        value = _Value(Fraction(text), places, unit)
        self.at += 1
        if places is None and self.kind() == "number" and self.kind(1) == "/" and self.kind(2) == "number":
            value = value._replace(value=value.value + self._mixed())
        if self.kind() == "%" or (self.kind() == "word" and self.tokens[self.at].text in ("percent", "pct")):
            self.at += 1
            value = value._replace(value=value.value / 100, percent=True)
        return self._with_unit(value)

    def _mixed(self) -> Fraction:
        above, below = (self.tokens[self.at + i].text for i in (0, 2))
        if not (above.isdigit() and below.isdigit() and 0 < int(above) < int(below) < 1000):
            raise _Unread
        self.at += 3
        return Fraction(int(above), int(below))

    def _with_unit(self, value: _Value) -> _Value:
        """Passes over the words after a number: "5 red apples", "$2/egg", "2 hours per day", "5 (eggs)"."""
        at, words = self.at, list[str]()
        while at < self.end and len(words) < 6:
            token = self.tokens[at]
            if token.kind == "word" and token.text != "of":
                if len(token.text) == 1 and token.text not in "mghls":
                    raise _Unread  # a variable
                if token.text.casefold() in _SCALES:
                    raise _Unread
                words.append(token.text)
                at += 1
            elif token.kind in ("/", "(") and at + 1 < self.end and self.tokens[at + 1].kind == "word":
                closing = at + 2 < self.end and self.tokens[at + 2].kind == ")"
                if len(self.tokens[at + 1].text) == 1 or (token.kind == "(" and not closing):
                    break
                words.append(self.tokens[at + 1].text)
                at += 3 if token.kind == "(" else 2
            else:
                break
        follows = self.tokens[at].kind if at < self.end else "end"
        if words and follows in ("+", "-", "*", "/", "=", "~", ")", "^", "end", ""):
            self.at = at
            return value._replace(unit=value.unit or words[0])
        return value
