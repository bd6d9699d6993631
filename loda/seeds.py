"""Named random draws: every generator is seeded by a seed setting and the names of what it draws."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, *names: object) -> int:
    """A 63-bit seed from a seed setting and the names of the draw (ours: SHA-256, so that draws are independent).

    Two settings that differ only in, say, a learning rate draw the same batches in the same task: differences
    between them are then due to the settings and not to luck (common random numbers).
    """
    text = "\x1f".join([str(int(seed)), *(str(name) for name in names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: object) -> torch.Generator:
    """A CPU generator for one named draw."""
    return torch.Generator().manual_seed(derive_seed(seed, *names))
