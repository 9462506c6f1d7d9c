"""The two sparse products that all sparse work uses, `spmm` (decode) and `sddmm` (values at a pattern), and `topk`."""

from saelab.kernels.products import per_entry, sddmm, spmm, topk

__all__ = ["per_entry", "sddmm", "spmm", "topk"]
