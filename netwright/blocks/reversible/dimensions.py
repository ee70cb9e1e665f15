from torch import nn

from netwright import checks

# convolution, batch normalisation and pooling to one number, by the number of an image's axes
LAYERS: dict[int, tuple[type[nn.Module], type[nn.Module], type[nn.Module]]] = {
    1: (nn.Conv1d, nn.BatchNorm1d, nn.AdaptiveAvgPool1d),
    2: (nn.Conv2d, nn.BatchNorm2d, nn.AdaptiveAvgPool2d),
    3: (nn.Conv3d, nn.BatchNorm3d, nn.AdaptiveAvgPool3d),
}


def layers(dims: int) -> tuple[type[nn.Module], type[nn.Module], type[nn.Module]]:
    """Return convolution, batch normalisation and adaptive pooling for `dims` axes."""
    checks.between(1, 3, whole=True, dims=dims,
                   advice="they are the axes of an image beside its channels")
    return LAYERS[dims]
