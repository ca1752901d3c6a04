"""Triton kernels and their launchers, one file per op. Imported only where Triton is installed."""
