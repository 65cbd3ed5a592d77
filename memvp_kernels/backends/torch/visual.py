"""The visual branch of the torch backend: scores, visual activations, and the gradients of a memory."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from memvp_kernels.backends.torch.activations import activate, activation_backward
from memvp_kernels.backends.torch.dropout import keep_mask
from memvp_kernels.backends.torch.memory_rows import MemoryRows, Pair, memory_rows, row_of
from memvp_kernels.backends.torch.products import product
from memvp_kernels.problem import BEHIND_SCORES, BEHIND_VISUAL, Problem

__all__ = ["VisualBranch", "memory_backward"]


class VisualBranch:
    """The visual branch of one problem: what both passes need of it."""

    def __init__(self, p: Problem) -> None:
        assert p.visual_key is not None and p.visual_value is not None
        self.p = p
        self._known_factor: Tensor | float | None = None
        self.rows: MemoryRows = memory_rows(p.segments, p.memories, p.x.device)
        lengths = p.segments.lengths
        self.lengths: Tensor | None = None  # (R,)
        self.valid: Tensor | None = None  # (R, M) slots that exist
        if lengths is not None:
            self.lengths = torch.where((lengths >= 0) & (lengths <= p.slots), lengths, 0)
            self.valid = torch.arange(p.slots, device=p.x.device)[None, :] < self.lengths[:, None]
        self.mapped = p.visual_map is not None
        # Plain: Kv and Vv (R, M, d), summed in the wider dtype and rounded once; or φ(Kv). Factored: the cores (R, M, r).
        add = (None, None) if p.factored else (p.key_position, p.value_position)
        if self.mapped:
            assert p.key_operand is not None
            self.key = self._clean(p.key_operand, None)
        else:
            self.key = self._clean(p.visual_key, add[0])
        same = not self.mapped and p.visual_value is p.visual_key and add[0] is add[1]
        self.value = self.key if same else self._clean(p.visual_value, add[1])
        if p.visual_basis is not None:
            self.rank = p.visual_basis.shape[0]
            self.basis = p.visual_basis.to(p.x.dtype)
            self.key_position = None if p.key_position is None else p.key_position.to(p.x.dtype)
            self.value_position = None if p.value_position is None else p.value_position.to(p.x.dtype)

    def _clean(self, memory: Tensor, position: Tensor | None) -> Tensor:
        """In x's dtype; slots that don't exist become zero, whatever they held."""
        dtype = self.p.x.dtype
        if position is not None:
            # PyTorch adds two 16-bit numbers in float32 and rounds once; beside a wider one, both are widened first.
            if not memory.dtype == position.dtype == dtype:
                memory = memory.to(
                    torch.promote_types(torch.promote_types(memory.dtype, position.dtype), torch.float32)
                )
            memory = memory + position
        memory = memory.to(dtype)
        return memory if self.valid is None else memory.masked_fill(~self.valid[:, :, None], 0)

    def mask_(self, scores: Tensor) -> Tensor:
        """Zero, in place, what a row must not see. Only the factored form needs it: positions there are shared by all rows."""
        hidden = self._hidden_slots
        return scores if hidden is None else scores.masked_fill_(hidden, 0)

    @functools.cached_property
    def _hidden_slots(self) -> Tensor | None:
        """True for (row, slot) without memory there, broadcast to (N, M); None when every row sees every slot."""
        segments = self.p.segments
        if segments.shared:
            return None if self.valid is None else ~self.valid[0]
        if self.valid is None and segments.index is None and segments.cu_seqlens is None:
            return None
        row = row_of(segments, self.p.memories, self.p.x.device)
        absent = (row < 0)[:, None]
        return absent if self.valid is None else absent | ~self.valid[row.clamp(min=0)]

    def only_readers(self, a: Tensor) -> Tensor:
        """`a` (N, ·) with the rows that read no slot zeroed, for a product over all rows: 0 · NaN of such a row would be NaN.

        Dense products take no mask, so this is a copy. On a CPU it is made if some row reads none; on a GPU, where looking would
        synchronize, if the arguments allow for such rows.
        """
        idle = self._idle
        return a if idle is None else a.masked_fill(idle, 0)

    @functools.cached_property
    def _idle(self) -> Tensor | None:
        """(N, 1), True for rows that read no slot; None when every row reads some."""
        segments, device = self.p.segments, self.p.x.device
        if self.valid is None and segments.index is None and segments.cu_seqlens is None:
            return None
        row = row_of(segments, self.p.memories, device)
        idle = row < 0
        if self.valid is not None:
            idle |= ~self.valid.any(1)[row.clamp(min=0)]
        return None if device.type == "cpu" and not idle.any() else idle[:, None]

    @functools.cached_property
    def query(self) -> Tensor:
        """What meets the keys: x, or φ(x)."""
        return F.silu(self.p.x) if self.mapped else self.p.x

    def scores(self) -> Tensor:
        """x Kvᵀ (N, M): (x Wᵀ) Aᵀ + x p^kᵀ when factored, φ(x) φ(Kv)ᵀ under a map."""
        p, keys = self.p, self.key.transpose(1, 2)
        if self.mapped or not p.factored:
            return self.rows.product(self.query, keys)
        if p.key_operand is not None:
            return self._from_joined(product(p.x, p.key_operand.T), keys)
        return self._with_position(p.x, product(p.x, self.basis.T), keys, self.key_position)

    def _from_joined(self, joined: Tensor, cores: Tensor) -> Tensor:
        """(a Wᵀ) Aᵀ + a pᵀ (N, M) from a [W; p]ᵀ."""
        return self.mask_(self.rows.plus_product(joined[:, self.rank :], joined[:, : self.rank], cores))

    def _with_position(self, d_wide: Tensor, r_wide: Tensor, cores: Tensor, position: Tensor | None) -> Tensor:
        """r_wide Aᵀ + d_wide pᵀ (N, M)."""
        if position is None:
            return self.mask_(self.rows.product(r_wide, cores))
        out = product(d_wide, position.T)
        self.rows.add_product(out, r_wide, cores)
        return self.mask_(out)

    def _factor(self, scores: Tensor) -> Tensor | float:
        """s · keep / (1 - p) · [score ≥ θ], which a backward needs twice."""
        if self._known_factor is None:
            self._known_factor = self._new_factor(scores)
        return self._known_factor

    def _new_factor(self, scores: Tensor) -> Tensor | float:
        p = self.p
        wide = torch.promote_types(p.x.dtype, torch.float32)
        factor: Tensor | float = p.visual_scale
        if p.seed is not None:
            keep = keep_mask(p.seed, p.rows, p.slots, p.dropout_p)
            factor = keep.to(wide).mul_(p.visual_scale / (1 - p.dropout_p) if p.dropout_p < 1 else 0.0)
        if int(p.visual_drop * p.slots) > 0:
            # A product, so that a dropped NaN stays one.
            factor = (scores >= self._threshold(scores)).to(wide) * factor
        return factor

    def _threshold(self, scores: Tensor) -> Tensor:
        """θ (N, 1): the (int(γ·m) + 1)-th lowest of a row's scores over the m slots of its image."""
        p, segments = self.p, self.p.segments
        most = int(p.visual_drop * p.slots)
        if self.valid is not None and self.lengths is not None:
            # Of the slots that don't exist as many go below all scores as give θ the same rank in every row; the others go above.
            below = (most - (self.lengths.double() * p.visual_drop).long())[:, None]
            beyond = torch.arange(p.slots, device=scores.device)[None, :] - self.lengths[:, None]
            filled = torch.where(beyond < below, -torch.inf, torch.inf).to(scores.dtype)
            row = slice(1) if segments.shared else row_of(segments, p.memories, scores.device).clamp(min=0)
            scores = torch.where(self.valid[row], scores, filled[row])
        # kthvalue is as fast, and refused on a GPU under deterministic algorithms.
        return scores.topk(most + 1, dim=1, largest=False, sorted=False).values.amax(1, keepdim=True)

    def visual(self, scores: Tensor) -> Tensor:
        """s · dropout(vact(scores) · [score ≥ θ]), in float32 and rounded once."""
        factor = self._factor(scores)
        if isinstance(factor, float) and factor == 1.0:
            return activate(self.p.visual_activation, scores)
        active = activate(self.p.visual_activation, scores.to(torch.promote_types(scores.dtype, torch.float32)))
        return (active * factor if active is scores else active.mul_(factor)).to(scores.dtype)

    def add_output_(self, y: Tensor, visual: Tensor) -> None:
        """y += visual Vv: (visual A) W + visual p^v when factored."""
        if not self.p.factored:
            self.rows.add_product(y, visual, self.value)
            return
        of_value = self.rows.product(visual, self.value)
        if self.p.value_operand is not None:
            y.addmm_(torch.cat([of_value, visual], dim=1), self.p.value_operand)
        elif self.value_position is None:
            y.addmm_(of_value, self.basis)
        else:  # y, the larger, is rounded once
            y += (visual @ self.value_position).addmm_(of_value, self.basis)

    def memory_gradient(self, *pairs: Pair, out: Tensor | None = None) -> Tensor:
        """For each memory row the sum of left[n]ᵀ right[n] (R, M, ·) over the rows that read it; zero in slots that don't exist.

        Args:
            pairs: (left, right); the sum is over all of them, rounded once.
            out: to which it is added, in the operands' dtype.
        """
        if out is None and pairs[0][0].itemsize < 4:
            found = self.rows.outer(*pairs)
        else:
            found, rest = (self.rows.outer(pairs[0]), pairs[1:]) if out is None else (out, pairs)
            for left, right in rest:
                self.rows.add_outer(found, left, right)
        # `left` is zero there, but 0 · NaN of a token is not.
        return found if self.valid is None else found.masked_fill_(~self.valid[:, :, None], 0)

    def through_value(self, grad: Tensor) -> Tensor | None:
        """dy Wᵀ (N, r), or dy [W; p^v]ᵀ (N, r + M) where the two come joined; None when not factored."""
        if not self.p.factored:
            return None
        return grad @ (self.basis if self.p.value_operand is None else self.p.value_operand).T

    def score_gradient(self, grad: Tensor, scores: Tensor, through_value: Tensor | None) -> Tensor:
        """dS (N, M) from dy and what :meth:`through_value` makes of it."""
        values = self.value.transpose(1, 2)
        if through_value is None:
            dvisual = self.rows.product(grad, values)
        elif self.p.value_operand is not None:
            dvisual = self._from_joined(through_value, values)
        else:
            dvisual = self._with_position(grad, through_value, values, self.value_position)
        wide = torch.promote_types(scores.dtype, torch.float32)
        dvisual = dvisual.to(wide).mul_(self._factor(scores))
        return activation_backward(self.p.visual_activation, dvisual, scores.to(wide)).to(scores.dtype)


def memory_backward(
    p: Problem,
    grad: Tensor,
    scores: Tensor | None,
    needs: frozenset[str],
    grads: dict[str, Tensor],
    sums: Mapping[str, Tensor],
) -> None:
    wanted = needs & (BEHIND_SCORES | BEHIND_VISUAL)
    if not wanted:
        return
    m = VisualBranch(p)
    if scores is None:
        scores = m.scores()
    visual = m.visual(scores) if wanted & BEHIND_VISUAL else None
    dscores = through_value = None
    if wanted & BEHIND_SCORES or "visual_value" in wanted:
        through_value = m.through_value(grad)
    if wanted & BEHIND_SCORES:
        dscores = m.score_gradient(grad, scores, through_value)
    if m.mapped and dscores is not None:
        _mapped_backward(m, dscores, wanted, grads, sums)
        wanted, dscores = wanted - {"x", "key_operand"}, None
    if p.factored:
        dy_basis = None if through_value is None else through_value[:, : m.rank]
        _factored_backward(p, m, grad, visual, dscores, dy_basis, wanted, grads, sums)
        return
    if "x" in wanted:
        assert dscores is not None
        grads.setdefault("x", torch.zeros_like(p.x, memory_format=torch.contiguous_format))
        m.rows.add_product(grads["x"], dscores, m.key)
    if "core" in wanted:
        assert visual is not None
        of_key = [] if dscores is None else [(dscores, p.x)]
        grads["core"] = m.memory_gradient(*of_key, (visual, grad))
    for side, left, right in (("key", dscores, p.x), ("value", visual, grad)):
        memory_name, position_name = f"visual_{side}", f"{side}_position"
        if f"{side}_operand" in wanted:
            assert left is not None
            grads[f"{side}_operand"] = _add_memory_gradient(m, sums.get(f"{side}_operand"), left, right)
        if memory_name not in wanted and position_name not in wanted:
            continue
        assert left is not None
        if memory_name not in wanted:
            # Rows without memory and slots that don't exist hold zeros in `left`, so the sum over images is one dense product;
            # but for a row whose image has no slot these zeros are a product with its x and dy, of which either may be NaN.
            grads[position_name] = m.only_readers(left).T @ m.only_readers(right)
            continue
        grads[memory_name] = m.memory_gradient((left, right))
        if position_name in wanted:
            grads[position_name] = grads[memory_name].sum(0, dtype=torch.promote_types(left.dtype, torch.float32))


def _mapped_backward(
    m: VisualBranch, dscores: Tensor, wanted: frozenset[str], grads: dict[str, Tensor], sums: Mapping[str, Tensor]
) -> None:
    """The gradients of x and of φ(Kv), both through φ(x) φ(Kv)ᵀ."""
    x = m.p.x
    if "x" in wanted:
        dx = torch.ops.aten.silu_backward(m.rows.product(dscores, m.key), x)
        grads["x"] = grads["x"].add_(dx) if "x" in grads else dx
    if "key_operand" in wanted:
        grads["key_operand"] = _add_memory_gradient(m, sums.get("key_operand"), dscores, m.query)


def _add_memory_gradient(m: VisualBranch, total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ right for each memory row in float32 at least, added to `total` where there is one."""
    if total is not None and total.dtype == left.dtype:
        return m.memory_gradient((left, right), out=total)
    found = m.memory_gradient((left, right)).to(torch.promote_types(left.dtype, torch.float32))
    return found if total is None else total.add_(found)


def _factored_backward(
    p: Problem,
    m: VisualBranch,
    grad: Tensor,
    visual: Tensor | None,
    dscores: Tensor | None,
    dy_basis: Tensor | None,
    wanted: frozenset[str],
    grads: dict[str, Tensor],
    sums: Mapping[str, Tensor],
) -> None:
    """Every d-wide operand is shared by the batch; only the cores' gradients (R, M, r) are per image."""
    readers = {"visual_basis", "key_position", "value_position", "key_operand", "value_operand"} & wanted
    x, dy = (m.only_readers(t) if readers else t for t in (p.x, grad))
    dx_basis = key_left = None
    if dscores is not None and wanted & {"x", "visual_basis", "key_operand"}:
        dx_basis = m.rows.product(dscores, m.key)
        if p.key_operand is not None:
            key_left = torch.cat([dx_basis, dscores], dim=1)
    if "x" in wanted:
        assert dx_basis is not None
        parts = [(dx_basis, m.basis), (dscores, m.key_position)] if key_left is None else [(key_left, p.key_operand)]
        for left, right in parts:
            if left is not None and right is not None:
                grads["x"] = grads["x"].addmm_(left, right) if "x" in grads else left @ right
    if "visual_key" in wanted:
        assert dscores is not None
        grads["visual_key"] = m.memory_gradient((dscores, p.x @ m.basis.T))
    if "visual_value" in wanted:
        assert visual is not None and dy_basis is not None
        grads["visual_value"] = m.memory_gradient((visual, dy_basis))
    if "visual_basis" in wanted:
        assert visual is not None
        of_value = m.rows.product(visual, m.value).T
        grads["visual_basis"] = of_value @ dy if dx_basis is None else (dx_basis.T @ x).addmm_(of_value, dy)
    if "key_position" in wanted:
        assert dscores is not None
        grads["key_position"] = dscores.T @ x
    if "value_position" in wanted:
        assert visual is not None
        grads["value_position"] = visual.T @ dy
    wide = torch.promote_types(grad.dtype, torch.float32)
    if "core" in wanted:
        assert visual is not None and dy_basis is not None
        # The products in float32: they are small, and each rounded to 16 bits nothing may be left of a sum that nearly cancels.
        of_key = [] if dscores is None else [(dscores.to(wide), (p.x @ m.basis.T).to(wide))]
        grads["core"] = m.memory_gradient(*of_key, (visual.to(wide), dy_basis.to(wide)), out=sums.get("core"))
    if "key_operand" in wanted:
        assert key_left is not None
        grads["key_operand"] = _add_transposed(sums.get("key_operand"), key_left, x, wide)
    if "value_operand" in wanted:
        assert visual is not None
        value_left = torch.cat([m.rows.product(visual, m.value), visual], dim=1)
        grads["value_operand"] = _add_transposed(sums.get("value_operand"), value_left, dy, wide)


def _add_transposed(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """leftᵀ right in `dtype`, added to `total` where there is one; a `total` wider than the operands stays as wide."""
    if total is None:
        return (left.T @ right).to(dtype)
    if total.dtype != left.dtype:
        return total.add_(left.T @ right)
    return total.addmm_(left.T, right)
