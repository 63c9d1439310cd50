"""Keep modules importable from where they used to stand; both names are one module."""

import importlib
import sys
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.util import find_spec, spec_from_loader

MOVED = {  # old name -> name, without "sepo."
    "accepted": "trainer.accepted",
    "adapters": "trainer.adapters",
    "arguments": "trainer.arguments",
    "arithmetic": "flags.dtype_note",
    "budget": "model.budget",
    "checkpoints": "trainer.checkpoints",
    "cli": "commands.main",
    "config": "trainer.config",
    "data.ahead": "model.ahead",
    "data.carry": "transfer.row",
    "data.cells": "data.read.cells",
    "data.check": "system.checksums",
    "data.content": "data.read.content",
    "data.crossvocab": "data.align",
    "data.files": "system.files",
    "data.formats": "data.read.formats",
    "data.load": "data.read.load",
    "data.manifest": "data.store.manifest",
    "data.official": "data.read.sepo_csv",
    "data.part": "data.store.part",
    "data.reasons": "data.read.reasons",
    "data.render": "data.read.render",
    "data.rows": "data.read.rows",
    "data.select": "data.selection",
    "data.tokenise": "data.read.tokenise",
    "decoder": "model.forward",
    "feed": "model.feed",
    "fingerprint": "model.fingerprint",
    "folder": "model.folder",
    "fused": "trainer.fused",
    "identity": "trainer.identity",
    "inherited": "trainer.inherited",
    "inspect": "commands.inspect",
    "layers": "trainer.layers",
    "lock": "system.lock",
    "masked": "trainer.mask",
    "methods": "trainer.methods",
    "metrics": "trainer.metrics",
    "options": "flags.options",
    "packages": "flags.packages",
    "precision": "score.precision",
    "prepared": "trainer.pairs",
    "reference": "model.reference",
    "report.command": "commands.report",
    "report.page": "report.html",
    "response_logp": "score.logp",
    "resumable": "trainer.resume",
    "routers": "model.routers",
    "score_command": "commands.score",
    "settings": "system.settings",
    "smollm2": "demo.smollm2",
    "tokens": "trainer.step",
    "values": "flags.values",
}


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
        return _loader(name).get_code(_now(name))

    def get_source(self, name):
        return _loader(name).get_source(_now(name))


def _loader(name: str) -> InspectLoader:
    """Of the file that has an old name's contents now."""
    spec = find_spec(_now(name))
    if spec is None or not isinstance(spec.loader, InspectLoader):
        raise ImportError(f"{name}: expected the source of {_now(name)}, found none")
    return spec.loader


def _now(name: str) -> str:
    return "sepo." + MOVED[name.removeprefix("sepo.")]


def install() -> None:
    """Put the finder behind all others, so that a file that exists wins."""
    sys.meta_path.append(_OldPlaces())
