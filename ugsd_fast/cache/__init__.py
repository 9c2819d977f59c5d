"""Key/value caches: rolling rejected tokens back out of a transformers cache."""

from ugsd_fast.cache.rollback import enable_rollback, rollback

__all__ = ["enable_rollback", "rollback"]
