"""Where a model looks, drawn over what it saw. Needs no display."""

from visattn.drawing.alignment import draw_alignment
from visattn.drawing.bars import bars
from visattn.drawing.film import film
from visattn.drawing.fixations import Fixations, draw_fixations
from visattn.drawing.generation import draw_generation, draw_samples, film_generation
from visattn.drawing.grid import grid_of
from visattn.drawing.overlay import overlay, upsample
from visattn.drawing.path import (
    Scanpath,
    draw_glimpse,
    draw_path,
    film_path,
    follow,
    read_paths,
    reconstructed,
)
from visattn.drawing.patterns import draw_patterns
from visattn.drawing.photo import as_photo, denormalise
from visattn.drawing.pictures import draw_maps, overview, picture
from visattn.drawing.reading import Channels, Heat, Warp, drawable, of_image, read_maps
from visattn.drawing.warp import draw_warp, sampled

__all__ = [
    "Channels",
    "Fixations",
    "Heat",
    "Scanpath",
    "Warp",
    "as_photo",
    "bars",
    "denormalise",
    "draw_alignment",
    "draw_fixations",
    "draw_generation",
    "draw_glimpse",
    "draw_maps",
    "draw_path",
    "draw_patterns",
    "draw_samples",
    "draw_warp",
    "drawable",
    "film",
    "film_generation",
    "film_path",
    "follow",
    "grid_of",
    "of_image",
    "overlay",
    "overview",
    "picture",
    "read_maps",
    "read_paths",
    "reconstructed",
    "sampled",
    "upsample",
]
