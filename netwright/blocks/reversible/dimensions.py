from torch import nn

# convolution, batch normalisation and pooling to one number, by the number of an image's axes
LAYERS: dict[int, tuple[type[nn.Module], type[nn.Module], type[nn.Module]]] = {
    1: (nn.Conv1d, nn.BatchNorm1d, nn.AdaptiveAvgPool1d),
    2: (nn.Conv2d, nn.BatchNorm2d, nn.AdaptiveAvgPool2d),
    3: (nn.Conv3d, nn.BatchNorm3d, nn.AdaptiveAvgPool3d),
}


def layers(dims: int) -> tuple[type[nn.Module], type[nn.Module], type[nn.Module]]:
    """Return convolution, batch normalisation and adaptive pooling for `dims` axes."""
    if dims not in LAYERS:
        raise ValueError(f"dims must be 1, 2 or 3, the axes of an image beside its channels, got "
                         f"{dims}")
    return LAYERS[dims]
