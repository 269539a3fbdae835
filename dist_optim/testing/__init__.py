"""Tools to test distributed optimizers: ranks that start once, and comparisons that say what they compare.

Needs torch alone, so that a package which adds an optimizer can use them with the test runner of its choice::

    def my_body(lr: float) -> float:              # module level: it travels to the ranks by reference
        return train_a_little(lr)                 # the process group is initialised

    with RankPool(world_size=2) as pool:
        losses = pool.run(my_body, lr=1e-3)       # one result per rank, in rank order
"""

from dist_optim.testing.compare import (
    assert_equal,
    assert_no_problems_on_any_rank,
    max_abs_difference,
    relative_distance,
)
from dist_optim.testing.failure import RankFailure
from dist_optim.testing.pool import RankPool
from dist_optim.testing.prove import prove
from dist_optim.testing.verify import verify

__all__ = [
    "RankFailure",
    "RankPool",
    "assert_equal",
    "assert_no_problems_on_any_rank",
    "max_abs_difference",
    "prove",
    "relative_distance",
    "verify",
]
