"""`exact-megatron files`: the repository's configs, scripts, patches and examples, out of an installed package."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from ..utils.files import writing

FOLDERS = ("configs", "examples", "patches", "slurm")  # setup.py reads them from here
PACKAGE = Path(__file__).resolve().parents[1]
SHOWN = 5  # names in an error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="*", metavar="FOLDER", help=f"{', '.join(FOLDERS)}; default: all")
    parser.add_argument(
        "--to", required=True, metavar="DIR", help="where to; configs/demo.yaml becomes DIR/configs/demo.yaml"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that DIR already has")


def run(args: argparse.Namespace) -> int:
    copied = copy_files(args.to, args.folder, args.overwrite)
    print(f"{len(copied)} files in {', '.join(str(Path(args.to, name)) for name in args.folder or FOLDERS)}")
    return 0


def project_root() -> Path:
    """The folder that holds FOLDERS: inside an installed package, or the checkout of an editable one.

    Raises:
        FileNotFoundError: neither has them.
    """
    installed = PACKAGE / "project_files"
    checkout = PACKAGE.parent
    for root in (installed, checkout):
        if all((root / name).is_dir() for name in FOLDERS):
            return root
    raise FileNotFoundError(
        f"neither {installed} nor {checkout} holds {', '.join(FOLDERS)}: the package was copied without them. "
        "Install it with pip, from a wheel, the sdist or a checkout"
    )


def copy_files(to: str | os.PathLike[str], folders: list[str] | None = None, overwrite: bool = False) -> list[Path]:
    """Copy the repository's files for users into a folder, under the same relative paths.

    Args:
        to: the folder; it is made if it is missing.
        folders: some of FOLDERS; None or empty for all.
        overwrite: replace files that are there already. Other files in `to` stay as they are.

    Returns:
        The files that were written.

    Raises:
        ValueError: an unknown folder, or an empty name.
        FileExistsError: files of these names exist, and `overwrite` is false; nothing was written.
        NotADirectoryError, IsADirectoryError: a file is where a folder must be, or the other way round; nothing was written.
    """
    unknown = sorted(set(folders or ()) - set(FOLDERS))
    if unknown:
        raise ValueError(f"unknown folder {', '.join(unknown)}: choose from {', '.join(FOLDERS)}")
    if not str(to).strip():
        raise ValueError("the folder of --to is empty: is a variable of the shell unset?")
    root = project_root()
    target = Path(to)
    files = sorted(
        path.relative_to(root)
        for folder in dict.fromkeys(folders or FOLDERS)
        for path in (root / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    )
    there = [str(target / file) for file in files if os.path.lexists(target / file)]
    if there and not overwrite:
        more = f" and {len(there) - SHOWN} more" if len(there) > SHOWN else ""
        raise FileExistsError(
            f"these files exist: {', '.join(there[:SHOWN])}{more}. Choose another folder for --to, or replace them with "
            "--overwrite. Nothing was written"
        )
    for final in (target / file for file in files):  # before the first one is written
        for folder in final.parents:
            if os.path.lexists(folder) and not folder.is_dir():
                raise NotADirectoryError(f"{folder} must be a folder, to hold {final}. Nothing was written")
        if final.is_dir() and not final.is_symlink():
            raise IsADirectoryError(f"{final} is a folder, and a file is to be written there. Nothing was written")
    for file in files:
        final = target / file
        part = final.with_name(f"{final.name}.part")
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            with writing(final):
                shutil.copy2(root / file, part)  # with its mode: scripts can be executed
                os.replace(part, final)  # a link is replaced, not written through
        finally:
            part.unlink(missing_ok=True)
    return [target / file for file in files]
