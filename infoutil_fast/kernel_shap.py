"""Former path of `KernelShap`: now in `infoutil_fast.shapley.kernel_shap`."""

from infoutil_fast.shapley.kernel_shap import KernelShap

__all__ = ["KernelShap"]
