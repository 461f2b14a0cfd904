"""Nobody has to tell two colours apart: marks are shapes that stand out from any cell, in every kind of colour vision; lines differ in dashes, too."""
import re

import pytest
import torch

from neural_plasticity.charts import line_chart
from neural_plasticity.controls import FRAME, HEADS_STYLE, shades
from neural_plasticity.drawing import BLUE, CARD, GREEN, MUTED, ORANGE
from neural_plasticity.panels import MARKS, recovery_html

# Machado, Oliveira & Fernandes 2009, "A physiologically-based model for simulation of color vision deficiency", severity 1.0: linear RGB → linear RGB
VISIONS = {
    "everybody": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    "without colour": [[0.2126, 0.7152, 0.0722]] * 3,  # luminance alone
}
vision = pytest.mark.parametrize("vision", VISIONS)


def linear(color: str) -> torch.Tensor:
    "sRGB in hexadecimal → linear RGB [3] in [0, 1] (IEC 61966-2-1)."
    digits = color.removeprefix("#")
    digits = "".join(digit * 2 for digit in digits) if len(digits) == 3 else digits
    values = torch.tensor([int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)], dtype=torch.float64)
    return torch.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def seen(color: str, vision: str) -> torch.Tensor:
    return (torch.tensor(VISIONS[vision], dtype=torch.float64) @ linear(color)).clamp(0, 1)


def luminance(color: str, vision: str) -> float:
    return float(torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64) @ seen(color, vision))


def contrast(one: str, other: str, vision: str) -> float:
    "WCAG 2.2: 1 (none) to 21; 3 is asked for of marks, 4.5 of text."
    low, high = sorted((luminance(one, vision), luminance(other, vision)))
    return (high + 0.05) / (low + 0.05)


def lab(color: str, vision: str) -> torch.Tensor:
    "CIE 1976 L*a*b* (D65)."
    xyz = torch.tensor([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]], dtype=torch.float64) @ seen(color, vision)
    ratio = xyz / torch.tensor([0.95047, 1.0, 1.08883], dtype=torch.float64)
    x, y, z = torch.where(ratio > (6 / 29) ** 3, ratio ** (1 / 3), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_the_measures_are_the_known_ones():
    assert contrast("#000", "#ffffff", "everybody") == pytest.approx(21)
    assert contrast("#767676", "#fff", "everybody") == pytest.approx(4.54, abs=0.01)  # the well-known lightest grey for text on white
    assert lab("#ff0000", "everybody").tolist() == pytest.approx([53.24, 80.09, 67.20], abs=0.05)
    red, green = (lab(color, "protanopia") for color in ("#b25000", "#667a00"))  # told apart by others, hardly in protanopia
    assert (red - green).norm() < 0.3 * (lab("#b25000", "everybody") - lab("#667a00", "everybody")).norm()


@vision
def test_the_map_goes_from_dark_to_light_in_every_colour_vision(vision):
    "Viridis: each shade is lighter than the one before, by as much as can be seen side by side."
    lightness = [float(lab(color, vision)[0]) for color in shades()]
    steps = [after - before for before, after in zip(lightness, lightness[1:])]
    assert len(lightness) == 16 and min(steps) > 2, steps  # 1 in L* is about what can just be told apart
    assert lightness[-1] - lightness[0] > 60


@vision
@pytest.mark.parametrize("page", ("#ffffff", "#111111"))
def test_marks_and_the_frame_stand_out_from_every_cell(vision, page):
    "Both are drawn in white and in black; one of the two is readable on anything."
    assert "color: #fff" in HEADS_STYLE and "2px #000" in HEADS_STYLE  # letters with their halo
    assert "outline: 2px solid #fff" in HEADS_STYLE and "4px #000" in HEADS_STYLE
    for cell in (*shades(), FRAME, page):
        assert max(contrast("#fff", cell, vision), contrast("#000", cell, vision)) > 4.5, cell
    assert contrast("#fff", "#000", vision) > 20


def test_marks_are_shapes():
    assert len(set(MARKS.values())) == len(MARKS) and all(len(mark) <= 1 for mark in MARKS.values())


@vision
def test_lines_can_be_read_and_told_apart(vision):
    colors = [BLUE, MUTED, GREEN, ORANGE]  # of the lines, in their order
    for color in colors:
        assert contrast(color, CARD, vision) > 3, color
    curve = recovery_html({"step": [0, 5], "train_loss": [float("nan"), 3.3], "perplexity": [30.0, 29.0]}, 10, 25.0)
    lines = re.findall(r'stroke="(var[^"]+)" stroke-width="2.5" stroke-dasharray="([^"]+)"', curve)
    pairs = [lines[place : place + 2] for place in range(0, len(lines), 2)]  # a line, and its stroke in the legend
    assert len(pairs) == 3 + 1 and all(drawn == named for drawn, named in pairs)
    assert len({dash for (_, dash), _ in pairs[:3]}) == 3  # where two colours look alike, their dashes do not
    most = re.findall(r'stroke-dasharray="([^"]+)"', line_chart({name: [(0, 1), (1, 2)] for name in "abcd"}, "x", "y"))
    assert len(set(most)) == 4 and len(most) == 8
