"""The base of the optimizers: patterns of the parameters, state and its files."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tscnc_kernels._checks import check_number
from tscnc_kernels.sparsity import SparsityPattern, remap

MASK_KEY = "mask_bits"
_PATTERN = "pattern"
# By the parameter's id: hashing a tensor takes half a microsecond.
Patterns = dict[int, SparsityPattern]
Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


def parameter_patterns(model: nn.Module) -> dict[Tensor, SparsityPattern]:
    """The weights of a model's masked layers and their patterns.

    Args:
        model: any module. A layer is masked if it has a `weight` and a `pattern`, as MaskedLinear.

    Returns:
        A dict from parameter to pattern.

    Raises:
        TypeError: not a module.
        ValueError: two layers share a weight under different masks.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected model to be an nn.Module, got {type(model).__name__}")
    found: dict[Tensor, SparsityPattern] = {}
    for module in model.modules():
        if not hasattr(type(module), "pattern"):
            continue
        weight, pattern = module.weight, module.pattern
        if not isinstance(weight, Tensor) or not isinstance(pattern, SparsityPattern):
            continue
        other = found.setdefault(weight, pattern)
        if other is not pattern and other != pattern:
            raise ValueError(
                f"two layers share a weight of shape {tuple(weight.shape)} under different masks"
            )
    return found


def stepped(params: list[Tensor], patterns: Patterns) -> list[SparsityPattern | None]:
    """The pattern that a step needs; values are their layer's kept entries, all to be stepped."""
    if not patterns:
        return [None] * len(params)
    return [patterns.get(id(param)) if param.dim() > 1 else None for param in params]


def state_tensors(
    key: str, states: list[dict[str, Any]], params: list[Tensor], patterns: Patterns
) -> list[Tensor]:
    """One kind of state of each parameter; zeros where there is none yet."""
    for state, param in zip(states, params, strict=True):
        if state.get(key) is None:
            pattern = patterns.get(id(param))
            if pattern is None:
                zeros = torch.zeros_like(param, memory_format=torch.preserve_format)
            else:
                zeros = param.new_zeros(pattern.nnz)
                state[_PATTERN] = pattern
            state[key] = zeros
    return [state[key] for state in states]


class MaskedOptimizer(torch.optim.Optimizer):
    """What `MaskedSGD` and `MaskedAdamW` share."""

    def __init__(self, params: Params, defaults: dict[str, Any], model: nn.Module) -> None:
        parameter_patterns(model)
        self._model = model
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Do one step with the gradients that are there.

        Args:
            closure: computes the loss and its gradients anew, or None.

        Returns:
            What the closure returns, or None.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        patterns = self._follow()
        for group in self.param_groups:
            by_device: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
            for param in group["params"]:
                grad = param.grad
                if grad is None:
                    continue
                if grad.layout != torch.strided:
                    raise RuntimeError(
                        f"{type(self).__name__} does not support sparse gradients, "
                        f"got {grad.layout}"
                    )
                params, grads = by_device.setdefault(param.device, ([], []))
                params.append(param)
                grads.append(grad)
            for params, grads in by_device.values():
                self._step(group, params, grads, patterns)
        return loss

    def _step(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], patterns: Patterns
    ) -> None:
        raise TypeError("expected MaskedSGD or MaskedAdamW, got their base class")

    def _check_group(self, group: dict[str, Any]) -> None:
        check_number("lr", group["lr"], 0)
        check_number("weight_decay", group["weight_decay"], 0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own.

        Args:
            param_group: "params" and any option of the constructor.

        Raises:
            ValueError: an option out of range, or a parameter that is in a group already.
            TypeError: an option of another type.
        """
        self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def follow_masks(self) -> None:
        """Carry the state over to the model's present masks; `step` does this by itself."""
        self._follow()

    def _follow(self) -> Patterns:
        patterns = {id(p): pattern for p, pattern in parameter_patterns(self._model).items()}
        for weight, state in self.state.items():
            held, pattern = state.get(_PATTERN), patterns.get(id(weight))
            if held is not pattern:
                _carry(state, held, pattern, weight.dim() > 1)
        return patterns

    def state_dict(self) -> dict[str, Any]:
        """The state, nnz-sized for masked weights, with their masks as packed bits.

        Returns:
            What `load_state_dict` takes, of any mode's model.
        """
        packed = super().state_dict()
        packed["state"] = {key: _pack(state) for key, state in packed["state"].items()}
        return packed

    @torch.no_grad()
    def dense_state_dict(self) -> dict[str, Any]:
        """The state in the shape of the parameters, as torch.optim's own classes load it.

        Returns:
            A state_dict whose tensors are zero where a weight is pruned.
        """
        self._follow()
        packed = super().state_dict()
        shapes = [param.shape for group in self.param_groups for param in group["params"]]
        packed["state"] = {
            key: _expand(state, shapes[key]) for key, state in packed["state"].items()
        }
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of torch.optim's.

        The model's own state may be loaded before or after.

        Args:
            state_dict: from `state_dict`, or from torch.optim's class on the same parameters.

        Raises:
            ValueError: the parameter groups differ, or a mask is of another shape.
        """
        super().load_state_dict(state_dict)
        patterns = parameter_patterns(self._model)
        for param, state in self.state.items():
            bits = state.pop(MASK_KEY, None)
            if bits is None or (param.dim() == 1 and param not in patterns):
                continue
            shape = tuple(param.shape) if param.dim() > 1 else patterns[param].shape
            # torch has cast the bytes to the parameter's dtype, which holds all of 0 to 255.
            state[_PATTERN] = SparsityPattern.from_bits(bits.to(torch.uint8), shape)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_model": self._model}


def _pack(state: dict[str, Any]) -> dict[str, Any]:
    packed = {key: value for key, value in state.items() if key != _PATTERN}
    if _PATTERN in state:
        packed[MASK_KEY] = state[_PATTERN].bits
    return packed


def _expand(state: dict[str, Any], shape: torch.Size) -> dict[str, Any]:
    held = state.get(_PATTERN)
    expanded = {key: value for key, value in state.items() if key != _PATTERN}
    if held is not None and len(shape) > 1:
        for key in _kept_keys(state, (held.nnz,)):
            expanded[key] = held.scatter(state[key])
    return expanded


def _kept_keys(state: dict[str, Any], shape: tuple[int, ...]) -> list[str]:
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    return [key for key, value in tensors.items() if tuple(value.shape) == shape]


def _carry(
    state: dict[str, Any],
    held: SparsityPattern | None,
    pattern: SparsityPattern | None,
    dense: bool,
) -> None:
    """Bring a weight's state from the pattern that it was made for to the present one."""
    if held is not None and pattern is not None and held != pattern:
        mapping = held.mapping_to(pattern)
        for key in _kept_keys(state, (held.nnz,)):
            state[key] = remap(state[key], mapping.to(state[key].device))
    elif held is not None and pattern is None and dense:
        for key in _kept_keys(state, (held.nnz,)):
            state[key] = held.scatter(state[key])
    elif held is None and pattern is not None and dense:
        for key in _kept_keys(state, pattern.shape):
            state[key] = pattern.gather(state[key])
    state.pop(_PATTERN, None)
    if pattern is not None:
        state[_PATTERN] = pattern
