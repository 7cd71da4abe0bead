from collections.abc import Iterable

DEFAULT_PATTERN: str  # any other is matched by a slower engine

def train(texts: Iterable[str], num_merges: int, pattern: str) -> list[bytes]:
    """The bytes of every token, in the order of the ids: the 256 bytes, then what merges make."""
