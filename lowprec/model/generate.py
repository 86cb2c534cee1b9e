"""Sample text from a model: temperature and top-k, one token at a time, deterministic by seed.

    p = softmax(logits / temperature) over the k most likely tokens

`generate` asks for the logits of the next token with all tokens so far. A plain forward runs the whole sequence again
each time; `Cached` runs the new tokens only: it keeps keys and values of attention, the states and last inputs of
Mamba-2 blocks, and goes on from there. Made for looking at a run, not for serving.

Neither touches the model's mode nor its precision: wrap the call in `plan.high_precision()` to sample in bf16. With
`Cached`, a recipe whose scales span tokens (one scale a tensor) sees one token at a time, so its logits differ a little
from those of the whole sequence; without such a recipe they are the same up to rounding.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .attention import Context, Memory
from .transformer import Transformer


@torch.no_grad()
def generate(
    next_logits: Callable[[list[int]], Tensor],
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    stop_token: int | None = None,
    max_seq_len: int | None = None,
) -> list[int]:
    """The new tokens that follow `prompt` (at least one token), at most max_new_tokens of them.

    next_logits: tokens so far -> (vocabulary,) logits of the next, such as `Cached(model)`, `Engine.next_logits`, or
    `lambda tokens: model(torch.tensor([tokens]))[0, -1]`.
    temperature 0 takes the most likely token. top_k None = the whole vocabulary. stop_token ends the text and is not
    returned. It sees at most the last max_seq_len tokens (None = all). Sampling is fp32 on the CPU with a generator of
    its own, so the ranks of a sharded model, which must all call this, draw the same tokens and stay in step. Raises
    ValueError for an empty prompt, a negative temperature or a top_k below 1.
    """
    if not prompt:
        raise ValueError("generate needs a prompt of at least one token: begin with the tokenizer's end-of-text token.")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}: it must be 0 (most likely token) or positive.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}: it must be at least 1, or None for the whole vocabulary.")
    generator = torch.Generator("cpu").manual_seed(seed)
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        logits_V = next_logits(tokens[-(max_seq_len or len(tokens)) :]).float().cpu()
        token = _sample(logits_V, temperature, top_k, generator)
        if token == stop_token:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def _sample(logits_V: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    values, indices = logits_V.topk(min(top_k or len(logits_V), len(logits_V)))
    choice = torch.multinomial((values / temperature).softmax(dim=-1), 1, generator=generator)
    return int(indices[choice])


class Cached:
    """The logits of the next token, from a model of one process that remembers what it has seen."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self._seen: list[int] = []
        self._memory: Memory = {}

    @torch.no_grad()
    def __call__(self, tokens: list[int]) -> Tensor:
        """tokens so far, at least one -> (vocabulary,) logits. If they do not go on from the last call's, all are run.

        Raises ValueError beyond the model's max_seq_len.
        """
        model = self.model
        past = len(self._seen)
        if past >= len(tokens) or tokens[:past] != self._seen:
            past, self._memory = 0, {}
        tokens_1T = torch.tensor([tokens], device=model.embed.weight.device)
        context = model.context(tokens_1T, None)  # refuses too long ones
        if past:
            context = Context.after(model.config, past, tokens_1T[:, past:], self._memory)
        context.memory = self._memory
        x_1TC = model.begin(tokens_1T[:, past:])
        for layer in model.layers:
            x_1TC = layer(x_1TC, context)
        self._seen = list(tokens)
        return model.end(x_1TC[:, -1:])[0, -1]
