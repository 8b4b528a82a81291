"""What attacks and verdict share: the contract of an attack, which plugins see too, under the audit's name."""

from ..attack import EDITED as EDITED
from ..attack import FULL as FULL
from ..attack import GROUPS as GROUPS
from ..attack import PLAIN as PLAIN
from ..attack import QUICK as QUICK
from ..attack import REFERENCE as REFERENCE
from ..attack import UNEDITED as UNEDITED
from ..attack import Attack as Attack
from ..attack import AttackResult as AttackResult
from ..attack import Audited as Audited
from ..attack import Context as Context
from ..attack import Measure as Measure
from ..attack import Sizes as Sizes
from ..attack import Value as Value
