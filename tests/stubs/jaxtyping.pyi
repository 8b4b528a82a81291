# What jaxtyping tells a type checker, so that mypy needs no installation of it: the axes are remarks.
from typing import Annotated as Bool
from typing import Annotated as Float
from typing import Annotated as Float16
from typing import Annotated as Float32
from typing import Annotated as Float64
from typing import Annotated as Int
from typing import Annotated as Num
from typing import Annotated as Shaped

__all__ = ["Bool", "Float", "Float16", "Float32", "Float64", "Int", "Num", "Shaped"]
