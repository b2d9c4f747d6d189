"""Where :class:`Info` and :class:`Chunk` lived when version 0.1 pickled them; import them from
``actzip.codec``."""

from actzip.codec.info import Chunk, Info

__all__ = ["Chunk", "Info"]
