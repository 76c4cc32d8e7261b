"""Where a model looks, drawn over what it saw. Needs no display."""

from visattn.drawing.alignment import draw_alignment
from visattn.drawing.bars import bars
from visattn.drawing.film import film
from visattn.drawing.generation import draw_generation, draw_samples, film_generation
from visattn.drawing.grid import grid_of
from visattn.drawing.overlay import overlay, upsample
from visattn.drawing.patterns import draw_patterns
from visattn.drawing.photo import as_photo, denormalise
from visattn.drawing.pictures import draw_maps, overview, picture
from visattn.drawing.reading import Channels, Heat, Warp, drawable, of_image, read_maps
from visattn.drawing.warp import draw_warp, sampled

__all__ = [
    "Channels",
    "Heat",
    "Warp",
    "as_photo",
    "bars",
    "denormalise",
    "draw_alignment",
    "draw_generation",
    "draw_maps",
    "draw_patterns",
    "draw_samples",
    "draw_warp",
    "drawable",
    "film",
    "film_generation",
    "grid_of",
    "of_image",
    "overlay",
    "overview",
    "picture",
    "read_maps",
    "sampled",
    "upsample",
]
