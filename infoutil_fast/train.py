"""Former path of `Recipe` and `teach`: now in `infoutil_fast.training.teaching`."""

from infoutil_fast.training.teaching import Recipe, teach

__all__ = ["Recipe", "teach"]
