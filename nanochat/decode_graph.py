"""One decode step of a GPU, captured once as a CUDA graph: a replay launches its hundreds of kernels at once.

Works because the shapes never change (all slots, one token each, the whole cache as keys) and because what does
change lies in static buffers: the ids here, the rest in `KVCache.plan`. `KVCache.begin` and `finish` do before and
after a replay what they do in an eager step, so lengths are checked and counted as ever.

The oracle is the eager step: tests/test_engine.py compares both where there is a GPU.

Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs. N slots, V vocabulary.
"""

import torch

from nanochat.gpt import GPT
from nanochat.kv_cache import KVCache

NUM_WARM_UPS = 3  # eager runs before the capture, in which cuBLAS takes its workspaces


class DecodeGraph:
    """The next logits of all slots of an empty `cache`, for weights that change in place only."""

    @torch.inference_mode()
    def __init__(self, model: GPT, cache: KVCache) -> None:
        self.cache, self.dtype = cache, model.compute_dtype
        self.ids = torch.zeros(cache.num_slots, 1, dtype=torch.int64, device=cache.keys.device)
        with torch.cuda.device(cache.keys.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(NUM_WARM_UPS):
                    model(self.ids, cache=cache, last_only=True)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.logits = model(self.ids, cache=cache, last_only=True)[:, 0]  # (N, V)
        cache.reset()

    def __call__(self, ids: torch.Tensor, num_new: torch.Tensor) -> torch.Tensor:
        """(N, V) logits, valid until the next call; `ids` (N, 1) and `num_new` (N,) as of GPT.forward."""
        step = self.cache.begin(len(ids), 1, num_new=num_new, dtype=self.dtype)
        self.ids.copy_(ids)
        self.graph.replay()
        self.cache.finish(step)
        return self.logits
