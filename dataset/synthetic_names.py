"""Names of the synthetic set and its classes, by which it is known wherever it was copied to."""

from __future__ import annotations

from dataset.format import LabelNames

NAME = "synthetic"
SHAPES = ("circle", "square", "triangle", "cross", "ring")
TEXTURES = ("plain", "striped", "dotted", "checkered")
# Red, green, blue. Hue jitter makes neighbours (red and yellow, blue and purple) nearly touch.
COLOURS = {
    "red": (210, 50, 40),
    "yellow": (210, 180, 40),
    "green": (50, 170, 60),
    "blue": (40, 90, 210),
    "purple": (150, 60, 190),
}

# Fine labels in alphabetical order, as CIFAR-100's, so that they are not grouped by superclass.
CLASSES = sorted(
    (f"{texture}_{colour}_{shape}", shape, colour, texture)
    for shape in SHAPES
    for colour in COLOURS
    for texture in TEXTURES
)
PLURALS = {shape: f"{shape}s" for shape in SHAPES} | {"cross": "crosses"}
COARSE = sorted(f"{texture}_{PLURALS[shape]}" for shape in SHAPES for texture in TEXTURES)
LABEL_NAMES = LabelNames(tuple(name for name, *_ in CLASSES), tuple(COARSE))
