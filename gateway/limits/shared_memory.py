"""Shared memory: an anonymous file whose descriptor the supervisor passes to its workers."""

from __future__ import annotations

import os
import tempfile

__all__ = ("make_shared_memory",)


def make_shared_memory(name: str, size: int) -> int:
    """Return the descriptor of `size` zero bytes. `name` appears in /proc. Pages are allocated when first used."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create(name)
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.set_inheritable(descriptor, False)
    os.ftruncate(descriptor, size)
    return descriptor
