"""Former path of `overlay`: now in `infoutil_fast.drawing.overlay`."""

from infoutil_fast.drawing.overlay import overlay

__all__ = ["overlay"]
