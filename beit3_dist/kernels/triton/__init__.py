"""The kernels in Triton, for CUDA devices; every function has the signature and the contract of its torch twin.

Nothing imports this package unless these kernels were asked for: Triton is a dependency of theirs alone.
"""
