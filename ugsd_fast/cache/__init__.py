"""Key/value caches: one of our own that grows in place, and rollback of any that transformers has."""

from ugsd_fast.cache.growing import GrowingCache
from ugsd_fast.cache.rollback import compact, enable_rollback, new_cache, rollback
from ugsd_fast.cache.step_inputs import step_inputs

__all__ = ["GrowingCache", "compact", "enable_rollback", "new_cache", "rollback", "step_inputs"]
