"""Where parameters live: ``layout`` holds the arithmetic, ``detect`` reads it off a model."""

from dist_optim.layouts.box_shard import BoxShard
from dist_optim.layouts.detect import PlacedParameter, detect
from dist_optim.layouts.layout import DimShard, FlatRange, Layout, Replicated

__all__ = ["BoxShard", "DimShard", "FlatRange", "Layout", "PlacedParameter", "Replicated", "detect"]
