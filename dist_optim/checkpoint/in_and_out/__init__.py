"""In and out: what upstream and others wrote becomes a checkpoint of ours, and the other way round; and what is in one.

All of it is done by one process, without a model and without the ranks that trained it. Reading order: ``folder``
(what lies where), ``weights``, ``weight_files`` and ``safetensors_file`` (weights, read and written tensor by
tensor), ``skeleton`` (the optimizer of a record, on names and shapes alone), ``upstream_state`` (the state dict that
upstream loads), ``export``; ``sources`` (what others wrote), ``names`` (which number is which parameter),
``zero_files`` (DeepSpeed's), ``imports``; ``soundness``, ``comparison`` and ``inspection``; ``commands`` (the command
line).
"""
