"""On PYTHONPATH, lets `python SCRIPT` run Megatron-Bridge on a CPU: bridge_cpu.install() before megatron.bridge is imported."""

import importlib.abc
import sys


class _BeforeBridge(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        if fullname == "megatron.bridge":
            sys.meta_path.remove(self)
            import bridge_cpu

            bridge_cpu.install()
        return None


sys.meta_path.insert(0, _BeforeBridge())
