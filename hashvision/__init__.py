"""hashvision turns a platform's own photos into vision models: posts in, a tested model out."""

__version__ = "0.1.0"
