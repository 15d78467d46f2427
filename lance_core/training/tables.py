"""pyarrow, where it is installed."""

from __future__ import annotations

from typing import Any

from ..errors import RequestError

EXTRA = "pip install 'comfyui-lance[training]'"


def parquet() -> Any:
    """pyarrow's parquet module.

    Raises:
        RequestError: it is missing.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise RequestError(f"parquet files need pyarrow ({error}): {EXTRA}") from None
    return pyarrow.parquet
