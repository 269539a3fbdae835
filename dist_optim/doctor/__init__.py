"""A configuration looked at before the launch: what would be refused or go wrong, why, and the change that serves.

A rule asks the code that refuses at run time, of what files and flags say. It holds no condition of its own where that
code can be asked.
"""

from dist_optim.doctor.examination import examine, fixed
from dist_optim.doctor.finding import Change, Finding, Rule
from dist_optim.doctor.subject import Subject

__all__ = ["Change", "Finding", "Rule", "Subject", "examine", "fixed"]
