"""A packed batch as a picture: its prefix forest on the left, who attends to whom on the right."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stepdpo_kernels.types import PackedBatch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PREFIX, CHOSEN, REJECTED = 0, 1, 2
# Okabe and Ito's bluish green and vermilion, told apart by every kind of colour vision, and a neutral grey.
COLOURS = {PREFIX: "#A7B1BE", CHOSEN: "#009E73", REJECTED: "#D55E00"}
INK = {PREFIX: "#5A6675", CHOSEN: "#00755A", REJECTED: "#B24A00"}
TEXT, FAINT, EMPTY = "#1F2933", "#8A94A0", "#F4F5F7"
TEXT_SIZE, TAG_SIZE, LEADING = 8.5, 7.5, 10.5  # points
BAR, SHORT = 7.0, 40.0  # points: height of a bar, and the width below which one may go without words
WIDTH = 10.0  # inches; legible when shown 900 pixels wide
DPI = 200


@dataclass
class Run:
    """Consecutive tokens of the forest without a branching, all of one kind: one bar of the drawing.

    kind:      PREFIX (context, or shared by a right and a wrong step), CHOSEN or REJECTED
    depth:     depth of its first token
    tokens:    token ids
    encoded:   how many of them, from the front, are packed; a last token that is only predicted is not
    first:     packed position of its first token, meaningless where `encoded` is 0
    pairs:     numbers of the pairs whose step or, for PREFIX, whose prefix it belongs to
    children:  the runs that follow it
    y:         row of the drawing, the leaves at 0, 1, 2, ... from the top
    """

    kind: int
    depth: int
    tokens: list[int]
    encoded: int
    first: int
    pairs: list[int]
    children: list[Run] = field(default_factory=list)
    y: float = 0.0

    @property
    def end(self) -> int:
        return self.depth + len(self.tokens)

    def walk(self) -> list[Run]:
        """This run and all below it, depth-first."""
        return [self, *(run for child in self.children for run in child.walk())]


@dataclass
class _Nodes:
    """The forest token by token: the packed tokens first, then the last tokens of branches, which nothing encodes.

    children[-1] holds the roots; `chosen`, `rejected` and `prefix` are the pairs that a token belongs to in that role.
    """

    tokens: list[int]
    depths: list[int]
    children: dict[int, list[int]]
    chosen: list[set[int]]
    rejected: list[set[int]]
    prefix: list[set[int]]

    def kind(self, node: int) -> int:
        if bool(self.chosen[node]) == bool(self.rejected[node]):
            return PREFIX
        return CHOSEN if self.chosen[node] else REJECTED

    def pairs(self, node: int) -> list[int]:
        steps = self.chosen[node] ^ self.rejected[node] if self.kind(node) != PREFIX else set()
        return sorted(steps or self.prefix[node] | self.chosen[node] | self.rejected[node])


def _nodes(batch: PackedBatch) -> _Nodes:
    """Read back from the batch's tensors alone: edges from the leaves' paths, roles from the branches' loss rows."""
    num_tokens = batch.num_tokens
    parents = np.full(num_tokens, -1)
    keys, cu_k = batch.plan.keys.index.numpy(), batch.plan.cu_k.tolist()
    for start, end in pairwise(cu_k):
        parents[keys[start + 1 : end]] = keys[start : end - 1]
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(parents.tolist()):
        children.setdefault(parent, []).append(node)
    roles: list[list[set[int]]] = [[set() for _ in range(num_tokens)] for _ in range(3)]
    nodes = _Nodes(batch.input_ids.tolist(), batch.position_ids.tolist(), children, *roles)

    sources, targets = batch.rows.index.numpy(), batch.targets.tolist()
    branch_rows = np.split(batch.branches.index.numpy(), np.cumsum(batch.branches.lengths.numpy())[:-1])
    for role, branches in ((nodes.chosen, batch.chosen), (nodes.rejected, batch.rejected)):
        for pair, branch in enumerate(branches.tolist()):
            rows = branch_rows[branch]
            if not rows.size:
                continue
            boundary, last = int(sources[rows[0]]), int(sources[rows[-1]])
            for node in sources[rows[1:]].tolist():
                role[node].add(pair)
            role[_target_node(nodes, last, targets[rows[-1]])].add(pair)
            while boundary >= 0:
                nodes.prefix[boundary].add(pair)
                boundary = int(parents[boundary])
    return nodes


def _target_node(nodes: _Nodes, parent: int, token: int) -> int:
    """The child of `parent` that carries `token`, added where no packed token does."""
    siblings = nodes.children.setdefault(parent, [])
    for node in siblings:
        if nodes.tokens[node] == token:
            return node
    siblings.append(len(nodes.tokens))
    nodes.tokens.append(token)
    nodes.depths.append(nodes.depths[parent] + 1)
    for role in (nodes.chosen, nodes.rejected, nodes.prefix):
        role.append(set())
    return siblings[-1]


def forest_runs(batch: PackedBatch) -> list[Run]:
    """The trees of a batch as runs, rows of the drawing assigned; together they hold every packed token once."""
    nodes = _nodes(batch)
    rows = 0

    def grow(node: int) -> Run:
        nonlocal rows
        kind, pairs = nodes.kind(node), nodes.pairs(node)
        chain = [node]
        below = nodes.children.get(node, [])
        # A prefix goes on where one of its pairs' steps begins and another's does not, as long as nothing branches.
        while len(below) == 1 and nodes.kind(below[0]) == kind and (kind == PREFIX or nodes.pairs(below[0]) == pairs):
            chain += below
            below = nodes.children.get(chain[-1], [])
        run = Run(
            kind=kind,
            depth=nodes.depths[node],
            tokens=[nodes.tokens[n] for n in chain],
            encoded=sum(n < batch.num_tokens for n in chain),
            first=node,
            pairs=pairs,
            children=[grow(child) for child in below],
        )
        if run.children:
            run.y = (run.children[0].y + run.children[-1].y) / 2
        else:
            run.y, rows = float(rows), rows + 1
        return run

    return [grow(root) for root in nodes.children[-1]]


def token_kinds(batch: PackedBatch) -> np.ndarray:
    """(T,) int8: PREFIX, CHOSEN or REJECTED for each packed token."""
    kinds = np.empty(batch.num_tokens, np.int8)
    for root in forest_runs(batch):
        for run in root.walk():
            kinds[run.first : run.first + run.encoded] = run.kind
    return kinds


def headline(batch: PackedBatch) -> str:
    """What packing these pairs saved, in one line."""
    pairs = f"{batch.num_pairs} pair{'s' if batch.num_pairs > 1 else ''}, {2 * batch.num_pairs} branches"
    unshared, packed = batch.tokens_unshared, batch.num_tokens
    return f"{pairs}: {unshared:,} tokens unshared → {packed:,} packed, {unshared / packed:.1f}× fewer"


def tag(run: Run, num_pairs: int) -> str:
    """What a run is, in a few words: pairs are numbered from 1."""
    if run.kind == PREFIX:
        return "shared prefix" if len(run.pairs) == num_pairs else "prefix"
    numbers = ", ".join(str(pair + 1) for pair in run.pairs)
    return f"{'chosen' if run.kind == CHOSEN else 'rejected'} {numbers}"


def draw(batch: PackedBatch, decode: Callable[[Sequence[int]], str], path: Path, title: str | None = None) -> None:
    """Writes the picture of a batch to `path`, a PNG of 200 dots per inch.

    decode: token ids to text
    title:  the line above the picture, `headline(batch)` by default

    Raises OSError where the file cannot be written.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    trees = forest_runs(batch)
    rows = 1 + int(max(run.y for tree in trees for run in tree.walk()))
    square, head, foot = 3.4, 0.78, 0.5  # inches: side of the attention pattern, space above and below it
    body = max(square, min(0.62 * rows, 20.0))
    height = head + body + foot
    with matplotlib.rc_context({"font.family": "DejaVu Sans"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # scripts that the font lacks show as boxes
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
        FigureCanvasAgg(figure)
        left = figure.add_axes((0.2 / WIDTH, foot / height, 5.45 / WIDTH, body / height))
        right = figure.add_axes(
            ((WIDTH - 0.24 - square) / WIDTH, 1 - (head + square) / height, square / WIDTH, square / height)
        )
        _draw_forest(left, trees, batch.num_pairs, decode)
        _draw_attention(right, batch, trees)
        figure.text(0.2 / WIDTH, 1 - 0.3 / height, title or headline(batch), size=13, weight="bold", color=TEXT)
        for axes, words in (
            (left, "A filled square is a token, encoded once; open ones are only predicted. Numbers: pairs."),
            (right, "Attention: a token sees itself and what leads to it"),
        ):
            figure.text(axes.get_position().x0, 1 - (head - 0.12) / height, words, size=9, color=INK[PREFIX])
        image = BytesIO()
        figure.savefig(image, format="png", metadata={"Software": None})
    unfinished = path.with_name(f".{path.name}.part")
    try:
        unfinished.write_bytes(image.getvalue())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _draw_forest(axes: Axes, trees: Sequence[Run], num_pairs: int, decode: Callable[[Sequence[int]], str]) -> None:
    """Coordinates are points from the upper left corner."""
    from matplotlib.patches import Rectangle

    runs = [run for tree in trees for run in tree.walk()]
    depths, places, cuts = _depth_scale(runs)
    box = axes.get_window_extent()
    width, height = box.width * 72 / DPI, box.height * 72 / DPI
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    places *= 0.88 * width / places[-1]  # the text of a leaf may run past its bar
    pitch = height / (1 + max(run.y for run in runs))

    def place(depth: int) -> float:
        return float(np.interp(depth, depths, places))

    only = {id(run.children[0]) for run in runs if len(run.children) == 1}
    short = {id(run) for run in runs if id(run) in only and place(run.end) - place(run.depth) < SHORT}

    for run in runs:
        x = np.interp(np.arange(run.depth, run.end + 1), depths, places)
        y = (run.y + 0.5) * pitch + 12
        colour = COLOURS[run.kind]
        for i, (a, b) in enumerate(pairwise(x)):
            gap = 0.8 if b - a > 3 else 0.0
            if i < run.encoded:
                axes.add_patch(Rectangle((a, y), b - a - gap, BAR, facecolor=colour, linewidth=0))
            else:
                axes.add_patch(
                    Rectangle((a + 0.4, y + 0.4), b - a - gap - 0.4, BAR - 0.8, fill=False, edgecolor=colour)
                )
        if run.children:
            spine = [(child.y + 0.5) * pitch + 12 + BAR / 2 for child in run.children]
            if spine[0] != spine[-1]:
                axes.plot([x[-1], x[-1]], [spine[0], spine[-1]], color=COLOURS[PREFIX], linewidth=1.5, zorder=0)
        if id(run) in short:
            continue
        # The text may run on above a short bar that follows, which has none of its own, and after a leaf.
        last = run
        while len(last.children) == 1 and id(last.children[0]) in short:
            last = last.children[0]
        room = (place(last.end) if last.children else width) - x[0] - 9
        # Nothing else is drawn above an inner run, up to the row of its first leaf.
        lines = 2 + int((run.y - min(r.y for r in run.walk())) * pitch / LEADING)
        _label(axes, run, x[0] + 3, y - 3, room, min(lines, 5), tag(run, num_pairs), decode)
    _depth_axis(axes, depths, places, cuts, height)


def _depth_scale(runs: Sequence[Run]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """(depths, places, cuts): depth is drawn at `np.interp(depth, depths, places)`; intervals `cuts` are shortened.

    Between two depths where some run begins or ends, long stretches get no more than a few steps' width.
    """
    depths = np.unique([d for run in runs for d in (run.depth, run.end)])
    steps = [len(run.tokens) for run in runs if run.kind != PREFIX] or [1]
    usual = float(np.median(steps))
    widths, cuts = [], []
    for i, (a, b) in enumerate(pairwise(depths)):
        in_step = any(run.kind != PREFIX and run.depth < b and run.end > a for run in runs)
        most = max(4 * usual if in_step else usual, 8.0)
        widths.append(min(b - a, most))
        if b - a > 1.5 * most:
            cuts.append(i)
    return depths, np.concatenate([[0.0], np.cumsum(widths)]), cuts


def _label(
    axes: Axes,
    run: Run,
    x: float,
    y: float,
    room: float,
    most_lines: int,
    name: str,
    decode: Callable[[Sequence[int]], str],
) -> None:
    """Above a bar: what it is, and below that its text."""
    words = " ".join(decode(run.tokens).split())
    for line in reversed(fit(words, room, most_lines, keep_end=run.kind == PREFIX)):
        axes.text(x, y, line, size=TEXT_SIZE, color=TEXT, va="baseline", parse_math=False)
        y -= LEADING
    if run.kind == PREFIX and text_width(name, TAG_SIZE, bold=True) > room + 6:
        name = "prefix"
    if text_width(name, TAG_SIZE, bold=True) <= room + 6:
        axes.text(x, y, name, size=TAG_SIZE, weight="bold", color=INK[run.kind], va="baseline", parse_math=False)


@lru_cache(maxsize=4096)
def text_width(text: str, size: float, bold: bool = False) -> float:
    """Width in points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    prop = FontProperties(family="DejaVu Sans", size=size, weight="bold" if bold else "normal")
    return float(text_to_path.get_text_width_height_descent(text, prop, ismath=False)[0])


def _breakable(word: str, room: float) -> list[str]:
    """A word, or pieces of one that is wider than the room."""
    pieces = [""]
    for character in word:
        if pieces[-1] and text_width(pieces[-1] + character, TEXT_SIZE) > room:
            pieces.append("")
        pieces[-1] += character
    return pieces


def fit(text: str, room: float, most_lines: int, keep_end: bool) -> list[str]:
    """`text` on at most so many lines of `room` points; what is too much gives way to an ellipsis.

    keep_end: the ellipsis stands in the middle, so that both ends can be read.
    """

    def wrapped(words: Sequence[str]) -> list[str]:
        lines = [""]
        for word in words:
            longer = f"{lines[-1]} {word}".strip()
            if text_width(longer, TEXT_SIZE) <= room or not lines[-1]:
                lines[-1] = longer
            else:
                lines.append(word)
        return lines

    words = [piece for word in text.split(" ") for piece in _breakable(word, room)]
    for kept in range(len(words), 0, -1):
        tail = kept // 2 if keep_end else 0
        cut = words if kept == len(words) else [*words[: kept - tail], "…", *words[len(words) - tail :]]
        lines = wrapped(cut)
        if len(lines) <= most_lines and all(text_width(line, TEXT_SIZE) <= room for line in lines):
            return lines
    return []


def _depth_axis(axes: Axes, depths: np.ndarray, places: np.ndarray, cuts: Sequence[int], height: float) -> None:
    y = height + 4
    axes.plot([0, places[-1]], [y, y], color=FAINT, linewidth=0.8, clip_on=False)
    shown = -np.inf
    for depth, x in zip(depths.tolist(), places.tolist(), strict=True):
        if x - shown > 24:
            axes.plot([x, x], [y, y + 3], color=FAINT, linewidth=0.8, clip_on=False)
            axes.text(x, y + 5, f"{depth}", size=TAG_SIZE, color=FAINT, ha="center", va="top")
            shown = x
    for cut in cuts:
        x = (places[cut] + places[cut + 1]) / 2
        axes.text(x, y, "//", size=9, color=FAINT, ha="center", va="center", backgroundcolor="white")
    words = "depth in tokens" + (", long stretches shortened at //" if cuts else "")
    axes.text(places[-1] / 2, y + 17, words, size=TAG_SIZE, color=FAINT, ha="center", va="top")


def _draw_attention(axes: Axes, batch: PackedBatch, trees: Sequence[Run]) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle

    from stepdpo_kernels.ops.tree_attention.reference import dense_mask

    size = batch.num_tokens
    kinds = token_kinds(batch)
    palette = np.array([to_rgb(COLOURS[kind]) for kind in (PREFIX, CHOSEN, REJECTED)])
    sees = dense_mask(batch.plan).numpy()[..., None]  # (T, T, 1): query, key
    image = np.where(sees, palette[kinds], np.array(to_rgb(EMPTY)))
    axes.imshow(image, interpolation="nearest", extent=(0, size, size, 0), aspect="auto")
    points = axes.get_window_extent().width * 72 / DPI / size  # a cell's side
    if points > 2.5:
        for at in range(1, size):
            axes.axhline(at, color="white", linewidth=0.35)
            axes.axvline(at, color="white", linewidth=0.35)
    for at in batch.plan.cu_q.tolist()[1:-1]:
        axes.plot([0, at, at], [at, at, size], color=TEXT, linewidth=0.6)
    for spine in axes.spines.values():
        spine.set(color=FAINT, linewidth=0.6)
    axes.set(xticks=[], yticks=[], xlim=(0, size), ylim=(size, 0))
    shown = -np.inf
    for run in (run for tree in trees for run in tree.walk() if run.encoded):
        strip = Rectangle((-7 / points, run.first), 4 / points, run.encoded, color=COLOURS[run.kind], linewidth=0)
        strip.set_clip_on(False)
        axes.add_patch(strip)
        middle = run.first + run.encoded / 2
        if (middle - shown) * points > 1.1 * TAG_SIZE:
            axes.text(
                -10 / points,
                middle,
                tag(run, batch.num_pairs),
                size=TAG_SIZE,
                weight="bold",
                color=INK[run.kind],
                ha="right",
                va="center",
            )
            shown = middle
    _annotate(axes, batch, trees, points)
    words = "a column for each token, coloured where it is seen (key);\nlines where another branch begins"
    axes.set_xlabel(words, size=TAG_SIZE, color=FAINT)
    words = "a row for each token, coloured what it sees (query)"
    axes.text(size + 4 / points, size / 2, words, size=TAG_SIZE, color=FAINT, rotation=270, va="center")


def _annotate(axes: Axes, batch: PackedBatch, trees: Sequence[Run], points: float) -> None:
    """Words on the pattern, where there is room: what the first block is, and why the rest of it is empty."""
    size, block = batch.num_tokens, trees[0].encoded
    words = "encoded once,\nseen by all"
    if len(trees) == 1 and trees[0].kind == PREFIX and block * points > text_width("encoded once,", TAG_SIZE) + 8:
        # Between two leaves' lines, below the first block's own rows.
        edges = [max(at, block) for at in batch.plan.cu_q.tolist()]
        top, bottom = max(pairwise(edges), key=lambda span: span[1] - span[0])
        if (bottom - top) * points > 3 * TAG_SIZE:
            axes.text(
                block / 2,
                (top + bottom) / 2,
                words,
                size=TAG_SIZE,
                color=TEXT,
                ha="center",
                va="center",
                bbox={"facecolor": COLOURS[PREFIX], "linewidth": 0, "pad": 2},
            )
    words = "never seen: what comes later\nand other branches"
    axes.text(
        size - 8 / points,
        18 / points,
        words,
        size=TAG_SIZE,
        color=INK[PREFIX],
        ha="right",
        va="center",
        bbox={"facecolor": EMPTY, "linewidth": 0, "pad": 2},
    )
