"""Triton kernels: jit bodies and plain launchers, imported as bcmfnet.kernels."""

if __name__ != "bcmfnet.kernels":
    raise ImportError(f"expected to be imported as bcmfnet.kernels, got {__name__} (a package on PyPI has that name)")
