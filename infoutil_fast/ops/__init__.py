"""The accelerated ops. Each body is the definition, in plain torch; its fast versions bear the same name in `kernels/` and `csrc/`."""

from infoutil_fast.ops.patches import FLOATS, assemble_patterns, masked_patches
from infoutil_fast.ops.sqnorms import channel_sums, conv_grad_sqnorm, gram_sqnorm, linear_grad_sqnorm

__all__ = ["FLOATS", "assemble_patterns", "channel_sums", "conv_grad_sqnorm", "gram_sqnorm", "linear_grad_sqnorm", "masked_patches"]
