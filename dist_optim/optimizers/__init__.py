"""The families of optimizers, one small file each; importing this package registers them all.

No upstream package is imported here: a spec loads its class on first use.
"""

from dist_optim.optimizers import (
    adafactor,
    adam_mini,
    apollo,
    bnb,
    flash,
    galore,
    grokadamw,
    layerwise,
    lomo,
    preconditioned,
    prodigy,
    pytorch_optimizer,
    schedulefree,
    stable,
    torch_native,
    torchao,
)
from dist_optim.specs.registry import register, register_package_driver

_FAMILIES = (
    torch_native,
    adafactor,
    galore,
    apollo,
    bnb,
    flash,
    grokadamw,
    schedulefree,
    stable,
    torchao,
    lomo,
    layerwise,
    pytorch_optimizer,
    preconditioned,
    prodigy,
    adam_mini,
)
for _family in _FAMILIES:
    for _spec in _family.SPECS:
        register(_spec)
register_package_driver("bitsandbytes", bnb.UnnamedDriver())
