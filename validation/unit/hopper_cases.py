"""Cases of the selected branch that reach the edges of its kernels for Hopper."""

from typing import Any

from nsa.config import NSAConfig
from validation.cases import Case, whole

CONFIG = NSAConfig()


def shaped(id: str, lengths: tuple[tuple[int, int], ...], group: int, dim: int, **rest: Any) -> Case:
    """A case of the default blocks, unless given, and of keys and values of one width."""
    return Case(id, lengths, rest.pop("config", CONFIG), group=group, key_dim=dim, value_dim=dim, **rest)


GROUP_4 = [
    shaped("group_4", whole(1003), 4, 64, kv_heads=2, batch=2),
    shaped("group_4_wide", whole(2050), 4, 128, kv_heads=1),
]
SEVERAL_BLOCKS = [
    shaped("blocks", whole(1100), 16, 128, kv_heads=2),
    shaped("group_8", whole(1003), 8, 128, kv_heads=2),
    shaped("group_32_wide", whole(330), 32, 128, kv_heads=1),
]
CASES = [
    *SEVERAL_BLOCKS,
    shaped("one_query", whole(1), 16, 128, kv_heads=1),
    shaped("one_tile", whole(3), 16, 128, kv_heads=1),
    shaped("part_of_a_block", whole(47), 8, 64, kv_heads=2),
    shaped("batch", whole(701), 16, 64, kv_heads=2, batch=3),
    shaped("group_8_narrow", whole(530), 8, 64, kv_heads=1, batch=2),
    shaped("group_32", whole(805), 32, 64, kv_heads=2),
    shaped("last_queries", ((130, 2333),), 16, 128, kv_heads=1),
    shaped("few_blocks", whole(900), 16, 128, kv_heads=1, config=NSAConfig(num_selected_blocks=5)),
    shaped("negative_scale", whole(400), 16, 128, kv_heads=1, scale=-0.1),
]
"""Cases of groups of 8 and more."""
