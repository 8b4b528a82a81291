"""The output folder: a plain Hugging Face model folder, and in `unierase/` a record from which the edit is taken back.

    manifest.json        what was done to which model by which versions; fingerprints before and after
    edits.safetensors    the update's factors and keys by step and layer, the weights as they were, the token's rows
    ledger.jsonl         one line a request, as salted hashes unless the requests are to be kept in the clear
    report.json          what was measured after the last step; report-<k>.json after step k before it
    digests.json         digests of the files, by which damage to them is found; the tensors' are in their own file

`.unierase-files.json` beside the weights lists what was written, and so what may go when the folder is replaced.

Steps are counted from 1: step k is what the k-th run of sequential unlearning added; step 0 is the unedited model.
docs/how-to/checkpoints.md says what can be done with it.
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
