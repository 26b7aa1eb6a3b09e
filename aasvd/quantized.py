"""Eight-bit storages: int8 factors, int8 pivoted rows, and Dobi-SVD's remapped factors.

Every component of the rank has one absmax scale per matrix. Codes stay codes in memory and are expanded when
a layer is called: that is what makes the loaded model small (at a ratio above a half, remapped factors in 16
bit would be larger than the dense weight), and `save_pretrained` gives the same bytes. It costs time at
every call, so these formats save memory, not time. Scales are kept as the bits of float16 in int16: a cast
of the model would round them otherwise.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aasvd.lowrank import CompressedLinear, Layout
from aasvd.pivoted import PivotedLinear, convert, left_factor
from aasvd.rounding import refit, round_with_feedback

_LEVELS = 127  # int8 without -128, so that codes are symmetric


def _scales_of(matrix: Tensor, levels: int) -> Tensor:
    """Return the largest magnitude of each row in units of `levels`, rounded up to float16.

    Rounded up, so that no entry exceeds the largest code; never 0, so that a row of zeros stays one.
    """
    if matrix.shape[1] == 0:
        return matrix.new_ones(len(matrix), dtype=torch.float16)
    exact = matrix.abs().amax(1) / levels
    half = exact.clamp_min(torch.finfo(torch.float16).smallest_normal).half()
    scales = torch.where(half < exact, torch.nextafter(half, half.new_tensor(torch.inf)), half)
    if not torch.isfinite(scales).all():
        raise ValueError(
            f"a factor holds {float(exact.max()) * levels:.3g}, too large for a scale in float16"
        )
    return scales


def _scales_problem(scales: Tensor) -> str | None:
    values = scales.view(torch.float16)
    return None if (torch.isfinite(values) & (values > 0)).all() else "holds scales that are not positive"


def _int8(matrix: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix (k, n) with feedback to int8 codes and a float16 scale per row."""
    scales = _scales_of(matrix, _LEVELS)
    exact = scales.to(torch.float64)

    def rounded(row: int, values: Tensor) -> Tensor:
        return (values / exact[row]).round().clamp(-_LEVELS, _LEVELS) * exact[row]

    fitted = round_with_feedback(matrix, gram, rounded)
    return (fitted / exact[:, None]).round().to(torch.int8), scales


def _expanded(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return codes (k, n) times the scales of their rows, given as bits."""
    return (codes * scales.view(torch.float16).float()[:, None]).to(dtype)


def balanced(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of the same product: its singular vectors, each times its singular value's root."""
    left_basis, left = torch.linalg.qr(u.to(torch.float64))
    right_basis, right = torch.linalg.qr(v.to(torch.float64).mT)
    rotated, singular, turned = torch.linalg.svd(left @ right.mT)
    root = singular.sqrt()
    return left_basis @ rotated * root, root[:, None] * (turned @ right_basis.mT)


class _Coded(nn.Module):
    """A layer whose numbers are codes, in buffers."""

    @property
    def qweight(self) -> Tensor:
        """A tensor of codes, by the name under which PEFT looks for a quantized layer's device."""
        return next(self.buffers())


class _ExpandedLinear(_Coded, CompressedLinear):
    """A layer whose factors are expanded at every call."""

    OVERHEAD = ("scales",)
    scales: Tensor

    @staticmethod
    def problem(name: str, value: Tensor) -> str | None:
        """Say so if scales are not positive."""
        return _scales_problem(value)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in) to (..., out)."""
        # Both factors expanded once, where `down` and `up` would do it twice.
        u, v = self.factors(x.dtype)
        return F.linear(F.linear(x, v), u, self.bias)

    def down(self, x: Tensor) -> Tensor:
        """Map x (..., in) to its latents (..., rank)."""
        return F.linear(x, self.factors(x.dtype)[1])

    def up(self, latents: Tensor) -> Tensor:
        """Map latents (..., rank) to (..., out)."""
        return F.linear(latents, self.factors(latents.dtype)[0], self.bias)


class Int8LowRankLinear(_ExpandedLinear):
    """Factors u (out, k) and v (k, in) in int8; `scales` (2, k): those of v's rows, of u's columns."""

    u: Tensor
    v: Tensor

    @staticmethod
    def layout(in_features: int, out_features: int, rank: int) -> Layout:
        """Return the shapes of the factors and their scales."""
        return {
            "u": ((out_features, rank), torch.int8),
            "v": ((rank, in_features), torch.int8),
            "scales": ((2, rank), torch.int16),
        }

    @staticmethod
    def pack(u: Tensor, v: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Round v, then u fitted anew to the rounded v."""
        left, right = balanced(u, v)
        codes, scales = _int8(right, left.mT @ left)
        rounded = codes * scales.to(torch.float64)[:, None]
        left_codes, left_scales = _int8(refit(rounded, left, left @ right).mT, rounded @ rounded.mT)
        bits = torch.stack((scales, left_scales)).view(torch.int16)
        return {"u": left_codes.mT.contiguous(), "v": codes, "scales": bits}

    def factors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Return u and v expanded."""
        return _expanded(self.u.mT, self.scales[1], dtype).mT, _expanded(self.v, self.scales[0], dtype)


class Int8PivotedLinear(_Coded, PivotedLinear):
    """Pivots' rows and coefficients in int8; `scales` (2, k): those of rows, of coefficients' columns."""

    OVERHEAD = ("order", "scales")
    DOWN = None
    scales: Tensor

    @staticmethod
    def layout(in_features: int, out_features: int, rank: int) -> Layout:
        """Return the shapes of rows, coefficients, order and scales."""
        return {
            "rows": ((rank, in_features), torch.int8),
            "coefficients": ((out_features - rank, rank), torch.int8),
            "order": ((out_features,), torch.int32),
            "scales": ((2, rank), torch.int16),
        }

    @staticmethod
    def pack(u: Tensor, v: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Round the rows, then the coefficients fitted anew to the rounded rows."""
        rounded: list[tuple[Tensor, Tensor]] = []

        def fit(matrix: Tensor, gram: Tensor) -> Tensor:
            codes, scales = _int8(matrix, gram)
            rounded.append((codes, scales))
            return codes * scales.to(torch.float64)[:, None]

        order = convert(u, v, fit)[2]
        (rows, row_scales), (columns, column_scales) = rounded
        bits = torch.stack((row_scales, column_scales)).view(torch.int16)
        return {"rows": rows, "coefficients": columns.mT.contiguous(), "order": order, "scales": bits}

    @staticmethod
    def problem(name: str, value: Tensor) -> str | None:
        """Say so if scales are not positive or `order` is not an order of all rows."""
        return _scales_problem(value) if name == "scales" else PivotedLinear.problem(name, value)

    def coefficients_in(self, dtype: torch.dtype) -> Tensor:
        """Return the coefficients expanded."""
        return _expanded(self.coefficients.mT, self.scales[1], dtype).mT

    def factors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Return u and v with everything expanded."""
        u = left_factor(self.coefficients_in(dtype), self.order)
        return u, _expanded(self.rows, self.scales[0], dtype)

    def down(self, x: Tensor) -> Tensor:
        """Map x (..., in) to its latents (..., rank)."""
        return F.linear(x, _expanded(self.rows, self.scales[0], x.dtype))


def dynamic_code_book() -> Tensor:
    """Return the 256 values of bitsandbytes' dynamic 8-bit map in ascending order, float32.

    Seven decades below 1, the i-th with 2^i values in each sign: the midpoints of as many equal parts of
    [0.1, 1], times 10^(i − 6); and 0 and 1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float64)
        middles = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)).tolist()
        values += [sign * middle for middle in middles for sign in (1, -1)]
    return torch.tensor(sorted(values), dtype=torch.float32)


_BOOK = dynamic_code_book()


class RemappedLinear(_ExpandedLinear):
    """Dobi-SVD's remapped factors: k max(out, in) slots of 16 bit (ICLR 2025).

    `slots` (max, k): each of the first min(out, in) rows holds a code of u in its low byte and one of v in
    its high byte; the others hold what the longer factor has left, in float16. `scales` (2, k): largest
    magnitude of each component among the coded entries of u, of v.
    """

    slots: Tensor

    @staticmethod
    def layout(in_features: int, out_features: int, rank: int) -> Layout:
        """Return the shapes of slots and scales."""
        return {
            "slots": ((max(in_features, out_features), rank), torch.int16),
            "scales": ((2, rank), torch.int16),
        }

    @staticmethod
    def pack(u: Tensor, v: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Code the singular vectors of u v, each times the root of its singular value."""
        left, right = balanced(u, v)
        short = min(len(left), right.shape[1])
        pair = left[:short], right.mT[:short]
        scales = torch.stack([_scales_of(matrix.mT, 1) for matrix in pair])
        book = _BOOK.to(u.device, torch.float64)
        middles = (book[:-1] + book[1:]) / 2
        codes = [
            torch.bucketize((matrix / scale.to(torch.float64)).contiguous(), middles).to(torch.uint8)
            for matrix, scale in zip(pair, scales, strict=True)
        ]
        coded = torch.stack(codes, -1).view(torch.int16)[..., 0]
        rest = torch.cat((left[short:], right.mT[short:])).half()
        if not torch.isfinite(rest).all():
            raise ValueError("a factor holds a number too large for float16")
        slots = torch.cat((coded, rest.view(torch.int16)))
        return {"slots": slots.contiguous(), "scales": scales.view(torch.int16)}

    def factors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Return u and v expanded."""
        short = min(self.in_features, self.out_features)
        codes = self.slots[:short].view(torch.uint8).view(short, self.rank, 2)
        values = _BOOK.to(codes.device)[codes.int()] * self.scales.view(torch.float16).float().mT
        rest = self.slots[short:].view(torch.float16).float()
        u, v = values[..., 0], values[..., 1]
        if self.out_features > self.in_features:
            u = torch.cat((u, rest))
        elif self.in_features > self.out_features:
            v = torch.cat((v, rest))
        return u.to(dtype), v.mT.to(dtype)
