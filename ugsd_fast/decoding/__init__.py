"""The decoding loop and what it leaves behind."""

from ugsd_fast.decoding.config import UGSDConfig
from ugsd_fast.decoding.decoder import Decoder
from ugsd_fast.decoding.trace import BlockRecord, Metrics, Result, StreamEvent, TokenRecord, Trace

__all__ = ["BlockRecord", "Decoder", "Metrics", "Result", "StreamEvent", "TokenRecord", "Trace", "UGSDConfig"]
