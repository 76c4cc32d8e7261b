"""Where to sample the image: transforms from parameters to grids, and warping by a grid."""

from visattn.attention.sampling.spatial_transformer import (
    AffineTransformer,
    IsotropicTransformer,
    ProjectiveTransformer,
    SimilarityTransformer,
    SpatialTransformer,
    ThinPlateTransformer,
)

__all__ = [
    "AffineTransformer",
    "IsotropicTransformer",
    "ProjectiveTransformer",
    "SimilarityTransformer",
    "SpatialTransformer",
    "ThinPlateTransformer",
]
