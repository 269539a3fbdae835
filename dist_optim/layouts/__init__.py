"""Where parameters live: ``layout`` holds the arithmetic, ``detect`` reads it off a model."""

from dist_optim.layouts.detect import PlacedParameter, detect
from dist_optim.layouts.layout import DimShard, FlatRange, Layout, Replicated

__all__ = ["DimShard", "FlatRange", "Layout", "PlacedParameter", "Replicated", "detect"]
