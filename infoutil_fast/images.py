"""Former path of `infoutil_fast.data.decode`."""

from infoutil_fast.data.decode import decode, read, short_side

__all__ = ["decode", "read", "short_side"]
