"""The two sparse products everything else is made of: `spmm` (decode) and `sddmm` (values at a pattern)."""

from saelab.kernels.products import sddmm, spmm

__all__ = ["sddmm", "spmm"]
