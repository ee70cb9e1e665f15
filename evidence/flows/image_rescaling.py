import statistics

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from netwright.data import cifar10
from netwright.evidence import Curve, Outcome, Scale, evidence
from netwright.generative.flows import InvertibleRescaler, coupling_net

SIDE, BLOCKS, HIDDEN, BATCH, RATE = 24, 2, 24, 8, 3e-3
SIZES = {"1.5 x 1.5": (16, 16), "2 x 2": (12, 12), "2.4 x 2.4": (10, 10), "1.4 x 2.7": (17, 9),
         "3 x 1.6": (8, 15)}
MARGIN, READABLE = 0.5, 30.0  # dB


@evidence(paper="002-011", claim="One network whose downscaling and upscaling are trained together "
          "restores images better than learned upscaling of bicubic ones, at non-integer and "
          "asymmetric scales, without harm to the small image.")
def image_rescaling(scale: Scale) -> Outcome:
    """Train the rescaler and a network that only upscales, alike, on parts of CIFAR-10 images."""
    steps = 120 if scale == "desk" else 20000
    images = _images()
    figures: dict[str, list[float]] = {}
    curves: dict[str, list[list[float]]] = {}
    contenders = ["rescaler", "learned upscaling"]
    if scale == "full":
        contenders.append("rescaler without scale encoding")
    for seed in range(3):
        for name in contenders:
            found, curve = _run(name, seed, steps, images)
            curves.setdefault(name, []).append(curve)
            for what, value in found.items():
                figures.setdefault(f"{what}, {name}", []).append(value)
    mean = {what: statistics.mean(values) for what, values in figures.items()}
    gains = [mean[f"PSNR at {size} (dB), rescaler"]
             - mean[f"PSNR at {size} (dB), learned upscaling"] for size in SIZES]
    readable = mean["PSNR of the small image against bicubic (dB), rescaler"] >= READABLE
    return Outcome(
        verdict="shown" if min(gains) >= MARGIN and readable else
        "partly shown" if statistics.mean(gains) >= MARGIN and readable else "not shown",
        setting={"data": f"CIFAR-10, the middle {SIDE} x {SIDE} pixels, 64 test images",
                 "rescaler": f"{BLOCKS} blocks, {HIDDEN} hidden channels",
                 "learned upscaling": "a residual network of 3x3 convolutions on the bicubic "
                 "enlargement, told scale and position too, of at least as many parameters",
                 "training": f"{steps} batches of {BATCH}, each made smaller by a factor between "
                 f"1.2 and 3 for each axis; Adam at {RATE} falling to nothing"},
        figures=figures, curves={
            name: Curve([steps // 3 * (i + 1) for i in range(3)], runs)
            for name, runs in curves.items()}, axes=("step", "mean PSNR over the scales (dB)"),
        note=f"Shown: PSNR at least {MARGIN} dB above that of learned upscaling at each of the "
             "scales, and the small image at least "
             f"{READABLE:.0f} dB near to the bicubic one; on average over the scales only, partly "
             "shown. Training is a small part of the paper's.")


def _images() -> tuple[Tensor, Tensor]:
    """Return the images for training and for the test."""
    split, start = cifar10(), (32 - SIDE) // 2
    middle = slice(start, start + SIDE)
    return split.x_train[:, :, middle, middle], split.x_test[:64, :, middle, middle]


class _Upscaler(nn.Module):
    """Learned upscaling of a bicubic small image, told what the rescaler is told."""

    def __init__(self, parameters: int) -> None:
        super().__init__()
        width = HIDDEN
        while _count(self._body(width)) < parameters:
            width += 2
        self.body = self._body(width)
        self.teller = InvertibleRescaler(3, 1, hidden=2)

    @staticmethod
    def _body(width: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(7, width, 3, padding=1), nn.ReLU(),
                             nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
                             coupling_net(width, 3, width))

    def forward(self, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        small = _bicubic(x, size)
        large = _bicubic(small, (SIDE, SIDE))
        (told,) = self.teller._told(x, size)
        return small, large + self.body(torch.cat([large, told.expand(len(x), -1, -1, -1)], 1))

    def loss(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return (self(x, size)[1] - x).abs().mean()


def _run(name: str, seed: int, steps: int, data: tuple[Tensor, Tensor]
         ) -> tuple[dict[str, float], list[float]]:
    torch.manual_seed(seed)
    rescaler = InvertibleRescaler(3, BLOCKS, name != "rescaler without scale encoding",
                                  hidden=HIDDEN)
    model = _Upscaler(_count(rescaler)) if name == "learned upscaling" else rescaler
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    images, test = data
    generator = torch.Generator().manual_seed(100 + seed)
    curve = []
    for step in range(1, steps + 1):
        x = images[torch.randint(len(images), (BATCH,), generator=generator)]
        factors = 1.2 + 1.8 * torch.rand(2, generator=generator)
        rows, columns = (SIDE / factors).round().int().tolist()
        optimizer.zero_grad()
        model.loss(x, (rows, columns)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % (steps // 3) == 0:
            found = _measured(model, test)
            curve.append(statistics.mean(found[f"PSNR at {size} (dB)"] for size in SIZES))
    return found, curve


@torch.no_grad()
def _measured(model: nn.Module, x: Tensor) -> dict[str, float]:
    figures, small_psnr = {}, []
    for name, size in SIZES.items():
        small, back = model(x, size)
        small = (255 * small.clamp(0, 1)).round() / 255  # as it would be stored
        if isinstance(model, InvertibleRescaler):
            back = model.up(small, (SIDE, SIDE))
        figures[f"PSNR at {name} (dB)"] = _psnr(back, x)
        small_psnr.append(min(99.0, _psnr(small, _bicubic(x, size))))
    figures["PSNR of the small image against bicubic (dB)"] = statistics.mean(small_psnr)
    return figures


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _bicubic(x: Tensor, size: tuple[int, int]) -> Tensor:
    return interpolate(x, size, mode="bicubic", align_corners=False, antialias=True)


def _psnr(x: Tensor, truth: Tensor) -> float:
    error = (x.clamp(0, 1) - truth).square().flatten(1).mean(1)
    return float(-10 * error.log10().mean())
