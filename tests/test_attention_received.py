"""Attention received is computed a few rows at a time: the same as from the whole map."""

from __future__ import annotations

import pytest
import torch

from itprune import scores


@pytest.mark.parametrize("most", [1, 200, 1000, 1 << 20])
@pytest.mark.parametrize("masked", [False, True])
def test_rows_at_a_time_equal_the_whole_map(monkeypatch, most: int, masked: bool) -> None:
    monkeypatch.setitem(scores.MOST_LOGITS, "cpu", most)
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 3, 17, 8, generator=generator) for _ in range(2))
    before = query.clone(), key.clone()
    mask = torch.rand(2, 1, 17, 17, generator=generator) < 0.7
    mask |= torch.eye(17, dtype=torch.bool)
    logits = query @ key.transpose(-1, -2) * 0.3
    logits = logits.masked_fill(~mask, -torch.inf) if masked else logits
    expected = torch.softmax(logits, -1).mean((1, 2))
    found = scores.attention_received(query, key, 0.3, mask if masked else None)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.sum(1), torch.ones(2))
    assert torch.equal(query, before[0])
    assert torch.equal(key, before[1])


def test_large_images_are_asked_by_evenly_spaced_tokens(monkeypatch) -> None:
    monkeypatch.setattr(scores, "MOST_QUERIES", 5)
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 3, 17, 8, generator=generator) for _ in range(2))
    whole = torch.softmax(query @ key.transpose(-1, -2) * 0.3, -1)
    expected = whole[:, :, [0, 3, 6, 10, 13]].mean((1, 2))
    found = scores.attention_received(query, key, 0.3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_padding_neither_asks_nor_receives() -> None:
    """What nobody sees leaves the scores of the others as they are without it."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 9, 8, generator=generator) for _ in range(2))
    mask = (torch.arange(9) < 6)[None, None, None, :].expand(1, 1, 9, 9)
    found = scores.attention_received(query, key, 0.3, mask)
    alone = scores.attention_received(query[:, :, :6], key[:, :, :6], 0.3)
    torch.testing.assert_close(found[:, :6], alone, rtol=0, atol=1e-6)
    assert not found[:, 6:].any()
