"""The families of optimizers, one small file each; importing this package registers them all.

No upstream package is imported here: a spec loads its class on first use.
"""

from dist_optim.optimizers import apollo, bnb, flash, galore, layerwise, lomo, torch_native
from dist_optim.registry import register

for _family in (torch_native, galore, apollo, bnb, flash, lomo, layerwise):
    for _spec in _family.SPECS:
        register(_spec)
