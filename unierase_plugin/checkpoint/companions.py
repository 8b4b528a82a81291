"""The files that go along with a model's weights: licences, notices and terms of use, and an image processor's."""

from __future__ import annotations

import filecmp
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from ..models.disk_space import local_folder

#: Words in the name of such a file, and endings that it does not have.
_NAME = re.compile(
    r"(?i)(?:.*[^a-z])?(?:licen[cs]es?|notices?|copying|copyright|use[ _-]policy|terms[ _-]of[ _-](?:use|service))"
    r"(?:[^a-z].*)?"
)
_OTHER = (".py", ".json", ".jsonl", ".csv", ".parquet", ".safetensors", ".bin", ".pt")
#: The most bytes of such a file.
LARGEST = 1 << 20
#: What an image-text model needs beside its tokenizer. No edit changes it.
PROCESSOR = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)


def carry_companions(models: Iterable[str | os.PathLike[str]], staging: Path, target: Path) -> None:
    """Copies these files from the folders of `models`, or from the hub's copies on this machine, to `staging`.

    If two models have different licences of one name, the name of the second begins with "base-". The first one's
    processor wins. The folder `target`, which `staging` will replace, is left out: `contents.carry_over` handles its
    files.
    """
    for model in dict.fromkeys(os.fspath(each) for each in models if os.fspath(each)):
        try:
            folder = local_folder(model)
        except (OSError, ValueError):  # there is no such folder
            continue
        if target.exists() and folder.samefile(target):
            continue
        for path in sorted(folder.iterdir()):
            if is_licence(path):
                _copy(path, staging)
            elif path.name in PROCESSOR and not (staging / path.name).exists():
                shutil.copyfile(path, staging / path.name)


def is_licence(path: Path) -> bool:
    """Whether a file has the name of a licence and is small."""
    named = _NAME.fullmatch(path.name) and not path.name.casefold().endswith(_OTHER)
    return bool(named) and path.is_file() and path.stat().st_size <= LARGEST


def _copy(path: Path, staging: Path) -> None:
    for name in (path.name, f"base-{path.name}"):
        if not (staging / name).exists():
            shutil.copyfile(path, staging / name)
            return
        if filecmp.cmp(path, staging / name, shallow=False):
            return
