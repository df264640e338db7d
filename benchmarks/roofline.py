"""What the head should take on an H100, from operations and bytes: `python -m benchmarks.roofline` prints the table.

No figure here is measured by us. Rates are published ones: 700 TFLOP/s for cuBLAS products of this kind in bfloat16,
400 for products inside Triton kernels (reported: 310 to 470), 3.35 TB/s of memory.
"""

from __future__ import annotations

from stepdpo_kernels.ops.linear_logprob.in_forward import in_groups

LIBRARY, TRITON, BYTES = 700e12, 400e12, 3.35e12  # FLOP/s, FLOP/s, bytes/s
HEADS = {"Qwen2-7B": (3584, 152_064), "Llama-3-8B": (4096, 128_256), "Qwen2-72B": (8192, 152_064)}
ROWS = (1024, 4096, 16_384)
CHUNK_ROWS, Q_BYTES, SUM_ROWS, MIN_COLUMNS = 1024, 32 * 2**20, 1024, 512  # of triton_chunked and triton_kernel


def kept_rows(rows: int, hidden_size: int) -> int:
    return min(rows, max(2 * hidden_size, 4 * CHUNK_ROWS))


def milliseconds(path: str, rows: int, size: int, vocabulary: int) -> float:
    """Products, and what is moved beside them; a path is an implementation and what it computes.

    Moved are logits by the kernels over rows, and by the fused path the float32 sum of dX, for each chunk of columns.
    The loss takes gradients in forward where rows are not kept: each group of rows after the first reads and writes a
    float32 dW, which is cast at the end.
    """
    product = 2 * rows * size * vocabulary  # FLOP
    logits = rows * vocabulary
    kept = kept_rows(rows, size) / rows
    groups = -(-rows // kept_rows(rows, size))
    sums = (8 * (groups - 1) + 6) * vocabulary * size
    chunks = -(-vocabulary // max(MIN_COLUMNS, Q_BYTES // (2 * rows)))
    full = (3 + (1 - kept), 0.0, 6.0 * (2 - kept) * logits)
    library, triton, moved = {
        "chunked, full": full,
        "chunked, loss": (3.0, 0.0, 6.0 * logits + sums) if in_groups(rows, kept_rows(rows, size)) else full,
        "chunked, frozen": (2.0, 0.0, 6.0 * logits),
        "chunked, logp": (1.0, 0.0, 4.0 * logits),
        "fused, full": (2.0, 2.0, 8.0 * chunks * rows * size),
    }[path]
    return 1e3 * (library * product / LIBRARY + triton * product / TRITON + moved / BYTES)


def gibibytes(path: str, rows: int, size: int, vocabulary: int) -> float:
    """Peak beside inputs and gradients in the dtype of the inputs."""
    chunk = 4 * min(rows, CHUNK_ROWS) * vocabulary
    passing = chunk // 2  # Q of a chunk that is not kept
    kept = 2 * kept_rows(rows, size) * vocabulary
    sums, d_weight = 4 * rows * size, 4 * vocabulary * size  # of dX / g, and of dW, in float32
    full = chunk + kept + sums + (passing if rows > kept_rows(rows, size) else 0)
    total = {
        "chunked, full": full,
        "chunked, loss": chunk + kept + d_weight + sums if in_groups(rows, kept_rows(rows, size)) else full,
        "chunked, frozen": chunk + passing + sums,
        "chunked, logp": chunk,
        "fused, full": max(Q_BYTES, 2 * rows * MIN_COLUMNS) + sums + 2 * rows * size + 4 * min(rows, SUM_ROWS) * size,
    }[path]
    return total / 2**30


def table() -> str:
    paths = ("chunked, full", "chunked, loss", "chunked, frozen", "chunked, logp", "fused, full")
    lines = [
        "| head | rows | one product, ms | " + " | ".join(f"{p}: ms, GiB" for p in paths) + " |",
        "|---|---|---|" + "---|" * len(paths),
    ]
    for name, (size, vocabulary) in HEADS.items():
        for rows in ROWS:
            product = 1e3 * 2 * rows * size * vocabulary / LIBRARY
            cells = [
                f"{milliseconds(p, rows, size, vocabulary):.1f}, {gibibytes(p, rows, size, vocabulary):.2f}"
                for p in paths
            ]
            lines.append(f"| {name} | {rows:,} | {product:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
