"""Silero's detector of speech for 16 kHz audio: a fixed Fourier transform, convolutions, an LSTM.

Architecture and weights are those of github.com/snakers4/silero-vad.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.models.weights import loaded

NEW, CONTEXT = 512, 64  # samples of a frame, and samples before it
WIDTH = 128  # of the state


class SileroVad(nn.Module):
    """Tells the probability of speech in a frame from its samples and the state of the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 2 * 129, 256, stride=128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.lstm_cell = nn.LSTMCell(128, WIDTH)
        self.final_conv = nn.Conv1d(WIDTH, 1, 1)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map samples (N, 576) in -1..1 and the state, both parts (N, 128).

        Returns:
            The probability (N, 1), and both parts of the next state.
        """
        x = functional.pad(x, (0, CONTEXT), mode="reflect")  # (N, 640)
        real, imaginary = self.stft_conv(x[:, None]).chunk(2, 1)
        x = (real.square() + imaginary.square()).sqrt()  # (N, 129, 4)
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = functional.relu(conv(x))  # at last (N, 128, 1)
        h, c = self.lstm_cell(x.squeeze(2), (h, c))
        y = self.final_conv(functional.relu(h)[..., None])  # (N, 1, 1)
        return y.squeeze(2).sigmoid(), h, c


def pretrained(root: str | None = None) -> SileroVad:
    """Return the detector for 16 kHz."""
    return loaded(SileroVad(), "silero_vad_16k", root)


def frames(samples: Tensor) -> Tensor:
    """Return what the network takes in turn, from samples (T,): (T // 512, 576).

    Each row begins with the last 64 samples of the row before, the first with silence.
    """
    return functional.pad(samples, (CONTEXT, 0)).unfold(0, CONTEXT + NEW, NEW)


@torch.no_grad()
def speech(model: nn.Module, samples: Tensor) -> Tensor:
    """Return the probability of speech in each frame of samples (T,) in -1..1: (T // 512,)."""
    h = c = torch.zeros(1, WIDTH)
    found = []
    for x in frames(samples):
        y, h, c = model(x[None], h, c)
        found.append(y[0, 0])
    return torch.stack(found)
