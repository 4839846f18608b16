"""torch FlexAttention as a contestant: compiled, with a BlockMask made of the selection's own lists."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from saccade.bench.case import Contestant, Run, Skip, Work
from saccade.bench.peers import Inputs, backward_of, outputs_of
from saccade.core import Selection


def causal_rows(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
    return row >= key


def block_mask(selection: Selection) -> BlockMask:
    """The same tiles: those wholly below the diagonal as whole ones, those on it with a causal rule inside. No map of pairs is made.

    Raises Skip for selections that aren't causal squares of aligned tiles.
    """
    n, block_q, block_k = selection.n_q, selection.block_q, selection.block_k
    if not selection.aligned or selection.tokens.shape[-1] or not selection.causal or n != selection.n_k or n % block_q or n % block_k:
        raise Skip("FlexAttention is given causal squares of aligned tiles only")
    if block_q % 128 or block_k % 128:
        raise Skip("FlexAttention is given tiles of 128 tokens only")
    columns = n // block_k
    device = selection.device
    counts = selection.start_counts
    ids = torch.nn.functional.pad(selection.starts // block_k, (0, columns - selection.starts.shape[-1])).clamp(max=columns - 1)
    first_row = torch.arange(selection.tiles, device=device).unsqueeze(-1) * block_q
    listed = torch.arange(columns, device=device) < counts.unsqueeze(-1)
    crossing = (listed & ((ids + 1) * block_k - 1 > first_row)).sum(-1, dtype=torch.int32)
    whole = (counts - crossing).to(torch.int32)
    # lists ascend, so the tiles that cross the diagonal are the last ones
    place = (whole.unsqueeze(-1) + torch.arange(columns, device=device)).clamp(max=columns - 1).long()
    return BlockMask.from_kv_blocks(
        crossing, ids.gather(-1, place).to(torch.int32), whole, ids.to(torch.int32), BLOCK_SIZE=(block_q, block_k),
        mask_mod=causal_rows, seq_lengths=(n, n),
    )  # fmt: skip


def contestant(x: Inputs, selection: Selection, work: Work, role: str) -> list[Contestant]:
    """FlexAttention over the tiles of `selection`; nothing on a CPU, where compiling takes longer than all else."""
    if not x.q.is_cuda:
        return []

    def make() -> Run:
        mask = block_mask(selection)
        # each case has a shape of its own: without this the compiler gives up after eight and runs uncompiled
        torch.compiler.reset()
        compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

        def call() -> Tensor:
            out = compiled(x.q, x.k, x.v, block_mask=mask, enable_gqa=x.grouped)
            assert isinstance(out, Tensor)
            return out

        return Run(call=backward_of(call, (x.q, x.k, x.v), x.d_out), outputs=outputs_of(x.d_out), impl="flex")

    return [Contestant(name="FlexAttention", role="dense" if role == "dense" else "peer", work=work, make=make)]
