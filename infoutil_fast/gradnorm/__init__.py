"""Per-sample gradient norms of any nn.Module, and the scores that are made of them."""

from infoutil_fast.gradnorm.norms import el2n, grad_norms, grand

__all__ = ["el2n", "grad_norms", "grand"]
