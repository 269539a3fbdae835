"""The files of a run's folder: written by ``integrations.transformers.run_report``, read by ``reading``."""

from __future__ import annotations

__all__ = ["ABOUT", "DECISIONS", "METRICS", "SUMMARY", "TELEMETRY", "UNFINISHED"]

METRICS = "metrics.jsonl"
"""A line for each logging step and each evaluation."""
DECISIONS = "lr_decisions.jsonl"
"""A line for each decision of a schedule that follows a metric."""
ABOUT = "run.json"
"""How the run was started: arguments, audit, versions."""
SUMMARY = "summary.json"
"""The last figures, of all ranks; written last."""
UNFINISHED = ".unfinished"
"""The folder inside the run's that holds all of these until the run has finished."""
TELEMETRY = "optim_"
"""Begins the names of the figures of ``telemetry=True`` in the metrics."""
