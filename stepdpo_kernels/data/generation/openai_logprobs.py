"""The log-probs in an answer of the OpenAI protocol -> those of the tokens of its text, and where each ends."""

from __future__ import annotations

import re
from bisect import bisect_right
from itertools import accumulate
from typing import Any, NamedTuple

UNKNOWN = "�"  # what a server writes for the bytes of a part of a character


class Piece(NamedTuple):
    """A token. data: its bytes, or None where the server does not tell."""

    data: bytes | None
    logp: float


def read_logprobs(logprobs: Any, text: str) -> tuple[tuple[float, ...], tuple[int, ...]] | None:
    """(log-probs, ends) of the tokens of `text`, as in Completion; None for none, or where they do not spell `text`.

    logprobs: the field of a choice, in either form of the protocol: {"tokens", "token_logprobs"} of completions,
    {"content": [{"token", "logprob", "bytes"}]} of chats. A character that is spread over tokens belongs to the last of
    them; where several such characters follow one another and the server does not tell the bytes, they are dealt out
    evenly.
    """
    try:
        pieces = _pieces(logprobs)
    except (KeyError, TypeError, ValueError):
        return None
    ends = _ends([piece.data for piece in pieces], text) if pieces else None
    if ends is None:
        return None
    return tuple(piece.logp for piece in pieces[: len(ends)]), tuple(ends)


def _pieces(logprobs: Any) -> list[Piece]:
    if not isinstance(logprobs, dict):
        return []
    if logprobs.get("content"):
        return [Piece(_bytes(each["token"], each.get("bytes")), float(each["logprob"])) for each in logprobs["content"]]
    tokens, logps = logprobs.get("tokens") or [], logprobs.get("token_logprobs") or []
    return [Piece(_bytes(token), float(logp)) for token, logp in zip(tokens, logps, strict=True)]


def _bytes(token: str, data: Any = None) -> bytes | None:
    if data is not None:
        return bytes(data)
    if token.startswith("bytes:"):  # OpenAI's: "bytes:\\xe2\\x82"
        return bytes(int(pair, 16) for pair in re.findall(r"\\x([0-9a-f]{2})", token))
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):  # SentencePiece's
        return bytes([int(token[3:5], 16)])
    return None if UNKNOWN in token else token.encode()


def _ends(pieces: list[bytes | None], text: str) -> list[int] | None:
    """Characters at or before the end of each piece, for those that begin before the end of the text."""
    whole = text.encode("utf-8", "surrogatepass")
    characters = list(accumulate(len(character.encode("utf-8", "surrogatepass")) for character in text))
    ends: list[int] = []
    at = waiting = 0  # bytes; pieces since `at` whose bytes are not known

    def settle(to: int) -> None:
        before, after = bisect_right(characters, at), bisect_right(characters, to)
        ends.extend(before + (after - before) * (i + 1) // waiting for i in range(waiting))

    for piece in pieces:
        if at == len(whole):
            break
        if piece is None or (waiting and not piece):
            waiting += 1
            continue
        start, stop = _find(piece, whole, at, waiting)
        if waiting:
            settle(start)
            waiting = 0
        at = stop
        ends.append(bisect_right(characters, at))
    if waiting:
        settle(len(whole))
        at = len(whole)
    return ends if at == len(whole) else None


def _find(piece: bytes, whole: bytes, at: int, waiting: int) -> tuple[int, int]:
    """Where the piece begins and ends in `whole`, at or, after pieces that are not known, somewhat behind byte `at`.

    A token may lack its leading space (decoded alone), and the last one may reach beyond the text (a stop text was cut
    off). One that is not there at all is a special token, left out of the text.
    """
    for data in (piece, b" " + piece):
        start = whole.find(data, at + 1, at + 4 * waiting + len(data)) if waiting else at
        if start >= 0 and whole.startswith(data, start):
            return start, start + len(data)
        if not waiting and data.startswith(whole[at:]):
            return at, len(whole)
    return at, at
