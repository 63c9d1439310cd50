"""Load models that hold once what they share: a folder is read once, and so is a common base."""

import os
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from sepo.model.folder import ModelFolder, read_beside
from sepo.model.load import load_model
from sepo.terminal import say


class Wanted(NamedTuple):
    """A model to load, and where."""

    folder: ModelFolder
    dtype: torch.dtype
    device: str

    @property
    def base(self) -> "Wanted | None":
        """The same of the folder that an adapter is on."""
        adapter = self.folder.adapter
        return None if adapter is None else self._replace(folder=adapter.base)

    @property
    def key(self) -> tuple[str, torch.dtype, str]:
        path = self.folder.path
        return os.path.realpath(path) if os.path.isdir(path) else path, self.dtype, self.device


def load_sharing(wanted: Mapping[str, Wanted]) -> dict[str, PreTrainedModel]:
    """Load a model for each role, to be run and not to be trained. Says what is held once.

    A folder that two roles name, in one dtype on one device, is one model. An adapter whose base
    another role names, or stands on, lies beside it (`read_beside`): the base is held once. Raises
    InputError as `load_model` does.
    """
    distinct = {one.key: one for one in wanted.values()}
    bases = [one.base.key for one in distinct.values() if one.base is not None]
    held = Counter([*distinct, *bases])
    loaded: dict[tuple, PreTrainedModel] = {}
    for role, one in wanted.items():
        if one.key in loaded:
            say(f"{role}: {one.folder.path} is loaded once for all that name it")
        elif one.base is not None and held[one.base.key] > 1:
            if one.base.key not in loaded:
                loaded[one.base.key] = _load(one.base)
            loaded[one.key] = _beside(role, loaded[one.base.key], one)
        else:
            loaded[one.key] = _load(one)
    return {role: loaded[one.key] for role, one in wanted.items()}


def _beside(role: str, base: PreTrainedModel, one: Wanted) -> PreTrainedModel:
    beside = read_beside(base, one.folder)
    if beside is None:
        return _load(one)
    say(f"{role}: its adapter is added in each pass, not merged: {base.name_or_path} is held once")
    return beside


def _load(one: Wanted) -> PreTrainedModel:
    return load_model(one.folder, dtype=one.dtype, device=one.device)
