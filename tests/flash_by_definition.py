"""FlashAttention for sequences of different lengths, by definition and in any dtype, also broken on request.

What the kernels share: the last query aligned with the last key, `window` keys to each side of the diagonal (-1 for
all), a softcap, heads in groups; forward gives the logsumexp (H, T), and backward begins with exp(S - lse) and
rowsum(dO * O), whatever lse and O it is given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Flash:
    """faults: of "top-left", "no window", "no softcap", "no groups", "wrong dK"."""

    faults: tuple[str, ...] = ()
    calls: list[dict[str, Any]] = field(default_factory=list)

    def _sequences(self, query: Tensor, key: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Any:
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert cu_q[0] == cu_k[0] == 0
        assert cu_q[-1].item() == query.shape[0]
        assert cu_k[-1].item() == key.shape[0]
        assert max_q == cu_q.diff().max().item()
        assert max_k == cu_k.diff().max().item()
        bounds = zip(cu_q.tolist(), cu_q.tolist()[1:], cu_k.tolist(), cu_k.tolist()[1:], strict=False)
        return [(slice(a, b), slice(c, d)) for a, b, c, d in bounds]

    def _expand(self, x: Tensor, heads: int) -> Tensor:
        """(H, n, d) of (n, G, d)"""
        share = heads // x.shape[1]
        return (x.repeat(1, share, 1) if "no groups" in self.faults else x.repeat_interleave(share, dim=1)).transpose(
            0, 1
        )

    def _scores(
        self, q: Tensor, k: Tensor, scale: float, window: tuple[int, int], softcap: float
    ) -> tuple[Tensor, Tensor]:
        """S and its derivative by scale q k, both (H, n, m); q (H, n, d), k (H, m, d)."""
        scores = q @ k.mT * scale
        slope = torch.ones_like(scores)
        if softcap and "no softcap" not in self.faults:
            scores = softcap * torch.tanh(scores / softcap)
            slope = 1 - (scores / softcap) ** 2
        n, m = scores.shape[1:]
        diagonal = torch.arange(n)[:, None] + (0 if "top-left" in self.faults else m - n)
        left, right = (math.inf if w == -1 else w for w in window)
        left = math.inf if "no window" in self.faults else left
        j = torch.arange(m)
        sees = (j >= diagonal - left) & (j <= diagonal + right)
        return scores.masked_fill(~sees, -torch.inf), slope

    def _check(self, *tensors: Tensor) -> None:
        sizes = {x.shape[2] for x in tensors}
        assert len(sizes) == 1
        assert sizes.pop() % 8 == 0
        assert all(x.stride(2) == 1 for x in tensors)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        max_q: int,
        max_k: int,
        scale: float,
        window: tuple[int, int],
        softcap: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        self._check(q, k, v)
        self.calls.append({"forward": True, "window": window, "softcap": softcap, "keys": k.shape})
        wide = torch.promote_types(q.dtype, torch.float32)
        out, lse = torch.empty(q.shape, dtype=wide), torch.empty(q.shape[1], q.shape[0], dtype=wide)
        for of_q, of_k in self._sequences(q, k, cu_q, cu_k, max_q, max_k):
            rows = q[of_q].to(wide).transpose(0, 1)
            keys, values = (self._expand(x[of_k].to(wide), q.shape[1]) for x in (k, v))
            scores, _ = self._scores(rows, keys, scale, window, softcap)
            lse[:, of_q] = scores.logsumexp(dim=2)
            out[of_q] = (scores.softmax(dim=2) @ values).transpose(0, 1)
        return out.to(q.dtype), lse

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        max_q: int,
        max_k: int,
        scale: float,
        window: tuple[int, int],
        softcap: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        self._check(grad, q, k, v, out)
        self.calls.append({"forward": False, "window": window, "softcap": softcap, "keys": k.shape})
        wide = torch.promote_types(q.dtype, torch.float32)
        d_q, d_k, d_v = (torch.empty(x.shape, dtype=wide) for x in (q, k, v))
        for of_q, of_k in self._sequences(q, k, cu_q, cu_k, max_q, max_k):
            rows, up, result = (x[of_q].to(wide).transpose(0, 1) for x in (q, grad, out))
            keys, values = (self._expand(x[of_k].to(wide), q.shape[1]) for x in (k, v))
            scores, slope = self._scores(rows, keys, scale, window, softcap)
            p = torch.exp(scores - lse[:, of_q, None])
            d_s = p * (up @ values.mT - (up * result).sum(dim=2, keepdim=True)) * slope * scale
            d_q[of_q] = (d_s @ keys).transpose(0, 1)
            for total, parts in ((d_k, d_s.mT @ rows), (d_v, p.mT @ up)):
                groups = parts.view(
                    *((-1, k.shape[1]) if "no groups" in self.faults else (k.shape[1], -1)), *parts.shape[1:]
                )
                total[of_k] = groups.sum(dim=0 if "no groups" in self.faults else 1).transpose(0, 1)
        if "wrong dK" in self.faults:
            d_k *= 0.7
        return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype)
