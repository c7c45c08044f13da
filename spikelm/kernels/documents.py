"""Packed documents: where one begins."""

from __future__ import annotations

import torch
from torch import Tensor


def first_tokens(segment: Tensor) -> Tensor:
    """Which tokens begin a document [B, T], from the documents begun in this call [B, T]."""
    return torch.diff(segment, dim=1, prepend=torch.zeros_like(segment[:, :1])) > 0
