"""The operators in Triton, for CUDA and ROCm, and what all kernels share.

Those of `svd_linear` are in `hal_kernels.ops.svd_linear`.

Nothing here is imported before an operator is first called with a CUDA tensor (`ops._library`), so
that the package works without triton. In each file: the kernels, each with its formula; the launch
functions, with the signatures of the operator's default implementation, which the operator calls
where the kernels do not apply (float64, high ranks).
"""
