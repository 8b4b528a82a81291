"""The output folder: a plain Hugging Face model folder, with a record in `unierase/` from which the edit is reverted.

    manifest.json        the model, the method, the versions, and the fingerprints before and after
    edits.safetensors    the update's factors and keys by step and layer, the original weights, the token's rows
    ledger.jsonl         one line for each request: salted hashes, or the texts too if requests are kept in the clear
    report.json          the measurements after the last step; report-<k>.json holds those after an earlier step k
    digests.json         digests of the files, which show damage; edits.safetensors holds the digests of its tensors

`.unierase-files.json` beside the weights lists the files that were written. Only these may be deleted when the folder
is replaced.

Steps are counted from 1. Step k is what the k-th run of sequential unlearning added. Step 0 is the unedited model.
docs/how-to/checkpoints.md says what can be done with the folder.
"""

from .contents import is_whole
from .export import export_adapter
from .folder import save_checkpoint, save_plain, step_id
from .integrity import Examined, examine, is_edited, read_checkpoint
from .originals import Originals, take_originals
from .place import OutputFolder, check_output_folder, output_folder
from .record import RECORD, SCHEMA, Checkpoint, join_edits, ledger_hash, pack_edits, unpack_edits
from .revert import revert_checkpoint, take_back_requests
from .summary import step_summaries
from .verify import Verification, verify_folder
from .work import discard_work, unseal, work_folder

__all__ = [
    "RECORD",
    "SCHEMA",
    "Checkpoint",
    "Examined",
    "Originals",
    "OutputFolder",
    "Verification",
    "check_output_folder",
    "discard_work",
    "examine",
    "export_adapter",
    "is_edited",
    "is_whole",
    "join_edits",
    "ledger_hash",
    "output_folder",
    "pack_edits",
    "read_checkpoint",
    "revert_checkpoint",
    "save_checkpoint",
    "save_plain",
    "step_id",
    "step_summaries",
    "take_back_requests",
    "take_originals",
    "unpack_edits",
    "unseal",
    "verify_folder",
    "work_folder",
]
