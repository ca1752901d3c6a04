"""SGD and AdamW that step the kept weights of masked layers and leave the pruned ones alone.

Drop-in for torch.optim.SGD and torch.optim.AdamW, with the model as one more argument:

    optimizer = MaskedAdamW(model.parameters(), lr=1e-3, weight_decay=1e-2, model=model)

The model's masked layers tell which entries of which parameter are kept; all other parameters are
stepped wholly. The masks are read anew at every step, so that a mask changed by any means (such as
`nn.update_masks`, or a loaded state_dict) is followed: kept entries keep their state, grown ones
start at zero.

The state of a dense weight has one entry per kept weight, in the order of `pattern.gather`, which
is also the form that a layer in values mode has; a `state_dict` fits either mode. It holds the mask
as packed bits, too, so that it finds its weights again when the model's mask has changed since.
States of torch.optim's classes load as they are; `dense_state_dict` gives one that they load.
"""

from tscnc_kernels.optim.adamw import MaskedAdamW
from tscnc_kernels.optim.masked_optimizer import MaskedOptimizer, parameter_patterns
from tscnc_kernels.optim.sgd import MaskedSGD

__all__ = ["MaskedAdamW", "MaskedOptimizer", "MaskedSGD", "parameter_patterns"]
