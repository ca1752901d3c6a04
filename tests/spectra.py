"""Matrices of known spectra."""

import torch


def gaussian(rows, cols, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=generator, dtype=torch.float64).to(dtype)


def with_spectrum(rows, cols, sigma, seed=0):
    left, _ = torch.linalg.qr(gaussian(rows, len(sigma), seed, torch.float64))
    right, _ = torch.linalg.qr(gaussian(cols, len(sigma), seed + 1, torch.float64))
    return ((left * torch.as_tensor(sigma)) @ right.mT).float()


def exact(matrix, mask=None):
    return torch.linalg.svdvals(matrix.double() if mask is None else matrix.double() * mask)
