"""The classes that the YAML files beside this one name.

lm-eval before 0.4.12 looks for `!function` in the YAML's folder alone, and runs what it finds there as a module without
a package: hence a file of that kind, with absolute imports.
"""

from unierase_plugin.tasks.facts import Facts
from unierase_plugin.tasks.tofu import Scored, Utility

__all__ = ["Facts", "Scored", "Utility"]
