"""Where to sample the image: transforms from parameters to grids, and warping by a grid."""

__all__: list[str] = []
