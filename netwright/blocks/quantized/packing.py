"""Codes of one to eight bits in as few bytes."""

import torch
from torch import Tensor

__all__: list[str] = []

_PIECES = (4, 2, 1)  # what divides a byte; other widths are sums of these


def packed(codes: Tensor, bits: int) -> Tensor:
    """Return codes below 2^bits as bytes, row by row.

    A piece of p bits of 8/p codes shares a byte: those of column j, j + n/(8/p), ..., so that
    the codes of one place in all bytes stand in a row when they are unpacked.

    Shapes: codes (rows, n) uint8 -> (rows, bytes) uint8.

    >>> packed(torch.tensor([[1, 2, 3, 15]], dtype=torch.uint8), 4).tolist()
    [[49, 242]]
    """
    if bits == 8:
        return codes
    pieces, shift = [], 0
    for width in (p for p in _PIECES if bits & p):
        many = 8 // width
        part = (codes >> shift) & (2**width - 1)
        part = torch.nn.functional.pad(part, (0, -codes.shape[1] % many))
        places = part.unflatten(1, (many, -1))
        byte = places[:, 0].clone()
        for i in range(1, many):
            byte |= places[:, i] << (width * i)
        pieces.append(byte)
        shift += width
    return torch.cat(pieces, 1)


def unpacked(data: Tensor, bits: int, columns: int) -> Tensor:
    """Return the codes that `packed` was given, `columns` in each row.

    >>> codes = torch.randint(8, (2, 5), dtype=torch.uint8)
    >>> packed(codes, 3).shape, torch.equal(unpacked(packed(codes, 3), 3, 5), codes)
    (torch.Size([2, 3]), True)
    """
    if bits == 8:
        return data
    codes, shift, start = None, 0, 0
    for width in (p for p in _PIECES if bits & p):
        many = 8 // width
        size = -(-columns // many)
        byte = data[:, start:start + size]
        places = [(byte >> (width * i)) & (2**width - 1) for i in range(many - 1)]
        part = torch.cat([*places, byte >> (8 - width)], 1)[:, :columns]
        codes = part if codes is None else codes | (part << shift)
        shift, start = shift + width, start + size
    assert codes is not None
    return codes
