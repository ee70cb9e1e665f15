"""Functions of coordinates, curves and time series."""

__all__: list[str] = []
