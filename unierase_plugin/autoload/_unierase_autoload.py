"""Tells lm-eval and EasyEdit of unierase-plugin when a program imports them; docs/how-to/hosts.md has the why.

Python calls `install` at its start: named by unierase_autoload.pth, and from Python 3.15 on by unierase_autoload.start
(PEP 829). Until one of the two hosts is imported nothing of the package is. UNIERASE_AUTOLOAD=0 switches it off.
"""

import os
import sys

#: The host's module that is waited for, and the module whose `register` is called once it is there.
HOSTS = {"lm_eval.tasks": "unierase_plugin.hosts.lm_eval", "easyeditor": "unierase_plugin.hosts.easyedit"}


def install():
    """Begins to wait, once in a process."""
    if _wanted() and not any(isinstance(finder, HostFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, HostFinder())


def _wanted():
    return os.environ.get("UNIERASE_AUTOLOAD", "").casefold() not in ("0", "false", "no", "off")


class HostFinder:
    """Finds no module itself: asks the other finders for a host, and has `register` called when it has been loaded."""

    def __init__(self):
        self.unierase_hosts = dict(HOSTS)

    def find_spec(self, name, path=None, target=None):
        if name not in self.unierase_hosts or not _wanted():
            return None
        for finder in [each for each in sys.meta_path if each is not self and hasattr(each, "find_spec")]:
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                self._call_after(spec)
                return spec
        return None

    def _call_after(self, spec):
        """On the host's own loader, so that whoever looks at the module finds what is there without us."""
        loader = spec.loader
        execute = getattr(loader, "exec_module", None)
        if execute is None:  # a folder without __init__.py
            return

        def exec_module(module):
            # First, since an archive has one loader for all its modules.
            vars(loader).pop("exec_module", None)
            execute(module)
            if module.__name__ in self.unierase_hosts:
                self._register(module.__name__)

        loader.exec_module = exec_module

    def _register(self, name):
        ours = self.unierase_hosts.pop(name)
        if not self.unierase_hosts and self in sys.meta_path:
            sys.meta_path.remove(self)
        import importlib

        try:
            importlib.import_module(ours).register()
        except (Exception, SystemExit) as error:  # whatever it is, it is not the host's fault
            import warnings

            said = (
                f"unierase-plugin could not make itself known to {name.split('.')[0]}, which works without it: "
                f"{type(error).__name__}: {error} Set UNIERASE_AUTOLOAD=0 to have it not try."
            )
            try:
                warnings.warn(said, stacklevel=2)
            except Warning:  # warnings are errors (python -W error); the host is to work all the same
                sys.stderr.write(said + "\n")
