"""SmolTalk: conversations on everything, written by larger models for small ones.

One row in outline (a system message may come first):
    {"messages": [{"role": "user", "content": "How do I ..."},
                  {"role": "assistant", "content": "You can ..."}], "source": "smol-magpie-ultra"}

The "smol" selection (460 K conversations for training, 24 K for testing) of the full million leaves
out function calls and advanced mathematics, and its conversations are shorter.

Source: HuggingFaceTB/smol-smoltalk on the Hugging Face hub (arXiv 2502.02737), Apache-2.0.
"""

from typing import Any

from nanochat.tokenizer import Conversation
from tasks.common import HubTask


class SmolTalk(HubTask):
    """Splits: train, test."""

    name, config = "HuggingFaceTB/smol-smoltalk", "default"

    def convert(self, row: dict[str, Any]) -> Conversation:
        return {"messages": row["messages"]}
