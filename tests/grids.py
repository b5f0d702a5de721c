"""Sizes of upsampling that several tests share."""

# A whole factor, a fraction, each axis alone, one source pixel, and a scale that float32 cannot hold (3/7).
UPSAMPLINGS = [
    ((2, 3), (16, 24)),
    ((3, 5), (7, 8)),
    ((4, 3), (4, 9)),
    ((2, 9), (6, 9)),
    ((1, 1), (5, 4)),
    ((3, 3), (7, 7)),
]
