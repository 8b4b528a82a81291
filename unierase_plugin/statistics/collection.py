"""The second moment of ordinary text: the text is read or sampled, and counted by one process or several.

A pass can be kept, resumed and replaced by an import. `unierase run` and `unierase stats` both use this module, so each
finds what the other left in the cache.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..hparams import UniEraseHyperParams
from ..models.architecture import Architecture, find_architecture
from ..models.loaded import LoadedModel
from ..storage.atomic import check_disk_space
from ..storage.cache import ONE_OF_DAMAGED, Store
from ..storage.fingerprints import digest
from ..storage.tensor_files import Packed, pack, unpack
from .corpus import corpus_identity, corpus_tokens
from .distributed import Processes
from .files import check_likeness, is_of_model, read_moments
from .second_moment import MomentSums, SecondMoment, add_sequences, begin_sums, mean_moments, second_moments, unusable

logger = logging.getLogger(__name__)

#: Part of the cache key. Raise it when the computation changes.
VERSION = "3"
#: Kinds of files in the cache: finished moments, and the state of an unfinished pass.
FINISHED, UNDER_WAY = "statistics", "statistics-under-way"
#: Seconds between two saves of an unfinished pass.
KEEP_EVERY = 60.0

#: Called with (share done from 0 to 1, note).
Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class CorpusMoment:
    """The second moment of a corpus, the file that keeps it, its origin, and the seconds that it took in this call."""

    moment: SecondMoment
    file: Path
    #: Settings of the corpus, or the files from which it was imported.
    source: dict[str, Any]
    #: Seconds for reading or sampling text, and for the pass. Both are 0 if the moments came from the cache.
    reading: float = 0.0
    counting: float = 0.0


@dataclass(frozen=True)
class Corpus:
    """Ordinary text for a model, given by the hyper-parameters `mom2_*`, `layers` and `seed`."""

    loaded: LoadedModel
    hparams: UniEraseHyperParams
    cache: Store
    #: Questions with which sampled texts begin, and prose that is added to them.
    openings: Sequence[str]
    prose: Sequence[str]
    progress: Progress = lambda share, note: None

    def key(self) -> str:
        """Digest of everything that the moments depend on."""
        h = self.hparams
        return digest(
            VERSION,
            self.loaded.fingerprint,
            self.loaded.tokenizer_fingerprint,
            h.layers,
            h.mom2_dataset,
            corpus_identity(h.mom2_dataset),
            h.mom2_n_samples,
            h.mom2_max_length,
            h.mom2_dtype,
            h.seed,
            self.openings,
            self.prose,
        )[:32]

    def kept(self) -> CorpusMoment | None:
        """The moments from the cache; None if they are not there."""
        key = self.key()
        packed = self.cache.get(FINISHED, key)
        if packed is None:
            return None
        found = self._result(key, packed)
        why = unusable(found.moment)
        if why:
            logger.warning("Computing again: %s in %s.", why, found.file, extra=ONE_OF_DAMAGED)
            return None
        return found

    def check_disk_space(self, out: Path | None) -> None:
        """Raises WriteError if the disk has no room for the sums of the pass, the moments, and a copy in `out`."""
        if self.kept() is None:
            arch = self._architecture()
            size = sum(math.prod(arch.moment_shape(layer)) for layer in self.hparams.layers)
            check_disk_space(
                self.cache.path(FINISHED, self.key()), size * (torch.float64.itemsize + self.dtype.itemsize)
            )
            if out is not None:
                check_disk_space(out, size * self.dtype.itemsize)

    def check(self) -> None:
        """Raises if the corpus is wrong, by reading one text. Checks nothing if the moments are in the cache."""
        if self.hparams.mom2_dataset != "self" and not self.cache.path(FINISHED, self.key()).is_file():
            self.sequences(samples=1)

    def sequences(self, samples: int) -> list[Sequence[int]]:
        """Token ids of the corpus' texts."""
        h = self.hparams
        longest = min(h.mom2_max_length, self.loaded.context)
        found = corpus_tokens(
            h.mom2_dataset,
            self.loaded.model,
            self.loaded.tokenizer,
            samples=samples,
            max_length=longest,
            seed=h.seed,
            openings=self.openings,
            progress=lambda share: self.progress(share / 2, "reading the corpus"),
        )
        # Sampled text is what the model says. The bundled prose adds what others say.
        return found + self._prose_ids(longest) if h.mom2_dataset == "self" else found

    def moment(self, processes: Processes | None = None) -> CorpusMoment:
        """The moments from the cache. If they are not there, all processes compute them and the first one keeps them.

        A pass that was stopped continues from its last save, and gives the same bytes as an undisturbed one.
        """
        processes, key = processes or Processes(), self.key()
        kept = processes.agreed(self.kept)
        if kept is not None:
            # Left by a pass that was killed after it had kept the moments.
            self._discard(key)
            return kept
        start = time.perf_counter()
        ids, noted = processes.agreed(lambda: self._read(key))
        read = time.perf_counter()
        packed = self._finished(self._count(key, ids, int(noted["max_tokens"]), processes), self._settings())
        if processes.leads:
            self.cache.put(FINISHED, key, *packed)
        self._discard(key)
        return self._result(key, packed, read - start, time.perf_counter() - read)

    def take(self, sources: Sequence[Path]) -> CorpusMoment:
        """Takes moments from files (`files.read_moments`) and keeps them as those of this corpus.

        A file whose fingerprint says that it is of this model is trusted. For any other file, the pattern of strong and
        weak neurons is compared. Raises EditError if the moments are not of this model's layers.
        """
        start, key = time.perf_counter(), self.key()
        arch = self._architecture()
        names = (self.loaded.name.replace("/", "_"), Path(self.loaded.name).name)
        moment, files = read_moments(sources, arch, self.hparams.layers, names)
        if not is_of_model(sources, {self.loaded.fingerprint, self.loaded.saved_fingerprint}):
            prose = self._prose_ids(self.loaded.context)
            check_likeness(
                moment, second_moments(arch, prose, self.hparams.layers, max_tokens=self.loaded.max_tokens), files
            )
        moment = SecondMoment({layer: each.to(self.dtype) for layer, each in moment.moments.items()}, moment.count)
        packed = self._finished(moment, {"imported": files})
        self.cache.put(FINISHED, key, *packed)
        return self._result(key, packed, time.perf_counter() - start)

    # --- the pass -----------------------------------------------------------------------------------------------------

    def _count(self, key: str, ids: Mapping[str, Tensor], max_tokens: int, processes: Processes) -> SecondMoment:
        arch = self._architecture()
        # Saved sums fit only the same batches. With several processes, each has its own.
        texts = [tensor.numpy().tobytes() for tensor in (ids["tokens"], ids["lengths"])]
        own = f"{key}-{digest(*texts, max_tokens, processes.size, processes.rank)[:16]}"
        sums = self._begun(arch, own)
        sequences = cast("list[Sequence[int]]", [part.numpy() for part in ids["tokens"].split(ids["lengths"].tolist())])
        add_sequences(
            arch,
            sequences,
            sums,
            max_tokens=max_tokens,
            dtype=self.dtype,
            pad_id=self.loaded.pad_id,
            share=(processes.rank, processes.size),
            keep_every=KEEP_EVERY,
            keep=lambda so_far: self.cache.put(UNDER_WAY, own, *pack(so_far)),
            progress=lambda share: self.progress((1 + share) / 2, "keys of the corpus"),
        )
        processes.add_up(sums.sums.values())
        sums.count = processes.total(sums.count)
        return mean_moments(sums, self.dtype)

    def _begun(self, arch: Architecture, own: str) -> MomentSums:
        """Zeros, or the sums of a stopped pass."""
        sums = begin_sums(arch, self.hparams.layers)
        saved = self.cache.get(UNDER_WAY, own)
        if saved is None:
            return sums
        earlier = unpack(MomentSums, *saved)
        for layer, total in sums.sums.items():
            total.copy_(earlier.sums[layer])
        return MomentSums(sums.sums, earlier.count, earlier.batches, earlier.tokens)

    def _read(self, key: str) -> Packed:
        """The texts' token ids and the batch size. Both are kept until the pass is finished.

        Sampling takes as long as the pass itself. And if the batch size followed the free memory of the moment, a
        second start or another process would divide the texts into other batches.
        """
        kept = self.cache.get(UNDER_WAY, f"{key}-ids")
        if kept is None:
            ids = self.sequences(self.hparams.mom2_n_samples)
            tokens = np.concatenate([np.asarray(each, dtype=np.int32) for each in ids])
            tensors = {"tokens": torch.from_numpy(tokens), "lengths": torch.tensor([len(each) for each in ids])}
            kept = tensors, {"max_tokens": str(self.loaded.max_tokens)}
            self.cache.put(UNDER_WAY, f"{key}-ids", *kept)
        if self.hparams.max_batch_tokens:
            return kept[0], {"max_tokens": str(self.hparams.max_batch_tokens)}
        return kept

    def _discard(self, key: str) -> None:
        for path in (self.cache.root / UNDER_WAY).glob(f"{key}-*"):
            path.unlink(missing_ok=True)

    # --- helpers ------------------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the products, and of the kept moments."""
        return torch.float64 if self.hparams.mom2_dtype == "float64" else torch.float32

    def _architecture(self) -> Architecture:
        return find_architecture(self.loaded.model, self.hparams.rewrite_module_tmp, self.hparams.layer_module_tmp)

    def _prose_ids(self, longest: int) -> list[Sequence[int]]:
        return [self.loaded.tokenizer(text)["input_ids"][:longest] for text in self.prose]

    def _settings(self) -> dict[str, Any]:
        h = self.hparams
        return {"corpus": h.mom2_dataset, "samples": h.mom2_n_samples, "max_length": h.mom2_max_length, "seed": h.seed}

    def _finished(self, moment: SecondMoment, source: dict[str, Any]) -> Packed:
        tensors, metadata = pack(moment)
        return tensors, {
            **metadata,
            "model": self.loaded.name,
            "fingerprint": self.loaded.fingerprint,
            "source": json.dumps(source),
        }

    def _result(self, key: str, packed: Packed, reading: float = 0.0, counting: float = 0.0) -> CorpusMoment:
        source = json.loads(packed[1].get("source", "{}"))
        return CorpusMoment(
            moment=unpack(SecondMoment, *packed),
            file=self.cache.path(FINISHED, key),
            source=source,
            reading=reading,
            counting=counting,
        )
