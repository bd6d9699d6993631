"""The artifacts that a worker keeps in memory from one stage to the next."""

from __future__ import annotations

from collections import OrderedDict

from loda.state import Artifact
from loda.workbench import MERGED

KEPT_BYTES = 2**29  # of artifacts in a worker's memory; a stage's parents are needed again at once
KEPT_MERGES = 2048  # finished tasks whose merged factors stay in memory: stages read those of all tasks before theirs


class StepMemory:
    """The artifacts that a worker read or computed last, and of finished tasks the merged factors for longer.

    A stage needs its parent whole, and of all the tasks before it only what they added to the weights: second moments
    and class statistics of fifty tasks would fill a machine.
    """

    def __init__(self) -> None:
        self._whole: OrderedDict[str, Artifact] = OrderedDict()
        self._merged: OrderedDict[str, Artifact] = OrderedDict()

    def get(self, key: str, merged_only: bool) -> Artifact | None:
        """The artifact, if it is here; with ``merged_only`` its merged factors are enough."""
        for kept in (self._merged, self._whole) if merged_only else (self._whole,):
            if key in kept:
                kept.move_to_end(key)
                return kept[key]
        return None

    def add(self, key: str, artifact: Artifact) -> None:
        """Keep a whole artifact, and let go of those that were not asked for longest."""
        self._whole[key] = artifact
        self._whole.move_to_end(key)
        while len(self._whole) > 1 and sum(kept.nbytes for kept in self._whole.values()) > KEPT_BYTES:
            self._whole.popitem(last=False)
        part = artifact.part(MERGED)
        if part.tensors:
            self._merged[key] = part
            self._merged.move_to_end(key)
            while len(self._merged) > KEPT_MERGES:
                self._merged.popitem(last=False)
