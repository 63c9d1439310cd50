"""Keep modules importable from where they used to stand; both names are one module."""

import importlib
import sys
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.util import find_spec, spec_from_loader

MOVED: dict[str, str] = {}  # old name -> name, without "sepo."


class _OldPlaces(MetaPathFinder, InspectLoader):
    def find_spec(self, name, path=None, target=None):
        if name.removeprefix("sepo.") in MOVED and name.startswith("sepo."):
            return spec_from_loader(name, self)

    def create_module(self, spec):
        module = importlib.import_module(_now(spec.name))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module):
        module.__spec__ = module.__spec__.loader_state  # import has put the old name's there

    def get_code(self, name):  # for `python -m` with an old name
        return find_spec(_now(name)).loader.get_code(_now(name))

    def get_source(self, name):
        return find_spec(_now(name)).loader.get_source(_now(name))


def _now(name: str) -> str:
    return "sepo." + MOVED[name.removeprefix("sepo.")]


def install() -> None:
    """Put the finder behind all others, so that a file that exists wins."""
    sys.meta_path.append(_OldPlaces())
