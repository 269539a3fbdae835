"""Where models are placed in tests: the same code with which ``dist_optim.testing.verify`` places a user's."""

from dist_optim.testing.placements import (
    full_parameters,
    inject,
    mesh_of,
    own_group,
    place,
    reduce,
    two_by_half,
    units_of,
    whole,
)

__all__ = ["full_parameters", "inject", "mesh_of", "own_group", "place", "reduce", "two_by_half", "units_of", "whole"]
