"""``verify``: whether this machine, with these versions, shapes and ranks, gives the trajectory of one process.

The one process is upstream's own class, unmodified, on whole tensors; both sides get equal gradients, and every weight
is compared after every step, to the bit.
"""

from dist_optim.testing.verify.verification import Report, Verdict, verify

__all__ = ["Report", "Verdict", "verify"]
