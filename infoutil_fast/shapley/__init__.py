"""Shapley values of the patches of an image, for any nn.Module: a reusable plan, its one-line form, and Captum's call."""

from infoutil_fast.shapley.kernel_shap import KernelShap
from infoutil_fast.shapley.maps import PAYOFFS, PatchShapley, patch_shapley

__all__ = ["PAYOFFS", "KernelShap", "PatchShapley", "patch_shapley"]
