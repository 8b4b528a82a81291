"""The attacks, one short file for each kind, all behind `contract.Attack`."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import UniEraseError, did_you_mean, shown
from ..contract import GROUPS, Attack
from .bans import BAN_REFUSALS, BAN_TOKEN, DELETE_ROWS
from .choice import CHOICE
from .collateral import ORDINARY, PAIRED, RETENTION
from .depth import DEPTH
from .inside import EXTRACTION, LENS, PROBABILITY
from .membership import MEMBERSHIP
from .openings import FIRST_WORD, PREFILL
from .orders import ORDERS
from .plain import PLAIN
from .probe import PROBE
from .relearning import KEPT_ONLY, SOME_FORGOTTEN, UNRELATED
from .rounding import PRUNE, QUANTISE
from .sampling import SAMPLING
from .words import FEW_SHOT, FILL_IN, PARAPHRASES, SPELLINGS, TEMPLATES

#: In the order in which they are run and shown: GROUPS' own.
ATTACKS: tuple[Attack, ...] = (
    PLAIN,
    *(BAN_TOKEN, DELETE_ROWS, BAN_REFUSALS, PREFILL, FIRST_WORD, ORDERS),
    *(PARAPHRASES, SPELLINGS, TEMPLATES, FEW_SHOT, FILL_IN, CHOICE),
    SAMPLING,
    *(QUANTISE, PRUNE),
    *(SOME_FORGOTTEN, KEPT_ONLY, UNRELATED),
    *(LENS, PROBE, PROBABILITY, DEPTH, EXTRACTION, MEMBERSHIP),
    *(RETENTION, ORDINARY, PAIRED),
)


def choose_attacks(names: Sequence[str]) -> tuple[Attack, ...]:
    """The attacks that are named, one by one or by group; all where none is. The plain questions always take part.

    Raises UniEraseError for a name that is neither.
    """
    known = [attack.name for attack in ATTACKS]
    for name in names:
        if name not in known and name not in GROUPS:
            raise UniEraseError(
                f"There is no attack {shown(name)}.{did_you_mean(name, [*known, *GROUPS])} Attacks: "
                f"{', '.join(known)}; groups: {', '.join(GROUPS)}."
            )
    if not names:
        return ATTACKS
    return tuple(attack for attack in ATTACKS if attack is PLAIN or attack.name in names or attack.group in names)
