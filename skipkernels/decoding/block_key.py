"""BlockKey: what a full block of the cache holds, so that two sequences with the same start find the same block."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

_ROOT = bytes(32)
"""The parent of a first block."""


@dataclass(frozen=True)
class BlockKey:
    """A block's tokens and all that its keys and values depend on beside them: everything before it, through the
    parent's digest, and the policy some of its positions were generated under.

    The digest is cryptographic, so that nobody can craft a prompt that reads the block of another one; equality
    compares the tokens all the same.
    """

    parent: bytes
    tokens: tuple[int, ...]
    policy_identity: str | None
    digest: bytes

    @classmethod
    def after(cls, parent: BlockKey | None, tokens: Iterable[int], policy_identity: str | None = None) -> BlockKey:
        """The key of the block that follows ``parent``; None: of a first block."""
        before, held = parent.digest if parent else _ROOT, tuple(tokens)
        return cls(before, held, policy_identity, _digest(before, held, policy_identity))


def _digest(parent: bytes, tokens: tuple[int, ...], policy_identity: str | None) -> bytes:
    """Of a message in which each part's place is fixed: 32 bytes, a count, so many tokens, the rest."""
    identity = b"" if policy_identity is None else b"=" + policy_identity.encode()
    return blake2b(parent + array("q", (len(tokens), *tokens)).tobytes() + identity, digest_size=32).digest()
