"""The files that come with the package: configurations, model shapes, examples, ``train.py``.

In a wheel they lie in ``dist_optim/shipped``; in a source tree they are ``configs`` and ``launch`` beside it.
"""

from __future__ import annotations

import difflib
import shutil
from pathlib import Path

from dist_optim.errors import UsageError
from dist_optim.files import written_whole

__all__ = ["KINDS", "copy", "find", "find_model_config", "listed", "root"]

KINDS = {
    "models": ("configs/models", "model shapes, for --model and --model_config"),
    "accelerate": ("configs/accelerate", "accelerate launch --config_file FILE"),
    "deepspeed": ("configs/deepspeed", "--deepspeed FILE, deepspeed.initialize(config=FILE)"),
    "runs": ("configs/runs", "a whole run: torchrun --nproc_per_node N train.py FILE"),
    "examples": ("launch/examples", "loops of your own"),
    "launch": ("launch", "train.py and what it is made of; several machines"),
}
"""Folder and use, by kind."""
SUFFIXES = (".json", ".yaml", ".py", ".sh", ".sbatch")


def root() -> Path:
    """The folder that holds ``configs`` and ``launch``.

    Raises:
        UsageError: They are not there: the package was put together without them.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "shipped", package.parent):
        if (folder / "configs" / "models").is_dir():
            return folder
    raise UsageError(
        f"The files of dist_optim are neither in {package / 'shipped'} nor beside the package. Install it again: "
        "pip install --force-reinstall dist-optim."
    )


def listed(kind: str | None = None) -> dict[str, list[Path]]:
    """Files by kind, sorted by name.

    Raises:
        UsageError: There is no such kind.
    """
    if kind is not None and kind not in KINDS:
        raise UsageError(f"There is no kind {kind!r} of files. Kinds: {', '.join(KINDS)}.")
    wanted = KINDS if kind is None else [kind]
    return {one: _files(root() / KINDS[one][0]) for one in wanted}


def find(name: str) -> list[Path]:
    """The files that a name means: ``train.py`` and what it imports, or one file, named as ``ls`` does.

    Raises:
        UsageError: None, or several of different kinds: the message lists what there is.
    """
    known = {f"{kind}/{path.name}": path for kind, paths in listed().items() for path in paths}
    hits = [path for key, path in known.items() if name in (key, key.rpartition(".")[0], path.name, path.stem)]
    if not hits:
        hits = [path for path in known.values() if str(path).endswith(f"/{name}")]
    if len(hits) == 1:
        path = hits[0]
        needs = ("train.py", "train_arguments.py", "train_data.py")
        return [path.with_name(one) for one in needs] if path.name == "train.py" else [path]
    if hits:
        listing = ", ".join(key for key, path in known.items() if path in hits)
        raise UsageError(f"{name!r} is the name of several files: {listing}. Write one of these.")
    near = difflib.get_close_matches(name, [*known, *(path.name for path in known.values())], n=3, cutoff=0.4)
    hint = f" The nearest: {', '.join(near)}." if near else ""
    raise UsageError(f"There is no file {name!r}.{hint} All: dist-optim ls.")


def copy(name: str, directory: Path) -> list[Path]:
    """Copy a file, or all that ``train.py`` needs, into a folder, which is made. Nothing is ever replaced.

    Raises:
        UsageError: There is no such file, or one of that name is in the folder already.
    """
    sources = find(name)
    targets = [directory / source.name for source in sources]
    if there := [str(target) for target in targets if target.exists()]:
        raise UsageError(f"{', '.join(there)} is there already, and is not replaced. Name another folder.")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for source, target in zip(sources, targets, strict=True):
            with written_whole(target) as draft:
                shutil.copy(source, draft)
    except OSError as error:
        raise UsageError(f"{str(directory)!r} cannot be written: {error}.") from error
    return targets


def find_model_config(name: str) -> Path | None:
    """The packaged model shape of this name, unless a file or folder of that name is here."""
    if Path(name).exists() or not name.replace("_", "").isalnum():
        return None
    path = root() / KINDS["models"][0] / f"{name}.json"
    return path if path.is_file() else None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.suffix in SUFFIXES)
