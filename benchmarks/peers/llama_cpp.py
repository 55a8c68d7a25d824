"""llama.cpp through llama-cpp-python's thin C bindings: batches are sequences of one context."""

from typing import Any

import llama_cpp
import numpy as np

BATCH_TOKENS = 512  # llama.cpp's own default for n_ubatch


class Peer:
    def __init__(self) -> None:
        llama_cpp.llama_backend_init()
        self._contexts: dict[tuple[int, int], Any] = {}

    def versions(self) -> dict[str, str]:
        return {"llama-cpp-python": llama_cpp.__version__}

    def load(self, model: str, threads: int) -> None:
        self.threads = threads
        self.model = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {model}")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def _context(self, rows: int, slots: int) -> Any:
        """A context for `rows` sequences of `slots` tokens, emptied; kept, so that its making is not timed twice."""
        slots = -(-slots // 256) * 256
        if (rows, slots) not in self._contexts:
            params = llama_cpp.llama_context_default_params()
            params.n_ctx, params.n_seq_max = rows * slots, rows
            params.n_batch, params.n_ubatch = max(BATCH_TOKENS, rows), BATCH_TOKENS
            params.n_threads = params.n_threads_batch = self.threads
            self._contexts[rows, slots] = llama_cpp.llama_init_from_model(self.model, params)
        context = self._contexts[rows, slots]
        if not context:
            raise RuntimeError(f"llama.cpp cannot make a context of {rows} x {slots} tokens")
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        return context

    def prefill(self, prompts: list[list[int]], new_tokens: int) -> Any:
        context = self._context(len(prompts), len(prompts[0]) + new_tokens)
        firsts = []
        for row, prompt in enumerate(prompts):
            for start in range(0, len(prompt), BATCH_TOKENS):
                part = prompt[start : start + BATCH_TOKENS]
                wanted = [start + len(part) == len(prompt) and i == len(part) - 1 for i in range(len(part))]
                places = range(start, start + len(part))
                self._decode(context, part, places, [row] * len(part), wanted)
            firsts.append(self._best(context, -1))
        return context, len(prompts[0]), firsts

    def decode(self, state: Any, new_tokens: int) -> list[list[int]]:
        context, length, tokens = state
        rows = [[token] for token in tokens]
        for step in range(new_tokens):
            self._decode(context, tokens, [length + step] * len(tokens), range(len(tokens)), [True] * len(tokens))
            tokens = [self._best(context, i) for i in range(len(tokens))]
            for row, token in zip(rows, tokens, strict=True):
                row.append(token)
        return rows

    def _decode(self, context: Any, tokens: Any, places: Any, rows: Any, wanted: Any) -> None:
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (token, place, row, wants) in enumerate(zip(tokens, places, rows, wanted, strict=True)):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, place, 1, row
            batch.logits[i] = int(wants)
        code = llama_cpp.llama_decode(context, batch)
        llama_cpp.llama_batch_free(batch)
        if code:
            raise RuntimeError(f"llama_decode failed with code {code} for {len(tokens)} tokens")

    def _best(self, context: Any, index: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(context, index)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocab_size,)).argmax())
