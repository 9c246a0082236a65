from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from icon2_rt import ops
from icon2_rt.kernels.grouped_decode_attention import grouped_decode_attention
from tests.items import Group, Scene, scene
from tests.losses import DTYPES, no_worse


def assert_right(s: Scene) -> None:
    out = grouped_decode_attention(*s.arguments())
    assert out.dtype == s.q.dtype and out.shape == (len(s.q), s.q.shape[1] * s.q.shape[2])
    if s.q.dtype == torch.float32:
        torch.testing.assert_close(out.double(), s.expected(), rtol=1e-5, atol=1e-5)
    else:
        # Both round the weights before they meet V, each by a maximum of its own. The reference reads what is hidden.
        clean = replace(s, k=s.k.nan_to_num(0.0), v=s.v.nan_to_num(0.0))
        no_worse(out, ops.grouped_decode_attention(*clean.arguments()), s.expected(), differ=1.0)
    assert not out[~s.state.running].any()


PAIR = (Group(prefix=21, own=(2, 2)),)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [8, 16, 32, 80, 96, 112, 128, 256])
def test_head_sizes(d: int, dtype: torch.dtype) -> None:
    assert_right(scene(PAIR, heads=2, kv_heads=1, d=d, dtype=dtype))


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 16])
def test_query_heads_of_a_kv_head(group: int) -> None:
    assert_right(scene((*PAIR, Group(prefix=9, own=(1, 3, 2))), heads=2 * group, kv_heads=2))


@pytest.mark.parametrize(("page_size", "split_pages"), [(16, 1), (16, 4), (32, 2), (64, 1), (1, 5), (3, 3), (12, 2)])
def test_pages_and_splits(page_size: int, split_pages: int) -> None:
    groups = (Group(prefix=75, own=(3, 1)), Group(prefix=0, own=(1,)))
    assert_right(scene(groups, page_size=page_size, split_pages=split_pages))


def test_a_tile_is_a_part_of_a_page_and_a_page_a_part_of_a_tile() -> None:
    for page_size in (16, 256):
        groups = (Group(prefix=200, own=(40, 12)),)
        assert_right(scene(groups, heads=2, kv_heads=1, page_size=page_size, split_pages=256 // page_size))


@pytest.mark.parametrize("branches", [1, 2, 3, 4, 5, 8, 9, 20])
def test_any_number_of_branches(branches: int) -> None:
    assert_right(scene((Group(prefix=17, own=tuple(1 + i % 3 for i in range(branches))),)))


# Every scope: shared up to a fork, shared whole, nothing shared; and seats that nobody has.
MIXED = (
    Group(prefix=19, own=(3, 1), fork=2),
    Group(prefix=16, own=(1, 1, 5), idle=(1,)),
    Group(prefix=0, own=(1,)),
    Group(prefix=8, own=(7,), idle=(0,)),
    Group(prefix=9, own=(8, 2), fork=1),
)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_mixed_scopes_in_a_storage_type(dtype: torch.dtype) -> None:
    assert_right(scene(MIXED, heads=8, kv_heads=1, d=64, dtype=dtype))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_scopes_mixed_in_one_list(layer: int) -> None:
    s = scene(MIXED, layer=layer, seed=layer)
    assert_right(s)
    # The same items with a K that has no NaN where nothing exists: the reference reads it.
    clean = scene(MIXED, layer=layer, seed=layer, hidden=0.0, spare=0)
    expected = ops.grouped_decode_attention(*clean.arguments())
    running = s.state.running
    torch.testing.assert_close(
        grouped_decode_attention(*s.arguments())[running], expected[running], rtol=1e-5, atol=1e-5
    )


def test_items_of_one_row_over_the_same_pages() -> None:
    # Bitwise on a GPU; the interpreter's products are numpy's, whose order of summation is its own affair.
    s, alone = scene(MIXED), scene(MIXED, shared=False)
    assert alone.items.count > s.items.count
    assert_right(alone)
    torch.testing.assert_close(
        grouped_decode_attention(*alone.arguments()), grouped_decode_attention(*s.arguments()), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("hidden", [torch.nan, torch.inf, -7.0])
def test_what_does_not_exist_has_no_influence(hidden: float) -> None:
    zero = grouped_decode_attention(*scene(MIXED, hidden=0.0).arguments())
    assert torch.equal(grouped_decode_attention(*scene(MIXED, hidden=hidden).arguments()), zero)


def test_a_batch_without_items() -> None:
    s = scene(PAIR)
    s.items.count.zero_()
    s.items.n_splits.zero_()
    for attend in (grouped_decode_attention, ops.grouped_decode_attention):
        out = attend(*s.arguments())
        assert out.shape == (2, 64)
        assert not out.any()


def test_large_scores_do_not_overflow() -> None:
    s = scene(PAIR)
    assert_right(replace(s, q=s.q * 1000))


def test_q_and_items_may_be_parts_of_wider_buffers() -> None:
    s = scene(MIXED)
    expected = grouped_decode_attention(*s.arguments())
    fused = torch.full((len(s.q), 8, 16), torch.nan)
    fused[:, :4] = s.q
    rows, pages = (
        torch.cat([t, torch.full((len(t), 3), 1 << 30, dtype=torch.int32)], dim=1)[:, : t.shape[1]]
        for t in (s.items.rows, s.items.pages)
    )
    apart = replace(s, q=fused[:, :4], items=replace(s.items, rows=rows, pages=pages))
    assert torch.equal(grouped_decode_attention(*apart.arguments()), expected)


def test_too_many_query_rows_for_a_tile() -> None:
    s = scene(PAIR)
    wide = replace(s, items=replace(s.items, rows=torch.zeros(4, 9, dtype=torch.int32)))
    with pytest.raises(ValueError, match=r"9 rows of 2 query heads.*at most 8 rows"):
        grouped_decode_attention(*wide.arguments())
