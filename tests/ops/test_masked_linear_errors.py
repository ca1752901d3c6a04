import pytest
import torch

from tscnc_kernels import SparsityPattern, masked_linear, use_backend

KERNEL = SparsityPattern.from_mask(torch.ones(2, 1, 3, 3, dtype=torch.bool))
GOOD = {
    "input": torch.zeros(2, 3),
    "weight": torch.zeros(4, 3),
    "bias": torch.zeros(4),
    "pattern": SparsityPattern.from_mask(torch.ones(4, 3, dtype=torch.bool)),
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pattern": torch.ones(4, 3)}, TypeError, "SparsityPattern, got Tensor"),
        ({"input": [1.0]}, TypeError, "input to be a tensor, got list"),
        ({"input": torch.zeros(2, 3).long()}, TypeError, "got torch.int64"),
        ({"input": torch.zeros(2, 3).double()}, TypeError, "torch.float64, got torch.float32"),
        ({"weight": torch.zeros(4, 3).half()}, TypeError, "torch.float32, got torch.float16"),
        ({"input": torch.zeros(2, 5)}, ValueError, r"\(..., 3\), got \(2, 5\)"),
        ({"input": torch.tensor(1.0)}, ValueError, r"\(..., 3\), got \(\)"),
        ({"weight": torch.zeros(3, 4)}, ValueError, r"\(12,\), got \(3, 4\)"),
        ({"weight": torch.zeros(11)}, ValueError, r"\(12,\), got \(11,\)"),
        ({"bias": torch.zeros(3)}, ValueError, r"\(4,\), got \(3,\)"),
        ({"input": torch.zeros(2, 3, device="meta")}, ValueError, "device cpu, got meta"),
        ({"weight": torch.zeros(4, 3).to_sparse()}, ValueError, "got torch.sparse_coo"),
        ({"activation": "tanh"}, ValueError, "none, relu, gelu, got 'tanh'"),
        ({"algorithm": "fast"}, ValueError, "panel, .*dense, .*got 'fast'"),
        ({"weight": torch.zeros(12), "dense_grad": True}, ValueError, "values of shape"),
        ({"algorithm": "panel", "backend": "reference"}, RuntimeError, "got 'reference'"),
        ({"algorithm": "panel", "backend": "triton"}, RuntimeError, "triton"),
        ({"pattern": KERNEL}, ValueError, r"\(N, K\), got \(2, 1, 3, 3\)"),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        masked_linear(**{**GOOD, **change})


def test_panel_is_refused_where_the_backend_is_forced_to_reference():
    with use_backend("reference"), pytest.raises(RuntimeError, match="needs the native backend"):
        masked_linear(**GOOD, algorithm="panel")
