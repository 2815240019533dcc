"""Renders scenes with Pillow.

Corners have integer pixels, so rounding cannot differ between machines.
"""

import math

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from multimodal.scenes.scene import BACKGROUNDS, COLOURS, RGB, SHAPES, Scene

OVERSAMPLING = 4
MAX_SIZE = 2048  # pixels per side
RING_HOLE = 0.5  # of the radius
RIM = 0.16  # of the radius


def _outline(shape: str) -> list[tuple[float, float]]:
    """The corners (x, y) of a shape of radius 1 around the origin."""
    if shape == "square":
        return [(-0.75, -0.75), (0.75, -0.75), (0.75, 0.75), (-0.75, 0.75)]
    if shape == "triangle":
        return [(0, -0.95), (0.95, 0.75), (-0.95, 0.75)]
    if shape == "diamond":
        return [(0, -1), (0.68, 0), (0, 1), (-0.68, 0)]
    if shape == "star":
        turns = [(k * math.pi / 5, 1.0 if k % 2 == 0 else 0.42) for k in range(10)]
        return [(r * math.sin(turn), -r * math.cos(turn)) for turn, r in turns]
    if shape == "cross":
        arm = 0.31
        quarter = [(arm, -0.95), (arm, -arm), (0.95, -arm)]
        corners = list(quarter)
        for _ in range(3):
            quarter = [(-y, x) for x, y in quarter]
            corners += quarter
        return corners
    assert shape == "heart"
    points = []
    for k in range(48):
        t = k * math.pi / 24
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((math.sin(t) ** 3, -(y + 2.5) / 16.5))
    return points


_OUTLINES = {shape: _outline(shape) for shape in SHAPES if shape not in ("circle", "ring")}


def stencil(shape: str, radius: int) -> Image.Image:
    """The shape as a mask.

    Args:
        shape: one of ``SHAPES``.
        radius: of the circle around the shape, in pixels.

    Returns:
        Mode L, 2 * radius + 1 pixels per side, 255 inside the shape and 0 outside.
    """
    side = 2 * radius + 1
    mask = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(mask)
    if shape in _OUTLINES:
        corners = [
            (radius + round(radius * x), radius + round(radius * y)) for x, y in _OUTLINES[shape]
        ]
        draw.polygon(corners, fill=255)
        return mask
    draw.ellipse((0, 0, side - 1, side - 1), fill=255)
    if shape == "ring":
        edge = radius - round(radius * RING_HOLE)
        draw.ellipse((edge, edge, side - 1 - edge, side - 1 - edge), fill=0)
    return mask


def _second_colour(rgb: RGB) -> RGB:
    """The colour of stripes and dots: near white on a dark colour, near black on a light one."""
    red, green, blue = rgb
    dark = 0.3 * red + 0.59 * green + 0.11 * blue < 130
    target, share = (255, 0.85) if dark else (0, 0.75)
    return (
        round(red + share * (target - red)),
        round(green + share * (target - green)),
        round(blue + share * (target - blue)),
    )


def _fill(texture: str, rgb: RGB, side: int, unit: int) -> Image.Image:
    """The surface of an object: RGB, side x side. ``unit``: pixels of one scene unit."""
    fill = Image.new("RGB", (side, side), rgb)
    draw, second, middle = ImageDraw.Draw(fill), _second_colour(rgb), side // 2
    if texture == "striped":
        period = max(4, round(unit * 0.07))
        # The stripe through the centre has the object's colour.
        for top in range((middle + period // 4) % period - period, side, period):
            draw.rectangle((0, top, side, top + round(period * 0.45) - 1), fill=second)
        return fill
    period, dot = max(4, round(unit * 0.078)), max(1, round(unit * 0.02))
    for row, y in enumerate(range(middle % period - 2 * period, side + period, period)):
        shift = (row + middle // period) % 2 * (period // 2)
        for x in range(middle % period - 2 * period + shift, side + period, period):
            draw.ellipse((x - dot, y - dot, x + dot, y + dot), fill=second)
    return fill


def render(scene: Scene, size: int = 64) -> Image.Image:
    """Render a scene. Edges are smoothed by rendering four times larger.

    Args:
        scene: what to render.
        size: pixels per side, 8 to MAX_SIZE.

    Returns:
        RGB, size x size.

    Raises:
        ValueError: for another size.
    """
    if not 8 <= size <= MAX_SIZE:
        raise ValueError(f"size is {size} pixels, expected 8 to {MAX_SIZE:,}")
    unit = size * OVERSAMPLING
    high, low = (np.array(rgb, np.float64) for rgb in BACKGROUNDS[scene.background])
    # One colour per output row: the gradient looks smooth, and few colours compress well.
    share = np.repeat(np.linspace(0, 1, size), OVERSAMPLING)[:, None, None]
    rows = np.rint(high + share * (low - high)).astype(np.uint8)
    canvas = Image.fromarray(np.repeat(rows, unit, axis=1))
    for item in scene.objects:
        radius = max(1, round(item.radius * unit))
        mask = stencil(item.shape, radius)
        rgb = item.rgb or COLOURS[item.colour]
        left, top = round(item.x * unit) - radius, round(item.y * unit) - radius
        canvas.paste(rgb, (left, top, left + mask.width, top + mask.height), mask)
        if item.texture != "solid":
            # A rim of the plain colour keeps the outline visible on a background like the stripes.
            rim = round(radius * RIM)
            inner = Image.new("L", mask.size, 0)
            inner.paste(stencil(item.shape, radius - rim), (rim, rim))
            texture = _fill(item.texture, rgb, mask.width, unit)
            canvas.paste(texture, (left, top), ImageChops.darker(inner, mask))
    return canvas.reduce(OVERSAMPLING)
