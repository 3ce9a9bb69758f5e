"""Triton versions of the ops, one file an op; installed as infoutil_fast.kernels. Importing this package does not import Triton."""
