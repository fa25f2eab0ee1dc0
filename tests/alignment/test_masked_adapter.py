"""PixelREPA's masked adapter: its mask against whole numbers of Python, its projection against plain formulas."""

from __future__ import annotations

import struct

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dic_repa.alignment import heads
from dic_repa.alignment.masked_adapter import masked
from dic_repa.errors import UserError


def make(**options):
    torch.manual_seed(0)
    return heads.find("masked-adapter")(128, 12, (6, 8), **options)


@pytest.fixture
def feature():
    return torch.randn(4, 128, 3, 4, generator=torch.Generator().manual_seed(0))


def mixed(number: int) -> int:
    for _ in range(2):
        number = (number ^ number >> 16) * 0x45D9F3B % 2**32
    return number ^ number >> 16


def test_the_mask_is_a_function_of_the_bits_of_the_time_and_the_tokens_number():
    times = [0.0, 0.25, 0.1, 1.0]
    bits = [int.from_bytes(struct.pack(">f", time), "big") for time in times]
    expected = [[mixed(mixed(each) ^ mixed(n + 1)) / 2**32 < 0.3 for n in range(50)] for each in bits]
    assert masked(torch.tensor(times), 50, 0.3).tolist() == expected


def test_each_token_is_masked_in_its_share_independently_of_all_others():
    t = torch.rand(4096, generator=torch.Generator().manual_seed(0))
    mask = masked(t, 64, 0.2).float()
    deviation = (0.2 * 0.8 / 4096) ** 0.5
    assert ((mask.mean(dim=0) - 0.2).abs() < 4.5 * deviation).all()
    assert torch.corrcoef(mask.T).fill_diagonal_(0).abs().max() < 5 / 4096**0.5
    assert mask.mean(dim=1).var().item() == pytest.approx(0.2 * 0.8 / 64, rel=0.1)
    next_times = masked(torch.nextafter(t, torch.ones(())), 64, 0.2).float()
    assert (mask == next_times).float().mean().item() == pytest.approx(1 - 2 * 0.2 * 0.8, abs=0.01)


def test_masked_tokens_are_replaced_and_all_are_projected(feature):
    """While the gates are zero the blocks change nothing."""
    head, t = make(), torch.tensor([0.1, 0.2, 0.3, 0.4])
    first, norm, _, last = head.project
    nn.init.normal_(norm.weight)
    mask = masked(t, 12, 0.2)
    assert 0 < mask.sum() < mask.numel()
    tokens = torch.where(mask[..., None], head.mask_token, feature.flatten(2).mT)
    angles = torch.arange(3.0)[:, None] * 10_000 ** (-torch.arange(32) / 32)
    columns = torch.arange(4.0)[:, None] * 10_000 ** (-torch.arange(32) / 32)
    places = [
        torch.cat([columns[x].sin(), columns[x].cos(), angles[y].sin(), angles[y].cos()])
        for y in range(3)
        for x in range(4)
    ]
    tokens = (tokens + torch.stack(places)) @ first.weight.T + first.bias
    tokens = F.silu(F.layer_norm(tokens, (128,), norm.weight, norm.bias)) @ last.weight.T + last.bias
    expected = F.interpolate(tokens.mT.unflatten(2, (3, 4)), (6, 8), mode="bilinear").flatten(2).mT
    torch.testing.assert_close(head(feature, t), expected, rtol=1e-4, atol=1e-4)


def test_what_is_masked_gives_nothing_to_any_token(feature):
    head, t = make(mask_ratio=0.5), torch.tensor([0.1, 0.2, 0.3, 0.4])
    for block in head.blocks:
        nn.init.normal_(block.modulation.weight, std=0.1)
    feature.requires_grad_()
    head(feature, t)[:, 0].square().sum().backward()
    seen = feature.grad.flatten(2).abs().sum(dim=1) > 0  # by attention the first token sees all that are not masked
    assert torch.equal(seen, ~masked(t, 12, 0.5))
    assert head.mask_token.grad.abs().min() > 0


@torch.no_grad()
def test_a_part_of_the_batch_has_the_same_masks_and_eval_mode_has_none(feature):
    head, t = make(), torch.rand(4, generator=torch.Generator().manual_seed(1))
    whole = head(feature, t)
    torch.testing.assert_close(torch.cat([head(feature[:1], t[:1]), head(feature[1:], t[1:])]), whole)
    assert not torch.allclose(head(feature, t + 1e-6), whole)
    torch.testing.assert_close(head.eval()(feature, t), make(mask_ratio=0.0)(feature, t))


def test_it_takes_what_pixelrepa_has_and_says_what_it_does_not_take():
    head = make()
    assert (len(head.blocks), head.mask_ratio, head.blocks[0].attn.num_heads) == (2, 0.2, 2)
    assert isinstance(heads.find("masked-adapter")(96, 96, (7, 7)).project, nn.Identity)
    with pytest.raises(UserError, match=r"mask_ratio lies in \[0, 1\), not at 1"):
        make(mask_ratio=1)
    with pytest.raises(UserError, match="channels must be a multiple of 4, not 6"):
        heads.find("masked-adapter")(6, 12, (2, 2))
