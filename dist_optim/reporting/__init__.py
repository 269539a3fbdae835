"""``dist-optim report``: what runs have left in their folders, as one page that needs no network.

Reading order: ``files`` (their names), ``reading`` (a folder becomes a ``Run``), ``charts`` (which curves there are),
``axis`` and ``drawing`` (curves become SVG), ``tables``, ``page``, ``commands``.
"""
