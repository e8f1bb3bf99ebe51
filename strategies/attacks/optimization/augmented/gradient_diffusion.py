"""A diffusion model of gradients: what noise did to them is taken back step by step.

Denoising diffusion (Ho, Jain and Abbeel, NeurIPS 2020) with T = 1,000 steps and rates beta from
1e-4 to 0.02.  With ``a_t = prod (1 - beta)`` the forward chain is

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e,   e ~ N(0, 1),

which is a gradient x_0 under noise of ``sqrt(1 / a_t - 1)``, times ``sqrt(a_t)``.  The network
tells ``v = sqrt(a_t) e - sqrt(1 - a_t) x_0`` (Salimans and Ho, ICLR 2022); from it follow
``x_0 = sqrt(a_t) x_t - sqrt(1 - a_t) v`` and ``e = sqrt(1 - a_t) x_t + sqrt(a_t) v``.
"""

from collections import deque
from collections.abc import Callable, Iterable
from math import log

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, mse_loss, silu

STEPS = 1000
BETAS = torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64)
#: a_t of t = 1 ... T, ``[T]``.
KEPT = torch.cumprod(1 - BETAS, dim=0)
GROUPS = 4  # of a GroupNorm


def matching_step(noise: float) -> int:
    """Return the first t, 1 to T, at which the chain has as much noise on data of variance 1."""
    reached = torch.le(KEPT, 1 / (1 + noise**2)).nonzero()
    return int(reached[0, 0]) + 1 if len(reached) else STEPS


class Block(nn.Module):
    """Two 3 x 3 convolutions around the step's scale and shift, beside a shortcut."""

    def __init__(self, before: int, after: int, told: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, padding=1)
        self.second = nn.Conv2d(after, after, 3, padding=1)
        self.norm, self.again = nn.GroupNorm(GROUPS, after), nn.GroupNorm(GROUPS, after)
        self.step = nn.Linear(told, 2 * after)
        self.shortcut = nn.Conv2d(before, after, 1)

    def forward(self, maps: Tensor, told: Tensor) -> Tensor:
        """Map ``[n, before, h, w]`` and what tells the step ``[n, told]``."""
        scale, shift = self.step(told).unsqueeze(2).unsqueeze(3).chunk(2, dim=1)
        inner = silu(self.norm(self.first(maps)) * (1 + scale) + shift)
        out: Tensor = silu(self.again(self.second(inner))) + self.shortcut(maps)
        return out


class UNet(nn.Module):
    """Tells v of a square of numbers, at two resolutions.

    It learns what :func:`normal_v` leaves: a convolution does not know at which place it is.

    Parameters
    ----------
    places : Tensor
        ``[2, S, S]``, S a multiple of 4: mean and standard deviation of clean data at each place.
    width : int
        Channels at the higher resolution; a multiple of 4.
    """

    def __init__(self, places: Tensor, width: int) -> None:
        super().__init__()
        told = 4 * width
        self.register_buffer("places", places)
        self.time = nn.Sequential(nn.Linear(width, told), nn.SiLU(), nn.Linear(told, told))
        self.fold, self.unfold = nn.PixelUnshuffle(2), nn.PixelShuffle(2)
        self.enter = nn.Conv2d(12, width, 3, padding=1)
        self.down = Block(width, width, told)
        self.smaller = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.middle = nn.ModuleList([Block(2 * width, 2 * width, told) for _ in range(2)])
        self.up = Block(3 * width, width, told)
        self.leave = nn.Conv2d(width, 4, 3, padding=1)
        self.width = width

    def forward(self, squares: Tensor, steps: Tensor) -> Tensor:
        """Map ``[n, S, S]`` and steps ``[n]`` int64 from 1 to ``[n, S, S]``."""
        told = self.time(sinusoids(steps, self.width))
        places = self.get_buffer("places").expand(len(squares), -1, -1, -1)
        maps = self.enter(self.fold(torch.cat([squares.unsqueeze(1), places], dim=1)))
        maps = self.down(maps, told)
        low = self.smaller(maps)
        for block in self.middle:
            low = block(low, told)
        both = torch.cat([maps, interpolate(low, scale_factor=2.0)], dim=1)
        out: Tensor = self.unfold(self.leave(self.up(both, told))).squeeze(1)
        return out + normal_v(squares, steps, *self.get_buffer("places"))


def normal_v(noised: Tensor, steps: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return the expected v ``[n, S, S]`` if clean data were independent normal at each place."""
    kept = KEPT.to(steps.device)[steps - 1].to(noised.dtype).view(-1, 1, 1)
    trust = std.square() / (std.square() + 1 / kept - 1)
    clean = mean + trust * (noised / kept.sqrt() - mean)
    noise = (noised - kept.sqrt() * clean) / (1 - kept).sqrt()
    return kept.sqrt() * noise - (1 - kept).sqrt() * clean


def sinusoids(steps: Tensor, width: int) -> Tensor:
    """Return ``[n, width]``: sines and cosines of the steps, of wavelengths up to 10,000."""
    rates = torch.exp(-log(1e4) * torch.arange(width // 2, device=steps.device) / (width // 2))
    angles = steps.unsqueeze(1) * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class GradientDiffusion:
    """A diffusion model of gradients of one set of weights and one batch size.

    Parameters
    ----------
    examples : Tensor
        ``[N, P]`` on the CPU: clean gradients of single examples.
    size : int
        Examples in a batch, whose gradient is the mean of theirs.
    width : int
        Channels of the network.
    generator : torch.Generator
    device : torch.device
    """

    def __init__(
        self,
        examples: Tensor,
        *,
        size: int,
        width: int,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        self.examples, self.size, self.generator = examples, size, generator
        self.device = device
        self.side = -(-int(-(-(examples.shape[1] ** 0.5) // 1)) // 4) * 4
        self.scale = 1.0
        self.trained = 0  # steps
        some = self.clean(len(examples))
        #: The root mean square of clean gradients, which are divided by it.
        self.scale = float(some.square().mean().sqrt())
        places = self.squares(torch.stack([some.mean(dim=0), some.std(dim=0)]) / self.scale)
        self.network = UNet(places, width).to(device)
        for module in self.network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                reach = module.weight[0].numel() ** -0.5  # PyTorch's own initialization
                for parameter in module.parameters():
                    drawn = torch.empty(parameter.shape).uniform_(
                        -reach, reach, generator=generator
                    )
                    parameter.data.copy_(drawn)
        for parameter in self.network.leave.parameters():  # begin at normal_v
            nn.init.zeros_(parameter)

    def clean(self, count: int) -> Tensor:
        """Return gradients ``[n, P]`` of random batches, divided by the scale."""
        chosen = torch.randint(len(self.examples), (count, self.size), generator=self.generator)
        total = torch.zeros(count, self.examples.shape[1])
        for column in chosen.T:
            total += self.examples[column]
        return total / (self.size * self.scale)

    def squares(self, gradients: Tensor) -> Tensor:
        """Return ``[n, S, S]`` of ``[n, P]``: padded with zeros."""
        padded = gradients.new_zeros(len(gradients), self.side**2)
        padded[:, : gradients.shape[1]] = gradients
        return padded.view(-1, self.side, self.side)

    def train(
        self,
        steps: int,
        *,
        batch: int,
        lr: float,
        upto: int,
        counted: Callable[[int], Iterable[int]] = range,
    ) -> float:
        """Train on t from 1 to ``upto``; return the mean squared error in v, of the last tenth.

        ``counted`` yields the steps, given their number: all, or the first one and some more.
        """
        optimizer = torch.optim.Adam(self.network.parameters(), lr=lr)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        errors: deque[Tensor] = deque(maxlen=steps // 10 + 1)
        for _ in counted(steps):
            begun = self.squares(self.clean(batch))
            noise = torch.randn(begun.shape, generator=self.generator)
            times = torch.randint(1, upto + 1, (batch,), generator=self.generator)
            kept = KEPT[times - 1].float().view(-1, 1, 1)
            noised = kept.sqrt() * begun + (1 - kept).sqrt() * noise
            wanted = kept.sqrt() * noise - (1 - kept).sqrt() * begun
            told = self.network(noised.to(self.device), times.to(self.device))
            loss = mse_loss(told, wanted.to(self.device))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            decay.step()
            errors.append(loss.detach())
            self.trained += 1
        self.network.eval()
        return float(torch.stack(list(errors)).mean())

    @torch.no_grad()
    def told(self, noised: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Return the clean square and the noise that the network sees in ``[n, S, S]`` at t."""
        kept = float(KEPT[step - 1])
        v: Tensor = self.network(noised, torch.full((len(noised),), step, device=self.device))
        clean = kept**0.5 * noised - (1 - kept) ** 0.5 * v
        return clean, (1 - kept) ** 0.5 * noised + kept**0.5 * v

    def reverse(self, noised: Tensor, step: int) -> Tensor:
        """Return one step back, ``[n, S, S]`` at t - 1: its mean, and noise unless it is 0."""
        beta, kept = float(BETAS[step - 1]), float(KEPT[step - 1])
        noise = self.told(noised, step)[1]
        mean: Tensor = (noised - beta / (1 - kept) ** 0.5 * noise) / (1 - beta) ** 0.5
        if step == 1:
            return mean
        fresh = torch.randn(noised.shape, generator=self.generator).to(noised)
        spread = beta * (1 - float(KEPT[step - 2])) / (1 - kept)
        back: Tensor = mean + spread**0.5 * fresh
        return back
