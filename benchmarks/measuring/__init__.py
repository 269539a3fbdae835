"""What ``benchmarks/steps.py`` and ``benchmarks/scale.py`` are made of.

Reading order: ``recipes`` (the optimizers, as upstream and as ours), ``models``, ``contenders`` (what is measured side
by side), ``through_backward`` and ``zero`` (contenders whose engine brings the gradients), ``timing`` and ``counting``
(how), ``cells`` and ``share`` (bodies of a rank), ``scale`` (one rank of many), ``results``, ``tables``, ``charts``,
``page``. ``on_gpu`` is what ``benchmarks/gpu.py`` is made of.
"""
