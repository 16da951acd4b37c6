"""The faults: each a small change to one file of `nsa/`, of the kind that people make and that runs without complaint.

Those that public implementations of Native Sparse Attention have shipped are among them, numbered as in `PUBLIC_BUGS`.
"""

from dataclasses import dataclass
from pathlib import Path

PUBLIC_BUGS = {
    1: "backward of the compressed branch wrong for wide values: delta summed for one chunk of them only",
    2: "a number of blocks that is no power of two: forward attends to blocks of the padding, gradients do not",
    3: "the scale given does not reach the window branch",
    4: "importance that underflows to 0 ties with padding: a valid block is lost",
    5: "the maximum of one row used for all rows: overflow with large logits",
    6: "a store at a head dim that is no power of two writes into the next head",
    7: "a window of w + 1 tokens",
    8: "a -1 among the indices read as a block",
    9: "no causal mask inside the query's own block; the end of a packed sequence reads the next one",
    10: "rows that see no compressed block made 0 in the first tile only",
    11: "importance off by one compressed block",
    12: "offsets of large batches overflow 32 bits",
    13: "gradients dropped, or doubled, where several queries share a block",
}
"""What real kernels shipped. Cached decoding that differs from the full forward is missing: there is no cache yet."""


@dataclass(frozen=True)
class Fault:
    """One change that makes the package wrong.

    Attributes:
        name: what it is called in the table and on the command line.
        what: what it does, in a line.
        file: below `nsa/`.
        old: text that stands in the file exactly once.
        new: what is put in its place.
        tests: ids of the tests, below the folder of the layer, that are tried first: one of them should fail.
        models: the public bug it is an example of, by its number.
        layer: the layer whose tests should kill it.
    """

    name: str
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    models: int | None = None
    layer: str = "unit"

    def apply(self, root: Path) -> None:
        """Makes the change in the copy of the repository at `root`.

        Raises:
            ValueError: the text to be replaced does not stand there exactly once.
        """
        path = root / "nsa" / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"its text must stand in nsa/{self.file} once, not {text.count(self.old)} times")
        path.write_text(text.replace(self.old, self.new))


def _oracle(case: str, part: str, dtype: str = "float64") -> str:
    """The test that compares a part of the Triton backend with the oracle on a case."""
    stage, _, way = part.partition("_by_")
    if way:
        return f"test_kernels.py::test_selected_attention_either_way[{case}-{dtype}-by_{way}]"
    return f"test_stages.py::test_matches_the_oracle[triton-{stage}-{case}-{dtype}]"


def _wide(stage: str) -> str:
    """The test of a stage whose head dims come in two chunks."""
    return _oracle("odd_head_dims", stage)


def _eager(case: str, stage: str) -> str:
    """The test that compares a stage of the eager backend with the oracle on a case."""
    return f"test_stages.py::test_matches_the_oracle[eager-{stage}-{case}-float64]"


_CONFIG = [
    Fault(
        "stride-need-not-divide",
        "the configuration takes a stride that does not divide the compressed block",
        "config.py",
        'for name in ("compress_block_size", "select_block_size"):',
        'for name in ("select_block_size",):',
        ("test_errors.py::test_illegal_configurations",),
    ),
    Fault(
        "more-forced-than-selected",
        "the configuration takes one forced block more than blocks are selected",
        "config.py",
        "if self.num_selected_blocks < forced:",
        "if self.num_selected_blocks < forced - 1:",
        ("test_errors.py::test_illegal_configurations",),
    ),
    Fault(
        "last-selection-block-not-counted",
        "the block at the end that is filled in part is none",
        "config.py",
        "return -(-num_keys // self.select_block_size)",
        "return num_keys // self.select_block_size",
        (_eager("small", "selected_attention"),),
    ),
]

_FUNCTIONS = [
    Fault(
        "dtypes-mixed",
        "keys may have another dtype than queries",
        "checks.py",
        'check_tensor(names[0], k, f"[B, {length}, Hk, Dk]", like=q, dtype=q.dtype)',
        'check_tensor(names[0], k, f"[B, {length}, Hk, Dk]", like=q)',
        ("test_errors.py::test_mixed_dtypes",),
    ),
    Fault(
        "triton-replaced-silently",
        'backend="triton" takes eager where Triton lacks support',
        "functional.py",
        'if backend == "triton":\n',
        'if backend == "triton" and False:\n',
        ("test_errors.py::test_triton_is_never_replaced_silently",),
    ),
    Fault(
        "offsets-of-keys-ignored",
        "cu_seqlens_k is checked, then that of the queries used in its place",
        "checks.py",
        "return cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()\n",
        "return cu_seqlens_q.contiguous(), cu_seqlens_q.contiguous()\n",
        (_eager("packed_last_queries", "sliding_window_attention"),),
    ),
    Fault(
        "compressed-block-crosses-a-boundary",
        "the first compressed block of a packed sequence is taken to be one more of the sequence before",
        "blocks.py",
        "sequence = torch.searchsorted(ends, block, right=True)",
        "sequence = torch.searchsorted(ends, block)",
        (_eager("packed_mean", "compress_keys"),),
    ),
    Fault(
        "block-listed-twice-accepted",
        "a block that is listed twice for one query counts twice",
        "checks.py",
        "if bool(repeated.any()):",
        "if bool(repeated.all()):",
        ("test_errors.py::test_a_block_listed_twice",),
    ),
    Fault(
        "scale-of-zero-ignored",
        "a scale of 0 is taken for none",
        "checks.py",
        "    if scale is None:\n        return float(",
        "    if not scale:\n        return float(",
        ("test_semantics.py::test_logits_may_be_scaled_by_any_number[eager-0.0-compressed_attention]",),
    ),
    Fault(
        "triton-offsets-strides-ignored",
        "offsets of packed sequences are read as if they were contiguous",
        "checks.py",
        "return cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()",
        "return cu_seqlens_q, cu_seqlens_k",
        ("test_semantics.py::test_strides_of_offsets_do_not_matter[triton-select_blocks]",),
    ),
]

_MODULE = [
    Fault(
        "compressed-keys-rotated-at-their-end",
        "RoPE takes a compressed block's last position, not its first",
        "module.py",
        "rope[blocks.positions]",
        "rope[blocks.positions + self.config.compress_block_size - 1]",
        ("test_module.py::test_matches_the_oracle_with_all_gradients[whole-mean]",),
    ),
    Fault(
        "positions-run-through",
        "positions of packed sequences do not start anew",
        "module.py",
        "return (token - bounds[torch.searchsorted(bounds, token, right=True) - 1]).clamp(min=0)",
        "return token",
        ("test_module.py::test_matches_the_oracle_with_all_gradients[packed-mean]",),
    ),
    Fault(
        "branches-in-another-order",
        "the window gets the keys of the selected branch and the other way round",
        "module.py",
        "q, (k_cmp, k_slc, k_win), (v_cmp, v_slc, v_win), gates = self.project(x)",
        "q, (k_cmp, k_win, k_slc), (v_cmp, v_slc, v_win), gates = self.project(x)",
        ("test_module.py::test_matches_the_oracle_with_all_gradients[whole-mean]",),
    ),
    Fault(
        "gates-by-softmax",
        "gates compete with one another",
        "module.py",
        "_split(self.wg(x), 3).sigmoid()",
        "_split(self.wg(x), 3).softmax(-1)",
        ("test_module.py::test_matches_the_oracle_with_all_gradients[whole-mean]",),
    ),
    Fault(
        "values-compressed-like-keys",
        "values go through the compression of keys",
        "module.py",
        "v_cmp = self.compress_v(v_cmp, cu_seqlens, self.backend)",
        "v_cmp = self.compress_k(v_cmp, cu_seqlens, self.backend)",
        ("test_module.py::test_matches_the_oracle_with_all_gradients[whole-mlp]",),
    ),
]

_OPERATORS = [
    Fault(
        "backward-forgets-the-packing",
        "offsets of packed sequences are not saved for the backward",
        "ops.py",
        "return (*inputs[:3], *outputs, *inputs[3:6]), inputs[6:]",
        "return (*inputs[:3], *outputs, inputs[3], None, None), inputs[6:]",
        (_eager("packed", "sliding_window_attention"),),
    ),
    Fault(
        "sums-in-the-narrow-dtype",
        "the log-sum-exp that tracing promises has the dtype of the inputs",
        "ops.py",
        "lse = q.new_empty(q.shape[:-1], dtype=accumulation_dtype(q.dtype))",
        "lse = q.new_empty(q.shape[:-1])",
        ("test_compile.py::test_operators_promise_what_they_give[nsa_eager::compressed_attention]",),
    ),
    Fault(
        "operators-out-of-sight",
        "what saves or repeats operators does not see them: calls go around it",
        "ops.py",
        "        or torch._C._len_torch_dispatch_stack() > 0\n",
        "",
        ("test_compile.py::test_recomputation_gives_the_same_bits[attention_kept]",),
    ),
    Fault(
        "second-derivatives-of-zero",
        "second derivatives are those of a constant gradient instead of an error",
        "ops.py",
        "    @once_differentiable\n",
        "",
        ("test_compile.py::test_second_derivatives_are_refused[nsa_eager::sliding_window_attention]",),
    ),
    Fault(
        "gradients-all-or-none",
        "gradients are 0 unless queries, keys and values all want theirs",
        "ops.py",
        "    if douts == (None,):\n",
        "    if douts == (None,) or sum(ctx.needs_input_grad) < gradient.num_inputs:\n",
        ("test_semantics.py::test_gradients_do_not_depend_on_which_are_asked_for[eager-compressed_attention]",),
    ),
]

_EAGER = [
    Fault(
        "autocast-inside",
        "autocast of the layer around reaches the float32 products inside the eager backend",
        "eager.py",
        "return torch.autocast(x.device.type, enabled=False)",
        "return torch.autocast(x.device.type, enabled=torch.is_autocast_enabled(x.device.type))",
        ("test_precision.py::test_autocast_does_not_reach_inside_a_stage[eager-selected_attention-bfloat16]",),
    ),
    Fault(
        "eager-compressed-block-seen-early",
        "a compressed block is seen one token before it has passed",
        "eager.py",
        "* config.compress_stride + config.compress_block_size - 1",
        "* config.compress_stride + config.compress_block_size - 2",
        (_eager("small", "compressed_attention"),),
    ),
    Fault(
        "eager-window-one-wider",
        "the window has w + 1 tokens",
        "eager.py",
        "behind = 1 - window - ahead",
        "behind = -window - ahead",
        (_eager("small", "sliding_window_attention"),),
        models=7,
    ),
    Fault(
        "eager-own-block-not-causal",
        "the selected branch sees the whole of the query's own block",
        "eager.py",
        "ahead = first_ahead.float().unsqueeze(-1) + within",
        "ahead = first_ahead.float().unsqueeze(-1) + 0 * within",
        (_eager("small", "selected_attention"),),
        models=9,
    ),
    Fault(
        "eager-empty-slot-is-block-0",
        "an empty slot of the indices is read as the first block",
        "eager.py",
        ".masked_fill_(chosen < 0, 1)",
        "",
        (_eager("scrambled", "selected_attention"),),
        models=8,
    ),
    Fault(
        "eager-queries-are-the-first-tokens",
        "fewer queries than keys are the first tokens, not the last",
        "eager.py",
        "slice(first_block, last_block), (k1 - k0) - (q1 - q0))",
        "slice(first_block, last_block), 0)",
        (_eager("last_queries", "sliding_window_attention"),),
    ),
    Fault(
        "eager-blocks-of-silent-sequences-kept",
        "the compressed blocks of a sequence without queries go to the next one",
        "eager.py",
        "\n        first_block = last_block\n",
        "\n            first_block = last_block\n",
        (_eager("packed_last_queries", "compressed_attention"),),
    ),
    Fault(
        "eager-blind-rows-not-zero",
        "a query that sees no compressed block gets a log-sum-exp of 0, and a mean of what it must not see",
        "eager.py",
        ".masked_fill_(peak < _HIDDEN / 2, -torch.inf)",
        ".masked_fill_(peak < _HIDDEN / 2, 0.0)",
        ("test_semantics.py::test_before_the_first_block_the_compressed_branch_is_zero[eager]",),
        models=10,
    ),
    Fault(
        "eager-blind-rows-have-gradients",
        "queries that see nothing give gradients to what they do not see",
        "eager.py",
        "    dout = _without(dout, lse == -torch.inf)\n",
        "",
        (_eager("small", "compressed_attention"),),
    ),
    Fault(
        "eager-no-maximum-subtracted",
        "softmax without its maximum overflows",
        "eager.py",
        "p = scores.softmax(-1)",
        "p = scores.exp() / scores.exp().sum(-1, keepdim=True)",
        ("test_semantics.py::test_large_logits_are_finite_and_right[eager-float32-compressed_attention]",),
    ),
    Fault(
        "eager-delta-missing",
        "the gradient of softmax lacks what its sum takes away",
        "eager.py",
        ".sub_((out * dout).sum(-1, keepdim=True))",
        "",
        ("test_gradcheck.py::test_every_element_of_the_jacobian[eager-sliding_window_attention]",),
    ),
    Fault(
        "eager-keys-gradient-unscaled",
        "the gradient of keys lacks the scale",
        "eager.py",
        "ds.mT @ (q * scale)",
        "ds.mT @ q",
        ("test_gradcheck.py::test_every_element_of_the_jacobian[eager-compressed_attention]",),
    ),
    Fault(
        "eager-shared-blocks-overwritten",
        "of the queries that share a block only one gives it a gradient",
        "eager.py",
        "table.index_add_(0, rows.flatten(), gathered)",
        "table.index_copy_(0, rows.flatten(), gathered)",
        ("test_gradcheck.py::test_every_element_of_the_jacobian[eager-selected_attention]",),
        models=13,
    ),
    Fault(
        "eager-log-sum-exp-narrow",
        "the log-sum-exp is rounded to the dtype of the inputs",
        "eager.py",
        "z.view_as(lse[:, :, rows])\n    return _ungrouped(out, q.dtype), _ungrouped(lse, lse.dtype)",
        "z.view_as(lse[:, :, rows])\n    return _ungrouped(out, q.dtype), _ungrouped(lse, q.dtype)",
        ("test_stages.py::test_outputs_and_gradients_keep_the_dtype[eager-bfloat16-compressed_attention]",),
    ),
    Fault(
        "eager-importance-shifted",
        "importance is that of the compressed blocks one further on",
        "eager.py",
        "start = (tap - earlier) * stride",
        "start = (tap - earlier + 1) * stride",
        ("test_stages.py::test_selection[eager-nothing_forced-float64]",),
        models=11,
    ),
    Fault(
        "eager-overlap-not-weighed",
        "every compressed block that reaches into a block counts alike",
        "eager.py",
        " * (overlap / stride)",
        " * (overlap > 0)",
        ("test_stages.py::test_selection[eager-nothing_forced-float64]",),
    ),
    Fault(
        "eager-importance-of-one-head",
        "importance is the greatest of a group's heads, not their sum",
        "eager.py",
        ".unflatten(2, (-1, queries.shape[3])).sum(3)",
        ".unflatten(2, (-1, queries.shape[3])).amax(3)",
        ("test_stages.py::test_selection[eager-many_blocks-float64]",),
    ),
    Fault(
        "eager-one-local-block-more",
        "one block more than the local ones is forced",
        "eager.py",
        "(block > own - config.num_local_blocks)",
        "(block >= own - config.num_local_blocks)",
        ("test_stages.py::test_selection[eager-paper-float64]",),
    ),
    Fault(
        "eager-ties-to-the-higher-index",
        "of equally important blocks the last is taken",
        "eager.py",
        "best, chosen = score.sort(dim=-1, descending=True, stable=True)\n",
        "best, chosen = score.flip(-1).sort(dim=-1, descending=True, stable=True)\n    chosen = blocks - 1 - chosen\n",
        ("test_stages.py::test_ties_go_to_the_lower_index[eager-blocks1-float64]",),
    ),
    Fault(
        "eager-underflow-loses-a-block",
        "a block whose importance is 0 is taken for padding",
        "eager.py",
        "masked_fill(best == -torch.inf, blocks)",
        "masked_fill(best <= 0, blocks)",
        ("test_semantics.py::test_underflowing_importance_loses_no_candidate[eager-float32]",),
        models=4,
    ),
    Fault(
        "eager-indices-by-importance",
        "indices come in the order of importance",
        "eager.py",
        "chosen.masked_fill(best == -torch.inf, blocks).sort(dim=-1).values",
        "chosen.masked_fill(best == -torch.inf, blocks)",
        ("test_stages.py::test_selection[eager-nothing_forced-float64]",),
    ),
    Fault(
        "eager-blocks-summed",
        "compression of the mean kind gives the sum",
        "eager.py",
        ".mean(3).to(x.dtype)",
        ".sum(3).to(x.dtype)",
        (_eager("mean", "compress_keys"),),
    ),
    Fault(
        "eager-position-embedding-left-out",
        "tokens are compressed without their position in the block",
        "eager.py",
        "rows = (tokens + params.position.to(x.dtype)).flatten(3)",
        "rows = tokens.flatten(3)",
        (_eager("small", "compress_values"),),
    ),
    Fault(
        "eager-scale-not-for-the-window",
        "the window branch takes the default scale whatever is given",
        "eager.py",
        "sliding_window_attention(q, k_win, v_win, config, *rest)",
        "sliding_window_attention(q, k_win, v_win, config, *rest[:2], q.shape[-1] ** -0.5)",
        ("test_properties.py::test_scaling_logits_is_scaling_queries[eager-nsa_attention]",),
        models=3,
    ),
    Fault(
        "eager-gates-turned-round",
        "the gates of the compressed and of the window branch change places",
        "eager.py",
        "gates[..., branch : branch + 1]",
        "gates.flip(-1)[..., branch : branch + 1]",
        ("test_properties.py::test_output_is_the_gated_sum_of_the_branches[eager]",),
    ),
]

_COMPRESSION_KERNELS = [
    Fault(
        "mean-gradient-misses-a-block",
        "a token has no gradient from the first of the blocks it belongs to",
        "kernels/compress.py",
        "for back in tl.static_range(LENGTH // STRIDE):",
        "for back in tl.static_range(LENGTH // STRIDE - 1):",
        (_oracle("mean", "compress_keys"),),
    ),
    Fault(
        "mean-gradient-misses-the-last-block",
        "the last compressed block gives its tokens no gradient",
        "kernels/compress.py",
        "covers = live & (block >= 0) & (block < count)",
        "covers = live & (block >= 0) & (block < count - 1)",
        (_oracle("mean", "compress_keys"),),
    ),
    Fault(
        "one-position-for-all-parts",
        "every part of a compressed block gets the position embedding of its first part",
        "kernels/compress.py",
        "of_positions[:, :, m : m + 1, m]",
        "of_positions[:, :, :1, m]",
        (_oracle("linear", "compress_keys"),),
    ),
]

_SELECTION_KERNELS = [
    Fault(
        "importance-shifted",
        "importance is that of the compressed blocks one further on",
        "kernels/select.py",
        "block = (start - BEFORE) * RATIO + tl.arange(0, BLOCKS * RATIO)",
        "block = (start - BEFORE) * RATIO + 1 + tl.arange(0, BLOCKS * RATIO)",
        ("test_stages.py::test_selection[triton-many_blocks-float64]",),
        models=11,
    ),
    Fault(
        "overlap-not-weighed",
        "a compressed block counts in full for the block it starts in and not for the next",
        "kernels/select.py",
        "own_weight = (tl.minimum(LENGTH, SIZE - share) // STRIDE).to(ACC)",
        "own_weight = ((LENGTH + 0 * share) // STRIDE).to(ACC)",
        ("test_stages.py::test_selection[triton-many_blocks-float64]",),
    ),
    Fault(
        "importance-of-one-head",
        "importance is the greatest of a group's heads, not their sum",
        "kernels/select.py",
        "p = tl.sum(tl.reshape(p, [BLOCKS * RATIO, PADDED_G, QUERIES]), 1)",
        "p = tl.max(tl.reshape(p, [BLOCKS * RATIO, PADDED_G, QUERIES]), 1)",
        ("test_stages.py::test_selection[triton-many_blocks-float64]",),
    ),
    Fault(
        "one-local-block-more",
        "one block more than the local ones is forced",
        "kernels/select.py",
        "(block > own - LOCAL)",
        "(block >= own - LOCAL)",
        ("test_stages.py::test_selection[triton-many_blocks-float64]",),
    ),
    Fault(
        "ties-to-the-higher-index",
        "of equally important blocks the last is taken",
        "kernels/select.py",
        "(tl.cumsum(equal, 1) <= spare)",
        "(tl.sum(equal, 1)[:, None] - tl.cumsum(equal, 1) < spare)",
        ("test_stages.py::test_ties_go_to_the_lower_index[triton-blocks1-float32]",),
    ),
    Fault(
        "underflow-loses-a-block",
        "a block whose importance is 0 is taken for padding",
        "kernels/select.py",
        "rank = tl.where(candidate, rank, -1)",
        "rank = tl.where(candidate & (rank > 0), rank, -1)",
        ("test_adversarial.py::test_slots_are_filled_from_the_lower_end_where_importance_underflows",),
        models=4,
    ),
    Fault(
        "triton-log-sum-exp-strides-ignored",
        "the selection reads the log-sum-exp as if it were contiguous",
        "kernels/select.py",
        "rows_contiguous(k_cmp), lse.contiguous()",
        "rows_contiguous(k_cmp), lse",
        ("test_semantics.py::test_strides_do_not_matter_to_a_selection[triton-inside_a_larger_tensor]",),
    ),
]

_CONTIGUOUS_KERNELS = [
    Fault(
        "compressed-block-seen-early",
        "a compressed block is seen one token before it has passed",
        "kernels/contiguous.py",
        'return _Branch("compressed", config.compress_stride, config.compress_block_size - 1, None)',
        'return _Branch("compressed", config.compress_stride, config.compress_block_size - 2, None)',
        (_oracle("small", "compressed_attention"),),
    ),
    Fault(
        "window-one-wider",
        "the window has w + 1 tokens",
        "kernels/contiguous.py",
        "max(1, min(config.window_size, num_keys))",
        "max(1, min(config.window_size + 1, num_keys))",
        (_oracle("small", "sliding_window_attention"),),
        models=7,
    ),
    Fault(
        "window-one-wider-for-values",
        "gradients of keys and values come from a window of w + 1 tokens, outputs from one of w",
        "kernels/contiguous.py",
        "visible = visible & (keys[:, None] > (position - window)[None, :])",
        "visible = visible & (keys[:, None] >= (position - window)[None, :])",
        (_oracle("small", "sliding_window_attention"),),
    ),
    Fault(
        "sum-not-rescaled",
        "the sum of exponentials is not rescaled when the maximum grows",
        "kernels/contiguous.py",
        "z = z * rescale + tl.sum(p, 1)",
        "z = z + tl.sum(p, 1)",
        (_oracle("small", "sliding_window_attention"),),
    ),
    Fault(
        "second-chunk-not-rescaled",
        "the second chunk of the values' columns is not rescaled when the maximum grows",
        "kernels/contiguous.py",
        "acc1 = dot(p, v1, acc1 * rescale[:, None], ACC, PRECISION)",
        "acc1 = dot(p, v1, acc1, ACC, PRECISION)",
        (_wide("sliding_window_attention"),),
    ),
    Fault(
        "maximum-of-one-row-for-all",
        "the running maximum is that of the tile's first row",
        "kernels/contiguous.py",
        "peak = tl.maximum(m, tl.max(x, 1))\n                # A row",
        'peak = tl.maximum(m, tl.max(tl.where(rows == first, tl.max(x, 1), float("-inf")), 0))\n'
        "                # A row",
        (_oracle("small", "compressed_attention"),),
        models=5,
    ),
    Fault(
        "blind-rows-zero-in-the-first-tile",
        "rows that see no compressed block are made 0 in the first tile only",
        "kernels/contiguous.py",
        "blind = z == 0\n",
        "blind = (z == 0) & (first == 0)\n",
        (_oracle("small", "compressed_attention"),),
        models=10,
    ),
    Fault(
        "delta-of-one-chunk",
        "delta lacks the second chunk of the values' columns",
        "kernels/contiguous.py",
        "delta += tl.sum(do1.to(ACC) * load_rows(out, out_offsets, inside, V0, V1, DV, True).to(ACC), 1)",
        "delta += 0.0",
        (_wide("compressed_attention"),),
        models=1,
    ),
    Fault(
        "keys-miss-the-last-queries",
        "gradients of keys and values lack the last tile of queries",
        "kernels/contiguous.py",
        "y = count * (share + 1) // shares",
        "y = tl.minimum(count * (share + 1) // shares, count - 1)",
        (_oracle("small", "sliding_window_attention"),),
    ),
    Fault(
        "scale-twice-for-keys",
        "the gradient of keys is scaled twice",
        "kernels/contiguous.py",
        "store_rows(dk, key * dk_strides[2], held, dk0 * scale, 0, K0, DK)",
        "store_rows(dk, key * dk_strides[2], held, dk0 * scale * scale, 0, K0, DK)",
        (_oracle("small", "sliding_window_attention"),),
    ),
    Fault(
        "queries-are-the-first-tokens",
        "in the backward of keys, fewer queries than keys are the first tokens",
        "kernels/contiguous.py",
        "    shift = num_tokens - num_queries\n    share64",
        "    shift = 0\n    share64",
        (_oracle("last_queries", "sliding_window_attention"),),
    ),
    Fault(
        "unwritten-gradients",
        "gradients of compressed keys that packed sequences leave no use for are whatever memory held",
        "kernels/contiguous.py",
        "make = torch.empty if packing is None or branch.window is not None else torch.zeros",
        "make = torch.empty",
        ("test_reproducibility.py::test_no_result_comes_of_memory_never_written[packed-compressed_attention]",),
    ),
    Fault(
        "batch-offset-of-32-bits",
        "the offset of a batch row overflows where it passes 2**31 elements",
        "kernels/contiguous.py",
        "    v += batch64 * v_strides[0] + head64 * v_strides[2]\n    out += batch64 * out_strides[0]\n    lse",
        "    v += batch * v_strides[0] + head64 * v_strides[2]\n    out += batch64 * out_strides[0]\n    lse",
        ("test_bounds.py::test_rows_of_a_batch_may_be_far_apart[compressed_attention]",),
        models=12,
    ),
    Fault(
        "tile-in-part-left-out",
        "the tile at the end of a packed sequence that is filled in part is none",
        "kernels/common.py",
        "counts = (lengths + (block - 1)) // block",
        "counts = lengths // block",
        (_oracle("packed", "sliding_window_attention"),),
    ),
    Fault(
        "launched-like-the-nearest-by-difference",
        "parameters are taken from the group nearest by difference, not by ratio",
        "kernels/tuning.py",
        "abs(math.log2(other / group))",
        "abs(other - group)",
        ("test_launches.py::test_the_nearest_group_is_taken_by_ratio_and_the_smaller_of_two",),
    ),
    Fault(
        "home-taken-for-writable",
        "compiled kernels go to a home that cannot be written to",
        "kernels/cache.py",
        "return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)",
        "return True",
        ("test_launches.py::test_compiled_kernels_have_a_place_where_the_home_has_none",),
    ),
    Fault(
        "short-sequences-take-blocks-away",
        "a packed sequence shorter than a compressed block has a negative number of them",
        "kernels/common.py",
        "((cu_seqlens.diff() - config.compress_block_size) // config.compress_stride + 1).clamp(min=0)",
        "((cu_seqlens.diff() - config.compress_block_size) // config.compress_stride + 1)",
        (_oracle("packed", "compressed_attention"),),
    ),
    Fault(
        "store-beyond-the-head",
        "a store at a head dim that is no power of two writes into the next head",
        "kernels/common.py",
        "mask = seen[:, None]\n    if FIRST + WIDTH > DIM:",
        "mask = seen[:, None]\n    if FIRST > DIM:",
        ("test_bounds.py::test_nothing_is_written_beside_a_result[sliding_window_attention-2-(24, 72)]",),
        models=6,
    ),
    Fault(
        "load-beyond-the-head",
        "a load at a head dim that is no power of two reads the next head",
        "kernels/common.py",
        "return tl.load(pointers, mask=seen[:, None] & (columns < DIM)[None, :], other=0.0)",
        "return tl.load(pointers, mask=seen[:, None] & (columns >= 0)[None, :], other=0.0)",
        (_oracle("wide_values", "sliding_window_attention"),),
    ),
]

_SELECTED_KERNELS = [
    Fault(
        "padded-slots-attended-to",
        "slots up to the next power of two are read as blocks: by output and dq, not by dk and dv",
        "kernels/selected.py",
        "block = tl.load(indices + slot * stride, mask=slot < SLOTS, other=-1)",
        "block = tl.load(indices + slot * stride, mask=slot < SPAN, other=-1)",
        (_oracle("many_blocks", "selected_attention_by_query"),),
        models=2,
    ),
    Fault(
        "own-block-not-causal",
        "going by query, the whole of the query's own block is seen, and at the end of a packed sequence the next one",
        "kernels/selected.py",
        "return first, valid & (first + tl.arange(0, KEYS) <= position)",
        "return first, valid & (first + tl.arange(0, KEYS) >= 0)",
        (_oracle("many_blocks", "selected_attention_by_query"),),
        models=9,
    ),
    Fault(
        "own-block-not-causal-by-block",
        "going by block, the output has the whole of the query's own block in it, its gradients have not",
        "kernels/selected.py",
        "visible = within[None, :] <= reach[:, None]",
        "visible = real[None, :]",
        (_oracle("many_blocks", "selected_attention_by_block"),),
        models=9,
    ),
    Fault(
        "packed-keys-of-the-first-sequence",
        "going by query, every packed sequence reads the keys of the first",
        "kernels/selected.py",
        "first_key = tl.load(located + 3 * query + 1)",
        "first_key = query * 0",
        (_oracle("packed_scrambled", "selected_attention_by_query"),),
    ),
    Fault(
        "empty-slot-is-block-0",
        "going by block, an empty slot is read as the first block",
        "kernels/selected.py",
        "valid = _sees(block, _locate(located, query, shift, inside, PACKED), BLOCK)",
        "valid = inside & (block <= _locate(located, query, shift, inside, PACKED) // BLOCK)",
        (_oracle("scrambled", "selected_attention_by_block"),),
        models=8,
    ),
    Fault(
        "maximum-not-subtracted",
        "going by query, exponentials are taken of logits as they are",
        "kernels/selected.py",
        "        highest = tl.maximum(peak, tl.max(s, 1))\n",
        '        highest = tl.where(tl.maximum(peak, tl.max(s, 1)) == float("-inf"), float("-inf"), 0.0)\n',
        ("test_adversarial.py::test_matches_the_oracle[by_query-selected_attention-queries_of_all_sizes-float64]",),
    ),
    Fault(
        "maximum-of-one-row-for-all-by-block",
        "going by block, every row of a tile is taken relative to the maximum of the first",
        "kernels/selected.py",
        "            peak = tl.max(s, 1)\n",
        '            peak = tl.max(tl.max(tl.where(row[:, None] == step, s, float("-inf")), 1), 0)\n',
        ("test_adversarial.py::test_matches_the_oracle[small-selected_attention-queries_of_all_sizes-float64]",),
        models=5,
    ),
    Fault(
        "sum-not-rescaled-by-block",
        "the partial results of a query are put together without rescaling",
        "kernels/selected.py",
        "total = total * rescale + weight",
        "total = total + weight",
        (_oracle("small", "selected_attention_by_block"),),
    ),
    Fault(
        "delta-of-one-chunk-selected",
        "delta of the selected branch lacks the second chunk of the values' columns",
        "kernels/selected.py",
        "total += tl.sum(o1.to(ACC) * do1.to(ACC), 1)",
        "total += 0.0",
        (_wide("selected_attention"),),
        models=1,
    ),
    Fault(
        "padded-head-stride",
        "going by block, the head dim of values is taken to be padded to a power of two in memory",
        "kernels/selected.py",
        "        v += batch * v_strides[0] + head * v_strides[2]\n"
        "        q += batch * q_strides[0] + head * G * q_strides[2]\n\n        spoiled",
        "        v += batch * v_strides[0] + head * (V0 + V1)\n"
        "        q += batch * q_strides[0] + head * G * q_strides[2]\n\n        spoiled",
        (_oracle("wide_values", "selected_attention_by_block"),),
    ),
    Fault(
        "last-piece-dropped",
        "the last piece of a block's list of queries is not added to its gradient",
        "kernels/selected.py",
        "for piece in range(0, count):",
        "for piece in range(0, count - 1):",
        (_oracle("small", "selected_attention_by_block"),),
        models=13,
    ),
    Fault(
        "pieces-overlap",
        "a piece of a block's list goes on to the end of the list: its queries count several times",
        "kernels/selected.py",
        "count = tl.minimum(tl.load(offsets + low + 1) - begin, CHUNK)",
        "count = tl.load(offsets + low + 1) - begin",
        (_oracle("small", "selected_attention_by_block"),),
        models=13,
    ),
    Fault(
        "by-block-queries-are-the-first-tokens",
        "going by block, fewer queries than keys are the first tokens",
        "kernels/selected.py",
        "return (query + shift).to(tl.int32)",
        "return query.to(tl.int32)",
        (_oracle("last_queries", "selected_attention_by_block"),),
    ),
    Fault(
        "dq-overwritten",
        "going by block, the selected branch writes its dq over that of the compressed branch",
        "kernels/selected.py",
        "ROWS=tile, ADD=add,",
        "ROWS=tile, ADD=False,",
        (_oracle("small", "nsa_attention"),),
    ),
    Fault(
        "triton-heads-32-bits",
        "offsets of the heads of a group are computed in 32 bits",
        "kernels/selected.py",
        "row.to(tl.int64) * q_strides[2], live, DK, K0, K1)\n\n            peak",
        "row * q_strides[2], live, DK, K0, K1)\n\n            peak",
        ("test_bounds.py::test_heads_of_a_group_may_be_far_apart[selected_attention-by_query]",),
    ),
]

_ATTENTION_KERNELS = [
    Fault(
        "scale-not-for-the-window",
        "the window branch takes the default scale whatever is given",
        "kernels/attention.py",
        "contiguous.window_forward(q, k_win, v_win, None, *rest)",
        "contiguous.window_forward(q, k_win, v_win, None, *rest[:-1], q.shape[-1] ** -0.5)",
        (_oracle("wide_keys", "nsa_attention"),),
        models=3,
    ),
    Fault(
        "gates-gradients-exchanged",
        "the gates of the selected and the window branch get one another's gradient",
        "kernels/attention.py",
        "(dgate_cmp, dgate_slc, dgate_win)",
        "(dgate_cmp, dgate_win, dgate_slc)",
        (_oracle("small", "nsa_attention"),),
    ),
    Fault(
        "sign-of-the-gate-lost",
        "a negative gate gives keys and values the gradient of a positive one",
        "kernels/common.py",
        'negative = (weight < 0) & (log_sum < float("inf"))',
        'negative = (weight < 0) & (log_sum > float("inf"))',
        ("test_gates.py::test_gates_of_either_sign_and_zero[triton-2]",),
    ),
]


def _forced(path: str, stage: str, case: str) -> str:
    """The test that forces a path of large sizes in a stage on a case."""
    return f"test_large_sizes.py::test_matches_the_oracle[{path}-{stage}-{case}]"


def _chosen(path: str, case: str) -> str:
    return _forced(path, "select_blocks", case)


def _attended(path: str, case: str) -> str:
    return _forced(path, "selected_attention", case)


_LARGE_SIZES = [
    Fault(
        "later-parts-begin-anew",
        "of importance made in parts, every part has that of the first tiles of queries",
        "kernels/select.py",
        "        num_blocks,\n        first_tile + local_tile,",
        "        num_blocks,\n        local_tile,",
        (_chosen("one_tile_of_queries_at_a_time", "whole"),),
    ),
    Fault(
        "later-parts-choose-for-the-first",
        "of importance made in parts, every part chooses for the first tiles of queries",
        "kernels/select.py",
        "        first_tile + local_row // QUERIES,",
        "        local_row // QUERIES,",
        (_chosen("one_tile_of_queries_at_a_time", "whole"),),
    ),
    Fault(
        "later-parts-reach-as-far-as-the-first",
        "of importance made in parts, every part has room for the blocks that the first can see",
        "kernels/select.py",
        "min((first + taken) * queries, num_queries)",
        "min(taken * queries, num_queries)",
        (_chosen("one_tile_of_queries_at_a_time", "nothing_forced"),),
    ),
    Fault(
        "part-reaches-a-token-too-little",
        "of importance made in parts, a part has no room for the block that its last query is the first of",
        "kernels/select.py",
        "min((first + taken) * queries, num_queries)",
        "min((first + taken) * queries - 1, num_queries)",
        (_chosen("one_tile_of_queries_at_a_time", "nothing_forced"),),
    ),
    Fault(
        "last-part-left-out",
        "of importance made in parts, the last tile of queries is in none",
        "kernels/select.py",
        "for first in range(0, count, step):",
        "for first in range(0, count - 1, step):",
        (_chosen("one_tile_of_queries_at_a_time", "whole"),),
    ),
    Fault(
        "importance-rows-as-long-as-a-share",
        "importance is stored in rows as long as a program's share of the blocks",
        "kernels/select.py",
        "scores += ((batch * HEADS + head) * num_tiles + local_tile) * QUERIES * width",
        "scores += ((batch * HEADS + head) * num_tiles + local_tile) * QUERIES * span",
        (_chosen("blocks_shared_out", "far"),),
    ),
    Fault(
        "share-of-blocks-begins-late",
        "of blocks shared out, every share lacks its first",
        "kernels/select.py",
        "begin = tl.program_id(1) * span",
        "begin = tl.program_id(1) * span + 1",
        (_chosen("blocks_shared_out", "far"),),
    ),
    Fault(
        "remainder-of-blocks-left-out",
        "of blocks shared out, those that are left over by a division are in no share",
        "kernels/select.py",
        "triton.cdiv(width, parts), scale",
        "width // parts, scale",
        (_chosen("blocks_shared_out", "far"),),
    ),
    Fault(
        "tiles-of-blocks-do-not-overlap",
        "a compressed block that reaches into the next tile of blocks does not count there",
        "kernels/select.py",
        "for start in range(begin, end, BLOCKS - BEFORE):",
        "for start in range(begin, end, BLOCKS):",
        (_chosen("one_tile_of_queries_at_a_time", "whole"),),
    ),
    Fault(
        "rows-of-a-tile-choose-for-its-first",
        "where many candidates leave room for some rows of a tile at a time, all are taken for the first ones",
        "kernels/select.py",
        "query = first + local_row % QUERIES + row",
        "query = first + row",
        (_chosen("more_candidates_than_fit_beside_a_tile_of_queries", "far"),),
    ),
    Fault(
        "second-chunk-alone-is-important",
        "importance is made of the second chunk of the columns of keys",
        "kernels/select.py",
        "            s = dot(k1, tl.trans(q1), s, ACC, PRECISION)",
        "            s = dot(k1, tl.trans(q1), None, ACC, PRECISION)",
        (_chosen("keys_in_two_chunks", "80"),),
    ),
    Fault(
        "table-of-tiles-one-short",
        "the table of tiles of packed sequences has an entry less than there could be tiles",
        "kernels/common.py",
        "tile = torch.arange(total // block + len(lengths)",
        "tile = torch.arange(total // block + len(lengths) - 1",
        (_forced("full_tables", "sliding_window_attention", "packed"),),
    ),
    Fault(
        "table-of-blocks-one-short",
        "the table of blocks of packed sequences has an entry less than there could be blocks",
        "kernels/selected.py",
        "count = num_keys // size + len(lengths)\n",
        "count = num_keys // size + len(lengths) - 1\n",
        (_attended("full_tables", "packed"),),
    ),
    Fault(
        "share-of-queries-begins-early",
        "queries of a key tile that are left over by a division among programs count twice or not at all",
        "kernels/contiguous.py",
        "x = count * share // shares",
        "x = count // shares * share",
        (_forced("queries_in_three_shares", "compressed_attention", "packed"),),
    ),
    Fault(
        "shares-of-queries-in-one-place",
        "programs that share the queries of a key tile write their partial sums over one another",
        "kernels/contiguous.py",
        "dk += share64 * dk_strides[0] +",
        "dk +=",
        (_forced("queries_in_three_shares", "compressed_attention", "whole"),),
    ),
    Fault(
        "last-share-not-added",
        "the partial sums of the last program that shares the queries of a key tile are left out",
        "kernels/contiguous.py",
        "x[0] if shares == 1 else x.sum(0)",
        "x[0] if shares == 1 else x[:-1].sum(0)",
        (_forced("queries_in_three_shares", "compressed_attention", "whole"),),
    ),
    Fault(
        "every-share-has-the-first-tiles",
        "every program that shares the queries of a key tile takes the first of them",
        "kernels/contiguous.py",
        "(x + _part(i // G, a - x, b - x, MASKED))",
        "_part(i // G, a - x, b - x, MASKED)",
        (_forced("queries_in_three_shares", "compressed_attention", "whole"),),
    ),
    Fault(
        "tile-without-mask-taken-twice",
        "the loop over masked tiles takes the first of those that need no mask, and leaves out a masked one",
        "kernels/contiguous.py",
        "return i + tl.where(i < a, 0, b - a)",
        "return i + tl.where(i <= a, 0, b - a)",
        (_forced("queries_in_one_share", "compressed_attention", "whole"),),
    ),
    Fault(
        "last-query-of-a-window-left-out",
        "the last query that sees a key tile is left out where it is the first of a tile of queries",
        "kernels/contiguous.py",
        "query_stop = tl.minimum(num_queries, last + window - shift)",
        "query_stop = tl.minimum(num_queries, last + window - shift - 1)",
        (_forced("queries_in_one_share", "sliding_window_attention", "whole"),),
    ),
    Fault(
        "second-chunk-of-values-is-the-first",
        "gradients of keys read the first columns of the values for the second chunk",
        "kernels/contiguous.py",
        "v1 = load_rows(v, key * v_strides[1], held, V0, V1, DV, True)",
        "v1 = load_rows(v, key * v_strides[1], held, 0, V1, DV, True)",
        (_forced("heads_in_two_chunks", "sliding_window_attention", "16_and_72"),),
    ),
    Fault(
        "every-launch-has-the-first-lists",
        "of heads taken some at a time, every launch makes the partial results of the first ones",
        "kernels/selected.py",
        "first * packing.blocks, first, scale, heads, ROWS=parameters",
        "0, 0, scale, heads, ROWS=parameters",
        (_attended("one_head_at_a_time", "whole"),),
    ),
    Fault(
        "gradients-of-the-first-heads-only",
        "of heads taken some at a time, gradients of queries are put together for the first ones only",
        "kernels/selected.py",
        "indices.stride(), num_queries, shift, first, heads,\n                    ROWS=tile, ADD=add,",
        "indices.stride(), num_queries, shift, 0, heads,\n                    ROWS=tile, ADD=add,",
        (_attended("four_heads_at_a_time", "whole"),),
    ),
    Fault(
        "every-share-is-of-the-first-heads",
        "of heads taken some at a time, partial results are put together for the first ones only",
        "kernels/selected.py",
        "indices.stride(), num_queries, shift, first,\n",
        "indices.stride(), num_queries, shift, 0,\n",
        (_attended("two_heads_at_a_time", "packed"),),
    ),
    Fault(
        "last-heads-left-out",
        "of heads taken some at a time, one that is left over is in no launch",
        "kernels/selected.py",
        "for first in range(0, heads, step)]",
        "for first in range(0, heads - 1, step)]",
        (_attended("two_heads_at_a_time", "packed"),),
    ),
    Fault(
        "pieces-in-one-place",
        "the pieces of a list write their partial sums over one another",
        "kernels/selected.py",
        "rows = (tl.load(shared + owner) - siblings + piece)",
        "rows = (tl.load(shared + owner) - siblings)",
        (_attended("lists_in_pieces_of_3_by_query", "whole"),),
    ),
    Fault(
        "single-pieces-have-places",
        "lists of one piece are given places for partial sums, for which there is no room",
        "kernels/selected.py",
        "shared = (counts * (counts > 1)).cumsum(",
        "shared = counts.cumsum(",
        (_attended("lists_in_pieces_of_32_by_query", "many_lists"),),
    ),
    Fault(
        "first-piece-dropped",
        "the first piece of a block's list of queries is not added to its gradient",
        "kernels/selected.py",
        "for piece in range(0, count):",
        "for piece in range(1, count):",
        (_attended("lists_in_pieces_of_3_by_query", "whole"),),
    ),
    Fault(
        "every-part-of-a-block-is-the-first",
        "of a block that is taken in parts, every part reads the first keys",
        "kernels/selected.py",
        "within = part * KEYS + tl.arange(0, KEYS)",
        "within = tl.arange(0, KEYS)",
        (_attended("blocks_in_parts_by_block", "whole"),),
    ),
    Fault(
        "parts-of-a-block-in-one-place",
        "the parts of a block write what they make of a query's gradient over one another",
        "kernels/selected.py",
        "place = (place * (BLOCK // KEYS) + tl.program_id(1)) * G + row % G",
        "place = place * (BLOCK // KEYS) * G + row % G",
        (_attended("blocks_in_parts_by_block", "whole"),),
    ),
    Fault(
        "every-step-has-the-first-keys",
        "going by query, every step through a block reads its first keys",
        "kernels/selected.py",
        "first = tl.where(valid, block, 0) * BLOCK + step % (BLOCK // KEYS) * KEYS",
        "first = tl.where(valid, block, 0) * BLOCK",
        (_attended("blocks_in_parts_by_query", "whole"),),
    ),
    Fault(
        "first-part-of-a-block-reduced",
        "partial sums are added up for the first part of a block only",
        "kernels/selected.py",
        "_reduce_kernel[(batch * heads * packing.blocks, parts)]",
        "_reduce_kernel[(batch * heads * packing.blocks, 1)]",
        (_attended("blocks_in_parts_by_query", "whole"),),
    ),
    Fault(
        "second-chunk-not-reduced",
        "partial sums of the second chunk of the values' columns are not added up",
        "kernels/selected.py",
        "                dv1 += part1\n",
        "                dv1 += 0 * part1\n",
        (_attended("heads_in_two_chunks_by_query", "16_and_72"),),
    ),
    Fault(
        "lists-overflow-16-bits",
        "lists are numbered in 16 bits however many they are",
        "kernels/selected.py",
        "if lists < 2**15 - 1 else torch.int32",
        "if lists < 2**31 - 1 else torch.int32",
        ("test_large_sizes.py::test_lists_have_numbers_wide_enough[65542-torch.int32]",),
    ),
    Fault(
        "every-program-has-the-first-blocks",
        "every program of the mean makes the first compressed blocks",
        "kernels/compress.py",
        "block = tile * ROWS + tl.arange(0, ROWS)",
        "block = tl.arange(0, ROWS)",
        (_forced("several_programs", "compress_keys", "packed"),),
    ),
    Fault(
        "two-pieces-at-most",
        "the mean gives a token gradients of two blocks, however many it belongs to",
        "kernels/compress.py",
        "for back in tl.static_range(LENGTH // STRIDE):",
        "for back in tl.static_range(2):",
        (_forced("tokens_of_four_blocks", "compress_keys", "whole"),),
    ),
    Fault(
        "pieces-not-shifted",
        "every part of a compressed block is made of the tokens of its first",
        "kernels/compress.py",
        "of_tokens[:, :, m : m + count, m]",
        "of_tokens[:, :, :count, m]",
        (_forced("blocks_of_four_pieces", "compress_keys", "linear"),),
    ),
    Fault(
        "every-program-adds-up-the-first-rows",
        "every program of the gated sum makes its first rows",
        "kernels/attention.py",
        "row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)\n    column",
        "row = tl.arange(0, ROWS)\n    column",
        (_oracle("paper", "nsa_attention"),),
    ),
    Fault(
        "eager-later-tiles-begin-anew",
        "queries of every tile stand at the positions of the first",
        "eager.py",
        "yield _Tile(slice(start, stop), start + offset, stop + offset - 1)",
        "yield _Tile(slice(start, stop), segment.first_position, segment.first_position + stop - start - 1)",
        (_forced("tiles_of_4", "sliding_window_attention", "whole"),),
    ),
    Fault(
        "eager-tile-one-short",
        "a tile of queries lacks its last one, which is in no other",
        "eager.py",
        "stop = min(start + rows, segment.queries.stop)",
        "stop = min(start + max(1, rows - 1), segment.queries.stop)",
        (_forced("tiles_of_4", "compressed_attention", "whole"),),
    ),
    Fault(
        "eager-last-tile-has-all-gradients",
        "keys have the gradient of the last tile of queries that sees them, not the sum over tiles",
        "eager.py",
        "dk[:, :, span] += tile_dk",
        "dk[:, :, span] = tile_dk",
        (_forced("tiles_of_4", "compressed_attention", "whole"),),
    ),
    Fault(
        "eager-blocks-of-a-tile-overwritten",
        "blocks have the gradient of the last tile of queries that chose them",
        "eager.py",
        "_scatter_add(dk_table, rows, tile_dk)",
        "_scatter_add(dk_table.zero_(), rows, tile_dk)",
        (_forced("tiles_of_4", "selected_attention", "whole"),),
    ),
    Fault(
        "eager-tile-sees-what-its-first-query-sees",
        "importance of a tile reaches as far as the blocks of its first query",
        "eager.py",
        "tile.last // config.select_block_size + 1",
        "tile.first // config.select_block_size + 1",
        (_chosen("tiles_of_4", "whole"),),
    ),
    Fault(
        "turns-in-reverse",
        "under context parallelism, heads that wait for their turn come out in reverse order",
        "titan/context.py",
        "outs.append(torch.cat([attention(*part, *blocks, *ks) for part, ks in zip(parts, seen, strict=True)], 1))",
        "outs.insert(0, torch.cat([attention(*part, *blocks, *ks) for part, ks in zip(parts, seen, strict=True)], 1))",
        ("test_attention.py::test_is_that_of_one_process[cp2-two-heads-a-turn]",),
        layer="integration",
    ),
    Fault(
        "every-turn-has-the-first-blocks",
        "under context parallelism, heads that wait for their turn get the compressed blocks of the first",
        "titan/context.py",
        "attention(*part, *blocks, *ks)",
        "attention(*part, *(x.chunk(turns, 2)[0] for x in compressed), *ks)",
        ("test_attention.py::test_is_that_of_one_process[cp2-two-heads-a-turn]",),
        layer="integration",
    ),
    Fault(
        "pieces-of-a-parameter-drawn-alike",
        "all pieces of a large parameter are drawn from the same numbers",
        "titan/model.py",
        'f"{name} {piece}" if piece else name',
        'f"{name}"',
        ("test_model.py::test_a_part_of_a_parameter_is_drawn_as_in_the_whole",),
        layer="integration",
    ),
    Fault(
        "piece-of-a-parameter-misplaced",
        "a process whose part begins within a piece takes the beginning of the piece",
        "titan/model.py",
        "drawn[(slice(start - first, stop - first), *columns)]",
        "drawn[(slice(0, stop - start), *columns)]",
        ("test_model.py::test_a_part_of_a_parameter_is_drawn_as_in_the_whole",),
        layer="integration",
    ),
    Fault(
        "epochs-end-with-one-row",
        "after the last row of the corpus it is repeated, instead of the first that follows it",
        "titan/data.py",
        "return over + 1 + passes, (row + 1) * self.seq_len",
        "return over, token + left * self.seq_len",
        ("test_data.py::test_epochs_wrap_around_at_the_last_whole_row",),
    ),
]
"""Of paths that exist for large sizes, most of which are forced at small size."""

_UNDER_PYTORCH = [
    Fault(
        "gates-unbound",
        "eager weighs the branches by views of the gates, over which Inductor writes their gradient",
        "eager.py",
        "out.to(dtype) * gates[..., branch : branch + 1].to(dtype) for branch, out in enumerate(branches)",
        "out.to(dtype) * gate.unsqueeze(-1).to(dtype) for out, gate in zip(branches, gates.unbind(-1))",
        ("test_compile.py::test_compiled_gradients_are_those_of_the_layer[eager-mlp-40-whole]",),
    ),
    Fault(
        "compiled-offsets-taken-as-they-are",
        "offsets that torch.compile cannot look at lead wherever they say",
        "checks.py",
        "return _legal_offsets(cu_seqlens_q, cu_seqlens_k, q.shape[1], num_keys)",
        "pass",
        ("test_compile.py::test_offsets_that_nobody_can_check_lead_nowhere[triton-not_to_the_end]",),
    ),
    Fault(
        "compiled-offsets-may-fall",
        "offsets that torch.compile cannot look at are clamped, and may fall",
        "checks.py",
        "offsets.clamp(0, total).cummax(0).values",
        "offsets.clamp(0, total)",
        ("test_compile.py::test_offsets_that_nobody_can_check_lead_nowhere[eager-falling]",),
    ),
    Fault(
        "an-index-depends-on-the-length",
        "a linear layer over blocks is compiled anew for every length",
        "kernels/compress.py",
        "of_positions[:, :, m : m + 1, m]",
        "products[:, :, pieces + m, m].unsqueeze(2)",
        ("test_compile.py::test_another_length_batch_or_packing_compiles_nothing[triton-linear-whole]",),
    ),
    Fault(
        "tangents-dropped",
        "forward-mode derivatives are taken to be 0",
        "checks.py",
        "if forward_ad.unpack_dual(x).tangent is not None:",
        "if False:",
        ("test_errors.py::test_forward_mode_derivatives_are_refused[sliding_window_attention-plain]",),
    ),
    Fault(
        "derivatives-of-functorch-unnoticed",
        "derivatives of torch.func end in an error of PyTorch's that does not say what to do",
        "checks.py",
        "return any(level.key() == _functorch.TransformType.Grad for level in _transforms())",
        "return False",
        ("test_errors.py::test_derivatives_of_functorch_are_refused[sliding_window_attention-plain]",),
    ),
]

_HIDDEN_VALUES = [
    Fault(
        "eager-hides-by-adding",
        "keys are hidden by adding to their logits, which a NaN outlives",
        "eager.py",
        "scores.masked_fill_(ahead > 0, _HIDDEN)",
        "scores.add_(ahead.clamp(0, 1).to(q.dtype) * _HIDDEN)",
        ("test_hidden_values.py::test_keys_and_values[eager-widest-small-sliding_window_attention-nan]",),
    ),
    Fault(
        "eager-weighs-by-nothing",
        "hidden values are weighed by 0, which a NaN outlives",
        "eager.py",
        "out = p @ _without(v, bad)",
        "out = p @ v",
        ("test_hidden_values.py::test_keys_and_values[eager-widest-small-sliding_window_attention-nan]",),
    ),
    Fault(
        "hidden-values-weighed-by-nothing",
        "hidden values of a tile are weighed by 0",
        "kernels/contiguous.py",
        "v0, v1 = without(v0, v1, bad, V1)",
        "pass",
        ("test_hidden_values.py::test_keys_and_values[triton-widest-small-sliding_window_attention-nan]",),
    ),
    Fault(
        "hidden-keys-weighed-by-nothing",
        "hidden keys of a tile are weighed by 0 in the gradients of queries",
        "kernels/contiguous.py",
        "k0, k1 = without(k0, k1, not_finite(k0, k1, K1, ACC), K1)",
        "pass",
        ("test_hidden_values.py::test_keys_and_values[triton-widest-small-sliding_window_attention-nan]",),
    ),
    Fault(
        "queries-reach-keys-they-do-not-see",
        "a gradient that is not finite spoils the values of a tile that its query does not see",
        "kernels/contiguous.py",
        "do0, do1 = without(do0, do1, bad, V1)",
        "pass",
        ("test_hidden_values.py::test_queries_and_gradients[triton-gradient-small-sliding_window_attention]",),
    ),
    Fault(
        "hidden-values-weighed-by-nothing-by-block",
        "going by block, values hidden in a query's own block are weighed by 0",
        "kernels/selected.py",
        "spoiled = zero_unless_finite(v0, v1, V1, ACC)",
        "spoiled = 0.0",
        ("test_hidden_values.py::test_keys_and_values[triton-widest-small-selected_attention-nan]",),
    ),
    Fault(
        "tokens-of-no-block-reach-weights",
        "a block that does not exist reads the first tokens, whose values reach the gradients of the weights",
        "kernels/compress.py",
        "rows = (tokens.masked_fill(~blocks.filled.view(-1, 1, 1, 1), 0) + position).flatten(3)",
        "rows = (tokens + position).flatten(3)",
        ("test_hidden_values.py::test_blocks_that_do_not_exist[triton-mlp]",),
    ),
    Fault(
        "batch-along-the-second-side",
        "the batch is a side of the grid that CUDA limits to 65,535",
        "kernels/compress.py",
        "kernel[(tiles * x.shape[2] * x.shape[0], 1, 1)](",
        "kernel[(tiles * x.shape[2], x.shape[0], 1)](",
        ("test_launches.py::test_grids_have_one_side[compress]",),
    ),
    Fault(
        "launches-of-the-current-device",
        "launch parameters are those of the current device, not of the inputs'",
        "kernels/tuning.py",
        "index = device.index if device is not None and device.index is not None else torch.cuda.current_device()",
        "index = torch.cuda.current_device()",
        ("test_launches.py::test_parameters_are_those_of_the_inputs_device",),
    ),
]

_DATA = [
    Fault(
        "position-in-rows",
        "a position in the data is taken for one in rows of the length at hand",
        "titan/data.py",
        """        passes, token = state_dict["passes"], state_dict["token"]
""",
        """        passes, token = state_dict["passes"], state_dict["token"] // state_dict["seq_len"] * self.seq_len
""",
        ("test_data.py::test_another_row_length_goes_on_with_the_next_token",),
    ),
    Fault(
        "corpus-not-compared",
        "a position in another corpus is taken for one in this one",
        "titan/data.py",
        """for name in ("tokenizer", "corpus"):
            if state_dict""",
        """for name in ("tokenizer",):
            if state_dict""",
        ("test_data.py::test_a_senseless_state_is_an_error_and_changes_nothing",),
    ),
    Fault(
        "tail-read-twice",
        "the pass after one whose last rows were wanted begins with its second row",
        "titan/data.py",
        "divmod(rows - left - 1, self.num_rows)",
        "divmod(rows - left, self.num_rows)",
        ("test_data.py::test_epochs_wrap_around_at_the_last_whole_row",),
    ),
]

_RUNS = [
    Fault(
        "other-jobs-resumed",
        "a checkpoint of another job is gone on from as long as some field may differ",
        "titan/runs.py",
        "    if not refused and not misfits:\n",
        "    if (not refused or allowed) and not misfits:\n",
        ("test_runs.py::test_another_job_is_refused_by_every_field_old_and_new",),
    ),
    Fault(
        "fields-that-went-not-compared",
        "a field of the recorded job that this one has not got is no difference",
        "titan/runs.py",
        "for name in (*old, *(name for name in new if name not in old))",
        "for name in new",
        ("test_runs.py::test_differences_are_named_with_both_values",),
    ),
    Fault(
        "job-of-a-save-that-never-came",
        "the job of a run that saved nothing stands for the checkpoint it began with",
        "titan/runs.py",
        """entry["job"] for entry in reversed(read_jobs(folder)) if entry["after_step"] < step""",
        """entry["job"] for entry in reversed(read_jobs(folder)) if entry["after_step"] <= step""",
        ("test_runs.py::test_a_job_is_that_of_the_steps_after_it_began",),
    ),
    Fault(
        "finished-run-is-a-success",
        "a run with nothing left to train ends as if it had trained",
        "titan/runs.py",
        "    status = 3\n",
        "    status = 0\n",
        ("test_runs.py::test_a_finished_run_has_nothing_left_to_train",),
    ),
    Fault(
        "lock-shared",
        "two runs may use one folder",
        "titan/runs.py",
        "fcntl.LOCK_EX | fcntl.LOCK_NB",
        "fcntl.LOCK_SH | fcntl.LOCK_NB",
        ("test_runs.py::test_a_folder_is_one_run_s_until_it_ends",),
    ),
    Fault(
        "replaced-before-it-is-written",
        "a file that could not be written takes the place of the one before",
        "titan/runs.py",
        "        temporary.replace(path)\n    finally:\n        temporary.unlink(missing_ok=True)\n",
        "    finally:\n        temporary.replace(path)\n",
        ("test_runs.py::test_a_file_whose_writing_fails_stays_as_it_was",),
    ),
    Fault(
        "part-of-a-record-left",
        "a record that a full disk cuts off stays in the log",
        "titan/runs.py",
        "                file.truncate(end)\n",
        "",
        ("test_runs.py::test_a_log_holds_whole_lines_when_room_runs_out",),
    ),
    Fault(
        "unfinished-saves-counted",
        "a save that did not end counts among the latest that are kept",
        "titan/runs.py",
        "oldest_kept = saved_steps(folder)[-keep:][:1]",
        "oldest_kept = list(checkpoints(folder))[-keep:][:1]",
        ("test_runs.py::test_only_whole_checkpoints_count_as_the_latest",),
    ),
]

FAULTS = [
    *_CONFIG,
    *_FUNCTIONS,
    *_MODULE,
    *_OPERATORS,
    *_DATA,
    *_RUNS,
    *_EAGER,
    *_COMPRESSION_KERNELS,
    *_SELECTION_KERNELS,
    *_CONTIGUOUS_KERNELS,
    *_SELECTED_KERNELS,
    *_ATTENTION_KERNELS,
    *_LARGE_SIZES,
    *_UNDER_PYTORCH,
    *_HIDDEN_VALUES,
]
