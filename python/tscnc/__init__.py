"""Training of highly pruned, well-conditioned, adversarially robust networks on `tscnc_kernels`."""
