"""Files of second moments: the .npz files of ROME, MEMIT and EasyEdit, and this package's own."""

from __future__ import annotations

import math
import re
import zipfile
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError, EditError, reason
from ..models.architecture import Architecture
from ..storage.tensor_files import read_tensors, unpack
from .second_moment import SecondMoment

#: `<module>_<precision>_<statistics>[_<samples>].npz`, in `<stats_dir>/<model>/<dataset>_stats/`.
FILE_NAME = re.compile(r"(?P<module>.+)_float(?:16|32|64)_(?:[a-z0-9_]+-)*mom2(?:[-_].*)?\.npz")
#: Two diagonals of the same model and block correlate by more than this many times 1 / sqrt(m), the spread of chance.
#: On SmolLM2-135M: chance at most 0.08, source code against prose at least 0.17, prose against prose at least 0.82.
LEAST_LIKENESS = 4.0
#: How a file of this package names its model: digests of the weights as they were computed with, and as they are
#: stored.
FINGERPRINTS = ("fingerprint", "stored_fingerprint")


def read_moments(
    sources: Sequence[Path], arch: Architecture, layers: Sequence[int], model_names: Sequence[str]
) -> tuple[SecondMoment, dict[int, str]]:
    """The moments of `layers`, each (m, m), and the file of each.

    sources: .npz files, folders that contain them at any depth, or one .safetensors file from `unierase stats --out`.
    In a folder that has one of `model_names` as a subfolder, only that one is searched. Raises EditError if a layer is
    missing, found twice, damaged, or of another width.
    """
    if len(sources) == 1 and sources[0].suffix == ".safetensors":
        try:
            found = unpack(SecondMoment, *read_tensors(sources[0]))
        except CheckpointError as error:
            raise EditError(f"{error} Copy it again, or leave --import out to compute the statistics.") from error
        _check_own(found, sources[0], arch, layers)
        return SecondMoment({layer: found.moments[layer] for layer in layers}, found.count), {
            layer: str(sources[0]) for layer in layers
        }
    files = _find(sources, arch, layers, model_names)
    sums = {layer: _read(path, arch, layer) for layer, path in files.items()}
    counts = {layer: count for layer, (_, count) in sums.items()}
    if len(set(counts.values())) > 1:
        raise EditError(
            "The imported statistics are over different numbers of tokens: "
            f"{', '.join(f'{count} in block {layer}' for layer, count in counts.items())}. Give files of one corpus."
        )
    moments = {layer: total / count for layer, (total, count) in sums.items()}
    return SecondMoment(moments, counts[layers[0]]), {layer: str(path) for layer, path in files.items()}


def is_of_model(sources: Sequence[Path], fingerprints: Collection[str]) -> bool:
    """Whether the statistics are one file of this package that states one of the fingerprints.

    fingerprints: of the model's weights as they are computed with, and as they are stored.
    """
    if len(sources) != 1 or sources[0].suffix != ".safetensors":
        return False
    stated = read_tensors(sources[0])[1]
    return any(stated.get(name) in fingerprints for name in FINGERPRINTS)


def check_likeness(given: SecondMoment, own: SecondMoment, files: Mapping[int, str]) -> None:
    """Raises EditError if the pattern of strong and weak neurons in `given` differs from the model's own.

    A file's name and width do not tell apart two models of one shape, or a block from its neighbour.
    """
    for layer, moment in given.moments.items():
        diagonal = moment.diagonal(dim1=-2, dim2=-1)
        likeness, least = diagonal_likeness(moment, own.moments[layer]), LEAST_LIKENESS / math.sqrt(diagonal.numel())
        if not likeness >= least:  # NaN if all neurons of one of the two are alike
            shown = "in no way" if math.isnan(likeness) else f"by {likeness:.2f}"
            raise EditError(
                f"The statistics in {files[layer]!r} are not of block {layer} of this model: their diagonal correlates "
                f"with that of its own keys {shown}, and less than {least:.2f} is another model's or "
                "block's. Give the files of this very model, or leave --import out to compute them."
            )


def diagonal_likeness(a: Tensor, b: Tensor) -> float:
    """Pearson correlation of the logarithms of two diagonals: 1 if each neuron is as active, relative to others."""
    diagonals = [moment.diagonal(dim1=-2, dim2=-1).flatten().double() for moment in (a, b)]
    logs = torch.stack([diagonal.clamp(min=1e-30).log() for diagonal in diagonals])
    return float(torch.corrcoef(logs)[0, 1])


def _find(
    sources: Sequence[Path], arch: Architecture, layers: Sequence[int], model_names: Sequence[str]
) -> dict[int, Path]:
    """The one file of each layer."""
    modules = {arch.projection_names[layer]: layer for layer in arch.editable}
    found: dict[int, list[Path]] = defaultdict(list)
    others: set[str] = set()
    for path in (file for source in sources for file in _npz_files(source, model_names)):
        module = _module(path)
        if module in modules:
            found[modules[module]].append(path)
        elif module:
            others.add(module)
    missing = [layer for layer in layers if layer not in found]
    if missing:
        there = ", ".join([f"block {layer}" for layer in sorted(found)] or sorted(others)[:4]) or "no statistics at all"
        raise EditError(
            f"There are no statistics of block {', '.join(map(str, missing))} in {_names(sources)}; there is {there}. "
            f"Wanted: {arch.projection_names[missing[0]]}_float32_mom2_<samples>.npz or the like."
        )
    for layer in layers:
        if len(found[layer]) > 1:
            raise EditError(
                f"{_names(sources)} holds several statistics of block {layer}: {_names(found[layer][:4])}. "
                "Give the folder of one model and corpus, or the files themselves."
            )
    return {layer: found[layer][0] for layer in layers}


def _npz_files(source: Path, model_names: Sequence[str]) -> list[Path]:
    if source.is_dir():
        own = next((source / name for name in model_names if name and (source / name).is_dir()), source)
        return sorted(own.rglob("*.npz"))
    if not source.is_file():
        raise EditError(f"There is no file or folder {str(source)!r} to import statistics from.")
    if not _module(source):
        raise EditError(
            f"The name of {str(source)!r} does not tell what it holds. Name it "
            "<module>_<precision>_mom2[_<samples>].npz, as in model.layers.4.mlp.down_proj_float32_mom2_100000.npz."
        )
    return [source]


def _module(path: Path) -> str:
    """The module named in the file's name; "" if the name has another form."""
    match = FILE_NAME.fullmatch(path.name)
    return match["module"] if match else ""


def _read(path: Path, arch: Architecture, layer: int) -> tuple[Tensor, int]:
    """The sum of k k^T and the token count, as RunningStats saves them: a `SecondMoment` in a `CombinedStat`."""
    try:
        with np.load(path) as file:
            names = list(file)
            total, count = torch.from_numpy(file["mom2.mom2"]).double(), int(file["mom2.count"])
    except KeyError:
        raise EditError(f"{str(path)!r} holds {', '.join(names) or 'nothing'}, not mom2.mom2 and mom2.count.") from None
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise EditError(f"{str(path)!r} is damaged or no .npz file ({reason(error)}).") from error
    _check(total, str(path), arch, layer)
    if count <= 0:
        raise EditError(f"{str(path)!r} is over {count} tokens.")
    return total, count


def _check(moment: Tensor, name: str, arch: Architecture, layer: int) -> None:
    wanted = arch.moment_shape(layer)
    if moment.shape != wanted:
        keys = f"width {wanted[-1]}" + (f" in each of {wanted[0]} experts" if len(wanted) == 3 else "")
        raise EditError(
            f"The second moment in {name!r} is of shape {tuple(moment.shape)}; block {layer} of this model has keys of "
            f"{keys}. It is another model's."
        )
    if not torch.isfinite(moment).all():
        raise EditError(f"The second moment in {name!r} holds NaN or infinity: it overflowed where it was computed.")
    largest, diagonal = float(moment.abs().max()), moment.diagonal(dim1=-2, dim2=-1)
    if not largest > 0:
        raise EditError(f"The second moment in {name!r} is all zeros: no text was read where it was computed.")
    if float((moment - moment.mT).abs().max()) > 1e-3 * largest or float(diagonal.min()) < 0 or not diagonal.any():
        raise EditError(f"The matrix in {name!r} is no second moment: it is not symmetric with a positive diagonal.")


def _check_own(found: SecondMoment, path: Path, arch: Architecture, layers: Sequence[int]) -> None:
    missing = [layer for layer in layers if layer not in found.moments]
    if missing:
        raise EditError(
            f"{str(path)!r} holds statistics of blocks {', '.join(map(str, found.moments))}, not of "
            f"{', '.join(map(str, missing))}."
        )
    for layer in layers:
        _check(found.moments[layer], str(path), arch, layer)


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(repr(str(path)) for path in paths)
