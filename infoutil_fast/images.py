"""Former path of `read`: now in `infoutil_fast.data.decode`."""

from infoutil_fast.data.decode import read

__all__ = ["read"]
