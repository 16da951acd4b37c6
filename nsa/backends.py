"""The names of the backends, and the functions that each of them provides.

`nsa.functional` checks all arguments before it calls a backend. Packed sequences come as their tables, `varlen`, which
is `None` where nothing is packed. Shapes are those of the legend of `nsa.functional`.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

from torch import Tensor

from nsa.blocks import BlockFunction, BlockStarts, CompressionParams
from nsa.config import NSAConfig
from nsa.varlen import Varlen

BackendName = Literal["auto", "eager", "triton"]
"""Values of `backend=`; `"auto"` is Triton where it supports the arguments on a GPU, else eager."""


class Backend(Protocol):
    """The stages as a module provides them, `nsa.eager` and `nsa.kernels`; a type checker holds both to it."""

    def compress(
        self,
        xs: Sequence[Tensor],
        params: Sequence[CompressionParams | None],
        config: NSAConfig,
        blocks: BlockStarts | None,
    ) -> tuple[Tensor, ...]:
        """Compressed blocks `[B, C, Hk, D]` of each of one or two tensors.

        Args:
            xs: `[B, T, Hk, D]` each.
            params: those of each tensor, `None` for the `"mean"` kind; in any floating dtype.
            blocks: starts of the `C` blocks; a block that is not filled becomes 0. `nsa.kernels` needs none where
                nothing is packed.
        """

    def apply_rope(
        self,
        q: Tensor,
        k_cmp: Tensor,
        k_slc: Tensor,
        k_win: Tensor,
        rope: Tensor,
        config: NSAConfig,
        positions: Tensor | None,
        block_positions: Tensor | None,
        interleaved: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four tensors, rotated and contiguous.

        Args:
            q: `[B, T, Hq, D]`.
            k_cmp: `[B, C, Hk, D]`.
            k_slc, k_win: `[B, T, Hk, D]`.
            rope: `[L, D / 2, 2]`, cosines and sines.
            positions: `[T]`, those of the tokens; `0` to `T - 1` unless given.
            block_positions: `[C]`, those of the blocks; `i d` unless given.
            interleaved: whether neighbours make a pair, or elements of the two halves.
        """

    def compressed_attention(
        self,
        q: Tensor,
        k_cmp: Tensor,
        v_cmp: Tensor,
        config: NSAConfig,
        num_keys: int,
        varlen: Varlen | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Output `[B, Tq, Hq, Dv]`, and lse `[B, Tq, Hq]` in the accumulation dtype, which has no gradient.

        Args:
            q: `[B, Tq, Hq, Dk]`.
            k_cmp, v_cmp: `[B, C, Hk, Dk]`, `[B, C, Hk, Dv]`.
            num_keys: tokens `Tk` behind `k_cmp`.
        """

    def select_blocks(
        self,
        q: Tensor,
        k_cmp: Tensor,
        lse: Tensor,
        config: NSAConfig,
        num_keys: int,
        varlen: Varlen | None,
        scale: float,
    ) -> Tensor:
        """Indices, int32 `[B, Tq, Hk, N]`, ascending with `-1` at the end, without gradients.

        Args:
            q: `[B, Tq, Hq, Dk]`.
            k_cmp: `[B, C, Hk, Dk]`.
            lse: `[B, Tq, Hq]`, from `compressed_attention`.
            num_keys: tokens `Tk` behind `k_cmp`.
        """

    def selected_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        indices: Tensor,
        config: NSAConfig,
        varlen: Varlen | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Output `[B, Tq, Hq, Dv]`, and lse `[B, Tq, Hq]`, which has no gradient.

        Args:
            q: `[B, Tq, Hq, Dk]`.
            k, v: `[B, Tk, Hk, Dk]`, `[B, Tk, Hk, Dv]`.
            indices: int32 `[B, Tq, Hk, N]`, any order, any values.
        """

    def sliding_window_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        config: NSAConfig,
        varlen: Varlen | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Output `[B, Tq, Hq, Dv]`, and lse `[B, Tq, Hq]`, which has no gradient.

        Args:
            q: `[B, Tq, Hq, Dk]`.
            k, v: `[B, Tk, Hk, Dk]`, `[B, Tk, Hk, Dv]`.
        """

    def nsa_attention(
        self,
        q: Tensor,
        k_cmp: Tensor,
        v_cmp: Tensor,
        k_slc: Tensor,
        v_slc: Tensor,
        k_win: Tensor,
        v_win: Tensor,
        gates: Tensor,
        indices: Tensor | None,
        config: NSAConfig,
        varlen: Varlen | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Output `[B, Tq, Hq, Dv]`, and the indices used, int32 `[B, Tq, Hk, N]`.

        Args:
            q: `[B, Tq, Hq, Dk]`.
            k_cmp, v_cmp: `[B, C, Hk, Dk]`, `[B, C, Hk, Dv]`.
            k_slc, v_slc, k_win, v_win: `[B, Tk, Hk, Dk]` or `[B, Tk, Hk, Dv]`.
            gates: `[B, Tq, Hq, 3]`.
            indices: int32 `[B, Tq, Hk, N]`, or `None` to select them.
        """

    def take_in(
        self,
        q: Tensor,
        k: Sequence[Tensor],
        v: Sequence[Tensor],
        rope: Tensor | None,
        pairs: Mapping[str, tuple[Tensor, Tensor]],
        lengths: Tensor,
        arrived: Tensor,
        params: Sequence[CompressionParams | BlockFunction | None],
        config: NSAConfig,
        interleaved: bool,
    ) -> Tensor:
        """Queries `[B, 1, Hq, Dk]`, rotated; takes a token of every sequence into the stores of a cache.

        Args:
            q: `[B, 1, Hq, Dk]`, not rotated.
            k, v: of the compressed, the selected and the window branch, `[B, 1, Hk, Dk]` and `[B, 1, Hk, Dv]`.
            rope: `[L, Dk / 2, 2]`, contiguous, or `None`.
            pairs: keys and values `"compressed"`, `"selected"`, `"window"` and `"tail"`, contiguous; rings but for the
                first two. Of the tail, which is not rotated, compressed blocks are made.
            lengths: int64 `[B]`, on the device; counts the token.
            arrived: int32 `[B]`, zeros, which programs count with; zeros again afterwards.
            params: those of keys and of values, as `compress` takes them; `nsa.eager` takes functions too.
            interleaved: as `apply_rope` takes it.
        """

    def decode_attention(
        self,
        q: Tensor,
        k_cmp: Tensor,
        v_cmp: Tensor,
        k_slc: Tensor,
        v_slc: Tensor,
        k_win: Tensor,
        v_win: Tensor,
        lengths: Tensor,
        gates: Tensor,
        config: NSAConfig,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Output `[B, Tq, Hq, Dv]` and the indices used, int32 `[B, Tq, Hk, N]`, without gradients.

        Args:
            q: `[B, Tq, Hq, Dk]`, the last tokens of each sequence.
            k_cmp, v_cmp, k_slc, v_slc, k_win, v_win: all that a cache has room for; the window's are a ring.
            lengths: int64 `[B]`, on the device.
            gates: `[B, Tq, Hq, 3]`.
        """

    def combine(self, branches: Sequence[Tensor], gates: Tensor) -> Tensor:
        """The gated sum `[B, Tq, Hq, Dv]`; a part of `nsa_attention`, which need not have gradients of its own.

        Args:
            branches: outputs `[B, Tq, Hq, Dv]` of the compressed, the selected and the window branch.
            gates: `[B, Tq, Hq, 3]`.
        """
