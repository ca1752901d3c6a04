"""BatchNormReLU, and the calls that put it in the place of BatchNorm and ReLU and back."""

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from tscnc_kernels.nn._names import check_module
from tscnc_kernels.nn._traced_pairs import traced_pairs
from tscnc_kernels.ops.batch_norm_relu import batch_norm_relu

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class BatchNormReLU(_NormBase):
    """BatchNorm1d, 2d or 3d with a ReLU behind it, in one op.

    The parameters, buffers and `state_dict` are those of nn.BatchNorm2d. It is no subclass of it:
    what replaces batch norms, like nn.SyncBatchNorm's conversion, would drop the ReLU.

    Args:
        num_features: channels C of an input (N, C) or (N, C, …).
        eps: ε of the variance's root.
        momentum: how far running statistics move; None makes them the mean over all batches.
        affine: learn a weight and a bias per channel.
        track_running_stats: keep running statistics for evaluation.
        device: device of parameters and buffers.
        dtype: dtype of parameters and buffers.
    """

    fused_from: type[nn.Module] | None = None
    _marks_output = False

    def forward(self, input: Tensor) -> Tensor:
        """max(0, batch norm of the input), of the input's shape, dtype and layout."""
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        tracked = not self.training or self.track_running_stats
        output = batch_norm_relu(
            input,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.weight,
            self.bias,
            self.training or self.running_mean is None,
            momentum,
            self.eps,
        )
        if self._marks_output and not torch.compiler.is_compiling():
            vars(output)[_MARK] = True
        return output


# On a tensor that a _MarkedReLU need not compute anything of.
_MARK = "_tscnc_is_rectified"


class _FusedReLU(nn.Identity):
    """Holds the place of a ReLU that its predecessor computes."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace


class _MarkedReLU(nn.Module):
    """A ReLU in a module's own forward, where others than a fused norm may call it too.

    What a norm has marked is passed on. Without the mark, as in a compiled graph, the ReLU is
    computed, which changes nothing behind another one.
    """

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, input: Tensor) -> Tensor:
        # The mark goes: the tensor may be added to, and come here again.
        if not torch.compiler.is_compiling() and vars(input).pop(_MARK, False):
            return input
        return F.relu(input, self.inplace)


def fuse_batch_norm_relu(model: nn.Module, *, trace: bool = True) -> list[str]:
    """Replace BatchNorm followed by ReLU, in place, by BatchNormReLU.

    Pairs are found inside nn.Sequential and, by torch.fx, in the forward of other modules, such as
    a residual block's `self.relu(self.bn1(x))`. Both have to be modules: `F.relu` cannot be taken
    out of a forward. A forward that cannot be traced stays as it is.

    Parameters and buffers stay the same objects under the same names, so that optimizers and
    checkpoints fit before and after; the ReLU's place is kept by a module without parameters.
    Modules with hooks, modules that occur twice, and subclasses stay as they are.
    `split_batch_norm_relu` undoes it.

    Args:
        model: any module.
        trace: look into the forwards of modules. It has to be False where one decides by more than
            its inputs and `self.training` whether a ReLU follows, and changes its mind later.

    Returns:
        The names of the batch norms that were replaced.

    Raises:
        TypeError: not a module.
    """
    check_module(model)
    fused = list(_fuse_sequences(model))
    if trace:
        fused += _fuse_blocks(model)
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    return sorted(fused, key=lambda name: order[name])


def _fuse_sequences(model: nn.Module) -> Iterator[str]:
    uses = _uses(model)
    for name, parent in list(model.named_modules()):
        if type(parent) is not nn.Sequential:
            continue
        for (at, norm), (behind, relu) in pairwise(list(parent._modules.items())):
            if not isinstance(norm, _NORMS) or not isinstance(relu, nn.ReLU):
                continue
            if uses[id(norm)] > 1 or not _is_pair(norm, relu):
                continue
            parent._modules[at] = _fused(norm)
            parent._modules[behind] = _FusedReLU(relu.inplace).train(relu.training)
            yield f"{name}.{at}" if name else at


def _fuse_blocks(model: nn.Module) -> Iterator[str]:
    uses = _uses(model)
    for name, parent in list(model.named_modules()):
        if type(parent) is nn.Sequential or not _may_hold_pairs(parent):
            continue
        found = traced_pairs(parent, _NORMS)
        modules = {at: parent.get_submodule(at) for at in {*found}.union(*found.values())}
        for at, behind in found.items():
            norm = modules[at]
            if uses[id(norm)] > 1 or not all(_is_pair(norm, modules[relu]) for relu in behind):
                continue
            parent.set_submodule(at, _fused(norm, marks_output=True))
            for relu in behind:
                marked = _MarkedReLU(modules[relu].inplace).train(modules[relu].training)
                parent.set_submodule(relu, marked)
            yield f"{name}.{at}" if name else at


def _uses(model: nn.Module) -> Counter[int]:
    return Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))


def _may_hold_pairs(module: nn.Module) -> bool:
    kinds = {type(child) for child in module.modules()}
    return nn.ReLU in kinds and not kinds.isdisjoint(_NORMS)


def _is_pair(norm: nn.Module, relu: nn.Module) -> bool:
    if type(norm) not in _NORMS or type(relu) is not nn.ReLU:
        return False
    return not (_has_hooks(norm) or _has_hooks(relu))


def split_batch_norm_relu(model: nn.Module) -> None:
    """Undo `fuse_batch_norm_relu`, in place.

    Args:
        model: any module; what was not fused stays as it is.

    Raises:
        TypeError: not a module.
    """
    check_module(model)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, BatchNormReLU) and child.fused_from is not None:
                parent._modules[name] = _moved(child, child.fused_from)
            elif isinstance(child, _FusedReLU | _MarkedReLU):
                parent._modules[name] = nn.ReLU(child.inplace).train(child.training)


def _has_hooks(module: nn.Module) -> bool:
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(hooks)


def _fused(norm: nn.Module, marks_output: bool = False) -> BatchNormReLU:
    fused = _moved(norm, BatchNormReLU)
    assert isinstance(fused, BatchNormReLU)
    fused.fused_from, fused._marks_output = type(norm), marks_output
    return fused


def _moved(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """A module of another class with the same parameters, buffers and options."""
    moved = kind.__new__(kind)
    nn.Module.__init__(moved)
    for name in ("num_features", "eps", "momentum", "affine", "track_running_stats"):
        setattr(moved, name, getattr(module, name))
    moved._parameters.update(module._parameters)
    moved._buffers.update(module._buffers)
    return moved.train(module.training)
