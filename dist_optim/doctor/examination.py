"""All rules on one configuration, and the configuration after what they change."""

from __future__ import annotations

from dist_optim.doctor.finding import Finding, applied
from dist_optim.doctor.rules import RULES
from dist_optim.doctor.subject import Subject

__all__ = ["MOST_ROUNDS", "examine", "fixed"]

MOST_ROUNDS = 20
"""Of changes: one may show what another rule finds."""


def examine(subject: Subject) -> list[Finding]:
    """Everything that any rule finds, errors first; nothing is changed."""
    found: dict[str, Finding] = {}
    for rule in RULES:
        for finding in rule.find(subject):
            found.setdefault(finding.reason, finding)  # what one rule can mend, another may find too
    return sorted(found.values(), key=lambda finding: not finding.is_error)


def fixed(subject: Subject) -> tuple[Subject, list[Finding]]:
    """The nearest configuration without what files can mend, and what was found on the way, in order."""
    mended: list[Finding] = []
    for _ in range(MOST_ROUNDS):
        finding = next((one for one in examine(subject) if one.changes), None)
        if finding is None:
            break
        subject = applied(subject, finding.changes)
        mended.append(finding)
    return subject, mended
