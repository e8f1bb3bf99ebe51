"""An auto-encoder whose encoder is a network's own convolutions, trained on surrogate data.

The decoder mirrors the encoder: a transposed convolution for every convolution, ReLU between them,
a sigmoid at the end.  The loss is the mean squared error (Shi et al., NDSS 2025).
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from fedsim.data import Split

# The authors train 350 epochs at a constant rate of 1e-3 with batches of 50.  One cycle to four
# times that rate and back (Smith and Topin 2019), with half the batch, gets there in a tenth.
RATE, BATCH, WEIGHT_DECAY = 4e-3, 25, 1e-5
# How many images are encoded or decoded at once where nothing is learned.
AT_ONCE = 512

Told = Callable[[int, int, str], None]


def encoder_of(layers: Iterable[nn.Module]) -> nn.Sequential:
    """Return convolutions and their ReLU as one module; it shares their parameters.

    Raises
    ------
    ValueError
        If there is another layer among them, for which the decoder has no mirror image.
    """
    kept: list[nn.Module] = []
    for layer in layers:
        if isinstance(layer, nn.Conv2d | nn.ReLU):
            kept.append(layer)
        elif not isinstance(layer, nn.Flatten):
            raise ValueError(
                f"the decoder cannot mirror {type(layer).__name__}; use a model with nothing but "
                "convolutions and ReLU before its linear layers, such as cnn"
            )
    if not any(isinstance(layer, nn.Conv2d) for layer in kept):
        raise ValueError("there is no convolution that could encode images; use cnn")
    return nn.Sequential(*kept)


def mirrored(
    encoder: nn.Sequential, shape: tuple[int, int, int], generator: torch.Generator
) -> nn.Sequential:
    """Return an untrained decoder, from the encoder's maps back to images of ``shape``."""
    maps = torch.zeros(1, *shape)
    layers: list[nn.Module] = []
    for layer in encoder.float():
        before, maps = maps, layer(maps)
        if isinstance(layer, nn.Conv2d):
            transposed = nn.ConvTranspose2d(
                layer.out_channels,
                layer.in_channels,
                layer.kernel_size,  # type: ignore[arg-type]
                layer.stride,  # type: ignore[arg-type]
                layer.padding,  # type: ignore[arg-type]
            )
            missing = [
                wanted - found
                for wanted, found in zip(before.shape[2:], transposed(maps).shape[2:], strict=True)
            ]
            transposed.output_padding = (missing[0], missing[1])
            reach = transposed.weight[0].numel() ** -0.5  # PyTorch's own initialization
            for parameter in transposed.parameters():
                nn.init.uniform_(parameter, -reach, reach, generator=generator)
            layers = [transposed, nn.ReLU(), *layers]
    layers[-1] = nn.Sigmoid()
    return nn.Sequential(*layers)


def train(
    encoder: nn.Module,
    decoder: nn.Module,
    split: Split,
    *,
    epochs: int,
    generator: torch.Generator,
    device: torch.device,
    tell: Told,
) -> None:
    """Train both in place; a frozen encoder (``requires_grad`` False) stays, and its maps too."""
    learning = [p for net in (encoder, decoder) for p in net.parameters() if p.requires_grad]
    frozen = not any(p.requires_grad for p in encoder.parameters())
    maps = encoded(encoder, split, device) if frozen else None
    optimizer = torch.optim.Adam(learning, lr=RATE, weight_decay=WEIGHT_DECAY)
    batch = min(BATCH, len(split))
    steps = len(split) // batch
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=epochs * steps)
    for epoch in range(epochs):
        order = torch.randperm(len(split), generator=generator)
        error = 0.0
        for chosen in torch.split(order[: steps * batch], batch):
            images = split.batch(chosen)[0].to(device)
            shown = maps[chosen].to(device) if maps is not None else encoder(images)
            loss = mse_loss(decoder(shown), images)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            cycle.step()
            error += float(loss.detach()) / steps
        tell(epoch + 1, epochs, f"auto-encoder: mean squared error {error:.4f}")


def encoded(encoder: nn.Module, split: Split, device: torch.device) -> Tensor:
    """Return the maps of every example, ``[N, F, h, w]`` float32 on the CPU."""
    parts = torch.split(torch.arange(len(split)), AT_ONCE)
    with torch.no_grad():
        return torch.cat([encoder(split.batch(part)[0].to(device)).cpu() for part in parts])


def decoded(decoder: nn.Module, maps: Tensor, device: torch.device) -> Tensor:
    """Return images ``[N, C, H, W]`` in ``[0, 1]`` of maps ``[N, F, h, w]``, on the CPU."""
    with torch.no_grad():
        return torch.cat([decoder(part.to(device)).cpu() for part in torch.split(maps, AT_ONCE)])


def maps_of(encoder: nn.Sequential, shape: tuple[int, int, int]) -> torch.Size:
    """Return the shape ``[F, h, w]`` of the maps of an image of ``shape``."""
    own = next(encoder.parameters())
    with torch.no_grad():
        one: Tensor = encoder(torch.zeros(1, *shape, dtype=own.dtype, device=own.device))
    return one.shape[1:]
