"""A loaded model as lm-eval-harness sees one: log-likelihoods of continuations, of whole texts, and generated text.

Only `lowprec.launch.evaluate` imports this, and only when tasks are asked for: the harness is an extra (`eval`).
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from lowprec.model import generate
from lowprec.train.loaded import Loaded


class Harness(TemplateLM):
    """One sequence at a time, in the precision that the plan has in force."""

    def __init__(self, loaded: Loaded) -> None:
        super().__init__()
        self.loaded, self.tokenizer = loaded, loaded.data.tokenizer
        self.longest = loaded.run.model.max_seq_len
        loaded.plan.clock.micro = 0

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.tokenizer.encode(string)

    @torch.no_grad()
    def _logits(self, tokens: list[int]) -> Tensor:
        """(T, V) fp32."""
        return self.loaded.model(torch.tensor([tokens], device=self.loaded.device))[0].float()

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Of each (texts, context, continuation): the log-probability of the continuation, and whether it is greedy."""
        found = []
        for _texts, context, continuation in requests:
            tokens = (context + continuation)[-(self.longest + 1) :]
            count = min(len(continuation), len(tokens) - 1)  # of what is too long, the end
            if count < 1:  # nothing to predict
                found.append((0.0, True))
                continue
            logits_TV = self._logits(tokens[:-1])[-count:]
            wanted_T = torch.tensor(tokens[-count:], device=logits_TV.device)
            chosen_T = logits_TV.log_softmax(-1).gather(1, wanted_T[:, None])
            found.append((chosen_T.sum().item(), bool((logits_TV.argmax(-1) == wanted_T).all())))
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text, every token predicted once, in windows of the model's length."""
        totals = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(self.tok_encode(text), self.eot_token_id, self.longest, 1)
            pairs = [make_disjoint_window(window) for window in windows]
            totals.append(sum(value for value, _ in self._loglikelihood_tokens([(("", ""), *p) for p in pairs])))
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """What follows each prompt, up to the first of its stop strings."""
        texts = []
        for request in requests:
            prompt, options = request.args
            until = options.get("until") or []
            until = [until] if isinstance(until, str) else until
            tokens = self.tok_encode(prompt) or [self.eot_token_id]
            new = generate(
                lambda t: self._logits(t)[-1], tokens, int(options.get("max_gen_toks", 256)),
                temperature=float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0,
                stop_token=self.eot_token_id, max_seq_len=self.longest,
            )  # fmt: skip
            text = self.tokenizer.decode(new)
            ends = [text.find(stop) for stop in until if stop and stop in text]
            texts.append(text[: min(ends)] if ends else text)
        return texts
