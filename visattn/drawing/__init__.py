"""Where a model looks, drawn over what it saw. Needs no display."""

from visattn.drawing.bars import bars
from visattn.drawing.grid import grid_of
from visattn.drawing.overlay import overlay, upsample
from visattn.drawing.patterns import draw_patterns
from visattn.drawing.photo import as_photo, denormalise
from visattn.drawing.pictures import draw_maps, overview, picture
from visattn.drawing.reading import Channels, Heat, drawable, of_image, read_maps

__all__ = [
    "Channels",
    "Heat",
    "as_photo",
    "bars",
    "denormalise",
    "draw_maps",
    "draw_patterns",
    "drawable",
    "grid_of",
    "of_image",
    "overlay",
    "overview",
    "picture",
    "read_maps",
    "upsample",
]
