"""Reading a GGUF file through transformers in a quarter of the time."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np


@contextmanager
def reading_once() -> Iterator[None]:
    """Read each file once, and quickly.

    transformers reads a file anew for its config, its tokenizer and its weights, and gguf the 150,000 words of its
    header one number at a time of a memmap, which takes ten times as long as of a plain array: 7 CPU seconds each time.
    Here a file is read once, as a plain array over the same memory. And the table of an architecture's names, which
    transformers makes for every module, is made once.
    """
    import gguf

    read: dict[str, Any] = {}
    original, names = gguf.GGUFReader, gguf.get_tensor_name_map

    class Reader(original):  # type: ignore[misc, valid-type]
        data: np.ndarray

        def _get(self, *words: Any, **options: Any) -> Any:
            if isinstance(self.data, np.memmap):
                self.data = self.data.view(np.ndarray)
            return super()._get(*words, **options)

    def reader(path: Any, *words: Any, **options: Any) -> Any:
        if str(path) not in read:
            read[str(path)] = Reader(path, *words, **options)
        return read[str(path)]

    gguf.GGUFReader = reader  # type: ignore[assignment, misc]
    gguf.get_tensor_name_map = cache(names)
    try:
        yield
    finally:
        gguf.GGUFReader = original  # type: ignore[misc]
        gguf.get_tensor_name_map = names
