"""Takes configs/ and launch/ into the wheel, as dist_optim/shipped: there `dist-optim ls` and `cp` find them."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithShippedFiles(build_py):
    """Builds the package, and copies what comes with it beside the code; an editable install has the folders."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for folder in ("configs", "launch"):
            target = Path(self.build_lib) / "dist_optim" / "shipped" / folder
            shutil.copytree(folder, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))


setup(cmdclass={"build_py": WithShippedFiles})
