"""Drafts of speculative decoding beside a cache that is compacted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from llama_cpp.llama_speculative import LlamaDraftModel

from . import _native

if TYPE_CHECKING:
    from .engine import Llama


class BoundedDraft(LlamaDraftModel):
    """A draft model's tokens, as many as come before the next compaction.

    A compaction then comes at the same token as without a draft, and no rejected token takes part in it.
    """

    def __init__(self, draft: LlamaDraftModel, llama: Llama) -> None:
        self.draft = draft
        self._llama = llama

    def __call__(self, input_ids: npt.NDArray[np.intc], /, **kwargs: Any) -> npt.NDArray[np.intc]:
        """int32 [up to what the draft gives]; input_ids [n]: all tokens, those not decoded yet too."""
        llama = self._llama
        assert llama.kv is not None
        room = _native.seq_room(llama.ctx) or llama.kv.buffer
        waiting = len(input_ids) - llama.n_tokens
        return self.draft(input_ids, **kwargs)[: max(0, room - waiting)]
