"""rkv_local.Llama with what only a command line needs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from rkv_local import Llama
from rkv_local.cli.interrupt import Interrupt, Interrupted
from rkv_local.cli.options import Sampling

# after rkv_local, which says where its library is
from llama_cpp import llama_cpp as lib  # isort: skip
from llama_cpp._internals import LlamaSampler  # isort: skip
from llama_cpp.llama_grammar import LlamaGrammar  # isort: skip

MINUS_INFINITY = float("-inf")


class Loading:
    """How far the model is loaded, and whether to go on; llama.cpp calls `callback` while it loads."""

    share = 0.0
    interrupt: Interrupt | None = None

    @staticmethod
    @lib.llama_progress_callback
    def callback(share: float, _: Any) -> bool:
        """Note the share done; False stops."""
        Loading.share = share
        return Loading.interrupt is None or not Loading.interrupt.pressed


class CliLlama(Llama):
    """Llama with the sampler chain of our options, and a load and an eval that Ctrl-C can stop on the way."""

    sampling: Sampling = Sampling()
    grammar_text: str | None = None
    banned: Sequence[int] = ()
    interrupt: Interrupt | None = None
    n_evaluated = 0

    # llama_cpp.Llama.__init__ makes these with no way to add to them
    @property
    def model_params(self) -> Any:
        """llama_model_params that the model is loaded with."""
        return self._model_params

    @model_params.setter
    def model_params(self, value: Any) -> None:
        value.progress_callback = Loading.callback
        self._model_params = value

    def set_seed(self, seed: int) -> None:
        """The seed of the next generation."""
        self.sampling = self.sampling.with_(seed=seed)

    def _init_sampler(self, **_: Any) -> LlamaSampler:
        # llama.cpp's order: biases, penalties, grammar, top-k, top-p, min-p, temperature
        s, chain = self.sampling, LlamaSampler()
        if self.banned:
            chain.add_logit_bias(self._n_vocab, dict.fromkeys(self.banned, MINUS_INFINITY))
        if s.repeat_penalty != 1.0:
            chain.add_penalties(self._n_vocab, s.repeat_last_n, s.repeat_penalty, 0.0, 0.0)
        if self.grammar_text:
            chain.add_grammar(self._model, LlamaGrammar.from_string(self.grammar_text))
        if s.temp <= 0.0:
            chain.add_greedy()
            return chain
        chain.add_top_k(s.top_k)
        chain.add_top_p(s.top_p, 1)
        chain.add_min_p(s.min_p, 1)
        chain.add_temp(s.temp)
        chain.add_dist(random.getrandbits(32) if s.seed is None else s.seed)
        return chain

    def eval(self, tokens: Sequence[int]) -> None:
        for i in range(0, len(tokens), self.n_batch):
            if self.interrupt is not None and self.interrupt.pressed:
                raise Interrupted
            chunk = tokens[i : i + self.n_batch]
            super().eval(chunk)
            self.n_evaluated += len(chunk)
