"""int8 with a scale a row: how features and embeddings travel."""

from __future__ import annotations

import numpy as np

from ugsd_fast.serving.protocol import BadFrame, Quantized

_LARGEST = 1e6


def quantize(matrix: np.ndarray) -> Quantized:
    """Round a finite float matrix [R, C] to 255 levels a row; trailing columns of one value are left out.

    Examples
    --------
    >>> packed = quantize(np.array([[1.0, -0.5, 0.25], [0.0, 0.0, 0.0]]))
    >>> dequantize(packed, (2, 3)).round(2).tolist()
    [[1.0, -0.5, 0.25], [0.0, 0.0, 0.0]]
    """
    matrix = np.ascontiguousarray(matrix, dtype=np.float32)
    rows, width = matrix.shape
    fill = float(matrix[-1, -1])
    varied = np.flatnonzero((matrix != fill).any(0))
    columns = int(varied[-1]) + 1 if len(varied) else 1
    kept = matrix[:, :columns]
    scales = (np.abs(kept).max(1) / 127).astype("<f4")
    data = np.rint(kept / np.where(scales > 0, scales, 1)[:, None]).astype(np.int8)
    return Quantized(rows, columns, scales.tobytes(), data.tobytes(), width, fill)


def dequantize(packed: Quantized, shape: tuple[int, int]) -> np.ndarray:
    """The float32 matrix of `packed`, which has to be of `shape`: nothing is allocated for any other.

    Raises
    ------
    BadFrame
        If sizes do not fit or a number is not finite.
    """
    rows, columns, width = packed.rows, packed.columns, packed.width or packed.columns
    if (rows, width) != shape or not 0 < columns <= width:
        raise BadFrame(f"matrix: {rows} rows, {columns} of {width} columns, expected {shape[0]} rows of {shape[1]}")
    if len(packed.scales) != 4 * rows or len(packed.data) != rows * columns:
        raise BadFrame(
            f"matrix: {len(packed.scales)} bytes of scales and {len(packed.data)} of data, expected {4 * rows} and "
            f"{rows * columns} ({rows} rows of {columns} columns)"
        )
    scales = np.frombuffer(packed.scales, "<f4")
    if not (np.abs(scales) < _LARGEST).all() or not abs(packed.fill) < _LARGEST:  # NaN is not smaller either
        raise BadFrame(f"matrix: a scale or the fill is not below {_LARGEST:g}")
    matrix = np.full((rows, width), packed.fill, dtype=np.float32)
    np.multiply(np.frombuffer(packed.data, np.int8).reshape(rows, columns), scales[:, None], out=matrix[:, :columns])
    return matrix
