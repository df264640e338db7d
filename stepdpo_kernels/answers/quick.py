r"""What can be decided about two answers from their text: equal strings, plain numbers, units, words, lists.

Everything here is safe on any text: no evaluation, linear time, numbers of bounded size.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

LONGEST = 2000  # characters; longer answers are compared as text alone
DIGITS = 300  # of a plain number
EXPONENT = 300

_REPLACED = {
    "\\\\": "\\\\",  # ends a row of a matrix
    "\\left": "", "\\right": "", "\\!": "", "\\,": " ", "\\;": " ", "\\:": " ", "\\ ": " ", "~": " ", "\u00a0": " ",
    "\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\cfrac": "\\frac", "\\$": "$", "\\%": "%", "\u2212": "-", "\u2013": "-",
    "^{\\circ}": "°", "^\\circ": "°", "\\degree": "°", "\\cdotp": "\\cdot", "{,}": ",", "\\displaystyle": "",
    "\\lbrace": "\\{", "\\rbrace": "\\}", "×": "\\times ", "÷": "/", "π": "\\pi ", "∞": "\\infty ", "√": "\\sqrt ",
}  # fmt: skip
_COMMAND_END = "(?![a-zA-Z])"  # \\left, and not the beginning of \\leftarrow
_REPLACE = re.compile(
    "|".join(
        re.escape(text) + (_COMMAND_END if re.fullmatch(r"\\[a-z]+", text) else "")
        for text in sorted(_REPLACED, key=len, reverse=True)
    )
)

_THOUSANDS = re.compile(r"(?<=\d)\\,(?=\d{3})")
_INTEGER = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_NUMBER = rf"(?:{_INTEGER}(?:\.\d*)?|\.\d+)"
NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*(?P<money>[$€£]?)\s*(?P<sign2>[-+]?)(?:"
    rf"(?P<whole>\d+)\s*\\frac\s*\{{(?P<a>\d+)\}}\s*\{{(?P<b>\d+)\}}"
    rf"|(?P<whole2>\d+)\s+(?P<a2>\d+)\s*/\s*(?P<b2>\d+)"
    rf"|\\frac\s*\{{(?P<sign3>[-+]?)\s*(?P<n>{_NUMBER})\}}\s*\{{(?P<d>{_NUMBER})\}}"
    rf"|\\frac\s*(?P<n3>\d)\s*(?P<d3>\d)"
    rf"|(?P<n2>{_NUMBER})\s*/\s*(?P<d2>{_NUMBER})"
    rf"|(?P<decimal>{_NUMBER})(?:[eE](?P<e>[-+]?\d+)|\s*(?:\\times|\\cdot)\s*10\s*\^\s*(?P<power>\{{[-+]?\d+\}}|\d))?"
    rf")\s*(?P<unit>.*)",
    re.DOTALL,
)
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|mbox|rm|operatorname)\s*\{([^{}]*)\}")
_COMMAND = re.compile(r"\\(?:begin|end)\s*\{[a-z*]+\}(?:\{[a-z|]*\})?|\\[a-zA-Z]+")
_WORD = re.compile(r"[a-zA-Z]{3,}")
_NAMES = "sin cos tan cot sec csc log exp sqrt arcsin arccos arctan sinh cosh tanh max min gcd lcm mod det lim inf"
_FUNCTIONS = frozenset(_NAMES.split())
_NAME = re.compile(r"\s*([a-zA-Z](?:_\{?\w{1,5}\}?)?|\([a-z](?:,\s*[a-z])+\))\s*=(?!=)\s*")
_CHOICE = re.compile(r"\(?\s*([A-J])\s*\)?[.:]?")

_UNITS = {
    "%": "% percent percents percentage pct",
    "°": "° degree degrees deg",
    "$": "$ dollar dollars usd buck bucks",
    "€": "€ euro euros eur",
    "£": "£ pound-sterling gbp",
    "cent": "cent cents ¢",
    "mm": "mm millimeter millimeters millimetre millimetres",
    "cm": "cm centimeter centimeters centimetre centimetres",
    "m": "m meter meters metre metres",
    "km": "km kilometer kilometers kilometre kilometres",
    "in": "in inch inches",
    "ft": "ft foot feet",
    "yd": "yd yard yards",
    "mi": "mi mile miles",
    "g": "g gram grams",
    "kg": "kg kilogram kilograms",
    "mg": "mg milligram milligrams",
    "lb": "lb lbs pound pounds",
    "oz": "oz ounce ounces",
    "l": "l liter liters litre litres",
    "ml": "ml milliliter milliliters millilitre millilitres",
    "s": "s sec secs second seconds",
    "min": "min mins minute minutes",
    "h": "h hr hrs hour hours",
    "day": "day days",
    "week": "week weeks",
    "month": "month months",
    "year": "year years yr yrs",
    "mph": "mph",
}
_UNIT_OF = {word: unit for unit, words in _UNITS.items() for word in words.split()}


class Quantity(NamedTuple):
    value: Fraction
    unit: str


def clean(text: str) -> str:
    """One way of writing what can be written in several: spaces, sizes of brackets and fractions, signs."""
    text = _THOUSANDS.sub("", text.strip())
    text = _REPLACE.sub(lambda match: _REPLACED[match[0]], text)
    if text.count("$") == 2 and text.startswith("$") and text.endswith("$"):
        text = text[1:-1]
    for before, after in (("\\(", "\\)"), ("\\[", "\\]")):
        if text.startswith(before) and text.endswith(after):
            text = text[2:-2]
    text = " ".join(text.split())
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1]
    return text


def quantity(text: str) -> Quantity | None:
    """A plain number with what unit it has ("" for none): integer, decimal, fraction, mixed, scientific, percent."""
    match = NUMBER.fullmatch(text) if len(text) <= LONGEST else None
    if match is None or sum(map(len, re.findall(r"\d+", text))) > DIGITS:
        return None
    unit = _unit(match["unit"], match["money"])
    if unit is None:
        return None
    part = match.groupdict()
    if part["a"] or part["a2"]:
        whole, a, b = (part[name] or part[name + "2"] for name in ("whole", "a", "b"))
        value = _ratio(a, b)
        value = None if value is None else int(whole) + value
    elif part["decimal"]:
        power = int((part["e"] or part["power"] or "0").strip("{}"))
        value = Fraction(part["decimal"].replace(",", "")) * Fraction(10) ** power if abs(power) <= EXPONENT else None
    else:
        names = next(pair for pair in (("n", "d"), ("n2", "d2"), ("n3", "d3")) if part[pair[0]])
        value = _ratio(*(part[name] for name in names))
    if value is None:
        return None
    negative = sum(part[name] == "-" for name in ("sign", "sign2", "sign3")) % 2
    return Quantity(-value if negative else value, unit)


def _ratio(a: str, b: str) -> Fraction | None:
    below = Fraction(b.replace(",", ""))
    return Fraction(a.replace(",", "")) / below if below else None


def _unit(text: str, money: str) -> str | None:
    """The unit that follows a number; None where what follows is none, such as the x of 5x."""
    marked = bool(_TEXT.search(text))
    words = _TEXT.sub(lambda match: f" {match[1]} ", text).casefold().replace("^{2}", "^2").replace("^{3}", "^3")
    words = " ".join(words.replace("$", " $ ").split()).replace(" ^", "^").strip(" .")
    if not words:
        return money
    known = _UNIT_OF.get(words) or _UNIT_OF.get(words.replace(".", ""))
    if known is None:
        plain = re.fullmatch(r"(?:[a-z%°/ .'-]|\^[23])+", words) is not None and (marked or len(words.split()[0]) > 2)
        if not plain or words.split()[0] in _FUNCTIONS or words.startswith("and "):  # 5 and a half
            return None
        known = " ".join(_UNIT_OF.get(word, word.removesuffix("s")) for word in re.split(r"[\s.-]+", words) if word)
    return known if not money or known == money else f"{money} {known}"


def same_quantity(gold: Quantity, prediction: Quantity) -> bool:
    """Equal numbers, and units that are equal where both have one. 50% is 0.5, and 50 with its sign left out.

    Of money the currency alone must agree: $5 is $5 per egg.
    """
    units = {gold.unit, prediction.unit}
    if gold.value == prediction.value:
        return len(units) == 1 or "" in units or (len({u.split()[0] for u in units}) == 1 and gold.unit[0] in "$€£")
    return units == {"", "%"} and _plain(gold) == _plain(prediction)


def _plain(quantity: Quantity) -> Fraction:
    return quantity.value / 100 if quantity.unit == "%" else quantity.value


def words_of(text: str) -> str | None:
    """The words of an answer that is text rather than mathematics; None for mathematics."""
    plain = _TEXT.sub(lambda match: f" {match[1]} ", text)
    rest = _COMMAND.sub(" ", plain)
    found = [word for word in _WORD.findall(rest) if word.casefold() not in _FUNCTIONS]
    if not found:
        return None
    return " ".join(plain.casefold().replace("$", " ").split()).strip(" .'\"")


def choice(text: str) -> str | None:
    """The letter of an answer that is nothing but one: A, (A), \\text{(A)}."""
    match = _CHOICE.fullmatch(_TEXT.sub(lambda match: match[1], text).strip())
    return match[1] if match else None


def without_name(text: str) -> tuple[str, str]:
    """("x", "5") for "x = 5", ("", text) for anything that is no value given a name."""
    match = _NAME.match(text)
    if match is None or "=" in text[match.end() :] or not text[match.end() :].strip():
        return "", text
    return match[1].replace("{", "").replace("}", "").replace(" ", ""), text[match.end() :]


class Listed(NamedTuple):
    """brackets: such as "(]", "{}" for a set, "" for a bare list; parts: what the commas separate."""

    brackets: str
    parts: tuple[str, ...]


def listed(text: str) -> Listed | None:
    """The parts of a tuple, interval, set or bare list; None for anything else, also for thousands' separators."""
    inner = text.replace("\\{", "\ue000").replace("\\}", "\ue001").strip()
    brackets = ""
    if len(inner) > 1 and inner[0] in "([\ue000" and inner[-1] in ")]\ue001" and _closes_at_end(inner):
        brackets, inner = inner[0] + inner[-1], inner[1:-1]
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(inner):
        depth += (letter in "([{\ue000") - (letter in ")]}\ue001")
        if depth < 0:
            return None
        if letter == "," and not depth:
            parts.append(inner[start:i])
            start = i + 1
    parts.append(inner[start:])
    if depth or (len(parts) < 2 and brackets != "\ue000\ue001"):
        return None
    if not brackets and len(parts) > 1 and re.fullmatch(_INTEGER, inner.replace(" ", "").lstrip("-")):
        return None
    parts = [part.replace("\ue000", "\\{").replace("\ue001", "\\}").strip() for part in parts]
    parts[-1] = re.sub(r"^(?:and|or)\s+", "", parts[-1])
    return Listed(brackets.replace("\ue000", "{").replace("\ue001", "}"), tuple(parts))


def _closes_at_end(text: str) -> bool:
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter in "([{\ue000") - (letter in ")]}\ue001")
        if depth == 0 and i < len(text) - 1:
            return False
    return depth == 0
