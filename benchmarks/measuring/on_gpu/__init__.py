"""What ``benchmarks/gpu.py`` is made of.

Reading order: ``rows`` (what a part gives, item after item), ``parts`` (which there are), ``children`` (each part
in a process of its own, within its time), ``sides`` (upstream and ours on the same tensors), the parts themselves
(``own_tests``, ``equal_bits``, ``llama_steps``, ``decompositions``, ``packed_copies``, ``host_waits``), ``results``,
``page``.
"""
