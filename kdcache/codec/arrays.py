"""Arrays: the types that compiled loops speak of."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]
Ids = NDArray[np.int32]
Keys = NDArray[np.int32] | NDArray[np.int64]
Values = NDArray[np.uint8] | NDArray[np.uint16]

FAR = 255
"""A distance in one byte that stands for itself or more."""
